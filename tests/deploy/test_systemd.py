"""The unit of systemd: what systemd-analyze says of it, and the commands under its options."""

from __future__ import annotations

import ctypes.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from played import confine
from played.pod import DEVICES, RUNTIME, program_lines

from swarm.cli.main import _parser
from swarm.settings import Settings

ROOT = Path(__file__).parents[2]
UNIT, ENVIRONMENT = ROOT / "deploy/systemd/swarm.service", ROOT / "deploy/systemd/swarm.env"
EXPOSURE_MAX = 1.5
USER = 64999
analyzed = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze (systemd)")


def variables(state: Path, arguments: str) -> dict[str, str]:
    """What the unit and its environment file set."""
    said = confine.options(UNIT)
    lines = [word for line in said["Environment"] for word in shlex.split(line)]
    lines += [line for line in ENVIRONMENT.read_text().splitlines() if line and not line.startswith("#")]
    found = dict(line.split("=", 1) for line in [*lines, f"ARGUMENTS={arguments}"])
    places = {"%d": "/run/credentials", "%S": "/var/lib", "%C": "/var/cache"}
    return {name: re.sub("%[dSC]", lambda match: places[match[0]], value) for name, value in found.items()}


@analyzed
def test_does_systemd_find_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "swarm.service"
    unit.write_text(UNIT.read_text().replace("/opt/swarm/bin/swarm", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@analyzed
def test_is_the_unit_hardened() -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(UNIT)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    (level,) = re.findall(r"exposure level for swarm\.service: ([0-9.]+)", said)
    assert float(level) <= EXPOSURE_MAX, said


def test_are_the_variables_of_the_unit_settings_and_its_arguments_a_command(tmp_path: Path) -> None:
    settings = Settings.load(environment=variables(tmp_path, "fetch org/model"))
    assert settings.key_file == Path("/run/credentials/swarm.key")
    assert settings.listen == "0.0.0.0:7000"
    (arguments,) = re.findall(r"^ARGUMENTS=(.+)$", ENVIRONMENT.read_text(), re.MULTILINE)
    assert _parser().parse_args(shlex.split(arguments)).run
    drain_s, stop_s = settings.drain_timeout_s, int(confine.options(UNIT)["TimeoutStopSec"][0])
    assert drain_s < stop_s


@pytest.fixture
def allowed() -> str:
    if os.geteuid() or not all(map(shutil.which, ("unshare", "setpriv", "systemd-analyze"))):
        pytest.skip("needs root, unshare, setpriv and systemd-analyze")
    if ctypes.util.find_library("seccomp") is None:
        pytest.skip("needs libseccomp")
    return ",".join(sorted(confine.calls(UNIT)))


class Service:
    """The unit's process, with its options played."""

    def __init__(self, root: Path, arguments: str, key: Path, allowed: str, environment: dict[str, str]) -> None:
        self.state = root / "state"
        for name in ("upper", "work", "root", "state", "cache", "credentials"):
            (root / name).mkdir(parents=True)
        shutil.copy(key, root / "credentials" / "swarm.key")
        for name in ("state", "cache", "credentials", "credentials/swarm.key"):
            os.chown(root / name, USER, USER)
        lines = [f"device {name} {name}" for name in DEVICES]
        lines += ["tmpfs shm dev/shm mode=1777", "tmpfs tmp tmp mode=1777"]
        lines += [f"bind {root}/state var/lib/swarm rw", f"bind {root}/cache var/cache/swarm rw"]
        lines += [f"bind {root}/credentials run/credentials ro"]
        if model := environment.pop("MODEL", ""):
            lines.append(f"bind {model} model ro")
        lines += program_lines(own_tmp=True)
        (root / "mounts").write_text("\n".join([*lines, "readonly - -", ""]))
        values = {**variables(root, arguments), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
        del values["SWARM_PEERS"]
        self.log = root / "log"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "private", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
                 "sh", "-c", RUNTIME, "runtime", str(root), "unit",
                 "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--no-new-privs",
                 "--bounding-set=-all", "--inh-caps=-all",
                 "env", "-i", *(f"{name}={value}" for name, value in values.items()),
                 sys.executable, "-I", str(ROOT / "tests/played/confine.py"), str(UNIT), allowed, "--",
                 sys.executable, "-m", "swarm", *shlex.split(arguments)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/",
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 60
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def services() -> Iterator[list[Service]]:
    started: list[Service] = []
    yield started
    for each in started:
        each.close()


@pytest.mark.integration
def test_does_a_node_serve_fetch_reload_and_drain_under_the_options_of_the_unit(
    tmp_path: Path, allowed: str, services: list[Service]
) -> None:
    from integration.processes import contents, write_model

    model = write_model(tmp_path / "model", size=2_000_000)
    subprocess.run([sys.executable, "-m", "swarm", "keygen", tmp_path / "swarm.key"], check=True, capture_output=True)
    local = {"SWARM_LISTEN": "127.0.0.1:0", "SWARM_METRICS_LISTEN": "127.0.0.1:0"}

    def start(name: str, arguments: Sequence[str], **more: str) -> Service:
        service = Service(
            tmp_path / name, shlex.join([*arguments, "--no-mdns"]), tmp_path / "swarm.key", allowed, {**local, **more}
        )
        services.append(service)
        return service

    seed = start("seed", ["serve", "/model", "--model-id", "org/model"], MODEL=str(model))
    seed.wait_for(" ready: ")
    address = next(line.split()[0] for line in seed.said.splitlines() if " ready: " in line)
    newcomer = start("newcomer", ["fetch", "org/model", "--out", "/var/lib/swarm/model", "--peer", address, "--json"])
    newcomer.wait_for("serving it on")
    assert json.loads(next(line for line in newcomer.said.splitlines() if line.startswith("{")))["bytes"] > 2_000_000
    assert contents(newcomer.state / "model") == contents(model)
    seed.signal(signal.SIGHUP)
    seed.wait_for("settings are read again: nothing has changed")
    for service in (seed, newcomer):
        service.signal(signal.SIGTERM)
        assert service.process.wait(30) == 0, service.said
