"""A recipe chosen for a text, a machine and a time budget: `gemmule grow`."""
