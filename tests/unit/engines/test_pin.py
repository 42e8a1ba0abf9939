"""Engines that were started with a digest or a whole commit, among members that serve other bytes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from forgery import forging_source
from hub import Hub, Model, read_files

import swarm
from swarm.api import open_source, serve_source
from swarm.checkpoint import manifest_builder
from swarm.content.manifest import Manifest, ModelId
from swarm.engines import metadata
from swarm.engines.launch import prepare
from swarm.engines.layout import CONTENT, Fingerprint, metadata_id
from swarm.engines.load import RankLoader
from swarm.engines.pin import EnginePin
from swarm.engines.rank import LoadOptions, Rank
from swarm.errors import (
    ManifestInvalid,
    NotOfCommit,
    SettingsError,
    Stalled,
    StoreConflict,
    StoreError,
    Unpinnable,
)
from swarm.protocol.messages import Origin
from swarm.runtime import runtime
from swarm.settings import Settings
from swarm.store import Source

from .models import hashed

pytestmark = pytest.mark.usefixtures("brief")

MODEL = ModelId("org/model")
FIELDS = {"engine": "test", "tp": "0 of 1"}
COMMIT = "c" * 40


def nowhere(*_: object) -> None:
    raise StoreError("there are no files")


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Swarm:
    """Members with what they serve, and an engine's ranks that know them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.addresses: list[str] = []
        self.stall_timeout_s = 20.0
        self._open: list[swarm.Served] = []
        self._ranks: list[RankLoader] = []

    def serve(self, artifact: ModelId, source: Source, *, commit: str = "") -> None:
        name = f"member{len(self._open)}"
        settings = Settings(name=name, mdns=False, cache=self.root / name, origin="none", upload_limit=1e12)
        origin = Origin(commit, {}) if commit else None
        self._open.append(serve_source(artifact, source, origin, settings=settings))
        self.addresses.append(self._open[-1].address)

    def serve_model(self, path: Path, *, commit: str = "", described_as: Manifest | None = None) -> Manifest:
        """Serves the files and the metadata of a model."""
        cache = self.root / f"of-{path.name}"
        manifest = hashed(path, cache)
        self.serve(MODEL, open_source(path, model_id=MODEL, settings=Settings(cache=cache))[1], commit=commit)
        staged = metadata.stage(cache, path, manifest)
        if described_as:
            told = msgspec.json.encode(metadata.describe(described_as), order="sorted")
            (staged / metadata.DESCRIPTION).write_bytes(told)
        self.serve(metadata_id(MODEL), manifest_builder.files(staged, cache_dir=cache), commit=commit)
        return manifest

    def settings(self, **more: object) -> Settings:
        return Settings(
            name="engine", mdns=False, cache=self.root / "engine", peers=tuple(self.addresses), fsync=False,
            find_timeout_s=5, stall_timeout_s=self.stall_timeout_s, **more,  # type: ignore[arg-type]
        )  # fmt: skip

    def rank(self, model: Path | str, *, digest: str | None = None, revision: str | None = None) -> RankLoader:
        options = LoadOptions(self.settings(), model_id=MODEL, look_s=1.5, digest=digest)
        self._ranks.append(
            made := RankLoader("test 1", str(model), revision, Rank("0", 0), fields=FIELDS, options=options)
        )
        return made

    def close(self) -> None:
        for served in self._open:
            served.close()
        for rank in self._ranks:
            if rank.node.opened is not None:
                runtime().run(runtime().release(rank.settings))


@pytest.fixture
def members(tmp_path: Path) -> Iterator[Swarm]:
    made = Swarm(tmp_path)
    yield made
    made.close()


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    """A machine with nothing but the model's config."""
    path = tmp_path / "config"
    path.mkdir()
    shutil.copy(model / "config.json", path)
    return path


def copied(model: Path, name: str) -> Path:
    return Path(shutil.copytree(model, model.parent / name))


def evil_config(model: Path) -> Path:
    """The same weights, and a config of the same length that says something else."""
    path = copied(model, "evil")
    text = (path / "config.json").read_text().replace("true", "null")
    (path / "config.json").write_text(text)
    return path


def evil_weights(model: Path) -> Path:
    path = copied(model, "evil")
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    return path


def test_which_starts_are_pinned() -> None:
    digest = "d" * 64
    settings = Settings()
    for pin in (
        EnginePin.of(MODEL, digest=digest, revision=None),
        EnginePin.of(MODEL, digest=None, revision=COMMIT),
        EnginePin.of(MODEL, digest=digest, revision="main"),
    ):
        assert pin.settings(settings).chunk_hash == "blake3"
    assert EnginePin.of(MODEL, digest=None, revision="main").settings(settings) is settings
    with pytest.raises(SettingsError, match="not a digest"):
        EnginePin.of(MODEL, digest="abcdef", revision=None)
    assert LoadOptions.read({}, {"SWARM_DIGEST": digest}).digest == digest
    assert LoadOptions.read({"digest": digest}, {}).digest == digest


def test_does_a_digest_choose_among_members_that_contradict_each_other(
    members: Swarm, model: Path, config: Path
) -> None:
    members.serve_model(evil_weights(model))
    right = members.serve_model(model)
    rank = members.rank(config, digest=right.digest)
    assert rank.load({"checkpoint": rank.fetch_checkpoint, "disk": nowhere}, unread=lambda _: "") == "checkpoint"
    assert read_files(rank.fetch_checkpoint()) == read_files(model)


def test_is_another_checkpoint_on_this_machine_refused(members: Swarm, model: Path) -> None:
    with pytest.raises(StoreConflict, match=r"and SWARM_DIGEST pins dddd"):
        members.rank(model, digest="d" * 64)


def test_is_nothing_loaded_from_the_hub_that_a_digest_cannot_pin(members: Swarm, config: Path) -> None:
    rank = members.rank(config, digest="d" * 64)
    with pytest.raises(StoreConflict, match="what the engine downloads by itself has no digest"):
        rank.load({"checkpoint": nowhere, "disk": lambda: None})


def test_are_files_on_this_machine_hashed_before_they_are_loaded_under_a_digest(members: Swarm, model: Path) -> None:
    right = hashed(copied(model, "elsewhere"), members.root / "x")
    rank = members.rank(model, digest=right.digest)
    assert rank.load({"disk": lambda: None}) == "disk"
    assert rank.files.content == right.digest


@pytest.mark.parametrize("pin", ["digest", "commit"])
def test_are_forged_tensors_of_a_twin_refused(pin: str, members: Swarm, model: Path) -> None:
    """Other bytes under the right XXH3 digests."""
    members.stall_timeout_s = 1.0
    right = hashed(model, members.root / "x")
    rank_fields = Fingerprint({**FIELDS, CONTENT: right.digest})
    evil = forging_source(torch.randint(0, 256, (8 << 20,), dtype=torch.uint8))
    evil.manifest = msgspec.structs.replace(evil.manifest, tier="loaded", fingerprint=rank_fields.text)
    members.serve(rank_fields.model_id(MODEL), evil)
    described = members.root / "described"
    described.mkdir()
    (described / metadata.DESCRIPTION).write_bytes(msgspec.json.encode(metadata.describe(right)))
    rank = members.rank(described, **{"digest": right.digest} if pin == "digest" else {"revision": COMMIT})
    target = {"w": torch.zeros(8 << 20, dtype=torch.uint8)}
    with pytest.raises(StoreError):
        rank.load({"loaded": lambda: rank.fetch_loaded(target), "checkpoint": nowhere, "disk": nowhere})
    with pytest.raises(Stalled, match="wrong chunk"):
        rank.fetch_loaded(target)


def test_are_old_manifests_of_twins_refused_under_a_pin(members: Swarm, model: Path) -> None:
    right = hashed(model, members.root / "x")
    fields = Fingerprint({**FIELDS, CONTENT: right.digest})
    old = forging_source(torch.zeros(1 << 20, dtype=torch.uint8))
    files = tuple(msgspec.structs.replace(file, blake3=()) for file in old.manifest.files)
    old.manifest = msgspec.structs.replace(old.manifest, tier="loaded", fingerprint=fields.text, files=files)
    members.serve(fields.model_id(MODEL), old)
    described = members.root / "described"
    described.mkdir()
    (described / metadata.DESCRIPTION).write_bytes(msgspec.json.encode(metadata.describe(right)))
    rank = members.rank(described, digest=right.digest)
    with pytest.raises(StoreError):
        rank.load({"loaded": nowhere, "checkpoint": nowhere, "disk": nowhere})
    with pytest.raises(Unpinnable):
        rank.fetch_loaded({"w": torch.zeros(1 << 20, dtype=torch.uint8)})


def test_is_metadata_of_another_checkpoint_refused_under_a_digest(
    members: Swarm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hashed(model, members.root / "x")
    members.serve_model(evil_config(model), described_as=right)
    members.serve(MODEL, open_source(model, model_id=MODEL, settings=members.settings())[1])
    monkeypatch.setenv("SWARM_DIGEST", right.digest)
    with pytest.raises(ManifestInvalid, match=r"is not of the checkpoint .*config.json"):
        prepare(["vllm", "serve", MODEL], members.settings())


def test_is_metadata_of_an_earlier_start_without_a_pin_replaced(
    members: Swarm, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = hashed(model, members.root / "x")
    members.serve_model(evil_config(model), described_as=right)
    first = Path(prepare(["vllm", "serve", MODEL], members.settings()).command[2])
    assert "null" in (first / "config.json").read_text()
    members.close()
    honest = Swarm(members.root / "honest")
    honest.serve_model(model)
    monkeypatch.setenv("SWARM_DIGEST", right.digest)
    pinned = dataclasses.replace(members.settings(), peers=tuple(honest.addresses))
    launched = prepare(["vllm", "serve", MODEL], pinned)
    assert (Path(launched.command[2]) / "config.json").read_text() == (model / "config.json").read_text()
    assert launched.environment["SWARM_CHUNK_HASH"] == "blake3"
    honest.close()


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub({MODEL: Model(read_files(model))}) as made:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        yield made


def test_is_metadata_of_a_commit_compared_with_the_hub(members: Swarm, model: Path, hub: Hub) -> None:
    commit = hub.models[MODEL].commit
    members.serve_model(evil_config(model), commit=commit)
    launched = prepare(["vllm", "serve", MODEL, "--revision", commit], members.settings(origin="hf"))
    assert launched.command[2] == MODEL, "the files were read from the hub into its cache, and vLLM takes them there"
    snapshot = members.root / "hub" / "models--org--model" / "snapshots" / commit
    assert read_files(snapshot) == read_files(model)


def test_are_config_and_headers_of_an_honest_member_taken_for_a_commit(members: Swarm, model: Path, hub: Hub) -> None:
    commit = hub.models[MODEL].commit
    right = members.serve_model(model, commit=commit)
    launched = prepare(["vllm", "serve", MODEL, "--revision", commit], members.settings(origin="hf"))
    assert metadata.read(Path(launched.command[2])).content == right.digest


@pytest.mark.parametrize("before", [False, True], ids=["first start", "after a start without a pin"])
def test_is_a_checkpoint_that_is_not_the_commit_refused(
    before: bool, members: Swarm, model: Path, config: Path, hub: Hub
) -> None:
    commit = hub.models[MODEL].commit
    evil = members.serve_model(evil_weights(model), commit=commit)
    if before:
        unpinned = members.rank(config)
        tier = unpinned.load({"checkpoint": unpinned.fetch_checkpoint, "disk": nowhere}, unread=lambda _: "")
        assert tier == "checkpoint"
    rank = members.rank(config, revision=commit)
    with pytest.raises(StoreError, match="there are no files"):
        rank.load({"checkpoint": rank.fetch_checkpoint, "disk": nowhere}, unread=lambda _: "")
    with pytest.raises(NotOfCommit, match=r"model.safetensors has another content there"):
        rank.fetch_checkpoint()
    assert not (rank.settings.cache / "checkpoints" / evil.digest[:16]).exists()


def test_is_a_checkpoint_of_a_commit_proven_once(members: Swarm, model: Path, config: Path, hub: Hub) -> None:
    commit = hub.models[MODEL].commit
    members.serve_model(model, commit=commit)
    for _ in range(2):
        rank = members.rank(config, revision=commit)
        assert rank.load({"checkpoint": rank.fetch_checkpoint, "disk": nowhere}, unread=lambda _: "") == "checkpoint"
    assert len([asked for asked in hub.requests if asked.where == "api"]) == 1
