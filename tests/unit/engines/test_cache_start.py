"""A start fetches a compile cache that a member offers, and loses no time where none does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from swarm import Settings
from swarm.engines import cache_start, compile_caches
from swarm.engines.cache_start import CacheStart
from swarm.runtime import runtime
from swarm.security import cluster_key

FIELDS = {"model": "org/model"}
COMPILED = {"inductor/ab.so": b"\x7fELF" * 1000, "triton/kernel": b"cubin"}

Start = Callable[..., CacheStart]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    key = tmp_path / "key"
    cluster_key.create(key)

    def started(name: str, *peers: str, limit: float | None = None, compile_caches: bool | None = None) -> CacheStart:
        settings = Settings(
            name=name, mdns=False, peers=peers, cache=tmp_path / name / "cache", key_file=key, upload_limit=limit,
            compile_caches=compile_caches,
        )  # fmt: skip
        return CacheStart(FIELDS, settings, places=places(tmp_path / name))

    yield started
    runtime()._close_all()


def places(root: Path) -> dict[str, Path]:
    return {name: root / name for name in ("inductor", "triton")}


def compiled(root: Path) -> dict[str, bytes]:
    return {path: (root / path).read_bytes() for path in COMPILED if (root / path).is_file()}


def compile_at(root: Path) -> None:
    for path, content in COMPILED.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


@pytest.fixture
def source(start: Start, tmp_path: Path) -> str:
    """The address of a machine that has compiled."""
    compile_at(tmp_path / "source")
    served = start("source").serve()
    assert served is not None
    return served.address


def until_found(one: CacheStart) -> None:
    assert one._found.wait(20)


def test_is_what_a_member_compiled_there_when_the_engine_compiles(start: Start, source: str, tmp_path: Path) -> None:
    one = start("other", source)
    one.begin()
    until_found(one)
    one.join()
    assert compiled(tmp_path / "other") == COMPILED
    served = one.serve()
    assert served is not None
    third = start("third", served.address)
    third.begin()
    until_found(third)
    third.join()
    assert compiled(tmp_path / "third") == COMPILED


def test_is_no_time_lost_where_no_member_offers_a_cache(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_start, "WAIT_S", 1e6)
    caplog.set_level("INFO", "swarm")
    one = start("other")
    one.begin()
    work = one._work
    one.join()
    one.join()  # a second engine step changes nothing
    assert work is not None
    assert work.cancelled()
    assert caplog.text.count("no member offers one; compiling here") == 1
    assert compiled(tmp_path / "other") == {}


def test_is_a_cache_that_arrives_slowly_not_waited_for(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "swarm")
    monkeypatch.setattr(cache_start, "WAIT_S", 0.0)
    compile_at(tmp_path / "source")
    served = start("source", limit=1000.0).serve()
    assert served is not None
    one = start("other", served.address)
    one.begin()
    until_found(one)
    one.join()
    assert "still arriving after 0 s; compiling here" in caplog.text
    again = one.serve()  # what was compiled here meanwhile: nothing
    assert again is None


def test_does_no_failure_keep_the_engine_from_starting(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(*_: object, found: Callable[[], None], **__: object) -> None:
        found()
        raise ValueError("an accident")

    caplog.set_level("INFO", "swarm")
    monkeypatch.setattr(compile_caches, "fetch", fetch)
    one = start("other")
    one.begin()
    until_found(one)
    one.join()
    assert "compiling here (an accident)" in caplog.text


def test_does_a_machine_that_has_compiled_not_search(start: Start, source: str, tmp_path: Path) -> None:
    again = start("source")
    again.begin()
    assert again._work is None
    (tmp_path / "source" / "triton/kernel").unlink()
    emptied = start("source")
    emptied.begin()
    assert emptied._work is not None
    emptied.join()


def test_is_a_refusal_told_to_who_asked_for_caches(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "swarm")
    for asked in (None, True):
        one = CacheStart(FIELDS, Settings(mdns=False, cache=tmp_path / "c", compile_caches=asked), places={})
        one.begin()
        one.join()
        assert one.serve() is None
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["compile cache"]
    assert "needs a cluster key" in caplog.text
    off = start("off", compile_caches=False)
    off.begin()
    assert off._work is None
    assert compile_caches.refusal(off._settings) == "is off"
