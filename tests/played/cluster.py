"""Controllers, Services and machines of a played cluster."""

from __future__ import annotations

import base64
import contextlib
import copy
import itertools
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .dns import DOMAIN, ClusterDns
from .manifests import ROOT, Object
from .pod import LOOK_EVERY_S, Place, Pod, inside, package_of_image

sys.path.insert(0, str(ROOT / "bench"))
import hosts

__all__ = ["Cluster", "hosts", "lacking"]

T = TypeVar("T")

NAMESPACE = "swarm"


class Cluster:
    """`with Cluster(...) as cluster:` has machines, a DNS and controllers; `wait` lets them work.

    `images`: the entrypoint of each image by its name without the tag. `environment`: variables that all containers get
    beside those of their manifests, for example where the played hub is.
    """

    def __init__(
        self,
        root: Path,
        images: Mapping[str, Sequence[str]],
        *,
        machines: int,
        bits_per_s: int = 10**9,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.pods: list[Pod] = []
        self.machines = [f"machine-{number}" for number in range(machines)]
        self.environment = dict(environment or {})
        self._lost: set[str] = set()
        self._root, self._images = root, images
        self._network = hosts.Network(bits_per_s=bits_per_s, size=32)
        self._objects: dict[tuple[str, str], Object] = {}
        self._hosts: dict[Pod, hosts.Host] = {}
        self._numbers = itertools.count()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Cluster:
        with contextlib.ExitStack() as opening:
            opening.enter_context(self._network)
            self._package = package_of_image(self._root)
            self.system = self._network.host()  # kubelets, the DNS server, and what a test adds
            self.dns = inside(self.system.namespace, lambda: ClusterDns(self.system.address, self._addresses))
            opening.callback(self.dns.close)
            opening.callback(self._end)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def apply(self, objects: Sequence[Object]) -> None:
        """As `kubectl apply`."""
        for each in objects:
            self._objects[each["kind"], each["metadata"]["name"]] = copy.deepcopy(each)
        self._reconcile()

    def scale(self, name: str, replicas: int) -> None:
        """As `kubectl scale deployment`."""
        self._objects["Deployment", name]["spec"]["replicas"] = replicas

    def drop(self, kind: str, name: str) -> None:
        """As `kubectl delete`."""
        del self._objects[kind, name]

    def of(self, name: str) -> list[Pod]:
        """The pods of a workload that are not gone."""
        return [pod for pod in self.pods if pod.labels.get("app.kubernetes.io/name") == name and not pod.gone]

    def ready(self, name: str) -> list[Pod]:
        return [pod for pod in self.of(name) if pod.ready]

    def lose(self, machine: str) -> list[Pod]:
        """A machine loses power. Its pods are replaced elsewhere, and their addresses stay in the DNS."""
        self._lost.add(machine)
        lost = [pod for pod in self.pods if pod.place.machine == machine and not pod.gone]
        for pod in lost:
            self._network.cut(self._hosts[pod])
            pod.lose()
        return lost

    def wait(self, true: Callable[[], T], what: str, *, deadline_s: float) -> T:
        """What `true` returns once that is true, while the controllers work."""
        deadline = time.monotonic() + deadline_s
        while not (found := true()):
            if time.monotonic() > deadline:
                print(*(pod.output for pod in self.pods), sep="\n")
                raise AssertionError(f"waited {deadline_s:g} s for {what}: {self.pods}")
            self._reconcile()
            time.sleep(LOOK_EVERY_S)
        return found

    def _reconcile(self) -> None:
        for (kind, _), each in self._objects.items():
            if kind == "Deployment":
                self._reconcile_deployment(each)
            elif kind == "DaemonSet":
                self._reconcile_daemon_set(each)
        wanted = {name for kind, name in self._objects if kind in ("Deployment", "DaemonSet")}
        for pod in self.pods:
            if not pod.gone and not pod.terminating and pod.labels["app.kubernetes.io/name"] not in wanted:
                pod.delete()

    def _reconcile_deployment(self, each: Object) -> None:
        """One step of a rolling update."""
        spec, name = each["spec"], each["metadata"]["name"]
        replicas = int(spec["replicas"])
        rolling = spec.get("strategy", {}).get("rollingUpdate", {})
        surge = _share(rolling.get("maxSurge", "25%"), replicas, up=True)
        down = _share(rolling.get("maxUnavailable", "25%"), replicas, up=False)
        pods = [pod for pod in self.of(name) if not pod.terminating]
        new = [pod for pod in pods if pod.template == spec["template"]]
        old = [pod for pod in pods if pod.template != spec["template"]]
        missing = min(replicas - len(new), replicas + surge - len(pods))
        new += [self._start(name, spec["template"], self._machine(name)) for _ in range(missing)]
        available = sum(pod.ready for pod in (*new, *old))
        for pod in sorted(old, key=lambda pod: pod.ready):
            if pod.ready and available - 1 < replicas - down:
                break
            available -= pod.ready
            pod.delete()
        for pod in new[replicas:] if not old else []:
            pod.delete()

    def _reconcile_daemon_set(self, each: Object) -> None:
        name, template = each["metadata"]["name"], each["spec"]["template"]
        pods = self.of(name)
        for machine in self.machines:
            here = [pod for pod in pods if pod.place.machine == machine]
            if machine not in self._lost and not here:
                self._start(name, template, machine)
        stale = [pod for pod in pods if pod.template != template and not pod.terminating]
        if (
            stale
            and all(pod.ready and not pod.terminating for pod in pods)
            and len(pods) == len(self.machines) - len(self._lost)
        ):
            stale[0].delete()

    def _machine(self, name: str) -> str:
        """The machine with the fewest pods of a workload."""
        left = [machine for machine in self.machines if machine not in self._lost]
        return min(left, key=lambda machine: sum(pod.place.machine == machine for pod in self.of(name)))

    def _start(self, name: str, template: Object, machine: str) -> Pod:
        number = next(self._numbers)
        host = self._network.host()
        root = self._root / f"pod{number}"
        root.mkdir(parents=True)
        search = f"search {NAMESPACE}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN}"
        resolv_conf = f"nameserver {self.system.address}\n{search}\noptions ndots:5 timeout:1 attempts:2\n"
        place = Place(host.namespace, host.address, machine, self.system.namespace, root, self._package, resolv_conf)
        secrets = {
            each["metadata"]["name"]: _secret(each) for (kind, _), each in self._objects.items() if kind == "Secret"
        }
        # Containers have the boot id of the machine, and here all machines are one.
        environment = {**self.environment, "SWARM_HOST": machine}
        pod = Pod(f"{name}-{number}", copy.deepcopy(template), place, secrets, self._images, environment)
        self.pods.append(pod)
        self._hosts[pod] = host
        pod.start()
        return pod

    def _addresses(self, name: str) -> list[str] | None:
        """The addresses of a name: those of a headless Service's pods."""
        service = self._objects.get(("Service", name.partition(".")[0]))
        if service is None or name != f"{service['metadata']['name']}.{NAMESPACE}.svc.{DOMAIN}":
            return None
        spec = service["spec"]
        assert spec.get("clusterIP") == "None", "no other Service is asked for"
        selected = [pod for pod in self.pods if spec["selector"].items() <= pod.labels.items() and pod.phase != "Gone"]
        known = [pod.place.address for pod in selected if spec.get("publishNotReadyAddresses") or pod.ready]
        return known or None

    def _end(self) -> None:
        for pod in self.pods:
            pod.lose()
        for pod in self.pods:
            pod.join(10)
            pod.clean_up()


def lacking() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [program for program in ("nsenter", "setpriv", "unshare") if not shutil.which(program)]
    return f"{', '.join(missing)} not installed (util-linux)" if missing else hosts.lacking()


def _share(value: int | str, replicas: int, *, up: bool) -> int:
    """A number of pods, or a percentage of the replicas."""
    if isinstance(value, int):
        return value
    part = int(value.rstrip("%")) * replicas
    return -(-part // 100) if up else part // 100


def _secret(each: Object) -> dict[str, str]:
    plain = {name: base64.b64decode(text).decode() for name, text in each.get("data", {}).items()}
    return {**plain, **each.get("stringData", {})}
