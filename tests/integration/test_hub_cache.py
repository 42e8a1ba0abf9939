"""Models go from a Hugging Face cache into another; `huggingface_hub` checks the result."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

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
    lay_out(tmp_path / "theirs", files, etag=false_etag)
    seed = served(machine, tmp_path / "theirs")
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
