"""Links to other nodes: which ones to open, keep and close.

`connections` is the pure connection manager and `selection` its choice among candidates. `connections_driver` dials and
greets; `peer` is one open link; `manifest_requests` asks peers for manifests.
"""
