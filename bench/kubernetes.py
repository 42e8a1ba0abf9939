"""From `kubectl apply` to N ready replicas: the played cluster of tests/played, with swarm and without.

    python bench/kubernetes.py --replicas 8 --size 128 --hub 25

Both apply deploy/kubernetes/overlays/server: an init container fills a directory, a server reads all of it and answers
its probe. With swarm that container is `swarm storage`, and an agent on each machine keeps a copy; without, it is
`hf download` of huggingface_hub, and there are no agents. The hub is tests/hub.py: `--hub` MB/s for all together. Each
pod has a link of `--link`. Ready is what the kubelet sees: start-up probes come every second. Then the replicas are
deleted and applied again, as after a restart of all: agents, where there are any, have the model.

Needs root, kubectl (.ci/kubectl), and the extras `deploy` and `test`. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hosts import rate_bits_per_s
from hub import Hub, Model
from played import manifests
from played.cluster import Cluster, lacking
from played.manifests import ROOT
from played.pod import inside

MODEL = "org/model"
SERVER, AGENT = "swarm-server", "swarm-agent"
IMAGES = {
    "registry.example.com/swarm-weights": [sys.executable, "-m", "swarm"],
    "registry.example.com/server": [sys.executable, "-I", str(ROOT / "tests/played/file_server.py")],
    "registry.example.com/hf": [str(Path(sys.executable).parent / "hf")],
}
DEADLINE_S = 540.0


def objects(overlay: Path, replicas: int, *, swarm: bool) -> list[manifests.Object]:
    """The overlay `server`; without swarm its init container is `hf download`, and the agents are left out."""
    found = copy.deepcopy(manifests.kustomized(overlay))
    for each in found:
        if each["kind"] == "Deployment":
            each["spec"]["replicas"] = replicas
            if not swarm:
                (container,) = each["spec"]["template"]["spec"]["initContainers"]
                container |= {
                    "image": "registry.example.com/hf:1",
                    "args": ["download", MODEL, "--local-dir", "/models"],
                }
    return [each for each in found if swarm or each["kind"] != "DaemonSet"]


def measured(options: argparse.Namespace, files: dict[str, bytes], root: Path, *, swarm: bool) -> dict[str, Any]:
    """Seconds from `apply` to each replica that is ready, and the copies that the hub sent."""
    overlay = manifests.with_key(root) / "overlays" / "server"
    size = sum(map(len, files.values()))
    with Cluster(
        root / "cluster", IMAGES, machines=options.replicas, bits_per_s=rate_bits_per_s(options.link)
    ) as cluster:
        address = cluster.system.address
        served = {MODEL: Model(files)}
        with inside(cluster.system.namespace, lambda: Hub(served, host=address, total=options.hub * 1e6)) as hub:
            cluster.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
            found = objects(overlay, options.replicas, swarm=swarm)
            first = applied(cluster, found, hub, size)
            cluster.wait(lambda: len(cluster.ready(AGENT)) == len(cluster.of(AGENT)), "agents", deadline_s=DEADLINE_S)
            cluster.drop("Deployment", SERVER)
            cluster.wait(lambda: not cluster.of(SERVER), "replicas to end", deadline_s=DEADLINE_S)
            again = applied(cluster, found, hub, size)
            restarts = sum(pod.restarts for pod in cluster.pods)
            return {"swarm": swarm, "from nothing": first, "again": again, "restarts": restarts}


def applied(cluster: Cluster, found: list[manifests.Object], hub: Hub, size: int) -> dict[str, Any]:
    """Seconds until each replica is ready, and the copies of the model that the hub sent meanwhile."""
    began, sent = time.monotonic(), hub.sent_bytes
    cluster.apply(found)
    applied_s = time.monotonic() - began
    (wanted,) = (each["spec"]["replicas"] for each in found if each["kind"] == "Deployment")
    cluster.wait(lambda: len(cluster.ready(SERVER)) == wanted, f"{wanted} replicas", deadline_s=DEADLINE_S)
    ready_s = sorted(pod.ready_at - began for pod in cluster.of(SERVER) if pod.ready_at)
    return {
        "ready_s": [round(each, 1) for each in ready_s],
        "pods_made_s": round(applied_s, 1),
        "copies_of_the_hub": round((hub.sent_bytes - sent) / size, 2),
        "load": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--size", type=int, default=128, help="MB of the model")
    parser.add_argument("--hub", type=float, default=25.0, help="MB/s of the hub, all connections together")
    parser.add_argument("--link", default="1gbit", help="of each pod")
    options = parser.parse_args()
    if why := manifests.lacking("kubectl") or lacking():
        sys.exit(why)
    size = options.size * 1_000_000
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    files = {
        "model.safetensors": len(header).to_bytes(8, "little") + header + secrets.token_bytes(size),
        "config.json": b"{}",
    }
    root = Path(tempfile.mkdtemp(prefix="swarm-bench-kubernetes-"))
    load_before = os.getloadavg()
    try:
        runs = [measured(options, files, root / name, swarm=name == "with") for name in ("without", "with")]
    finally:
        shutil.rmtree(root, ignore_errors=True)
    bound_s = {
        "one copy from the hub": options.size / options.hub,
        "each its own": options.size * options.replicas / options.hub,
    }
    report = {**vars(options), "cores": os.cpu_count(), "load": [round(each, 1) for each in load_before]}
    print(json.dumps({**report, "bound_s": bound_s, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
