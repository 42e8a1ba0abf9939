"""Joins of two workers in one process: real nodes, tensors without an engine."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from swarm.demo import write_made_up
from swarm.engines import metadata, starts
from swarm.engines.joining import Join, Options, Rank
from swarm.engines.tiers import TierName
from swarm.errors import ManifestInvalid, SettingsError, StoreError
from swarm.runtime import runtime
from swarm.settings import Settings

MODEL = "org/model"
FIELDS = {"engine": "test", "tp": "0 of 1"}


def tensors(value: float) -> dict[str, torch.Tensor]:
    head = torch.full((64, 8), value)
    return {"embed": head, "head": head, "norm": torch.full((8,), value + 1)}


def nowhere() -> None:
    raise StoreError("there are no files")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_made_up(path / "model.safetensors", [("a.weight", (300, 100))], rng=np.random.default_rng(1))
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def join(tmp_path: Path) -> Iterator[Callable[..., Join]]:
    made: list[Join] = []

    def start(
        name: str, directory: Path | None, *peers: Join, fields: dict[str, str] = FIELDS, rank: int = 0, **more: object
    ) -> Join:
        settings = Settings(
            name=name, mdns=False, cache=tmp_path / name, peers=tuple(addresses[peer] for peer in peers), fsync=False
        )
        options = dataclasses.replace(Options(settings, look_s=3.0 if peers else 0.1), **more)  # type: ignore[arg-type]
        joined = Join("test 1", MODEL, Rank(str(rank), rank), directory=directory, fields=fields, options=options)
        made.append(joined)
        return joined

    addresses = _Addresses()
    yield start
    for one in made:
        if one._node is not None:
            runtime().run(runtime().release(one.settings))


class _Addresses:
    def __getitem__(self, join: Join) -> str:
        assert join._node is not None
        return join._node.address


def seed(
    join: Callable[..., Join], model: Path, *, held: dict[str, torch.Tensor] | None = None, **more: object
) -> Join:
    """A worker that has loaded from disk and serves."""
    a = join("a", model, **more)
    assert a.load({"disk": lambda: None}) == "disk"
    a.keep(lambda: held or tensors(1.0))
    a.ready()
    assert a.serving is not None
    a.serving.result(30)
    return a


def bare(tmp_path: Path, a: Join, name: str = "b") -> Path:
    """What `swarm run` lays out on a machine that has nothing."""
    assert a.content is not None
    staged = metadata.staged(tmp_path / "a", a.content)
    assert staged is not None
    return metadata.lay_out(tmp_path / name, MODEL, metadata.adopt(tmp_path / name, staged))


def test_does_a_twin_get_the_tensors_and_serve_them_on(join: Callable[..., Join], model: Path, tmp_path: Path) -> None:
    a = seed(join, model)
    b = join("b", bare(tmp_path, a), a)
    got = tensors(0.0)
    assert b.load({"loaded": lambda: b.fetch_loaded(got), "checkpoint": nowhere, "disk": nowhere}) == "loaded"
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors(1.0).items())
    assert b.fingerprint == a.fingerprint
    a.stop("a test")
    c = join("c", bare(tmp_path, a, "c"), b)
    again = tensors(0.0)
    assert c.load({"loaded": lambda: c.fetch_loaded(again), "disk": nowhere}) == "loaded"
    assert torch.equal(again["head"], got["head"])


def served(join: Join) -> set[str]:
    """Digests of the loaded tensors that others can get."""
    assert join._node is not None
    assert join.fingerprint is not None
    return set(join._node.holders(join.fingerprint.model_id(MODEL)))


def settled(join: Join) -> None:
    assert join.serving is not None
    join.serving.result(30)


def test_are_tensors_served_again_whose_memory_went_and_came_back(
    join: Callable[..., Join], model: Path, tmp_path: Path
) -> None:
    held = tensors(1.0)
    a = seed(join, model, held=held)
    before = served(a)
    a.pause("a test")
    assert not served(a)
    for tensor in held.values():
        tensor.data.zero_()
    for name, tensor in tensors(1.0).items():
        held[name].data.copy_(tensor)
    a.resume()
    settled(a)
    assert served(a) == before
    b = join("b", bare(tmp_path, a), a)
    got = tensors(0.0)
    assert b.load({"loaded": lambda: b.fetch_loaded(got), "disk": nowhere}) == "loaded"
    assert torch.equal(got["head"], held["head"])


def test_are_tensors_that_came_back_as_others_not_served_again(
    join: Callable[..., Join], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = tensors(1.0)
    a = seed(join, model, held=held)
    a.pause("a test")
    held["norm"].data[0] = 7
    with caplog.at_level("INFO", "swarm"):
        a.resume()
        settled(a)
    assert not served(a)
    assert "not served again before the engine starts anew: they are not the bytes that they were" in caplog.text
    held["norm"].data[0] = 2  # what it was
    a.pause("again")
    a.resume()
    settled(a)
    assert not served(a)


def test_are_tensors_not_served_that_nobody_hashed_before_their_memory_went(
    join: Callable[..., Join], model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = join("a", model)
    a.load({"disk": lambda: None})
    a.keep(lambda: tensors(1.0))
    a.pause("a test")
    with caplog.at_level("INFO", "swarm"):
        a.resume()
    a.ready()
    settled(a)
    assert not served(a)
    assert "went before they were hashed" in caplog.text


def test_are_tensors_that_changed_not_served_after_a_sleep(join: Callable[..., Join], model: Path) -> None:
    a = seed(join, model)
    a.stop("a test")
    a.pause("another one")
    a.resume()
    settled(a)
    assert not served(a)


def test_does_a_sleep_wait_for_whoever_reads_the_tensors(join: Callable[..., Join], model: Path) -> None:
    """Memory that is being hashed must not go, and what was hashed is not served by then."""
    a = join("a", model)
    a.load({"disk": lambda: None})
    reading, asleep = threading.Event(), threading.Event()

    def slowly() -> dict[str, torch.Tensor]:
        reading.set()
        asleep.wait(0.2)  # nobody may be asleep meanwhile
        order.append("read")
        return tensors(1.0)

    order: list[str] = []
    a.keep(slowly)
    a.ready()
    assert reading.wait(30)
    a.pause("a test")
    order.append("asleep")
    asleep.set()
    settled(a)
    assert order == ["read", "asleep"]
    assert not served(a)


def test_does_another_layout_get_the_files_and_the_record_says_why(
    join: Callable[..., Join], model: Path, tmp_path: Path
) -> None:
    a = seed(join, model)
    b = join("b", bare(tmp_path, a), a, fields={**FIELDS, "tp": "0 of 2"})
    found: list[Path] = []
    ways: dict[TierName, Callable[[], object]] = {
        "loaded": nowhere,
        "checkpoint": lambda: found.append(b.fetch_checkpoint()),
        "disk": nowhere,
    }
    assert b.load(ways) == "checkpoint"
    assert (found[0] / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    (_, start) = starts.recall(tmp_path / "b")[0]
    assert [(step.tier, step.taken) for step in start.steps] == [("loaded", False), ("checkpoint", True)]
    assert "tp is 0 of 2 here and 0 of 1 there" in start.steps[0].why
    other_rank = join("b", bare(tmp_path, a), a, fields={**FIELDS, "tp": "1 of 2"}, rank=1)
    a.stop("a test")
    assert other_rank.fetch_checkpoint() == found[0]  # the ranks of a host share it


def test_are_tensors_of_another_shape_refused_before_any_is_written(
    join: Callable[..., Join], model: Path, tmp_path: Path
) -> None:
    a = seed(join, model)
    b = join("b", bare(tmp_path, a), a)
    untied = {**tensors(0.0), "head": torch.zeros(64, 8)}
    with pytest.raises(StoreError, match="there are no files"):
        b.load({"loaded": lambda: b.fetch_loaded(untied), "checkpoint": nowhere, "disk": nowhere})
    assert untied["embed"].sum() == 0
    (_, start) = starts.recall(tmp_path / "b")[0]
    assert "is no twin: 1 missing there: head; 1 tied differently: head" in start.steps[0].why


def test_is_it_disk_when_there_is_nobody(join: Callable[..., Join], model: Path) -> None:
    a = join("a", model)
    assert a.load({"disk": lambda: None}) == "disk"
    assert (a.local, a.content) == ("whole", None)


def test_is_a_model_without_headers_built_only_if_nothing_depended_on_them(
    join: Callable[..., Join], model: Path, tmp_path: Path
) -> None:
    a = seed(join, model)
    b = join("b", None, a)
    asked: list[set[str]] = []

    def unread(described: metadata.Description) -> str:
        asked.append(described.tensor_names())
        return "embeddings are tied here"

    with pytest.raises(StoreError, match="there are no files"):
        b.load({"loaded": nowhere, "checkpoint": nowhere, "disk": nowhere}, unread=unread)
    assert asked == [{"a.weight"}]
    (_, start) = starts.recall(tmp_path / "b")[0]
    assert start.steps[1].why == "embeddings are tied here"


def test_are_files_with_other_headers_than_it_was_configured_by_refused(
    join: Callable[..., Join], model: Path, tmp_path: Path
) -> None:
    a = seed(join, model)
    place = bare(tmp_path, a)
    said = json.loads((place / metadata.DESCRIPTION).read_text())
    header = said["headers"]["model.safetensors"]
    header["text"] = header["text"].replace("a.weight", "b.weight")
    (place / metadata.DESCRIPTION).write_text(json.dumps(said))
    b = join("b", place, a)
    b.load({"loaded": nowhere, "checkpoint": nowhere, "disk": lambda: None})
    with pytest.raises(ManifestInvalid, match="headers"):
        b.fetch_checkpoint()


def test_is_nothing_served_of_an_engine_that_shall_not(join: Callable[..., Join], model: Path) -> None:
    a = join("a", model, serve=False)
    a.load({"disk": lambda: None})
    a.ready()
    assert a.serving is None


def test_are_options_read_from_the_engine_and_the_environment() -> None:
    options = Options.read({"look_s": 1, "upload_limit": "10MB/s"}, {"SWARM_TIERS": "checkpoint", "SWARM_SERVE": "0"})
    assert (options.look_s, options.tiers, options.serve) == (1.0, ("checkpoint",), False)
    assert options.settings.upload_limit == 10e6
    assert Options.read({"tiers": ["loaded"]}, {"SWARM_TIERS": "checkpoint"}).tiers == ("loaded",)


@pytest.mark.parametrize("given", [{"tiers": "loded"}, {"look_s": "soon"}, {"uplod_limit": "1MB/s"}])
def test_are_options_that_mean_nothing_refused(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Options.read(given, {})
