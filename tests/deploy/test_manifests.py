"""The chart and the kustomizations: rendered by the real tools, checked by strict schemas, and true to each other."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from played import manifests
from played.manifests import CHART, DEPLOY, KUBERNETES, OVERLAYS, Object

from swarm.cli.main import _parser
from swarm.settings import Settings

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="needs kubernetes-validate (pip install -e '.[deploy]')"
)
pytestmark = pytest.mark.skipif(bool(why := manifests.lacking("kubectl", "helm")), reason=str(why))

VERSION = "1.37"
CHANGED = (
    "--set", "port=7100,metricsPort=7200,agent.hostPath=/var/lib/swarm,originSecret=hub,revision=v2,user=1000",
    "--set", "settings.SWARM_RACK=rack-1,settings.SWARM_UPLOAD_LIMIT=150MB/s,imagePullSecrets[0].name=registry",
    "--set", "agent.hubPort=7091,agent.hold={org/other@v1}",
    "--set", "vllm.args={--max-model-len,4096},lws.args={--max-model-len,4096}", "--set", "server.command={/server}",
)  # fmt: skip
# Kinds of other projects: the fields that are used here, as their definitions have them, beside the pods in them.
OTHERS: dict[str, Any] = {
    "LeaderWorkerSet": {
        "replicas": int,
        "rolloutStrategy": {
            "type": "RollingUpdate", "rollingUpdateConfiguration": {"maxSurge": int, "maxUnavailable": int},
        },
        "leaderWorkerTemplate": {
            "size": int, "restartPolicy": "RecreateGroupOnPodRestart", "leaderTemplate": dict, "workerTemplate": dict,
        },
    },
    "ClusterStorageContainer": {
        "container": dict, "supportedUriFormats": [{"prefix": str, "regex": str}], "workloadType": "initContainer",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def kustomizations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifests.with_key(tmp_path_factory.mktemp("deploy"))


def every() -> tuple[str, ...]:
    """Flags that turn every workload on."""
    return ("--set", ",".join(f"{overlay}.enabled=true" for overlay in OVERLAYS))


def containers() -> list[tuple[str, Object, Object]]:
    """Name, pod and container of each container of the chart."""
    found = []
    for name, template in manifests.pod_specs(manifests.chart(*every())):
        spec = template["spec"]
        found += [
            (f"{name} {each['name']}", spec, each) for each in spec.get("initContainers", []) + spec["containers"]
        ]
    return found


def test_are_the_manifests_those_of_the_chart(tmp_path: Path) -> None:
    """If not: run deploy/kubernetes/render."""
    copy = tmp_path / "deploy"
    shutil.copytree(KUBERNETES.parent, copy)
    helm = Path(str(manifests.tool("helm"))).parent
    subprocess.run([copy / "kubernetes" / "render"], env={"PATH": f"{helm}:/usr/bin:/bin"}, check=True, timeout=60)
    for written in copy.rglob("*.yaml"):
        assert written.read_text() == (KUBERNETES.parent / written.relative_to(copy)).read_text(), written.name


@pytest.mark.parametrize("overlay", ["base", *OVERLAYS])
def test_does_a_kustomization_say_what_the_chart_says(overlay: str, kustomizations: Path) -> None:
    directory = kustomizations / ("base" if overlay == "base" else f"overlays/{overlay}")
    flags = () if overlay == "base" else ("--set", f"{overlay}.enabled=true")
    key = kustomizations / "base" / "swarm.key"
    of_chart = {named(each): each for each in manifests.chart("--set-file", f"key.value={key}", *flags)}
    of_kustomization = {named(each): each for each in manifests.kustomized(directory)}
    assert of_kustomization.keys() == of_chart.keys()
    for name, each in of_kustomization.items():
        if each["kind"] != "ClusterStorageContainer":
            assert each["metadata"].pop("namespace") == "swarm"
        if each["kind"] != "Secret":
            assert each == of_chart[name]


def named(each: Object) -> tuple[str, str]:
    return each["kind"], each["metadata"]["name"]


@pytest.mark.parametrize("flags", [(), CHANGED], ids=["defaults", "changed"])
def test_are_all_objects_right_by_strict_schemas(flags: tuple[str, ...]) -> None:
    objects = manifests.chart(*every(), *flags)
    assert {each["kind"] for each in objects} >= {"DaemonSet", "Deployment", "PodDisruptionBudget", *OTHERS}
    for each in objects:
        if each["kind"] in OTHERS:
            assert fits(each["spec"], OTHERS[each["kind"]]), each["spec"].keys()
        else:
            kubernetes_validate.validate(each, VERSION, strict=True)
    pods = [template for _, template in manifests.pod_specs(objects)]
    pods += [
        {"spec": {"containers": [each["spec"]["container"]]}} for each in objects if "container" in each.get("spec", {})
    ]
    for pod in pods:
        whole = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x", **pod.get("metadata", {})},
            "spec": pod["spec"],
        }
        kubernetes_validate.validate(whole, VERSION, strict=True)


def fits(value: Any, shape: Any) -> bool:
    """Whether a value has the shape: a type, a value, a list of a shape, or an object with no other fields."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        return isinstance(value, dict) and value.keys() <= shape.keys() and all(fits(value[k], shape[k]) for k in value)
    return isinstance(value, shape) if isinstance(shape, type) else bool(value == shape)


def test_has_the_chart_nothing_to_complain_of() -> None:
    assert "0 chart(s) failed" in manifests.run("helm", "lint", "--strict", CHART)


def test_are_all_containers_confined() -> None:
    for name, pod, each in containers():
        security = pod["securityContext"]
        assert security["runAsNonRoot"], name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }, name  # fmt: skip
        assert pod["automountServiceAccountToken"] is False, name
        assert "/tmp" in {mount["mountPath"] for mount in each["volumeMounts"]}, name


def test_are_the_variables_settings_and_the_arguments_commands() -> None:
    for name, _, each in containers():
        variables = {variable["name"]: variable.get("value", "x") for variable in each.get("env", [])}
        if "SWARM_LISTEN" in variables:
            settings = Settings.load(environment=variables)
            assert settings.listen == "0.0.0.0:7000", name
            assert not settings.insecure
        if "swarm-weights" in each["image"]:
            options = _parser().parse_args(each["args"])
            assert options.run, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_does_every_reference_lead_somewhere(overlay: str, kustomizations: Path) -> None:
    objects = manifests.kustomized(kustomizations / "overlays" / overlay)
    secrets = {each["metadata"]["name"] for each in objects if each["kind"] == "Secret"}
    accounts = {each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"}
    templates = manifests.pod_specs(objects)
    for _, template in templates:
        spec = template["spec"]
        assert spec["serviceAccountName"] in accounts
        volumes = {each["name"] for each in spec["volumes"]}
        assert {each["secret"]["secretName"] for each in spec["volumes"] if "secret" in each} <= secrets
        for each in spec.get("initContainers", []) + spec["containers"]:
            assert {mount["name"] for mount in each["volumeMounts"]} <= volumes
            ports = {port["name"] for port in each["ports"]}
            probes = [each[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe") if kind in each]
            assert {probe["httpGet"]["port"] for probe in probes} <= ports
    for each in objects:
        if each["kind"] in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            spec = each["spec"]
            selector = spec.get("podSelector", spec.get("selector", {}))
            labels = selector.get("matchLabels", selector)
            assert any(labels.items() <= template["metadata"]["labels"].items() for _, template in templates), each
    (peers,) = [each["spec"] for each in objects if named(each) == ("Service", "swarm-peers")]
    assert peers["clusterIP"] == "None"
    assert peers["publishNotReadyAddresses"] is True
    assert {(port.get("protocol", "TCP"), port["port"]) for port in peers["ports"]} == {("TCP", 7000), ("UDP", 7000)}


def test_does_a_cluster_without_a_key_get_no_manifests(tmp_path: Path) -> None:
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy, ignore=shutil.ignore_patterns("swarm.key"))
    with pytest.raises(AssertionError, match=r"swarm\.key"):
        manifests.kustomized(copy / "base")


def test_are_the_commands_of_the_page_those_of_the_manifests(tmp_path: Path) -> None:
    page = (DEPLOY.parent / "docs" / "deploy.md").read_text()
    key = tmp_path / "swarm.key"
    key.write_text("made up")
    (install,) = re.findall(r"^ +helm install (\S+) (\S+) (.*)$", page, re.MULTILINE)
    flags = [word.replace("swarm.key", str(key)) if "=" in word else word for word in shlex.split(install[2])]
    flags = [word for word in flags if word != "--create-namespace"]
    objects = manifests.parsed(manifests.run("helm", "template", install[0], DEPLOY.parent / install[1], *flags))
    assert {named(each) for each in objects} >= {("Deployment", "swarm-vllm"), ("Secret", "swarm-key")}
    applied = re.findall(r"kubectl apply -k (\S+)", page)
    assert applied
    assert all((DEPLOY.parent / each / "kustomization.yaml").exists() for each in applied)
    asked = re.findall(r"kubectl -n swarm exec ds/(\S+) -- swarm (.*)", page)
    assert asked
    for workload, arguments in asked:
        assert ("DaemonSet", workload) in {named(each) for each in objects}
        assert _parser().parse_args(shlex.split(arguments)).run
