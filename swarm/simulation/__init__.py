"""The simulation behind `swarm simulate`: a burst of newcomers as pure machines under a virtual clock.

`crowd` runs it. `setup` holds its parameters, `wire` the links, `report` the result, `plot` a picture of it. A run is a
function of its parameters: the same rng seed gives the same trace, to the last digit.
"""
