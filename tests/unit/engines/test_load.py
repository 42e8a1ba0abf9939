"""Joins of two workers in one process: real nodes, tensors without an engine."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from swarm.checkpoint import manifest_builder
from swarm.engines import metadata, start_log
from swarm.engines.layout import is_loaded, metadata_id
from swarm.engines.load import Join, Options, Rank
from swarm.engines.tiers import TierName
from swarm.errors import ManifestInvalid, SettingsError, StoreConflict, StoreError, SwarmError
from swarm.runtime import runtime
from swarm.settings import Settings

MODEL = "org/model"
FIELDS = {"engine": "test", "tp": "0 of 1"}


def tensors(value: float) -> dict[str, torch.Tensor]:
    head = torch.full((64, 8), value)
    return {"embed": head, "head": head, "norm": torch.full((8,), value + 1)}


def nowhere(*_: object) -> None:
    raise StoreError("there are no files")


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


def seed(join: Callable[..., Join], model: Path, **more: object) -> Join:
    """A worker that has loaded from disk and serves."""
    a = join("a", model, **more)
    assert a.load({"disk": lambda: None}) == "disk"
    a.offer.keep(lambda: tensors(1.0))
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
    a.offer.change("a test")
    c = join("c", bare(tmp_path, a, "c"), b)
    again = tensors(0.0)
    assert c.load({"loaded": lambda: c.fetch_loaded(again), "disk": nowhere}) == "loaded"
    assert torch.equal(again["head"], got["head"])


def test_does_a_newcomer_get_all_of_a_model_of_several_files(
    join: Callable[..., Join], sharded: Path, tmp_path: Path
) -> None:
    a = seed(join, sharded)
    b = join("b", bare(tmp_path, a), a)
    assert b.described is not None
    assert b.described.tensor_names() == {"a.weight", "b.weight", "c.weight"}
    got = tensors(0.0)
    assert b.load({"loaded": lambda: b.fetch_loaded(got), "checkpoint": nowhere, "disk": nowhere}) == "loaded"
    c = join("c", bare(tmp_path, a, "c"), a, fields={**FIELDS, "tp": "0 of 2"})
    found: list[Path] = []
    assert c.load({"checkpoint": lambda: found.append(c.fetch_checkpoint()), "disk": nowhere}) == "checkpoint"
    assert metadata.is_whole(found[0])


FAILING: dict[str, Callable[[Join], tuple[object, str] | None]] = {
    "the checkpoint": lambda a: (a, "_hash_files"),
    "metadata": lambda a: (metadata, "stage"),
    "loaded tensors": lambda a: (a.offer, "_serve"),
    "what was compiled": lambda a: None,
}


@pytest.mark.parametrize("failing", FAILING)
def test_does_what_cannot_be_served_keep_nothing_else_from_being_served(
    failing: str,
    join: Callable[..., Join],
    sharded: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    for path in sharded.iterdir():
        os.utime(path, (1, 1))  # long enough ago for the hashes to be trusted: it is known what was loaded
    _, source, _ = manifest_builder.checkpoint(sharded, cache_dir=tmp_path / "a")
    source.close()
    a = join("a", sharded)
    a.load({"disk": lambda: None})
    a.offer.keep(lambda: tensors(1.0))
    assert a.content is not None
    metadata.stage(tmp_path / "a", sharded, source.manifest)
    if patched := FAILING[failing](a):
        monkeypatch.setattr(*patched, nowhere)
    compiled: list[str] = []
    a.ready(nowhere if failing == "what was compiled" else lambda: compiled.append("served"))
    assert a.serving is not None
    with pytest.raises(StoreError, match="there are no files"):
        a.serving.result(30)
    assert a._node is not None
    served = {"what was compiled"} if compiled else set()
    for one in a._node._shares.announcements():
        served |= {"loaded tensors"} if is_loaded(one.model_id, MODEL) else set()
        served |= {"metadata"} if one.model_id == metadata_id(MODEL) else set()
        served |= {"the checkpoint"} if one.model_id == MODEL else set()
    assert served == set(FAILING) - {failing}
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == f"org/model rank 0: {failing} cannot be served: there are no files"


def test_is_nothing_served_by_the_name_of_files_that_changed_while_they_were_loaded(
    join: Callable[..., Join], sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = join("a", sharded)
    a.load({"disk": lambda: None})
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    a.offer.keep(lambda: tensors(1.0))
    with caplog.at_level("INFO", "swarm"):
        a.ready()
        assert a.serving is not None
        with pytest.raises(StoreConflict, match="other files than were loaded"):
            a.serving.result(30)
    assert a._node is None or not a._node._shares.announcements()
    assert "loaded tensors are not served: it is not known which checkpoint they are of" in caplog.text


def test_is_a_weight_version_given_to_who_asks_for_it_alone(
    join: Callable[..., Join], model: Path, tmp_path: Path
) -> None:
    a = seed(join, model)
    a.offer.change("a test")
    a.offer.changed()
    a.offer.call("v1", lambda: tensors(5.0))
    assert a.serving is not None
    a.serving.result(30)
    got = {name: tensors(0.0) for name in ("b", "c", "d", "e")}

    def load(one: Join, name: str) -> TierName:
        return one.load({"loaded": lambda: one.fetch_loaded(got[name]), "checkpoint": lambda: None, "disk": nowhere})

    b = join("b", bare(tmp_path, a), a)
    assert load(b, "b") == "checkpoint"
    (_, start) = start_log.recall(tmp_path / "b")[0]
    assert "weight_version is (not said) here and v1 there" in start.steps[0].why
    c = join("c", bare(tmp_path, a, "c"), a, weight_version="v1")
    assert load(c, "c") == "loaded"
    assert torch.equal(got["c"]["head"], tensors(5.0)["head"])
    d = join("d", bare(tmp_path, a, "d"), a, weight_version="v2")
    with pytest.raises(SwarmError, match=r"weight version 'v2'.*v2 here and v1 there"):
        load(d, "d")
    e = join("e", model, a, weight_version="v1")  # has files that nobody hashed, which would do for another
    assert load(e, "e") == "loaded"
    assert torch.equal(got["e"]["norm"], tensors(5.0)["norm"])


def test_is_a_weight_version_not_looked_for_on_the_disk_when_the_swarm_fails(
    join: Callable[..., Join], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = join("a", model, weight_version="v1")
    monkeypatch.setattr(a, "_situation", nowhere)
    with pytest.raises(SwarmError, match=r"weight version 'v1'.*there are no files"):
        a.load({"loaded": lambda: None, "checkpoint": lambda: None, "disk": lambda: None})


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
    (_, start) = start_log.recall(tmp_path / "b")[0]
    assert [(step.tier, step.taken) for step in start.steps] == [("loaded", False), ("checkpoint", True)]
    assert "tp is 0 of 2 here and 0 of 1 there" in start.steps[0].why
    other_rank = join("b", bare(tmp_path, a), a, fields={**FIELDS, "tp": "1 of 2"}, rank=1)
    a.offer.change("a test")
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
    (_, start) = start_log.recall(tmp_path / "b")[0]
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
    (_, start) = start_log.recall(tmp_path / "b")[0]
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
    assert Options.read({}, {"SWARM_WEIGHT_VERSION": "v1"}).weight_version == "v1"
    assert Options.read({"weight_version": ""}, {}).weight_version is None
    options = Options.read({"look_s": 1, "upload_limit": "10MB/s"}, {"SWARM_TIERS": "checkpoint", "SWARM_SERVE": "0"})
    assert (options.look_s, options.tiers, options.serve) == (1.0, ("checkpoint",), False)
    assert options.settings.upload_limit == 10e6
    assert Options.read({"tiers": ["loaded"]}, {"SWARM_TIERS": "checkpoint"}).tiers == ("loaded",)


@pytest.mark.parametrize("given", [{"tiers": "loded"}, {"look_s": "soon"}, {"uplod_limit": "1MB/s"}])
def test_are_options_that_mean_nothing_refused(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Options.read(given, {})
