"""One agent for the programs of a machine: what comes once, what stays, and what never leaves it unverified?"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hub import Hub, Model, read_files, sha256

from swarm.cli.demo import write_made_up

from .processes import MODEL, Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration

SIZE = 8_000_000
DEADLINE_S = 60.0
# The client of the hub, with nothing of swarm in its process.
DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download as s; print(s(sys.argv[1], token=sys.argv[2] or False))"
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    root = tmp_path / "original"
    root.mkdir()
    rng = np.random.default_rng(4)
    write_made_up(root / "a.safetensors", [("a.weight", (SIZE // 4,))], rng=rng)
    (root / "config.json").write_text('{"model_type": "made up"}')
    (root / "README.md").write_text("# read me")
    (root / "picture.png").write_bytes(bytes(range(256)) * 40)
    return read_files(root)


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub({MODEL: Model(files)}) as made:
        yield made


class AgentMachine:
    """An agent of a machine, and the programs that use it."""

    def __init__(self, machine: Machine, hub: Hub | None, *flags: str) -> None:
        self.machine = machine
        endpoint = {"HF_ENDPOINT": hub.endpoint} if hub else {"SWARM_ORIGIN": "none"}
        self.environment = {**endpoint, "SWARM_MDNS": "0"}
        self.process = self.start(*flags)

    def start(self, *flags: str) -> Process:
        process = self.machine.start("agent", "--hub-listen", "127.0.0.1:0", *flags, environment=self.environment)
        process.wait_for(" ready: agent of ")
        return process

    @property
    def endpoint(self) -> str:
        (found,) = re.findall(r"HF_ENDPOINT=(\S+)", self.process.out)
        return str(found)

    @property
    def hub_cache(self) -> Path:
        return Path(self.machine.environment["HF_HOME"]) / "hub"

    def swarm(self, *arguments: str | Path) -> str:
        """The output of a command that succeeds."""
        ended = self.machine.start(*arguments, environment=self.environment).end()
        assert ended.code == 0, ended
        return str(ended.out)

    def download(self, home: Path, *, model: str = MODEL, token: str = "") -> Path:
        """What the hub's own client makes of the face, in a home of its own."""
        ended = self.client(home, model=model, token=token)
        assert ended.returncode == 0, ended.stderr
        return Path(ended.stdout.strip())

    def client(self, home: Path, *, model: str, token: str) -> subprocess.CompletedProcess[str]:
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", DOWNLOAD, model, token],
            env={**self.machine.environment, **settings},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )


def test_does_the_client_of_the_hub_get_the_bytes_once_from_there(
    machine: Machine, hub: Hub, files: Mapping[str, bytes], tmp_path: Path
) -> None:
    agent = AgentMachine(machine, hub)
    for number in range(2):
        assert read_files(agent.download(tmp_path / f"home{number}")) == files
    assert hub.copies() <= 1.0
    assert not {asked.authorization for asked in hub.requests} - {None}
    rows = json.loads(agent.swarm("ls", "--json"))["agent"]["models"]
    assert [(row["model_id"], row["served"]) for row in rows] == [(MODEL, "whole")]


def test_do_bytes_of_peers_reach_programs_without_a_hub(machine: Machine, model: Path, tmp_path: Path) -> None:
    seed = machine.serve(model)
    agent = AgentMachine(machine, None, "--peer", seed.address)
    assert contents(agent.download(tmp_path / "home")) == contents(model)
    missing = agent.client(tmp_path / "other", model="org/nothing", token="")
    assert "RepositoryNotFoundError" in missing.stderr


def test_goes_the_token_of_a_program_to_the_hub_alone_and_opens_what_it_opens_there(
    machine: Machine, files: Mapping[str, bytes], tmp_path: Path
) -> None:
    with Hub({MODEL: Model(dict(files), gated="all")}, token="hf_secret") as hub:
        agent = AgentMachine(machine, hub)
        assert read_files(agent.download(tmp_path / "allowed", token="hf_secret")) == files
        refused = agent.client(tmp_path / "refused", model=MODEL, token="")
        assert "GatedRepoError" in refused.stderr
        assert "hf_secret" not in agent.process.out + agent.process.err
        assert {asked.authorization for asked in hub.asked("store")} == {None}, "not to the store either"


def test_does_no_byte_leave_that_is_not_verified(
    machine: Machine, hub: Hub, files: Mapping[str, bytes], tmp_path: Path
) -> None:
    """A blob of the cache was changed, by a program or a disk, with its size and its time of modification."""
    agent = AgentMachine(machine, hub)
    agent.download(tmp_path / "first")
    blob = agent.hub_cache / f"models--{MODEL.replace('/', '--')}" / "blobs" / sha256(files["a.safetensors"])
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    assert read_files(agent.download(tmp_path / "second")) == files
    assert sha256(bytes(blob.read_bytes())) == blob.name, "it was fetched again"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
    ],
)
def test_who_is_answered(machine: Machine, hub: Hub, headers: Mapping[str, str], status: int) -> None:
    agent = AgentMachine(machine, hub)
    request = urllib.request.Request(f"{agent.endpoint}/{MODEL}/resolve/main/config.json", headers=dict(headers))
    assert answered(request) == (status, b'{"model_type": "made up"}' if status == 200 else None)


def answered(request: urllib.request.Request) -> tuple[int, bytes | None]:
    """Status and body; no body of a refusal."""
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, None


def test_is_the_limit_kept_and_what_is_pinned_stays(machine: Machine, tmp_path: Path) -> None:
    models = {f"org/m{n}": Model({"model.bin": bytes([n]) * 1_000_000, "config.json": b"{}"}) for n in range(4)}
    with Hub(models) as hub:
        agent = AgentMachine(machine, hub, "--hub-limit-gb", "0.0025")
        agent.swarm("pull", "org/m0", "--pin")
        refused = machine.start("rm", "org/m0", "--yes", environment=agent.environment).end()
        assert (refused.code, "org/m0 is pinned" in refused.err) == (2, True)
        for name in ("org/m1", "org/m2", "org/m3"):
            agent.swarm("pull", name)
        said = json.loads(agent.swarm("ls", "--json"))["agent"]
        assert {row["model_id"]: row["pinned"] for row in said["models"]} == {"org/m0": True, "org/m3": False}
        assert said["bytes"] <= said["limit_bytes"]
        (machine.cwd / "swarm.toml").write_text('upload_hours = ["00:00-24:00=1MB/s"]')
        agent.process.send(signal.SIGHUP)
        agent.process.wait_for("settings are read again: upload limit 1 MB/s")
        agent.swarm("pin", "org/m0", "--remove")
        agent.swarm("pull", "org/m1")
        assert "org/m0" not in {row["model_id"] for row in json.loads(agent.swarm("ls", "--json"))["agent"]["models"]}
        ended = machine.start("rm", "org/m1", "--yes", environment=agent.environment).end()
        assert "removed, 1 MB are free again" in ended.out
        assert not (agent.hub_cache / "models--org--m1").exists()


def test_do_fetches_go_through_the_agent_and_on_without_it(
    machine: Machine, hub: Hub, files: Mapping[str, bytes], tmp_path: Path
) -> None:
    agent = AgentMachine(machine, hub)
    out = tmp_path / "out"
    said = json.loads(agent.swarm("fetch", MODEL, "--out", out, "--no-seed", "--json"))
    assert said["transports"] == ["agent"]
    parts = {path: data for path, data in files.items() if not path.endswith((".md", ".png"))}
    assert {path: data for path, data in read_files(out).items() if not path.startswith(".")} == parts
    assert "as fetched" in agent.swarm("verify", out)
    into_cache = json.loads(agent.swarm("fetch", MODEL, "--no-seed", "--json"))
    assert (into_cache["transports"], into_cache["resumed_bytes"]) == (["agent"], into_cache["bytes"])
    assert hub.copies() <= 1.0

    hub.shaper.total = 1e6  # the rest takes its time
    agent.swarm("rm", MODEL, "--yes")
    other = machine.start(
        "fetch", MODEL, "--out", tmp_path / "other", "--no-seed", "--json", environment=agent.environment
    )
    wait_until(lambda: hub.copies() > 1.05, "the agent to read")
    agent.process.kill()
    hub.shaper.total = None
    ended = other.end()
    assert ended.code == 0, ended
    assert "this process fetches it by itself" in ended.err
    assert json.loads(ended.out)["transports"] != ["agent"]


def test_serves_the_agent_what_other_programs_downloaded(machine: Machine, tmp_path: Path) -> None:
    commit = "c" * 40
    folder = Path(machine.environment["HF_HOME"]) / "hub" / "models--org--model"
    write_model(folder / "snapshots" / commit, size=300_000)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    agent = AgentMachine(machine, None)
    agent.process.wait_for("org/model@cccc")
    peer = machine.fetch(tmp_path / "out", peers=[agent.process.address], environment={"SWARM_AGENT": "0"})
    assert peer.end().code == 0
    assert contents(tmp_path / "out") == contents(folder / "snapshots" / commit)
    examined = machine.start("doctor", "org/model", environment=agent.environment).end()
    assert "holds 100% of org/model" in examined.out, "by the agent, which every program here asks"


def test_is_an_agent_ready_when_what_it_holds_is_there(machine: Machine, hub: Hub) -> None:
    agent = AgentMachine(machine, hub, "--hold", MODEL)

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://{agent.process.address}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False

    wait_until(ready, "the agent to be ready")
    (row,) = json.loads(agent.swarm("ls", "--json"))["agent"]["models"]
    assert (row["model_id"], row["pinned"]) == (MODEL, True)


def test_is_a_model_fetched_again_of_which_only_a_changed_copy_was_there(
    machine: Machine, hub: Hub, files: Mapping[str, bytes], tmp_path: Path
) -> None:
    """Another program downloaded it, the agent serves it, and no peer has it: the hub's bytes come at once."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DOWNLOAD, MODEL, ""],
        env={**machine.environment, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        check=True,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    agent = AgentMachine(machine, hub)
    agent.process.wait_for(f"{MODEL}@")
    blob = agent.hub_cache / f"models--{MODEL.replace('/', '--')}" / "blobs" / sha256(files["a.safetensors"])
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    agent.swarm("pull", MODEL)
    assert sha256(blob.read_bytes()) == blob.name
    assert read_files(agent.download(tmp_path / "home")) == files
