"""Models on the nodes of a Ray cluster: each Ray node fetches by the others, into its own Hugging Face cache.

    ray.init(runtime_env=swarm_ray.runtime_env())        # Ray's workers get the settings of this process
    swarm_ray.fetch_everywhere("org/model")              # on all nodes, about one copy from the hub
    path = swarm_ray.fetch("org/model")                  # in a task or actor: on its node
    os.environ.update(swarm_ray.engine_env())            # in an actor, before an engine: it finds the others' memory

Ray starts workers with the environment of its own daemon on their node: neither the variables nor the working directory
of the driver get there, so `runtime_env` carries the settings. Files do not travel: the cluster key lies at the same
path on every node.

Nodes find each other by Ray's list of addresses, so no peer has to be named. Several Ray nodes on one machine share its
address; one of them listens at the known port, and the others learn of each other by it.

Must not know: Ray Serve (`ray_serve`), engines.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from swarm.api import bring
from swarm.engines.launch import environment_of
from swarm.errors import SwarmError
from swarm.settings import DEFAULT_PORT, Settings, join_address

ALL_LISTEN = "0.0.0.0"  # noqa: S104 - engines listen for other machines, once there is a key
LOOPBACK_LISTEN = Settings.__dataclass_fields__["listen"].default

log = logging.getLogger("swarm")


def runtime_env(settings: Settings | None = None) -> dict[str, Any]:
    """What `ray.init`, an actor or `LLMConfig` takes as `runtime_env`: settings as variables. By default those of here.

    Paths are absolute in it: workers have another working directory.
    """
    settings = settings or Settings.load()
    key_file = settings.key_file and settings.key_file.absolute()
    return {
        "env_vars": environment_of(dataclasses.replace(settings, key_file=key_file, cache=settings.cache.absolute()))
    }


def node_settings(settings: Settings) -> Settings:
    """Settings of a node in this Ray worker: it knows the other Ray nodes, and listens where they look for it."""
    import ray

    here = ray.util.get_node_ip_address()
    name = settings.name or f"ray-{ray.get_runtime_context().get_node_id()[:8]}"
    if not settings.reaches_out:
        log.warning("no key_file: this Ray node exchanges models with nodes of its own machine only")
        return dataclasses.replace(settings, name=name)
    listen = here if settings.listen == LOOPBACK_LISTEN else settings.listen
    return dataclasses.replace(settings, name=name, listen=_bracketed(listen), peers=_peers(settings))


def engine_env(settings: Settings | None = None) -> dict[str, str]:
    """Variables of an engine in this cluster, on any of its nodes: it knows the Ray nodes, and listens for them.

    Set before the engine starts, in its actor. Without them an engine finds others by multicast DNS alone.
    """
    settings = settings or Settings.load()
    if settings.reaches_out:
        listen = ALL_LISTEN if settings.listen == LOOPBACK_LISTEN else settings.listen
        settings = dataclasses.replace(settings, listen=listen, peers=_peers(settings))
    return dict(runtime_env(settings)["env_vars"])


def _peers(settings: Settings) -> tuple[str, ...]:
    import ray

    alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    return tuple(dict.fromkeys((*settings.peers, *(join_address(address, DEFAULT_PORT) for address in alive))))


def fetch(model_id: str, *, revision: str | None = None, settings: Settings | None = None) -> Path:
    """Fetches a model onto the Ray node of this worker; returns its snapshot in the Hugging Face cache.

    Serves it on for a while to nodes that started at the same time. Workers of one node wait for each other. Raises as
    `swarm.fetch` does.
    """
    return bring(model_id, revision, settings=node_settings(settings or Settings.load()))


def fetch_everywhere(
    model_id: str, *, revision: str | None = None, settings: Settings | None = None, timeout_s: float | None = None
) -> dict[str, Path]:
    """Fetches a model onto all Ray nodes that are alive; returns its snapshots by the ids of the nodes.

    A node that dies meanwhile is left out. Raises SwarmError with the line of the first node that fails, and Ray's
    GetTimeoutError.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    environment = runtime_env(settings)
    task = ray.remote(num_cpus=0, max_retries=0)(_fetch_here)
    running = {
        node["NodeID"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), runtime_env=environment
        ).remote(model_id, revision)
        for node in ray.nodes()
        if node["Alive"]
    }
    ray.wait(list(running.values()), num_returns=len(running), timeout=timeout_s)
    found: dict[str, Path] = {}
    for node, reference in running.items():
        try:
            path, why = ray.get(reference, timeout=0)
        except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
            log.warning("Ray node %s died while it fetched %s", node, model_id)
            continue
        if why:
            raise SwarmError(f"Ray node {node}: {why}")
        found[node] = Path(path)
    return found


def _fetch_here(model_id: str, revision: str | None) -> tuple[str, str]:
    """Path and '', or '' and why not: an exception of several arguments does not travel between Ray's processes."""
    try:
        return str(fetch(model_id, revision=revision)), ""
    except SwarmError as error:
        return "", str(error)


def _bracketed(listen: str) -> str:
    return f"[{listen}]" if listen.count(":") > 1 and not listen.startswith("[") else listen
