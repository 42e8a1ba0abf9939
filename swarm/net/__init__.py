"""The network of a node: a listening port, links over WebSocket, datagrams, discovery.

`environment` joins them behind an interface, which the simulation implements too.
"""
