"""Models go from a Hugging Face cache into another; `huggingface_hub` checks the result."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from swarm.api import open_source, serve_source
from swarm.protocol.messages import Origin
from swarm.settings import Settings

from .processes import QUICK, Ended, Machine, Process, contents, write_model

pytestmark = pytest.mark.integration

COMMIT = "c" * 40


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lay_out(home: Path, files: dict[str, bytes], *, etag: Callable[[str, bytes], str]) -> None:
    """A cache as `huggingface_hub` fills it."""
    folder = home / "hub" / "models--org--model"
    for name, data in files.items():
        blob = folder / "blobs" / etag(name, data)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        link = folder / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / blob.name)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def true_etag(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else git_sha1(data)


def false_etag(name: str, data: bytes) -> str:
    return true_etag(name, b"something else" if name == "b.safetensors" else data)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return contents(write_model(tmp_path / "plain", size=2_000_000))


def served(machine: Machine, home: Path) -> Process:
    seed = machine.start("serve", "org/model", "--no-mdns", environment={"HF_HOME": str(home)})
    seed.wait_for(" ready: org/model, ")
    return seed


def fetched(machine: Machine, home: Path, *, peer: str) -> Ended:
    command = ("fetch", "org/model", "--json", "--no-seed", "--no-mdns", "--peer", peer)
    return machine.run(*command, environment={**QUICK, "HF_HOME": str(home)})


def test_does_a_model_of_the_cache_arrive_as_the_hub_would_have_put_it(
    machine: Machine, tmp_path: Path, files: dict[str, bytes]
) -> None:
    lay_out(tmp_path / "theirs", files, etag=true_etag)
    seed = served(machine, tmp_path / "theirs")
    report = fetched(machine, tmp_path / "ours", peer=seed.address).report
    hub = tmp_path / "ours" / "hub"
    scanned = huggingface_hub.scan_cache_dir(hub)
    assert not scanned.warnings
    (repository,) = scanned.repos
    (revision,) = repository.revisions
    assert (repository.repo_id, revision.commit_hash, *revision.refs) == ("org/model", COMMIT, "main")
    found = Path(huggingface_hub.snapshot_download("org/model", cache_dir=hub, local_files_only=True))
    assert Path(report["out"]) == found
    assert contents(found) == files
    blobs = {(found / name).resolve().name for name in files}
    assert blobs == {true_etag(name, data) for name, data in files.items()}


def test_is_a_cached_model_not_transferred_again(machine: Machine, tmp_path: Path, files: dict[str, bytes]) -> None:
    lay_out(tmp_path / "theirs", files, etag=true_etag)
    first = served(machine, tmp_path / "theirs")
    assert fetched(machine, tmp_path / "ours", peer=first.address).code == 0
    second = served(machine, tmp_path / "ours")
    assert second.digest == first.digest != ""
    assert fetched(machine, tmp_path / "third", peer=second.address).code == 0
    hub = tmp_path / "third" / "hub"
    found = Path(huggingface_hub.snapshot_download("org/model", cache_dir=hub, local_files_only=True))
    assert (found.name, contents(found)) == (COMMIT, files)


def test_is_a_false_claim_about_the_hub_refused_and_nothing_published(
    machine: Machine, tmp_path: Path, files: dict[str, bytes]
) -> None:
    claimed = Origin(COMMIT, {name: false_etag(name, data) for name, data in files.items()})
    settings = Settings(mdns=False, cache=tmp_path / "cache", listen="127.0.0.1")
    name, source, _ = open_source(tmp_path / "plain", model_id="org/model", settings=settings)
    with serve_source(name, source, claimed, settings=settings) as seed:
        line = fetched(machine, tmp_path / "ours", peer=seed.address).error(5)
    assert "b.safetensors: its content does not have the name " in line
    folder = tmp_path / "ours" / "hub" / "models--org--model"
    assert not (folder / "refs" / "main").exists()
    assert not (folder / "blobs").exists()
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        huggingface_hub.snapshot_download("org/model", cache_dir=folder.parent, local_files_only=True)


def test_does_a_plain_directory_arrive_in_the_cache_too(machine: Machine, model: Path, tmp_path: Path) -> None:
    seed = machine.serve(model)
    assert fetched(machine, tmp_path / "ours", peer=seed.address).code == 0
    hub = tmp_path / "ours" / "hub"
    assert not huggingface_hub.scan_cache_dir(hub).warnings
    found = Path(huggingface_hub.snapshot_download("org/model", cache_dir=hub, local_files_only=True))
    assert contents(found) == contents(model)
    assert json.loads((found / "sub" / "config.json").read_text()) == {"seed": 1}


def test_is_an_id_that_the_hub_cannot_have_refused_without_out(machine: Machine, model: Path) -> None:
    seed = machine.serve(model, model_id="not a hub id")
    line = machine.run("fetch", "not a hub id", "--no-mdns", "--peer", seed.address, environment=QUICK).error(2)
    assert "not a hub id" in line
    assert "--out DIR" in line


def has(machine: Machine, home: Path, files: dict[str, bytes], *options: str) -> Process:
    """A node that serves these files of the commit."""
    lay_out(home, files, etag=true_etag)
    seed = machine.start("serve", "org/model", "--no-mdns", *options, environment={"HF_HOME": str(home)})
    seed.wait_for(" ready: ")
    return seed


def snapshot_of(home: Path) -> dict[str, bytes]:
    hub = home / "hub"
    assert not huggingface_hub.scan_cache_dir(hub).warnings
    return contents(Path(huggingface_hub.snapshot_download("org/model", cache_dir=hub, local_files_only=True)))


SHARDS = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
COMMITTED = {
    "README.md": b"# model",
    "config.json": b'{"architectures": ["X"]}',
    "pytorch_model.bin.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode(),
    SHARDS[0]: bytes(range(256)) * 4000,
    SHARDS[1]: bytes(range(255)) * 6000,
}


def test_do_two_machines_with_half_a_commit_each_give_all_of_it(machine: Machine, tmp_path: Path) -> None:
    halves = [{p: d for p, d in COMMITTED.items() if p != shard} for shard in SHARDS]
    first = has(machine, tmp_path / "one", halves[0])
    assert "1 of the files it names are missing: pytorch_model-00001-of-00002.bin" in first.err
    line = machine.run("fetch", "org/model", "--no-mdns", "--peer", first.address, environment=QUICK).error(3)
    assert "serves org/model#part" in line
    has(machine, tmp_path / "two", halves[1], "--peer", first.address)
    report = fetched(machine, tmp_path / "ours", peer=first.address).report
    assert len(report["sources"]) == 2
    assert snapshot_of(tmp_path / "ours") == COMMITTED


def test_is_a_damaged_blob_not_passed_on_and_mended_by_a_fetch(machine: Machine, tmp_path: Path) -> None:
    lay_out(tmp_path / "damaged", COMMITTED, etag=true_etag)
    blobs = tmp_path / "damaged" / "hub" / "models--org--model" / "blobs"
    (blobs / true_etag(SHARDS[0], COMMITTED[SHARDS[0]])).write_bytes(COMMITTED[SHARDS[0]].swapcase())
    alone = machine.start("serve", "org/model", "--no-mdns", environment={"HF_HOME": str(tmp_path / "damaged")})
    alone.wait_for(" ready: a part of org/model")
    assert f"{SHARDS[0]}: damaged in the Hugging Face cache" in alone.err
    right = has(machine, tmp_path / "right", COMMITTED, "--peer", alone.address)
    assert fetched(machine, tmp_path / "ours", peer=alone.address).code == 0
    assert snapshot_of(tmp_path / "ours") == COMMITTED
    report = fetched(machine, tmp_path / "damaged", peer=right.address).report
    assert report["bytes"] - report["resumed_bytes"] == len(COMMITTED[SHARDS[0]])
    assert snapshot_of(tmp_path / "damaged") == COMMITTED


def test_does_ls_show_what_there_is_and_rm_free_it(machine: Machine, tmp_path: Path) -> None:
    seed = has(machine, tmp_path / "one", COMMITTED)
    home = {"HF_HOME": str(tmp_path / "ours")}
    assert fetched(machine, tmp_path / "ours", peer=seed.address).code == 0
    (tmp_path / "ours" / "hub" / "models--org--other" / "snapshots").mkdir(parents=True)
    found = machine.run("ls", "--json", "--peer", seed.address, environment=home).report
    (here,), (served_,) = found["here"], found["swarm"]
    assert (here["model_id"], here["revisions"]) == ("org/model", ["main", COMMIT])
    assert served_["revisions"] == ["main", COMMIT]
    assert list(served_["holders"].values()) == [1.0]
    assert served_["digest"] == here["digest"] == seed.digest
    assert here["bytes"] == sum(len(data) for data in COMMITTED.values())
    for revision, count in (("", 1), ("@main", 1), (f"@{COMMIT[:7]}", 1), ("@main2", 0), (f"@{COMMIT[:6]}", 0)):
        found = machine.run("ls", f"org/model{revision}", "--json", "--peer", seed.address, environment=home).report
        assert len(found["here"]) == len(found["swarm"]) == count
    assert "no member serves org/no" in machine.run("ls", "org/no", "--peer", seed.address, environment=home).out
    assert "by the hub's names: right" in machine.run("verify", seed.digest[:6], environment=home).out
    assert "say --yes" in machine.run("rm", "org/model", environment=home).error(5)
    verified = machine.run("verify", f"org/model@{COMMIT[:7]}", "--digest", seed.digest[:8], environment=home)
    assert f"{len(COMMITTED)} by the hub's names: right; digest {seed.digest}" in verified.out
    fetch = ("fetch", "org/model", "--no-mdns", "--peer", seed.address)
    machine.start(*fetch, environment={**QUICK, **home}).wait_for("serving it on at")
    removed = machine.run("rm", f"org/model@{COMMIT[:9]}", "--yes", environment=home)
    assert removed.code == 0
    assert "has the files open and serves on" in removed.out
    assert [path.name for path in (tmp_path / "ours" / "hub").iterdir()] == ["models--org--other"]
    assert machine.run("ls", "--json", "--peer", seed.address, environment=home).report["here"] == []
