"""The manifests of deploy/, played: replicas find each other by DNS, fill themselves, roll over, lose a machine."""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("dnslib", reason="needs dnslib (pip install -e '.[deploy]')")
import played.cluster
from hub import Hub, Model
from played import manifests
from played.cluster import Cluster
from played.manifests import Object
from played.pod import Pod, inside

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(why := manifests.lacking("kubectl", "helm")), reason=str(why)),
    pytest.mark.skipif(bool(why := played.cluster.lacking()), reason=str(why)),
]

MODEL = "org/model"
SIZE = 16_000_000
STORAGE = "ClusterStorageContainer"
HERE = Path(__file__).parents[1] / "played"
IMAGES = {
    "registry.example.com/swarm-weights": [sys.executable, "-m", "swarm"],
    "registry.example.com/server": [sys.executable, "-I", str(HERE / "file_server.py")],
}
SERVER, AGENT, PREDICTOR = "swarm-server", "swarm-agent", "kserve-predictor"


def made_up(number: int) -> dict[str, bytes]:
    """The files of a revision."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + secrets.token_bytes(SIZE)
    return {"model.safetensors": weights, "config.json": json.dumps({"number": number}).encode()}


def revised(objects: list[Object], revision: str, replicas: int) -> list[Object]:
    """The overlay `server` with a revision, as a user patches it; quick to end."""
    for each in objects:
        if each["kind"] == "Deployment":
            each["spec"]["replicas"] = replicas
            spec = each["spec"]["template"]["spec"]
            spec["initContainers"][0]["args"][1] = f"hf://{MODEL}:{revision}"
            spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] = 1
        if each["kind"] == "DaemonSet":
            container = each["spec"]["template"]["spec"]["containers"][0]
            container["args"][container["args"].index(MODEL)] = f"{MODEL}@{revision}"
    return objects


def predictor(container: Object, source: str) -> Object:
    """A server as KServe's webhook makes it: the storage container gets arguments and a volume."""
    volume = {"name": "kserve-provision-location", "mountPath": "/mnt/models"}
    labels = {"app.kubernetes.io/name": PREDICTOR}
    spec = {
        "securityContext": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000, "runAsNonRoot": True},
        "initContainers": [{**container, "args": [source, "/mnt/models"], "volumeMounts": [volume]}],
        "containers": [
            {
                "name": "kserve-container",
                "image": "registry.example.com/server:1",
                "args": ["/mnt/models"],
                "ports": [{"name": "http", "containerPort": 8000}],
                "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 1},
                "securityContext": container["securityContext"],
                "volumeMounts": [{**volume, "readOnly": True}],
            }
        ],
        "volumes": [{"name": volume["name"], "emptyDir": {}}],
    }
    template = {"metadata": {"labels": labels}, "spec": spec}
    return {"kind": "Deployment", "metadata": {"name": PREDICTOR}, "spec": {"replicas": 1, "template": template}}


def files_of(cluster: Cluster, pod: Pod) -> dict[str, str]:
    """What a server has read: sha256 by path."""

    def ask() -> dict[str, str]:
        with urllib.request.urlopen(f"http://{pod.place.address}:8000/files", timeout=5) as answer:
            return dict(json.load(answer))

    return inside(cluster.system.namespace, ask)


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster", IMAGES, machines=3) as made:
        yield made


@pytest.mark.timeout(300)
def test_do_replicas_fill_themselves_roll_over_and_survive_a_lost_machine(cluster: Cluster, tmp_path: Path) -> None:
    first, second = made_up(1), made_up(2)
    overlay = manifests.with_key(tmp_path) / "overlays" / "server"
    served = {MODEL: Model(first, names={"v1": "", "main": ""})}
    with inside(cluster.system.namespace, lambda: Hub(served, host=cluster.system.address, total=20e6)) as hub:
        cluster.environment["HF_ENDPOINT"] = hub.endpoint
        cluster.apply(revised(manifests.kustomized(overlay), "v1", 3))
        cluster.wait(lambda: len(cluster.ready(SERVER)) == 3 and len(cluster.ready(AGENT)) == 3, "v1", deadline_s=90)
        assert all(files_of(cluster, pod) == hashes(first) for pod in cluster.ready(SERVER))
        assert cluster.dns.asked["swarm-peers.swarm.svc.cluster.local"]
        assert hub.sent_bytes < 3 * SIZE, "six nodes, and a busy machine"
        for pod in cluster.ready(AGENT):
            assert runs_confined(pod)
        agent = cluster.ready(AGENT)[0]
        shown = agent.execute("agent", sys.executable, "-m", "swarm", "status")
        assert shown.startswith(f"{agent.name} at {agent.place.address}"), shown
        assert MODEL in shown
        hub.models[MODEL] = Model(second, names={"v2": "", "main": ""})
        cluster.apply(revised(manifests.kustomized(overlay), "v2", 3))

        def rolled() -> bool:
            ready = cluster.ready(SERVER)
            assert len(ready) >= 3, "maxUnavailable is 0"
            return len(cluster.of(SERVER)) == 3 and all(files_of(cluster, pod) == hashes(second) for pod in ready)

        cluster.wait(rolled, "v2", deadline_s=90)
        ended = [pod for pod in cluster.pods if pod.gone and pod.labels["app.kubernetes.io/name"] == SERVER]
        assert [pod.exit_codes[-1] for pod in ended] == [("server", 0)] * 3
        (storage,) = (each for each in manifests.chart("--set", "kserve.enabled=true") if each["kind"] == STORAGE)
        sent = hub.sent_bytes
        cluster.apply([predictor(storage["spec"]["container"], f"hf://{MODEL}:v2")])
        cluster.wait(lambda: cluster.ready(PREDICTOR), "the server of KServe", deadline_s=90)
        assert files_of(cluster, cluster.ready(PREDICTOR)[0]) == hashes(second)
        assert hub.sent_bytes - sent < SIZE / 2, "agents have it"
        cluster.drop("Deployment", PREDICTOR)
        # A machine is lost while a fourth replica starts: what is left feeds the replacements.
        cluster.scale(SERVER, 4)
        lost = cluster.lose("machine-0")
        assert lost
        cluster.wait(lambda: len(cluster.ready(SERVER)) == 4, "replacements", deadline_s=90)
        assert all(files_of(cluster, pod) == hashes(second) for pod in cluster.ready(SERVER))
        (agent, *_) = cluster.of(AGENT)
        agents = cluster.of(AGENT)
        cluster.drop("DaemonSet", AGENT)
        cluster.wait(lambda: all(pod.gone for pod in agents), "agents to end", deadline_s=30)
        assert {code for pod in agents for _, code in pod.exit_codes} <= {0}, agent.output


def runs_confined(pod: Pod) -> bool:
    """Whether its process has no rights, and a root that is read-only."""
    pid = pod.container("agent").pid
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    options = {mount[1]: mount[3].split(",") for mount in mounts}
    return (
        fields["Uid"][0] == "65532"
        and set(fields["CapBnd"] + fields["CapEff"]) == {"0" * 16}
        and fields["NoNewPrivs"] == ["1"]
        and "ro" in options["/"]
        and "ro" in options["/etc/swarm"]
    )
