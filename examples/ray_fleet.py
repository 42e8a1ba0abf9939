"""Actors on all nodes of a Ray cluster use one model; about one copy of it is read from the hub.

pip install 'swarm-weights[ray]'
swarm keygen /etc/swarm/swarm.key        # and a copy at the same path on every machine
SWARM_KEY_FILE=/etc/swarm/swarm.key python examples/ray_fleet.py org/model
"""

from __future__ import annotations

import sys

import ray

from swarm.engines import ray as swarm_ray


class Replica:
    """In place of an engine: reads the model on its node."""

    def load(self, model_id: str) -> str:
        path = swarm_ray.fetch(model_id)  # here already; from the other nodes where a node came later
        return f"{ray.get_runtime_context().get_node_id()}: {sum(file.stat().st_size for file in path.iterdir())} bytes"


def main() -> None:
    model_id = sys.argv[1]
    ray.init(runtime_env=swarm_ray.runtime_env())  # workers get the SWARM_* settings of this process
    paths = swarm_ray.fetch_everywhere(model_id)
    actor = ray.remote(num_cpus=1)(Replica)
    replicas = [actor.remote() for _ in paths]
    for line in ray.get([replica.load.remote(model_id) for replica in replicas]):
        print(line)


if __name__ == "__main__":
    main()
