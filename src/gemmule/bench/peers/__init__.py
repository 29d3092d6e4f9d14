"""What is compared: one small program a peer and kind of work, run by the interpreter that has the peer.

Each has `make(job)`, which returns what `stage.perform` times and facts about it; see `stage.py`. No program here
imports Gemmule, and Gemmule imports none of them.
"""
