"""Links to other nodes: which links to open, keep and close.

`connections` is the pure connection manager, `selection` its choice among candidates. `connections_driver` dials and
owns the peers; `peer` is an open link; `manifest_requests` gets manifests; `host` has the interfaces of the node to
its parts.
"""
