"""`revision=COMMIT`: members that serve other files as a commit of the hub, with and without the hub's listing."""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forgery import forging_source
from hub import Hub, Model, read_files

import swarm
from swarm.api import HUB_CACHE, fetch_on, find_on, open_source, serve_source
from swarm.cli.demo import write_made_up
from swarm.content.manifest import ModelId
from swarm.protocol.messages import Origin
from swarm.runtime import runtime
from swarm.settings import Settings
from swarm.transfer import commit_proof

pytestmark = pytest.mark.usefixtures("brief")

MODEL = ModelId("org/model")
Change = Callable[[Path], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_made_up(path / "model.safetensors", [("a", (300, 1000)), ("b", (200, 1000))], rng=np.random.default_rng(1))
    (path / "config.json").write_text('{"model_type": "made up"}')
    return path


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub({MODEL: Model(read_files(model))}) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield made


@pytest.fixture
def commit(hub: Hub) -> str:
    return hub.models[MODEL].commit


@pytest.fixture
def serve(tmp_path: Path, commit: str) -> Iterator[Callable[[Path], Settings]]:
    """Serves a directory as the commit; returns the settings of a newcomer."""
    opened = []

    def start(path: Path) -> Settings:
        seed = Settings(name="seed", mdns=False, cache=tmp_path / "seed", origin="none")
        name, source, _ = open_source(path, model_id=MODEL, settings=seed)
        opened.append(serve_source(name, source, Origin(commit, {}), settings=seed))
        return Settings(
            name="newcomer", mdns=False, cache=tmp_path / "cache", peers=(opened[-1].address,), find_timeout_s=5,
            stall_timeout_s=20,
        )  # fmt: skip

    yield start
    for served in opened:
        served.close()


def flipped(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def other_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "evil up"}')


def longer_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "made up", "auto_map": {}}')


def more(path: Path) -> None:
    (path / "modeling.py").write_text("import os")


def asked_for(hub: Hub) -> list[str]:
    return [asked.where for asked in hub.requests]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


TARGETS: list[Callable[[Path], dict[str, Any]]] = [
    lambda tmp: {"out": tmp / "out"},
    lambda _: {"out": HUB_CACHE},
    lambda _: {},
    lambda _: {
        "into": {"a": torch.zeros(300, 1000, dtype=torch.bfloat16), "b": torch.zeros(200, 1000, dtype=torch.bfloat16)}
    },
]


def same(weights: swarm.Weights, model: Path) -> bool:
    """Whether all that was fetched is the model's."""
    if weights.path is not None:
        here = {path: data for path, data in read_files(weights.path).items() if not path.startswith(".")}
        return here == read_files(model)
    from safetensors.torch import load_file

    right = load_file(model / "model.safetensors")
    tensors = all(torch.equal(weights[name].view(torch.uint8), right[name].view(torch.uint8)) for name in right)
    return tensors and bytes(weights.files["config.json"]) == (model / "config.json").read_bytes()


@pytest.mark.parametrize("target", TARGETS, ids=["directory", "hub cache", "memory", "into"])
def test_is_the_commit_of_an_honest_member_proven_by_one_listing(
    target: Callable[[Path], dict[str, Any]], serve: Callable[[Path], Settings], hub: Hub, commit: str, model: Path,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    there = serve(model)
    with swarm.fetch(MODEL, revision=commit, settings=there, **target(tmp_path)) as weights:
        assert same(weights, model)
        assert weights.fetched.sources == {"seed": weights.fetched.bytes}
        assert weights.fetched.proven is True
    assert asked_for(hub) == ["api"]
    assert said(caplog) == []
    (record,) = (there.cache / "proven").iterdir()
    assert record.stat().st_mode & 0o777 == 0o600


CHANGES: list[tuple[Change, Callable[[Path], dict[str, Any]]]] = [
    *((flipped, target) for target in TARGETS),
    (other_config, TARGETS[1]),
    (longer_config, TARGETS[0]),
    (more, TARGETS[0]),
]


@pytest.mark.parametrize(("change", "target"), CHANGES)
def test_are_other_files_under_a_commit_refused_and_the_hubs_read(
    target: Callable[[Path], dict[str, Any]], change: Change, serve: Callable[[Path], Settings], hub: Hub,
    commit: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    right = tmp_path / "right"
    right.mkdir()
    for path, data in read_files(model).items():
        (right / path).write_bytes(data)
    change(model)
    with swarm.fetch(MODEL, revision=commit, settings=serve(model), **target(tmp_path)) as weights:
        assert same(weights, right)
        assert weights.fetched.proven is True
        assert any(name.startswith("origin ") for name in weights.fetched.sources)
    (line,) = said(caplog)
    assert f"what members serve as commit {commit[:12]}" in line
    assert "a member lies, or has damaged files" in line
    assert not list(tmp_path.glob("out/.swarm"))
    assert not list(tmp_path.glob("hf/hub/*/.swarm*/*"))


def test_does_nothing_of_a_refused_artifact_count_as_proven(
    serve: Callable[[Path], Settings], commit: str, model: Path, tmp_path: Path
) -> None:
    flipped(model)
    there = serve(model)
    for name in ("first", "second"):
        with swarm.fetch(MODEL, revision=commit, settings=there, out=tmp_path / name) as weights:
            assert any(source.startswith("origin ") for source in weights.fetched.sources)


def test_does_the_next_fetch_need_no_hub(
    serve: Callable[[Path], Settings], hub: Hub, commit: str, model: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there = serve(model)
    swarm.fetch(MODEL, revision=commit, settings=there, out=tmp_path / "first").close()
    hub.fault = lambda _: "503"
    monkeypatch.setattr(commit_proof.CommitProof, "begin", lambda *_: pytest.fail("proven again"))
    with swarm.fetch(MODEL, revision=commit, settings=there, out=tmp_path / "second") as weights:
        assert weights.fetched.proven is True
    assert said(caplog) == []


def test_is_a_record_of_another_user_no_proof(
    serve: Callable[[Path], Settings], hub: Hub, commit: str, model: Path, tmp_path: Path
) -> None:
    there = serve(model)
    swarm.fetch(MODEL, revision=commit, settings=there, out=tmp_path / "first").close()
    (record,) = (there.cache / "proven").iterdir()
    record.chmod(0o666)
    hub.fault = lambda _: "503"
    with swarm.fetch(MODEL, revision=commit, settings=there, out=tmp_path / "second") as weights:
        assert weights.fetched.proven is False


def refused_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


CASES: list[tuple[str, dict[str, str], str]] = [
    ("offline", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"),
    ("refused", {"HF_ENDPOINT": ""}, "Connection refused"),
    ("other model", {}, "there is no model org/model"),
]


@pytest.mark.parametrize(("case", "environment", "why"), CASES, ids=[case for case, *_ in CASES])
def test_is_it_said_that_members_alone_vouch_for_a_commit(
    case: str, environment: dict[str, str], why: str, serve: Callable[[Path], Settings], hub: Hub, commit: str,
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    there = serve(model)
    for name, value in environment.items():
        monkeypatch.setenv(name, value or refused_port())
    if not environment:
        hub.models.clear()
    with swarm.fetch(MODEL, revision=commit, settings=there, out=tmp_path / "out") as weights:
        assert weights.fetched.proven is False
        assert why in weights.fetched.unproven
    (line,) = said(caplog)
    assert line.startswith(f"{MODEL}: that the files are those of commit {commit[:12]} is the word of members alone")
    assert why in line
    assert "--digest D" in line


def test_does_a_silent_hub_not_hold_a_start(
    serve: Callable[[Path], Settings], hub: Hub, commit: str, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(commit_proof, "LISTING_S", 0.2)
    released = threading.Event()
    hub.fault = lambda _: "503" if released.wait(20) else ""
    with swarm.fetch(MODEL, revision=commit, settings=serve(model), out=tmp_path / "out") as weights:
        assert "no answer within 0.2 s" in weights.fetched.unproven
    released.set()


@pytest.mark.parametrize(
    ("how", "why"),
    [({"tensors": "a"}, "fetched in part"), ({"dtype": "float32"}, "cast as they arrive")],
    ids=["part", "cast"],
)
def test_is_it_said_what_has_no_hash_at_the_hub(
    how: dict[str, Any], why: str, serve: Callable[[Path], Settings], commit: str, model: Path
) -> None:
    with swarm.fetch(MODEL, revision=commit, settings=serve(model), **how) as weights:
        assert why in weights.fetched.unproven


def test_is_a_whole_file_of_a_part_proven(
    serve: Callable[[Path], Settings], commit: str, model: Path, tmp_path: Path
) -> None:
    there = serve(model)
    with swarm.fetch(MODEL, revision=commit, settings=there, out=tmp_path / "out", include="*.json") as weights:
        assert weights.fetched.proven is True
    assert not (there.cache / "proven").exists(), "the rest of the artifact was not looked at"


def test_is_the_hub_not_asked_where_a_digest_pins(
    serve: Callable[[Path], Settings], hub: Hub, commit: str, model: Path, tmp_path: Path
) -> None:
    there = serve(model)
    with swarm.fetch(MODEL, revision=commit, settings=there) as weights:
        digest = weights.digest
    hub.requests.clear()
    with swarm.fetch(MODEL, revision=commit, digest=digest, settings=there, out=tmp_path / "out") as weights:
        assert weights.fetched.proven is None
    assert hub.requests == []


def test_does_the_hub_decide_between_two_members_that_serve_one_commit(
    serve: Callable[[Path], Settings], hub: Hub, commit: str, model: Path, tmp_path: Path
) -> None:
    there = serve(model)
    evil = tmp_path / "evil"
    evil.mkdir()
    for path, data in read_files(model).items():
        (evil / path).write_bytes(data)
    flipped(evil)
    seed = Settings(name="liar", mdns=False, cache=tmp_path / "liar", origin="none", peers=there.peers)
    name, source, _ = open_source(evil, model_id=MODEL, settings=seed)
    with serve_source(name, source, Origin(commit, {}), settings=seed) as liar:
        both = dataclasses.replace(there, peers=(*there.peers, liar.address))
        with swarm.fetch(MODEL, revision=commit, settings=both, out=tmp_path / "out") as weights:
            assert same(weights, model)
            assert weights.fetched.proven is True


def test_is_a_forger_refused_by_the_fetch_of_an_artifact_that_was_found_before(tmp_path: Path) -> None:
    """As the agent of a machine fetches, for callers that pin a digest and for others."""
    evil = forging_source(torch.randint(0, 256, (8 << 20,), dtype=torch.uint8))
    seed = Settings(name="seed", mdns=False, cache=tmp_path / "seed", origin="none", upload_limit=1e12)

    async def fetch(settings: Settings) -> None:
        node = await runtime().acquire(settings)
        try:
            how: dict[str, Any] = {"digest": evil.manifest.digest, "revision": None, "settings": settings}
            found = await find_on(node, MODEL, find_timeout_s=10, **how)
            how["digest"] = None
            await fetch_on(node, MODEL, timeout_s=60, found=found, **how)
        finally:
            await runtime().release(settings)

    with serve_source(MODEL, evil, None, settings=seed) as served:
        newcomer = dataclasses.replace(seed, name="newcomer", peers=(served.address,), stall_timeout_s=2)
        with pytest.raises(swarm.Stalled, match="wrong chunk"):
            runtime().run(fetch(newcomer))
