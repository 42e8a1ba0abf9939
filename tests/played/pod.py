"""A kubelet's work for one pod, in a thread: volumes, init containers, probes, restarts, and the end.

A container is a process in mount, PID and UTS namespaces of its own and the network namespace of its pod. Its root is
this machine's, read-only where the manifest says so, with the pod's volumes and its resolv.conf over it.
"""

from __future__ import annotations

import compileall
import contextlib
import ctypes
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from .manifests import ROOT, Object

T = TypeVar("T")

LOOK_EVERY_S = 0.05
RESTART_AFTER_S = 1.0
SHM_BYTES = 64 << 20  # of a container runtime, unless the pod mounts another
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_CLONE_NEWNET = 0x40000000
_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "k": 10**3, "M": 10**6, "G": 10**9}

# $1: the container's directory, $2 its hostname; standard input has a line for each mount: KIND SOURCE TARGET [OPTION].
RUNTIME = r"""
set -eu
d=$1; hostname "$2"; shift 2
mount -t overlay overlay -o "lowerdir=/,upperdir=$d/upper,workdir=$d/work" "$d/root"
cd "$d/root"
mount -t proc proc proc
mount --rbind /sys sys
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/shm
while read -r kind source target option; do
  case $kind in
    device) : > "dev/$target"; mount --bind "/dev/$source" "dev/$target" ;;
    tmpfs) mkdir -p "./$target"; mount -t tmpfs -o "$option" "$source" "./$target" ;;
    bind) mkdir -p "./$target"; mount --bind "$source" "./$target"
      [ "$option" != ro ] || mount -o remount,bind,ro "./$target" ;;
    file) cp --remove-destination "$source" "./$target" ;;
    open) chmod a+rx "./$target" ;;
    readonly) mount -o remount,ro . ;;
  esac
done < "$d/mounts"
exec chroot . "$@" < /dev/null
"""


def program_lines(*, own_tmp: bool) -> list[str]:
    """Lines for RUNTIME: Python and this tree are readable for all, as in an image, also below a /tmp of its own."""
    programs = [Path(sys.prefix), Path(sys.base_prefix), ROOT]
    hidden = sorted(each for each in programs if own_tmp and each.is_relative_to("/tmp"))
    folders = {folder for program in programs for folder in program.parents}
    return [
        *(f"bind {each} {each.relative_to('/')} ro" for each in hidden),
        *(f"open - {each}" for each in sorted(folders) if not any(map(each.is_relative_to, hidden))),
    ]


def package_of_image(directory: Path) -> Path:
    """A copy of the package with bytecode, which an image has and a tree may lack: user ids of pods can write none."""
    package = directory / "swarm"
    shutil.copytree(ROOT / "swarm", package, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(package, stripdir=str(directory), prependdir=str(ROOT), quiet=1)
    return package


def inside(namespace: str, call: Callable[[], T]) -> T:
    """What a call returns on a thread in a network namespace; sockets that it makes stay there."""
    answer: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            enter(namespace)
            answer.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=f"in {namespace}")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return answer[0]


def enter(namespace: str) -> None:
    """Moves this thread into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def size_of(quantity: str) -> int:
    """Bytes of `64Mi`."""
    match = re.fullmatch(r"([0-9]+)([A-Za-z]*)", quantity)
    assert match, quantity
    return int(match[1]) * _UNITS[match[2]]


@dataclass
class Place:
    """Where a pod runs: its network namespace, address and machine, and where probes, files and `swarm` come from."""

    namespace: str
    address: str
    machine: str
    probes_from: str
    root: Path
    package: Path
    resolv_conf: str


@dataclass
class Container:
    """A container that was started; `ended` is its exit code."""

    spec: Object
    process: subprocess.Popen[bytes]
    log: Path
    started_up: bool = False
    ready: bool = False
    failures: dict[str, int] = field(default_factory=dict)
    next_probe: dict[str, float] = field(default_factory=dict)

    @property
    def ended(self) -> int | None:
        return self.process.poll()

    @property
    def pid(self) -> int | None:
        """The process of the container, PID 1 inside, as this machine numbers it."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def signal(self, number: signal.Signals) -> None:
        if pid := self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


class Pod:
    """`images`: an image's entrypoint, by the name of the image without its tag."""

    def __init__(
        self,
        name: str,
        template: Object,
        place: Place,
        secrets: Mapping[str, Mapping[str, str]],
        images: Mapping[str, Sequence[str]],
        extra_environment: Mapping[str, str],
    ) -> None:
        self.name, self.template, self.place = name, template, place
        self.spec: Object = template["spec"]
        self.labels: dict[str, str] = template["metadata"].get("labels", {})
        self.phase = "Pending"
        self.restarts = 0
        self.log: list[str] = []  # events, as `kubectl describe` lists them
        self.exit_codes: list[tuple[str, int]] = []
        self.ready_at: float | None = None
        self._secrets, self._images, self._extra = secrets, images, extra_environment
        self._running: list[Container] = []
        self._deleted = threading.Event()
        self._lost = threading.Event()
        self._numbers = 0
        self._thread = threading.Thread(target=self._main, name=f"kubelet {name}", daemon=True)

    def __repr__(self) -> str:
        return f"<Pod {self.name} at {self.place.address} {self.phase}{' ready' if self.ready else ''}>"

    @property
    def ready(self) -> bool:
        return self.phase == "Running" and bool(self._running) and all(each.ready for each in self._running)

    @property
    def terminating(self) -> bool:
        return self._deleted.is_set()

    @property
    def gone(self) -> bool:
        return self.phase in ("Gone", "Lost")

    @property
    def output(self) -> str:
        """What its containers wrote, for people."""
        logs = sorted(self.place.root.glob("*/log"))
        return "\n".join([*self.log, *(f"--- {log.parent.name}\n{log.read_text()}" for log in logs)])

    def container(self, name: str) -> Container:
        return next(each for each in self._running if each.spec["name"] == name)

    def execute(self, name: str, *words: str) -> str:
        """What a program prints in a running container, as by `kubectl exec`: its image's entrypoint is not used."""
        each = self.container(name)
        assert each.pid is not None, f"{name} is not running"
        environment = [f"{key}={value}" for key, value in self._environment(each.spec).items()]
        user = self.spec["securityContext"]["runAsUser"]
        command = [
            "nsenter", f"--target={each.pid}", "--mount", "--net", "--pid", "--uts", "--root", "--wd",
            "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", "--bounding-set=-all",
            "env", "-i", *environment, *words,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def volume(self, name: str) -> Path:
        """The directory behind a volume."""
        return self.place.root / "volumes" / name

    def start(self) -> None:
        self._thread.start()

    def delete(self) -> None:
        """Asks the kubelet to end it, with preStop and grace."""
        self._deleted.set()

    def lose(self) -> None:
        """Its machine has lost power: nothing is said, and no kubelet is left."""
        self._lost.set()
        for each in self._running:
            each.process.kill()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _main(self) -> None:
        try:
            enter(self.place.probes_from)
            self._make_volumes()
            self._say("scheduled")
            if self._initialised():
                self.phase = "Running"
                self._running = [self._start(spec) for spec in self.spec["containers"]]
                while not self._ending():
                    for number, each in enumerate(self._running):
                        self._look_after(number, each)
                    time.sleep(LOOK_EVERY_S)
            if not self._lost.is_set():
                self._terminate()
        except BaseException as error:
            self._say(f"kubelet failed: {error!r}")
            raise
        finally:
            for each in self._running:
                each.process.kill()
                each.process.wait(10)
            self.phase = "Lost" if self._lost.is_set() else "Gone"

    def _ending(self) -> bool:
        return self._deleted.is_set() or self._lost.is_set()

    def _say(self, what: str) -> None:
        self.log.append(f"{time.monotonic():.2f} {self.name}: {what}")

    def _initialised(self) -> bool:
        for spec in self.spec.get("initContainers", []):
            while True:
                each = self._start(spec)
                self._running = [each]
                while each.ended is None and not self._ending():
                    time.sleep(LOOK_EVERY_S)
                if self._ending():
                    return False
                assert each.ended is not None
                self.exit_codes.append((spec["name"], each.ended))
                self._say(f"init container {spec['name']} ended with {each.ended}")
                if each.ended == 0:
                    break
                self.restarts += 1
                time.sleep(RESTART_AFTER_S)
            self._running = []
        return True

    def _look_after(self, number: int, each: Container) -> None:
        now = time.monotonic()
        if each.ended is not None:
            self.exit_codes.append((each.spec["name"], each.ended))
            self._restart(number, f"ended with {each.ended}")
            return
        if not each.started_up:
            each.started_up = self._probe(each, "startupProbe", now) is not False
            if each.failures.get("startupProbe", 0) >= each.spec.get("startupProbe", {}).get("failureThreshold", 3):
                self._restart(number, "startup probe failed")
            return
        readiness = self._probe(each, "readinessProbe", now)
        if readiness:
            each.ready = True
            self.ready_at = self.ready_at or now
        elif each.failures.get("readinessProbe", 0) >= each.spec.get("readinessProbe", {}).get("failureThreshold", 3):
            each.ready = False
        self._probe(each, "livenessProbe", now)
        if each.failures.get("livenessProbe", 0) >= each.spec.get("livenessProbe", {}).get("failureThreshold", 3):
            self._restart(number, "liveness probe failed")

    def _restart(self, number: int, why: str) -> None:
        old = self._running[number]
        self._say(f"restarts {old.spec['name']}: {why}")
        old.process.kill()
        old.process.wait(10)
        self.restarts += 1
        time.sleep(RESTART_AFTER_S)
        if not self._ending():
            self._running[number] = self._start(old.spec)

    def _probe(self, each: Container, kind: str, now: float) -> bool | None:
        """Whether a probe succeeded now; None if it is not its time, or there is none (which counts as success)."""
        probe = each.spec.get(kind)
        if probe is None:
            return True
        if now < each.next_probe.get(kind, 0.0):
            return None if kind != "startupProbe" else False
        each.next_probe[kind] = now + float(probe.get("periodSeconds", 10))
        right = self._answers(each, probe["httpGet"], float(probe.get("timeoutSeconds", 1)))
        each.failures[kind] = 0 if right else each.failures.get(kind, 0) + 1
        return right

    def _answers(self, each: Container, get: Object, timeout_s: float) -> bool:
        port = get["port"]
        if isinstance(port, str):
            (port,) = (named["containerPort"] for named in each.spec["ports"] if named.get("name") == port)
        connection = http.client.HTTPConnection(self.place.address, port, timeout=timeout_s)
        try:
            connection.request("GET", get["path"], headers={"User-Agent": "kube-probe/1.37"})
            return 200 <= connection.getresponse().status < 400
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _terminate(self) -> None:
        self.phase = "Terminating"
        deadline = time.monotonic() + float(self.spec.get("terminationGracePeriodSeconds", 30))
        for each in self._running:
            hook = each.spec.get("lifecycle", {}).get("preStop", {})
            if "sleep" in hook:
                time.sleep(float(hook["sleep"]["seconds"]))
            assert set(hook) <= {"sleep"}, "no other hook is played"
            each.signal(signal.SIGTERM)
        for each in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.process.wait(max(0.0, deadline - time.monotonic()))
            if each.ended is None:
                self._say(f"{each.spec['name']} was killed after its grace period")
                each.process.kill()
            code = each.process.wait(10)
            self.exit_codes.append((each.spec["name"], code))
            self._say(f"{each.spec['name']} ended with {code}")

    def _make_volumes(self) -> None:
        group = self.spec.get("securityContext", {}).get("fsGroup", 0)
        for each in self.spec.get("volumes", []):
            path = self.volume(each["name"])
            path.mkdir(parents=True)
            if secret := each.get("secret"):
                for name, text in self._secrets[secret["secretName"]].items():
                    (path / name).write_text(text)
                    os.chown(path / name, 0, group)
                    (path / name).chmod(secret.get("defaultMode", 0o644))
            os.chown(path, 0, group)
            path.chmod(0o2777)

    def _environment(self, spec: Object) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # with the swarm of this environment
        values = {"PATH": path, "HOSTNAME": self.name, "PYTHONPATH": str(ROOT), **self._extra}
        for each in spec.get("env", []):
            source = each.get("valueFrom", {})
            if "fieldRef" in source:
                values[each["name"]] = self._field(source["fieldRef"]["fieldPath"])
            elif "secretKeyRef" in source:
                values[each["name"]] = self._secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
            else:
                values[each["name"]] = _expanded(str(each["value"]), values)
        return values

    def _field(self, path: str) -> str:
        if match := re.fullmatch(r"metadata\.labels\['(.+)'\]", path):
            return self.labels[match[1]]
        return {"metadata.name": self.name, "status.podIP": self.place.address}[path]

    def _start(self, spec: Object) -> Container:
        self._numbers += 1
        directory = self.place.root / f"{self._numbers}-{spec['name']}"
        for part in ("upper", "work", "root"):
            (directory / part).mkdir(parents=True)
        security = {**self.spec.get("securityContext", {}), **spec.get("securityContext", {})}
        (directory / "mounts").write_text("\n".join(self._mounts(spec, security, directory)) + "\n")
        user, group = security.get("runAsUser", 0), security.get("runAsGroup", 0)
        assert user or not security.get("runAsNonRoot"), f"{spec['name']} would run as root"
        dropped = ["--bounding-set=-all", "--inh-caps=-all"] if "ALL" in security["capabilities"]["drop"] else []
        privileges = [] if security.get("allowPrivilegeEscalation", True) else ["--no-new-privs"]
        groups = f"--groups={security['fsGroup']}" if "fsGroup" in security else "--clear-groups"
        environment = self._environment(spec)
        image = spec["image"].rpartition(":")[0]
        words = [*(spec.get("command") or self._images[image]), *spec.get("args", [])]
        command = [
            "nsenter", f"--net=/run/netns/{self.place.namespace}",
            "unshare", "--mount", "--propagation", "private", "--pid", "--uts", "--fork", "--kill-child",
            "sh", "-c", RUNTIME, "runtime", str(directory), self.name,
            "setpriv", f"--reuid={user}", f"--regid={group}", groups, *privileges, *dropped,
            "env", "-i", *(f"{name}={value}" for name, value in environment.items()),
            *(_expanded(str(word), environment) for word in words),
        ]  # fmt: skip
        log = directory / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/")
        return Container(spec, process, log)

    def _mounts(self, spec: Object, security: Object, directory: Path) -> list[str]:
        (directory / "resolv.conf").write_text(self.place.resolv_conf)
        lines = [f"device {name} {name}" for name in DEVICES]
        volumes = {each["name"]: each for each in self.spec.get("volumes", [])}
        mounted = {each["mountPath"]: each for each in spec.get("volumeMounts", [])}
        lines += [f"bind {each} {each}" for each in {sys.prefix, sys.base_prefix, str(ROOT)} if os.path.ismount(each)]
        lines.append(f"file {directory}/resolv.conf etc/resolv.conf")
        if "/dev/shm" not in mounted:
            lines.append(f"tmpfs shm dev/shm size={SHM_BYTES},mode=1777")
        for target, mount in sorted(mounted.items()):
            empty = volumes[mount["name"]].get("emptyDir") or {}
            if empty.get("medium") == "Memory":
                lines.append(f"tmpfs {mount['name']} {target} size={size_of(empty['sizeLimit'])},mode=1777")
            else:
                option = "ro" if mount.get("readOnly") or "secret" in volumes[mount["name"]] else "rw"
                lines.append(f"bind {self.volume(mount['name'])} {target} {option}")
        lines += program_lines(own_tmp="/tmp" in mounted)
        lines.append(f"bind {self.place.package} {ROOT}/swarm ro")
        if security.get("readOnlyRootFilesystem"):
            lines.append("readonly - -")
        return lines

    def clean_up(self) -> None:
        """Removes its files, after the end."""
        shutil.rmtree(self.place.root, ignore_errors=True)


def _expanded(text: str, values: Mapping[str, str]) -> str:
    """`$(NAME)` in arguments and variables, as a kubelet replaces it."""
    return re.sub(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda match: str(values.get(match[1], match[0])), text)
