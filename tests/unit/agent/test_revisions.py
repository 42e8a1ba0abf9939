"""Revisions: what is a program told while the origin rests, and what if its answer is odd, late, or a denial?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from swarm.agent import revisions as module
from swarm.agent.revisions import Revision, Revisions
from swarm.content.manifest import FileEntry, ModelId
from swarm.content.promise import ListedFile, Listing
from swarm.errors import (
    AgentError,
    ManifestNotFound,
    OriginBusy,
    OriginDenied,
    OriginNotFound,
    OriginUnreachable,
    OriginUnusable,
    SwarmError,
)
from swarm.node.cold_start import Found
from swarm.protocol.messages import Origin
from swarm.settings import Settings


class DeadOrigin:
    """An origin that never answers, and counts."""

    scheme, address = "hf", "hub"
    asked = 0

    def __init__(self, _environment: object) -> None:
        pass

    def listing(self, _model: str, _revision: str | None) -> None:
        DeadOrigin.asked += 1
        raise OriginUnreachable("hub", "does not answer")


def test_is_no_model_called_missing_while_the_origin_rests(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def nowhere(*_: object, **__: object) -> None:
        raise ManifestNotFound("org/m", tried=[], waited_s=1.0)

    monkeypatch.setattr(module, "HubOrigin", DeadOrigin)
    monkeypatch.setattr(module, "find_on", nowhere)
    monkeypatch.setattr("swarm.checkpoint.hf_cache.snapshot", lambda *_, **__: None)
    monkeypatch.setattr(DeadOrigin, "asked", 0)
    node: Any = SimpleNamespace(now=lambda: 0.0, holders=lambda _: ())

    async def scenario() -> None:
        revisions = Revisions(node, Settings())
        for model_id in ("org/a", "org/b", "org/a"):
            with pytest.raises(OriginUnreachable, match="does not answer"):
                await revisions.get(ModelId(model_id), "main", None)

    asyncio.run(scenario())
    assert DeadOrigin.asked == 1
    assert caplog.text.count("peers alone are asked for the next 30 s") == 1


COMMIT = "c" * 40


class Hub:
    """An origin whose answer for a model is a function; it counts."""

    scheme, address = "hf", "hub"
    answer: Callable[[str, str | None], Listing] = staticmethod(lambda model, _revision: listing(model))
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def __init__(self, _environment: object) -> None:
        pass

    def read(self, *_: object) -> None:
        pass

    def listing(self, model: str, revision: str | None) -> Listing:
        Hub.asked.append((model, revision))
        return Hub.answer(model, revision)


def listing(model: str, files: int = 1) -> Listing:
    return Listing(f"hub/{model}", COMMIT, tuple(ListedFile(f"{n}", 1, "sha256:" + "a" * 64) for n in range(files)))


def of_peers(commit: str) -> Found:
    manifest: Any = SimpleNamespace(promised=False, files=(), digest="d" * 64)
    return Found(manifest, Origin(commit, {}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(module, "HubOrigin", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr("swarm.checkpoint.hf_cache.snapshot", lambda *_, **__: None)
    return Hub


def told(revisions: Revisions, *models: str) -> list[object]:
    """The commits that a program is told, or the failures."""

    async def ask(model: str) -> object:
        try:
            return (await revisions.get(ModelId(model), "main", None)).commit
        except SwarmError as error:
            return type(error)

    async def scenario() -> list[object]:
        return [await ask(model) for model in models]

    return asyncio.run(scenario())


def made() -> Revisions:
    node: Any = SimpleNamespace(now=lambda: 0.0, holders=lambda _: ())
    return Revisions(node, Settings())


@pytest.mark.parametrize("commit", [COMMIT, ""])
@pytest.mark.parametrize("failure", [OriginNotFound("hub", "there is no model"), OriginUnusable("hub", "no JSON")])
def test_is_a_commit_of_the_origin_denied_that_the_origin_does_not_list(
    failure: SwarmError, commit: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private model is missing, for programs that may not read it; a model of the swarm alone is missing too."""

    async def found(*_: object, **__: object) -> Found:
        return of_peers(commit)

    def answer(model: str, _revision: str | None) -> Listing:
        if model == "org/m":
            raise failure
        return listing(model)

    monkeypatch.setattr(module, "find_on", found)
    monkeypatch.setattr(hub, "answer", staticmethod(answer))
    assert told(made(), "org/m", "org/other") == [type(failure) if commit else "d" * 40, COMMIT]
    assert hub.asked == [("org/m", "main"), *([("org/m", COMMIT)] if commit else []), ("org/other", "main")]


@pytest.mark.parametrize(
    ("promised", "held", "of_the_origin"),
    [(True, True, True), (True, False, True), (False, True, False), (False, False, True)],
)
def test_is_an_artifact_without_a_holder_read_at_the_origin(
    promised: bool, held: bool, of_the_origin: bool, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers, or this node itself, told of it, and have evicted it since; a promise of theirs ends with its fetch."""
    files = (FileEntry("0", 1, "sha256:" + "a" * 64, ()),)
    manifest: Any = SimpleNamespace(promised=promised, files=files, digest="d" * 64)

    async def of_peers(*_: object, **__: object) -> Found:
        return Found(manifest, Origin(COMMIT, {}))

    monkeypatch.setattr(module, "find", of_peers)
    node: Any = SimpleNamespace(now=lambda: 0.0, holdings=dict, holders_of=lambda _: [object()] if held else [])

    async def scenario() -> None:
        revisions = Revisions(node, Settings())
        revision = await revisions.get(ModelId("org/m"), "main", None)
        for _ in range(2):
            found = await revisions.artifact_of(revision)
            assert (found.source is not None) == of_the_origin
        revisions.give_up(revision)
        assert (await revisions.artifact_of(revision)).source, "the holders have failed"

    asyncio.run(scenario())


def test_does_a_slow_answer_for_a_model_leave_the_others_to_the_origin(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    async def nowhere(*_: object, **__: object) -> None:
        raise ManifestNotFound("org/slow", tried=[], waited_s=1.0)

    def answer(model: str, _revision: str | None) -> Listing:
        if model == "org/slow":
            ended.wait(20)
        return listing(model)

    monkeypatch.setattr(module, "find_on", nowhere)
    monkeypatch.setattr(module, "ORIGIN_ANSWER_S", 0.05)
    monkeypatch.setattr(hub, "answer", staticmethod(answer))
    assert told(made(), "org/slow", "org/m") == [OriginUnreachable, COMMIT]
    ended.set()


@pytest.mark.parametrize(
    ("failure", "other"),
    [
        (OriginBusy("hub", "org/m: 500"), COMMIT),
        (OriginBusy("hub", "org/m: 429", retry_s=5.0), OriginBusy),
        (OriginUnreachable("hub", "no connection"), OriginUnreachable),
    ],
)
def test_rests_the_origin_for_the_model_alone_that_it_cannot_list(
    failure: OriginUnreachable, other: object, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nowhere(*_: object, **__: object) -> None:
        raise ManifestNotFound("org/m", tried=[], waited_s=1.0)

    def answer(model: str, _revision: str | None) -> Listing:
        if model == "org/m":
            raise failure
        return listing(model)

    monkeypatch.setattr(module, "find_on", nowhere)
    monkeypatch.setattr(hub, "answer", staticmethod(answer))
    assert told(made(), "org/m", "org/m", "org/other") == [type(failure), type(failure), other]
    assert hub.asked.count(("org/m", "main")) == 1


def test_opens_an_error_of_the_hub_for_one_revision_no_other(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without a token knows a question that the hub cannot answer; the cache has a private model."""
    here = made()
    monkeypatch.setattr(here, "_here", lambda model_id, asked: Revision(model_id, COMMIT, asked, {}))

    def answer(model: str, revision: str | None) -> Listing:
        raise OriginBusy("hub", "500") if revision == "odd" else OriginDenied("hub", "private")

    monkeypatch.setattr(hub, "answer", staticmethod(answer))

    async def scenario() -> None:
        await here.get(ModelId("org/m"), "odd", None)
        with pytest.raises(OriginDenied):
            await here.get(ModelId("org/m"), "main", None)

    asyncio.run(scenario())


def test_how_many_ask_the_origin_at_once(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for programs that have hung up."""
    ended = threading.Event()

    def answer(model: str, _revision: str | None) -> Listing:
        ended.wait(20)
        return listing(model)

    monkeypatch.setattr(module, "LOOKS_MAX", 3)
    monkeypatch.setattr(hub, "answer", staticmethod(answer))

    async def scenario() -> None:
        revisions = made()
        asking = [asyncio.create_task(revisions.get(ModelId(f"org/m{n}"), "main", None)) for n in range(3)]
        await asyncio.sleep(0)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        with pytest.raises(AgentError, match="3 questions to hub are not answered yet"):
            await revisions.get(ModelId("org/m"), "main", None)
        ended.set()
        async with asyncio.timeout(10):
            while revisions._looks:  # noqa: ASYNC110 - threads end it
                await asyncio.sleep(0.01)
        assert (await revisions.get(ModelId("org/m"), "main", None)).commit == COMMIT

    asyncio.run(scenario())


def test_how_many_files_of_listings_are_kept(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES_KNOWN_MAX", 100)
    monkeypatch.setattr(hub, "answer", staticmethod(lambda model, _revision: listing(model, 20)))
    revisions = made()
    told(revisions, *(f"org/m{n}" for n in range(20)))
    assert sum(len(known.files) for _, known in revisions._known.values()) <= 100
    assert told(revisions, "org/m19") == [COMMIT]
    assert len(hub.asked) == 20, "the last are known"
