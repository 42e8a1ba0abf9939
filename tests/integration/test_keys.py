"""Who gets in? Real processes with and without the cluster's key."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from swarm.security import cluster_key

from .processes import MODEL, Machine, Process, contents


def own_address() -> str:
    """An address of this machine that is not loopback, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


OWN = own_address()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    cluster_key.create(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    cluster_key.create(tmp_path / "other")
    return tmp_path / "other"


def keyed(path: Path) -> dict[str, str]:
    return {"SWARM_KEY_FILE": str(path)}


def joined(tmp_path: Path, name: str, *paths: Path) -> Path:
    """A file with the keys of these, the first one first."""
    path = tmp_path / name
    path.touch(0o600)
    path.write_bytes(b"".join(each.read_bytes() for each in paths))
    return path


def fingerprint(path: Path) -> str:
    return str(cluster_key.load(path))


@pytest.mark.integration
@pytest.mark.parametrize("encryption", ["tls", "none"])
def test_do_members_feed_each_other(machine: Machine, model: Path, out: Path, key: Path, encryption: str) -> None:
    environment = {**keyed(key), "SWARM_DATA_ENCRYPTION": encryption}
    seed = machine.serve(model, environment=environment)
    first = machine.fetch(out / "1", peers=[seed.address], environment=environment)
    second = machine.fetch(out / "2", peers=[seed.address], environment=environment)
    assert first.end().report["digest"] == second.end().report["digest"] == seed.digest
    assert contents(out / "1") == contents(out / "2") == contents(model)
    said = f"cluster key {fingerprint(key)}"
    assert said in seed.err
    assert ("not encrypted" in seed.err) == (encryption == "none")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("holder", "asker", "told", "logged"),
    [
        ("key", "other", "has another cluster key", "does not accept this node's key"),
        ("key", None, "wants a cluster key", "does not speak TLS"),
        (None, "key", "does not speak TLS", "has a cluster key and this node has none"),
    ],
)
def test_do_strangers_hear_why_and_nodes_tell(
    machine: Machine, model: Path, out: Path, key: Path, other: Path,
    *, holder: str | None, asker: str | None, told: str, logged: str,
) -> None:  # fmt: skip
    files = {"key": key, "other": other}
    seed = machine.serve(model, environment=keyed(files[holder]) if holder else None)
    fetch = machine.fetch(out, peers=[seed.address], environment=keyed(files[asker]) if asker else None)
    assert told in fetch.end().error(3)
    seed.wait_for(logged)
    assert contents(out) == {}


@pytest.mark.integration
def test_is_a_key_exchanged_while_everything_runs(
    machine: Machine, model: Path, out: Path, key: Path, other: Path, tmp_path: Path
) -> None:
    """One node after the other gets both keys, then the new one first, then it alone; each is fed by the one before."""
    steps = [key, joined(tmp_path, "both", key, other), joined(tmp_path, "swapped", other, key), other]
    serve = ("serve", model, "--model-id", MODEL, "--no-mdns")
    seeds = [machine.start(*serve, environment=keyed(step)) for step in steps]
    for seed in seeds:
        seed.wait_for(" ready: ")

    def fetch(holder: int, asker: int) -> Process:
        target = out / f"{holder}-{asker}"
        return machine.fetch(target, peers=[seeds[holder].address], environment=keyed(steps[asker]))

    for number in range(3):
        for newcomer in (fetch(number, number + 1), fetch(number + 1, number)):
            assert newcomer.end().report["digest"] == seeds[0].digest
    late = fetch(3, 0)
    assert "another cluster key" in late.end().error(3)


@pytest.mark.integration
def test_is_a_key_that_others_can_read_refused(machine: Machine, model: Path, key: Path) -> None:
    key.chmod(0o644)
    ended = machine.run("serve", model, "--key-file", key)
    assert f"chmod 600 {key}" in ended.error(2)


@pytest.mark.integration
def test_keygen_makes_what_serve_takes(machine: Machine, model: Path) -> None:
    made = machine.run("keygen", "k")
    assert made.code == 0
    seed = machine.serve(model, "--key-file", "k")
    found = re.search("fingerprint ([0-9a-f]{8})", made.out)
    assert found is not None
    assert found[1] in seed.err
    assert "no key is ever overwritten" in machine.run("keygen", "k").error(2)


@pytest.mark.integration
@pytest.mark.skipif(OWN.startswith("127."), reason="this machine has no address beyond loopback")
def test_who_may_see_the_status(machine: Machine, model: Path, key: Path, other: Path) -> None:
    seed = machine.serve(model, "--listen", OWN, environment=keyed(key))
    assert machine.run("status", "--peer", seed.address, "--json").code == 0  # this machine
    assert machine.run("status", "--peer", seed.address, "--json", "--key-file", key).code == 0
    refused = machine.run("status", "--peer", seed.address, "--json", "--key-file", other)
    assert "another cluster key" in refused.error(6)


READ = """
import pathlib, sys, urllib.error, urllib.request
from swarm.security import cluster_key
from swarm.security.certificates import visitor
address, path, key = sys.argv[1:]
context = visitor(cluster_key.load(pathlib.Path(key))) if key else None
scheme = "https" if key else "http"
try:
    with urllib.request.urlopen(f"{scheme}://{address}{path}", context=context, timeout=10) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as refused:
    print(refused.status, refused.read().decode())
except urllib.error.URLError as failed:
    print("no answer", failed)
"""


def read(where: Sequence[str], address: str, path: str, *, key: Path | None = None) -> str:
    """Status and body of a node's page, for a program that runs there."""
    command = [*where, sys.executable, "-c", READ, address, path, str(key or "")]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.mark.integration
def test_who_of_another_machine_may_open_the_dashboard(
    machine: Machine, model: Path, key: Path, other: Path, two_hosts: tuple[Sequence[str], Sequence[str]]
) -> None:
    here, there = two_hosts
    flags = ("--model-id", MODEL, "--no-mdns", "--listen", "10.78.0.1:7000", "--key-file", str(key))
    seed = machine.start("serve", model, *flags, wrapper=here)
    seed.wait_for(" ready: ")
    assert seed.address == "10.78.0.1:7000"
    for path, shown in (("/", "200 <!doctype html>"), ("/web/main.js", "200 //"), ("/view", '200 {"node"')):
        assert read(here, seed.address, path).lower().startswith(shown)
        assert read(there, seed.address, path, key=key).lower().startswith(shown)
        assert read(there, seed.address, path, key=other).startswith("no answer")
        refused = read(there, seed.address, path)
        assert refused.startswith("403 This page is for members of the cluster")
        assert "ssh -L 7000:10.78.0.1:7000 10.78.0.1" in refused
        assert seed.digest not in refused
    watched = machine.start("status", "--json", "--peer", seed.address, "--key-file", key, wrapper=there).end().report
    assert [artifact["digest"] for artifact in watched["artifacts"]] == [seed.digest]


@pytest.mark.integration
def test_is_a_fetched_directory_compared_with_its_digest(machine: Machine, model: Path, out: Path, key: Path) -> None:
    seed = machine.serve(model, environment=keyed(key))
    assert machine.fetch(out, peers=[seed.address], environment=keyed(key)).end().code == 0
    assert machine.run("verify", out, "--digest", seed.digest).code == 0
    assert "not the digest asked for" in machine.run("verify", out, "--digest", "0" * 64).error(5)


@pytest.mark.integration
def test_may_trusted_machines_alone_introduce_a_model(machine: Machine, model: Path, out: Path, key: Path) -> None:
    seed = machine.serve(model, environment=keyed(key))
    elsewhere, here = ({**keyed(key), "SWARM_TRUSTED": network} for network in ("10.1.0.0/16", "127.0.0.0/8"))
    fetch = machine.fetch(out, peers=[seed.address], environment=elsewhere)
    assert "may not introduce it" in fetch.end().error(3)
    doctor = machine.start("doctor", MODEL, "--peer", seed.address, "--no-mdns", environment=elsewhere).end()
    assert "`trusted` (10.1.0.0/16) names no machine that may introduce" in " ".join(doctor.out.split())
    assert machine.fetch(out, peers=[seed.address], environment=here).end().code == 0
