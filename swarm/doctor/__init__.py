"""`swarm doctor`: diagnoses why an engine did, or did not, load from peers.

`examine` collects facts as a node with the same settings; `checks` turns facts into findings, each with a remedy;
`show` prints them.
"""
