"""Places of a file, the index of tensors, and the limits of memory."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from swarm.errors import SourceChanged, StoreFull
from swarm.store import memory
from swarm.store.memory import MemorySource, Place, PlacedFile, buffer, demand_room


def cut(file: PlacedFile, offset: int, size: int) -> list[bytes]:
    views = [place.view for place in file.cut(offset, size)]
    return [bytes(view) for view in views if isinstance(view, memoryview)]


def test_is_a_range_cut_at_the_places() -> None:
    file = PlacedFile.whole(Place(memoryview(part)) for part in (b"abc", b"", b"de", b"fghi"))
    for begin in range(9):
        for end in range(begin, 10):
            assert b"".join(cut(file, begin, end - begin)) == b"abcdefghi"[begin:end]
    assert cut(file, 1, 7) == [b"bc", b"de", b"fgh"]


def test_is_a_change_noticed_before_and_after_the_use() -> None:
    checks: list[str] = []

    def check() -> None:
        checks.append("check")
        if len(checks) == 2:
            raise SourceChanged("w", "it was written to")

    source = MemorySource()
    source._files = [PlacedFile.whole([Place(memoryview(b"abc"), check)])]
    views = source._read(0, 0, 3)
    view = next(views)
    assert view.readonly
    assert len(checks) == 1
    with pytest.raises(SourceChanged):
        next(views)
    source.close()
    with pytest.raises(SourceChanged, match="closed"):
        next(source._read(0, 0, 3))


@pytest.mark.parametrize("size", [0, 1, 2 << 20])
def test_are_buffers_zeroed_and_writable(size: int) -> None:
    view = buffer(size)
    assert len(view) == size
    assert not any(view)
    if size:
        view[-1] = 1


def test_is_a_buffer_beyond_the_memory_store_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    with pytest.raises(StoreFull):
        buffer(2 << 20)


def test_does_the_room_count_free_memory_and_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 10 kB\nSwapFree: 5 kB\n")
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "meminfo")
    demand_room(15 << 10)
    with pytest.raises(StoreFull) as caught:
        demand_room((15 << 10) + 1)
    assert caught.value.free_bytes == 15 << 10
