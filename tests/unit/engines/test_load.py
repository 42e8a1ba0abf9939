"""Loads of several workers in one process: real nodes, tensors without an engine."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import swarm
from swarm.engines import load, metadata, start_log
from swarm.engines.launch import prepare
from swarm.engines.layout import is_loaded, metadata_id
from swarm.engines.load import RankLoader
from swarm.engines.rank import LOOK_BESIDE_FILES_S, LoadOptions, Rank
from swarm.engines.tiers import TierName
from swarm.errors import ManifestInvalid, RevisionNotFound, SettingsError, StoreConflict, StoreError, SwarmError
from swarm.node.node import Node
from swarm.runtime import runtime
from swarm.settings import Settings

from .models import hashed

pytestmark = pytest.mark.usefixtures("brief")

MODEL = "org/model"
FIELDS = {"engine": "test", "tp": "0 of 1"}


def tensors(value: float) -> dict[str, torch.Tensor]:
    head = torch.full((64, 8), value)
    return {"embed": head, "head": head, "norm": torch.full((8,), value + 1)}


def nowhere(*_: object) -> None:
    raise StoreError("there are no files")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RankLoader]]:
    made: list[RankLoader] = []
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def started(
        name: str,
        directory: Path | None,
        *peers: RankLoader,
        fields: dict[str, str] = FIELDS,
        rank: int = 0,
        upload_limit: float | None = None,
        revision: str | None = None,
        **more: object,
    ) -> RankLoader:
        settings = Settings(
            name=name,
            mdns=False,
            cache=tmp_path / name,
            peers=tuple(map(address, peers)),
            fsync=False,
            upload_limit=upload_limit,
            origin="none",
        )
        options = LoadOptions(settings, model_id=MODEL, look_s=3.0 if peers else 0.1)
        options = dataclasses.replace(options, **more)  # type: ignore[arg-type]
        model = str(directory or MODEL)
        loader = RankLoader("test 1", model, revision, Rank(str(rank), rank), fields=fields, options=options)
        made.append(loader)
        return loader

    yield started
    for loader in made:
        if loader.node.opened is not None:
            runtime().run(runtime().release(loader.settings))


def address(loader: RankLoader) -> str:
    assert loader.node.opened is not None
    return loader.node.opened.address


def seed(
    start: Callable[..., RankLoader], model: Path, kept: dict[str, torch.Tensor] | None = None, **more: object
) -> RankLoader:
    """A worker that has loaded from disk and serves."""
    a = start("a", model, **more)
    assert a.load({"disk": lambda: None}) == "disk"
    a.server.keep(lambda: kept or tensors(1.0))
    a.ready()
    assert a.server.serving is not None
    a.server.serving.result(30)
    return a


def bare(tmp_path: Path, a: RankLoader, name: str = "b") -> Path:
    """What `swarm run` lays out on a machine that has nothing."""
    assert a.files.content is not None
    staged = metadata.staged(tmp_path / "a", a.files.content)
    assert staged is not None
    return metadata.lay_out(tmp_path / name, MODEL, metadata.adopt(tmp_path / name, staged))


def test_does_a_twin_get_the_tensors_and_serve_them_on(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model)
    b = start("b", bare(tmp_path, a), a)
    got = tensors(0.0)
    assert b.load({"loaded": lambda: b.fetch_loaded(got), "checkpoint": nowhere, "disk": nowhere}) == "loaded"
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors(1.0).items())
    assert b.fingerprint == a.fingerprint
    a.server.begin_change("a test")
    c = start("c", bare(tmp_path, a, "c"), b)
    again = tensors(0.0)
    assert c.load({"loaded": lambda: c.fetch_loaded(again), "disk": nowhere}) == "loaded"
    assert torch.equal(again["head"], got["head"])


def test_does_a_newcomer_get_all_of_a_model_of_several_files(
    start: Callable[..., RankLoader], sharded: Path, tmp_path: Path
) -> None:
    a = seed(start, sharded)
    b = start("b", bare(tmp_path, a), a)
    assert b.files.description is not None
    assert b.files.description.tensor_names() == {"a.weight", "b.weight", "c.weight"}
    got = tensors(0.0)
    assert b.load({"loaded": lambda: b.fetch_loaded(got), "checkpoint": nowhere, "disk": nowhere}) == "loaded"
    c = start("c", bare(tmp_path, a, "c"), a, fields={**FIELDS, "tp": "0 of 2"})
    found: list[Path] = []
    assert c.load({"checkpoint": lambda: found.append(c.fetch_checkpoint()), "disk": nowhere}) == "checkpoint"
    assert metadata.is_whole(found[0])


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_are_twins_found_while_the_engine_builds_the_model(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = seed(start, model)
    b = start("b", bare(tmp_path, a), a)
    b.begin()
    until(lambda: b._ahead)
    monkeypatch.setattr(load, "resolve", nowhere)  # whose answer is here already
    got = tensors(0.0)
    assert b.load({"loaded": lambda: b.fetch_loaded(got), "checkpoint": nowhere, "disk": nowhere}) == "loaded"
    assert torch.equal(got["head"], tensors(1.0)["head"])


def test_is_the_manifest_of_a_twin_that_left_asked_for_again(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model, tensors(1.0))
    b = start("b", bare(tmp_path, a), a)
    b.begin()
    until(lambda: b._ahead)
    a.node.withdraw({one.digest for one in b._ahead.values()}, "a test")
    assert b.node.opened is not None
    node, (artifact,) = b.node.opened, b._ahead
    until(lambda: not node.holders(artifact))
    got = tensors(0.0)
    assert b.load({"loaded": lambda: b.fetch_loaded(got), "checkpoint": nowhere, "disk": lambda: None}) == "disk"


@pytest.mark.parametrize("look_s", [None, LOOK_BESIDE_FILES_S + 0.3])
def test_does_an_engine_with_files_wait_no_longer_than_it_was_told_for_peers(
    look_s: float | None,
    start: Callable[..., RankLoader],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hashed(model, tmp_path / "a")
    a = start("a", model, look_s=look_s)
    a.begin()
    until(lambda: a.node.opened)
    a.node.opened_at_s -= LOOK_BESIDE_FILES_S
    waits: list[float] = []

    real = Node.changed

    async def changed(self: Node, timeout_s: float) -> None:
        if self is not a.node.opened:
            await real(self, timeout_s)
            return
        waits.append(timeout_s)
        await real(self, timeout_s)

    monkeypatch.setattr(Node, "changed", changed)
    assert a.load({"disk": lambda: None}) == "disk"
    assert bool(waits) == (look_s is not None)


def test_are_files_and_metadata_served_under_the_revision_of_the_command(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model, revision="v2")
    ours = dataclasses.replace(a.settings, name="b", cache=tmp_path / "b", peers=(address(a),))
    launched = prepare(["vllm", "serve", MODEL, "--revision", "v2"], ours)
    assert metadata.read(Path(launched.command[2])).content == a.files.content
    with swarm.fetch(MODEL, out=tmp_path / "files", revision="v2", settings=ours):
        assert metadata.is_whole(tmp_path / "files")
    other = prepare(["vllm", "serve", MODEL, "--revision", "v1"], ours)
    assert other.command[2] == MODEL, "vLLM itself gets that of the hub"
    with pytest.raises(RevisionNotFound, match="v2"):
        swarm.fetch(MODEL, out=tmp_path / "other", revision="v1", settings=ours)


def test_is_a_model_without_headers_looked_for_under_the_revision_of_the_command(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model, revision="v2")
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text("{}")
    found = {}
    for revision in ("v1", "v2"):
        b = start(f"b-{revision}", config, a, revision=revision)
        found[revision] = b.load({"checkpoint": b.fetch_checkpoint, "disk": lambda: None}, unread=lambda _: "")
    assert found == {"v1": "disk", "v2": "checkpoint"}


FAILING: dict[str, Callable[[RankLoader], tuple[object, str] | None]] = {
    "the checkpoint": lambda a: (a.files, "_hash"),
    "metadata": lambda a: (metadata, "stage"),
    "loaded tensors": lambda a: (a.server, "_serve"),
    "the compile cache": lambda a: None,
}


@pytest.mark.parametrize("failing", FAILING)
def test_does_what_cannot_be_served_keep_nothing_else_from_being_served(
    failing: str,
    start: Callable[..., RankLoader],
    sharded: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    manifest = hashed(sharded, tmp_path / "a")  # so that the loaded content is known
    a = start("a", sharded)
    a.load({"disk": lambda: None})
    a.server.keep(lambda: tensors(1.0))
    assert a.files.content is not None
    metadata.stage(tmp_path / "a", sharded, manifest)
    if patched := FAILING[failing](a):
        monkeypatch.setattr(*patched, nowhere)
    compiled: list[str] = []
    a.ready(nowhere if failing == "the compile cache" else lambda: compiled.append("served"))
    assert a.server.serving is not None
    with pytest.raises(StoreError, match="there are no files"):
        a.server.serving.result(30)
    assert a.node.opened is not None
    served = {"the compile cache"} if compiled else set()
    for one in a.node.opened._shares.announcements():
        served |= {"loaded tensors"} if is_loaded(one.model_id, MODEL) else set()
        served |= {"metadata"} if one.model_id == metadata_id(MODEL) else set()
        served |= {"the checkpoint"} if one.model_id == MODEL else set()
    assert served == set(FAILING) - {failing}
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == f"org/model rank 0: {failing} cannot be served: there are no files"


def test_is_nothing_served_by_the_name_of_files_that_changed_while_they_were_loaded(
    start: Callable[..., RankLoader], sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = start("a", sharded)
    a.load({"disk": lambda: None})
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    a.server.keep(lambda: tensors(1.0))
    with caplog.at_level("INFO", "swarm"):
        a.ready()
        assert a.server.serving is not None
        with pytest.raises(StoreConflict, match="other files than were loaded"):
            a.server.serving.result(30)
    assert a.node.opened is None or not a.node.opened._shares.announcements()
    assert "loaded tensors are not served: the checkpoint's content is not known" in caplog.text


def test_is_a_weight_version_given_to_who_asks_for_it_alone(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model)
    a.server.begin_change("a test")
    a.server.end_change()
    a.server.set_version("v1", lambda: tensors(5.0))
    assert a.server.serving is not None
    a.server.serving.result(30)
    got = {name: tensors(0.0) for name in ("b", "c", "d", "e")}

    def load(one: RankLoader, name: str) -> TierName:
        return one.load({"loaded": lambda: one.fetch_loaded(got[name]), "checkpoint": lambda: None, "disk": nowhere})

    b = start("b", bare(tmp_path, a), a)
    assert load(b, "b") == "checkpoint"
    (_, recorded) = start_log.recall(tmp_path / "b")[0]
    assert "weight_version is (not said) here and v1 there" in recorded.attempts[0].why
    c = start("c", bare(tmp_path, a, "c"), a, weight_version="v1")
    assert load(c, "c") == "loaded"
    assert torch.equal(got["c"]["head"], tensors(5.0)["head"])
    d = start("d", bare(tmp_path, a, "d"), a, weight_version="v2")
    with pytest.raises(SwarmError, match=r"weight version 'v2'.*v2 here and v1 there"):
        load(d, "d")
    e = start("e", model, a, weight_version="v1")  # has files that nobody hashed, which would do for another
    assert load(e, "e") == "loaded"
    assert torch.equal(got["e"]["norm"], tensors(5.0)["norm"])


def test_is_a_weight_version_not_looked_for_on_the_disk_when_the_swarm_fails(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = start("a", model, weight_version="v1")
    monkeypatch.setattr(a, "_available", nowhere)
    with pytest.raises(SwarmError, match=r"weight version 'v1'.*there are no files"):
        a.load({"loaded": lambda: None, "checkpoint": lambda: None, "disk": lambda: None})


def test_does_another_layout_get_the_files_and_the_record_says_why(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model)
    b = start("b", bare(tmp_path, a), a, fields={**FIELDS, "tp": "0 of 2"})
    found: list[Path] = []
    ways: dict[TierName, Callable[[], object]] = {
        "loaded": nowhere,
        "checkpoint": lambda: found.append(b.fetch_checkpoint()),
        "disk": nowhere,
    }
    assert b.load(ways) == "checkpoint"
    assert (found[0] / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    (_, recorded) = start_log.recall(tmp_path / "b")[0]
    assert [(attempt.tier, attempt.taken) for attempt in recorded.attempts] == [("loaded", False), ("checkpoint", True)]
    assert "tp is 0 of 2 here and 0 of 1 there" in recorded.attempts[0].why
    other_rank = start("b", bare(tmp_path, a), a, fields={**FIELDS, "tp": "1 of 2"}, rank=1)
    a.server.begin_change("a test")
    assert other_rank.fetch_checkpoint() == found[0]  # the ranks of a host share it


def test_are_tensors_of_another_shape_refused_before_any_is_written(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model)
    b = start("b", bare(tmp_path, a), a)
    untied = {**tensors(0.0), "head": torch.zeros(64, 8)}
    with pytest.raises(StoreError, match="there are no files"):
        b.load({"loaded": lambda: b.fetch_loaded(untied), "checkpoint": nowhere, "disk": nowhere})
    assert untied["embed"].sum() == 0
    (_, recorded) = start_log.recall(tmp_path / "b")[0]
    assert "is no twin: 1 missing there: head; 1 tied differently: head" in recorded.attempts[0].why


def test_does_an_engine_with_files_not_wait_for_a_source_that_died(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hashed(model, tmp_path / "b")
    big = {"weight": torch.ones(4 << 20)}
    a = seed(start, model, big, upload_limit=1e6)
    b = start("b", model, a)

    def die() -> None:
        a.node.opened = None
        runtime().run(runtime().release(a.settings))

    def loaded() -> None:
        threading.Timer(0.5, die).start()
        b.fetch_loaded({"weight": torch.zeros(4 << 20)})

    assert b.load({"loaded": loaded, "disk": lambda: None}) == "disk"
    (_, recorded) = start_log.recall(tmp_path / "b")[0]
    assert "stalled" in recorded.attempts[0].why
    assert recorded.attempts[0].failed
    assert recorded.attempts[0].seconds < 5.0, "not stall_timeout_s, which is 30 s"


def test_does_the_log_tell_transport_and_rate_of_a_fetch(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = seed(start, model)
    b, c = start("b", bare(tmp_path, a), a), start("c", bare(tmp_path, a, "c"), a, fields={**FIELDS, "tp": "0 of 2"})
    with caplog.at_level("INFO", "swarm"):
        b.load({"loaded": lambda: b.fetch_loaded(tensors(0.0))})
        c.load({"checkpoint": c.fetch_checkpoint})
    fetched = [record.getMessage() for record in caplog.records if " fetched " in record.getMessage()]
    assert len(fetched) == 2
    for line in fetched:
        assert re.search(
            r"fetched [0-9.]+ kB over inproc in [0-9.]+ s \([0-9.]+ .?B/s\) from 1 source \(a-0 [0-9]+ bytes\)", line
        )


def test_is_a_model_that_the_engine_downloaded_served_at_once(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / ("c" * 40)

    def download() -> None:
        snapshot.parent.parent.joinpath("refs").mkdir(parents=True)
        snapshot.parent.parent.joinpath("refs", "main").write_text(snapshot.name)
        shutil.copytree(model, snapshot)

    a = start("a", None)
    assert a.load({"disk": download}) == "disk"
    assert a.files.content is None, "it is known once the files are hashed"
    a.server.keep(lambda: tensors(1.0))
    a.ready()
    assert a.server.serving is not None
    a.server.serving.result(30)
    b = start("b", bare(tmp_path, a), a)
    got = tensors(0.0)
    assert b.load({"loaded": lambda: b.fetch_loaded(got), "disk": nowhere}) == "loaded"
    assert torch.equal(got["head"], tensors(1.0)["head"])
    c = start("c", bare(tmp_path, a, "c"), a, fields={**FIELDS, "tp": "0 of 2"})
    assert c.load({"checkpoint": c.fetch_checkpoint, "disk": nowhere}) == "checkpoint"


def test_is_a_download_not_served_as_the_content_of_peers(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    """The hub's revision may differ from the content that peers serve, and that the metadata was of."""
    a = seed(start, model)
    b = start("b", bare(tmp_path, a), a)
    assert b.load({"loaded": nowhere, "checkpoint": nowhere, "disk": lambda: None}) == "disk"
    b.server.keep(lambda: tensors(2.0))
    b.ready()
    assert b.server.serving is not None
    b.server.serving.result(30)
    assert b.node.opened is not None
    assert b.node.opened._shares.announcements() == ()


def test_is_it_disk_when_there_is_no_peer(start: Callable[..., RankLoader], model: Path) -> None:
    a = start("a", model)
    assert a.load({"disk": lambda: None}) == "disk"
    assert (a.files.local, a.files.content) == ("whole", None)


def test_is_a_model_without_headers_built_only_if_nothing_depended_on_them(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model)
    b = start("b", None, a)
    asked: list[set[str]] = []

    def unread(described: metadata.CheckpointDescription) -> str:
        asked.append(described.tensor_names())
        return "embeddings are tied here"

    with pytest.raises(StoreError, match="there are no files"):
        b.load({"loaded": nowhere, "checkpoint": nowhere, "disk": nowhere}, unread=unread)
    assert asked == [{"a.weight"}]
    (_, recorded) = start_log.recall(tmp_path / "b")[0]
    assert recorded.attempts[1].why == "embeddings are tied here"


def test_are_files_with_other_headers_than_it_was_configured_by_refused(
    start: Callable[..., RankLoader], model: Path, tmp_path: Path
) -> None:
    a = seed(start, model)
    place = bare(tmp_path, a)
    said = json.loads((place / metadata.DESCRIPTION).read_text())
    header = said["headers"]["model.safetensors"]
    header["text"] = header["text"].replace("a.weight", "b.weight")
    (place / metadata.DESCRIPTION).write_text(json.dumps(said))
    b = start("b", place, a)
    with pytest.raises(StoreError, match="there are no files"):
        b.load({"loaded": nowhere, "checkpoint": nowhere, "disk": nowhere})
    with pytest.raises(ManifestInvalid, match="headers"):
        b.fetch_checkpoint()


def test_is_nothing_served_of_an_engine_that_shall_not(start: Callable[..., RankLoader], model: Path) -> None:
    a = start("a", model, serve=False)
    a.load({"disk": lambda: None})
    a.ready()
    assert a.server.serving is None


def test_are_options_read_from_the_engine_and_the_environment() -> None:
    assert LoadOptions.read({}, {"SWARM_WEIGHT_VERSION": "v1"}).weight_version == "v1"
    assert LoadOptions.read({"weight_version": ""}, {}).weight_version is None
    options = LoadOptions.read(
        {"look_s": 1, "upload_limit": "10MB/s"}, {"SWARM_TIERS": "checkpoint", "SWARM_SERVE": "0"}
    )
    assert (options.look_s, options.tiers, options.serve) == (1.0, ("checkpoint",), False)
    assert options.settings.upload_limit == 10e6
    assert LoadOptions.read({"tiers": ["loaded"]}, {"SWARM_TIERS": "checkpoint"}).tiers == ("loaded",)


@pytest.mark.parametrize("given", [{"tiers": "loded"}, {"look_s": "soon"}, {"uplod_limit": "1MB/s"}])
def test_are_options_that_mean_nothing_refused(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        LoadOptions.read(given, {})
