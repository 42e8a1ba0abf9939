"""`swarm doctor`: why a start did, or did not, use the swarm.

`examine` looks around as a node with the same settings would, and gathers facts; `checks` are pure functions that turn
facts into findings, each with what to do; `show` prints them.
"""
