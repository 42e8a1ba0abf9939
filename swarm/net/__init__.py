"""The network as a node sees it: one listening port, links over WebSocket, datagrams, discovery.

`environment` joins them behind one interface, which the simulation replaces.
"""
