"""The simulation: real nodes, machines, landings and hashes under a virtual clock; only their world is made up.

`clock` owns time, `network` hosts and wires, `content` what is distributed, `cluster` puts nodes on them and reports,
`scenarios` are things that go wrong. A run is a function of its parameters: the same seed gives the same trace, to the
last digit.

`crowd` plays a burst as machines and messages alone, so that a thousand newcomers fit: `setup` is what it depends on,
`wire` its links, `report` what happened, `plot` a picture of that.
"""
