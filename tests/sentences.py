"""Enough text to train a tiny vocabulary on."""

SENTENCES = [
    f"{opening}, {who} {did} {what}. \u201cThank you!\u201d said {other}.\nThe end."
    for opening in ("Once upon a time", "One sunny day", "Long ago")
    for who in ("Mia", "a little fox", "the old miller", "Tom")
    for did in ("found", "lost", "gave away")
    for what in ("a red kite", "three golden eggs", "the silver key")
    for other in ("the owl", "Ana")
]
