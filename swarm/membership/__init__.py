"""The members of the swarm: SWIM with Lifeguard's extensions (docs/gossip.md).

`swim` is the pure machine on `member_table` and `probes`; `config` holds its times and counts. `swim_driver` gives it a
clock and a datagram socket.
"""
