"""`swarm serve --origin`: does one node that reaches an origin serve what it reads to nodes that do not?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub import Hub, Model, read_files

from .processes import MODEL, Machine, contents, wait_until, write_model

pytestmark = pytest.mark.integration

SIZE = 6_000_000


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return write_model(tmp_path / "original", size=SIZE)


@pytest.fixture
def hub(original: Path) -> Iterator[Hub]:
    with Hub({MODEL: Model(read_files(original))}) as made:
        yield made


def test_is_a_model_of_the_hub_served_while_it_arrives_and_not_read_again(
    machine: Machine, hub: Hub, original: Path, tmp_path: Path
) -> None:
    hub.shaper.total = 2e6
    reaches = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "gateway")}
    seed = machine.start("serve", "--origin", MODEL, "--no-mdns", environment=reaches)
    wait_until(lambda: "fetch it with" in seed.err, "the address of the seed")
    address = seed.err.partition("--peer ")[2].split()[0]
    cut_off = ("--origin", "none", "--peer", address, "--no-mdns", "--no-seed", "--out")
    done = machine.run("fetch", MODEL, *cut_off, tmp_path / "out", environment={"SWARM_CACHE": str(tmp_path / "c")})
    assert done.code == 0, done.err
    assert contents(tmp_path / "out") == contents(original)
    seed.wait_for(" ready: org/model, ")
    assert hub.copies() < 1.2
    seed.kill()
    hub.sent_bytes = 0
    machine.start("serve", "--origin", f"hf://{MODEL}", "--no-mdns", environment=reaches).wait_for(" ready: org/model")
    assert hub.sent_bytes == 0


def test_does_the_hubs_own_client_accept_the_caches_that_three_nodes_filled_together(
    machine: Machine, hub: Hub, original: Path, tmp_path: Path
) -> None:
    hub.shaper.total = 2e6

    def home(number: int) -> dict[str, str]:
        own = {"HF_HOME": str(tmp_path / f"hf{number}"), "SWARM_CACHE": str(tmp_path / f"cache{number}")}
        return {"HF_ENDPOINT": hub.endpoint, **own}

    seed = machine.start("serve", "--origin", MODEL, "--no-mdns", environment=home(0))
    wait_until(lambda: "fetch it with" in seed.err, "the address of the seed")
    flags = ("--peer", seed.err.partition("--peer ")[2].split()[0], "--no-mdns", "--json")
    others = [machine.start("fetch", MODEL, *flags, environment=home(number)) for number in (1, 2)]
    for node in others:
        node.wait_for('"sources"')
    reports = [node.out for node in others]
    seed.wait_for(" ready: ")
    assert {len(json.loads(report)["sources"]) for report in reports} != {1}, "none of them took part in the other's"
    assert hub.copies() < 2
    for number in range(3):
        cache = tmp_path / f"hf{number}" / "hub"
        assert not huggingface_hub.scan_cache_dir(cache).warnings
        found = huggingface_hub.snapshot_download(MODEL, cache_dir=cache, local_files_only=True)
        assert Path(found).name == hub.models[MODEL].commit
        assert contents(Path(found)) == contents(original)


def test_is_a_directory_filled_from_an_address_and_served_under_a_name(
    machine: Machine, original: Path, tmp_path: Path
) -> None:
    flags = ("--origin", f"file://{original}", "--model-id", "org/named", "--no-mdns")
    seed = machine.start("serve", tmp_path / "filled", *flags)
    seed.wait_for(" ready: org/named, ")
    assert contents(tmp_path / "filled") == contents(original)
    cut_off = ("--origin", "none", "--peer", seed.address, "--no-mdns", "--no-seed", "--out", tmp_path / "out")
    assert machine.run("fetch", "org/named", *cut_off).code == 0
    assert contents(tmp_path / "out") == contents(original)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--origin", "s3://bucket/model"), "path: is missing"),
        (("--origin", "no model at all"), "is neither the id of a model nor the address of an origin"),
        (("s3://bucket/model",), "say swarm serve --origin s3://bucket/model"),
        ((), "the following arguments are required"),
    ],
)
def test_is_a_command_that_cannot_be_meant_told_in_few_lines(
    machine: Machine, arguments: tuple[str, ...], words: str
) -> None:
    done = machine.run("serve", *arguments)
    assert done.code == 2
    assert words in done.err
    assert len(done.err.splitlines()) <= 2
