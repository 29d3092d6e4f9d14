"""Programs of the peers: one per peer and benchmark, run by the interpreter that has the peer installed.

Each has `setup(job)`, which returns the repetition that `runner.measure` times, and facts about it. None imports
Gemmule, and none is imported.
"""
