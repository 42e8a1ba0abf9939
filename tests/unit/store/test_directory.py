from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from swarm.content.manifest import Chunk, ChunkEntry, FileEntry, HashScheme, Manifest
from swarm.errors import SourceChanged, StoreConflict, StoreError, StoreFull
from swarm.hashing.cpu import chunk_digests
from swarm.store import IsRight
from swarm.store.directory import DirectoryStore
from swarm.store.directory_source import DirectorySource
from swarm.store.open_files import reserve_descriptors
from swarm.testing.stores import is_right

CHUNK = 8192
CONTENTS = {
    "a/b/deep.bin": hashlib.shake_128(b"deep").digest(3 * CHUNK + 5),
    "config.json": b'{"architectures": []}',
    "empty": b"",
    "weights.bin": hashlib.shake_128(b"weights").digest(4 * CHUNK),
}


def describe() -> Manifest:
    scheme = HashScheme(leaf_bytes=1024)
    files = []
    for path, data in CONTENTS.items():
        parts = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        chunks = tuple(ChunkEntry(len(part), chunk_digests(scheme, [part]).xxh3.hex()) for part in parts)
        files.append(FileEntry(path, len(data), "", chunks))
    manifest = Manifest(1, "checkpoint", "", scheme, CHUNK, tuple(files))
    manifest.check()
    return manifest


MANIFEST = describe()


def content(chunk: Chunk) -> bytes:
    return CONTENTS[MANIFEST.files[chunk.file].path][chunk.offset : chunk.offset + chunk.size]


def land(store: DirectoryStore, *chunks: Chunk) -> None:
    for chunk in chunks:
        rest = content(chunk)
        for view in store.landing(chunk):
            view[:] = rest[: len(view)]
            rest = rest[len(view) :]


def read(store: DirectoryStore | DirectorySource, chunk: Chunk) -> bytes:
    return b"".join(bytes(view) for view in store.read(chunk))


def right(store: DirectoryStore) -> IsRight:
    return lambda chunk: is_right(store, chunk)


def tree(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


def failing(error: int, *, after: int = 0) -> Callable[..., int]:
    calls = iter(range(after))

    def fail(*_: object, **__: object) -> int:
        if next(calls, None) is None:
            raise OSError(error, os.strerror(error))
        return 0

    return fail


def test_does_nothing_have_its_final_name_before_it_is_sealed(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks[:-1])
        assert {path.parts[len(tmp_path.parts)] for path in tmp_path.rglob("*")} == {".swarm"}
        partial = tmp_path / ".swarm" / MANIFEST.digest[:16]
        assert {path: (partial / path).stat().st_size for path in CONTENTS} == {
            path: len(data) for path, data in CONTENTS.items()
        }


def test_are_files_whole_and_traces_gone_once_sealed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("untouched")
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
        store.seal(right(store))
        assert tree(tmp_path) == {**CONTENTS, "mine.txt": b"untouched"}
        assert not (tmp_path / ".swarm").exists()
    assert tree(tmp_path) == {**CONTENTS, "mine.txt": b"untouched"}


def test_does_a_span_lent_before_the_seal_stay_good(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        chunk = MANIFEST.chunks[0]
        spans = store.spans(chunk)
        span = next(spans)
        store.seal(right(store))
        assert os.pread(span.fd, span.size, span.offset) == content(chunk)
        assert list(spans) == []


def test_is_nothing_left_when_nothing_was_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    store = DirectoryStore(out, MANIFEST)
    assert out.exists()
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_does_resuming_skip_what_was_never_written(tmp_path: Path) -> None:
    landed = [chunk for chunk in MANIFEST.chunks if chunk.index % 2]
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *landed)
        assert list(store.present()) == landed
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        assert list(store.present()) == landed
        assert all(read(store, chunk) == content(chunk) for chunk in landed)


def test_is_everything_present_where_holes_cannot_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        monkeypatch.setattr(os, "lseek", failing(errno.EINVAL))
        assert list(store.present()) == list(MANIFEST.chunks)


def test_does_an_earlier_fetch_survive_one_that_writes_nothing(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks[:2])
    DirectoryStore(tmp_path, MANIFEST).close()
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        assert list(store.present()) == list(MANIFEST.chunks[:2])


def test_are_partial_files_of_the_wrong_size_put_right(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
    partial = tmp_path / ".swarm" / MANIFEST.digest[:16]
    os.truncate(partial / "weights.bin", CHUNK)
    with (partial / "a/b/deep.bin").open("ab") as file:
        file.write(b"too much")
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *(chunk for chunk in MANIFEST.chunks if read(store, chunk) != content(chunk)))
        store.seal(right(store))
    assert tree(tmp_path) == CONTENTS


def disk(*, free_bytes: int = 1 << 40, inodes: int = 1000, free_inodes: int = 1000) -> SimpleNamespace:
    """What `statvfs` says of a disk."""
    return SimpleNamespace(f_bavail=free_bytes, f_frsize=1, f_blocks=1 << 40, f_files=inodes, f_favail=free_inodes)


def test_a_disk_without_enough_inodes_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: disk(free_inodes=7))
    with pytest.raises(StoreFull, match="8 new files and directories are needed and 7 inodes are free"):
        DirectoryStore(tmp_path / "out", MANIFEST)  # 4 files, a and a/b twice
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "statvfs", lambda _: disk(inodes=0, free_inodes=0))  # btrfs has no such limit
    DirectoryStore(tmp_path / "out", MANIFEST).close()


@pytest.mark.parametrize(
    ("error", "found", "why"),
    [
        (errno.ENOSPC, disk(free_bytes=0), f"{MANIFEST.size} bytes are needed and 0 are free"),
        (errno.ENOSPC, disk(free_inodes=0, free_bytes=70_000), "no inode is free for another file or directory"),
        (errno.ENOSPC, disk(free_bytes=70_000), f"no room for {MANIFEST.size} more bytes, though 70000 count as free"),
        (errno.EDQUOT, disk(), f"the disk quota is used up; {MANIFEST.size} more bytes are needed"),
    ],
)
def test_a_disk_that_fills_meanwhile_says_which_of_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, found: SimpleNamespace, why: str
) -> None:
    def fills(*_: object) -> None:
        monkeypatch.setattr(os, "statvfs", lambda _: found)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "posix_fallocate", fills)
    with pytest.raises(StoreFull, match=why):
        DirectoryStore(tmp_path / "out", MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_a_store_closes_on_a_disk_that_became_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path, MANIFEST)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing(errno.EROFS))
        store.close()
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
    assert tree(tmp_path) == CONTENTS


def test_is_a_fetch_that_cannot_fit_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: disk(free_bytes=1000))
    with pytest.raises(StoreFull) as caught:
        DirectoryStore(tmp_path / "out", MANIFEST)
    assert (caught.value.need_bytes, caught.value.free_bytes) == (MANIFEST.size, 1000)
    assert list(tmp_path.iterdir()) == []


def test_does_room_that_a_resumed_fetch_has_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, MANIFEST.chunks[0])
    monkeypatch.setattr(os, "statvfs", lambda _: disk(free_bytes=1000))
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        assert list(store.present()) == [MANIFEST.chunks[0]]


def test_is_nothing_left_when_room_runs_out_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC, after=2))
    with pytest.raises(StoreFull) as caught:
        DirectoryStore(tmp_path / "out", MANIFEST)
    assert caught.value.need_bytes == MANIFEST.size
    assert list(tmp_path.iterdir()) == []


def test_does_a_failed_resume_keep_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
    partial = tmp_path / ".swarm" / MANIFEST.digest[:16]
    (partial / "a/b/deep.bin").unlink()
    os.truncate(partial / "weights.bin", CHUNK)
    before = tree(partial)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.EDQUOT, after=2))
        with pytest.raises(StoreFull):
            DirectoryStore(tmp_path, MANIFEST)
    assert tree(partial) == before


def test_do_failed_writes_say_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing(errno.ENOSPC))
            with pytest.raises(StoreFull, match=r"config\.json|deep\.bin"):
                land(store, MANIFEST.chunks[0])
            patch.setattr(os, "pwrite", failing(errno.EIO))
            with pytest.raises(StoreError, match="Input/output error"):
                land(store, MANIFEST.chunks[0])
        land(store, MANIFEST.chunks[0])
        assert read(store, MANIFEST.chunks[0]) == content(MANIFEST.chunks[0])


def test_does_a_short_write_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        assert all(read(store, chunk) == content(chunk) for chunk in MANIFEST.chunks)


@pytest.mark.parametrize("size", [0, 4 * CHUNK - 1, 4 * CHUNK + 1])
def test_is_a_final_file_of_another_size_a_conflict_before_anything(tmp_path: Path, size: int) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x" * size)
    with pytest.raises(StoreConflict, match=f"weights.bin: exists with {size} bytes"):
        DirectoryStore(tmp_path, MANIFEST)
    assert tree(tmp_path) == {"weights.bin": b"x" * size}
    assert not (tmp_path / ".swarm").exists()


def test_is_a_final_file_with_other_content_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x" * 4 * CHUNK)
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        (wrong,) = [chunk for chunk in store.present() if chunk.file == 3 and chunk.offset == 0]
        assert read(store, wrong) == b"x" * CHUNK
        with pytest.raises(StoreConflict, match=r"weights\.bin: exists with other content"):
            next(store.landing(wrong))
    assert tree(tmp_path) == {"weights.bin": b"x" * 4 * CHUNK}


def test_are_final_files_that_are_right_used(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(CONTENTS["weights.bin"])
    inode = (tmp_path / "weights.bin").stat().st_ino
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        present = list(store.present())
        assert present == [chunk for chunk in MANIFEST.chunks if chunk.file == 3]
        land(store, *(chunk for chunk in MANIFEST.chunks if chunk not in present))
        store.seal(right(store))
    assert tree(tmp_path) == CONTENTS
    assert (tmp_path / "weights.bin").stat().st_ino == inode


def _link_component(out: Path, elsewhere: Path) -> None:
    (out / "a").symlink_to(elsewhere)


def _link_inner_component(out: Path, elsewhere: Path) -> None:
    (out / "a").mkdir()
    (out / "a" / "b").symlink_to(elsewhere)


def _link_file(out: Path, elsewhere: Path) -> None:
    (out / "config.json").symlink_to(elsewhere / "victim")


def _link_own(out: Path, elsewhere: Path) -> None:
    (out / ".swarm").symlink_to(elsewhere)


def _link_partials(out: Path, elsewhere: Path) -> None:
    (out / ".swarm").mkdir()
    (out / ".swarm" / MANIFEST.digest[:16]).symlink_to(elsewhere)


def _partial(out: Path, path: str) -> Path:
    place = out / ".swarm" / MANIFEST.digest[:16] / path
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def _link_partial(out: Path, elsewhere: Path) -> None:
    _partial(out, "config.json").symlink_to(elsewhere / "victim")


def _link_partial_component(out: Path, elsewhere: Path) -> None:
    _partial(out, "a").symlink_to(elsewhere)


def _hard_link_partial(out: Path, elsewhere: Path) -> None:
    _partial(out, "config.json").hardlink_to(elsewhere / "victim")


def _link_lock(out: Path, elsewhere: Path) -> None:
    _partial(out, ".swarm").symlink_to(elsewhere / "victim")


def _pipe(out: Path, elsewhere: Path) -> None:
    os.mkfifo(out / "config.json")


def _partial_pipe(out: Path, elsewhere: Path) -> None:
    os.mkfifo(_partial(out, "config.json"))


def _file_as_directory(out: Path, elsewhere: Path) -> None:
    (out / "a").write_text("a file")


def _directory_as_file(out: Path, elsewhere: Path) -> None:
    (out / "config.json").mkdir()


TRAPS = [
    _link_component, _link_inner_component, _link_file, _link_own, _link_partials, _link_partial,
    _link_partial_component, _hard_link_partial, _link_lock, _pipe, _partial_pipe, _file_as_directory,
    _directory_as_file,
]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_is_whatever_leads_elsewhere_refused(tmp_path: Path, trap: Callable[[Path, Path], None]) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "victim").write_bytes(b"precious")
    trap(out, elsewhere)
    before = {path for path in out.rglob("*") if not path.is_relative_to(out / ".swarm")}
    with pytest.raises(StoreConflict):
        DirectoryStore(out, MANIFEST)
    assert tree(elsewhere) == {"victim": b"precious"}
    assert {path for path in out.rglob("*") if not path.is_relative_to(out / ".swarm")} == before


def test_is_an_out_that_is_a_file_a_conflict(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(StoreConflict):
            DirectoryStore(out, MANIFEST)


def test_may_out_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with closing(DirectoryStore(tmp_path / "link", MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
    assert tree(tmp_path / "real") == CONTENTS


def test_is_what_appeared_meanwhile_never_overwritten(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        (tmp_path / "weights.bin").write_text("appeared")
        with pytest.raises(StoreConflict, match=r"weights\.bin: appeared"):
            store.seal(right(store))
        assert not (tmp_path / "config.json").exists()  # nothing has changed
        (tmp_path / "weights.bin").unlink()
        store.seal(right(store))
    assert tree(tmp_path) == CONTENTS


def test_is_what_appears_in_the_last_moment_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: str, target: str, **keywords: int) -> None:
        if target == "weights.bin":
            (tmp_path / "weights.bin").write_text("appeared")
        link(source, target, **keywords)  # type: ignore[arg-type]

    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        with monkeypatch.context() as patch:
            patch.setattr(os, "link", late)
            with pytest.raises(StoreConflict, match=r"weights\.bin: appeared"):
                store.seal(right(store))
        assert all(read(store, chunk) == content(chunk) for chunk in MANIFEST.chunks)
    assert (tmp_path / "weights.bin").read_text() == "appeared"
    assert (tmp_path / "config.json").read_bytes() == CONTENTS["config.json"]
    (tmp_path / "weights.bin").unlink()
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        assert list(store.present()) == list(MANIFEST.chunks)
        store.seal(right(store))
    assert tree(tmp_path) == CONTENTS


def exchange(path: Path, how: str) -> None:
    path.unlink()
    match how:
        case "link":
            path.symlink_to("/etc/passwd")
        case "file":
            path.write_bytes(b"forged")


@pytest.mark.parametrize("how", ["link", "file", "nothing"])
@pytest.mark.parametrize("late", [False, True])
def test_an_entry_in_the_place_of_a_staged_file_gets_no_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, *, late: bool
) -> None:
    staged = tmp_path / ".swarm" / MANIFEST.digest[:16] / "weights.bin"
    link = os.link

    def exchange_first(name: str, *names: str, **where: Any) -> None:
        if name == "weights.bin":
            exchange(staged, how)
        link(name, *names, **where)

    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        if late:
            monkeypatch.setattr(os, "link", exchange_first)
        else:
            exchange(staged, how)
        with pytest.raises(StoreError):
            store.seal(right(store))
    monkeypatch.undo()
    assert not os.path.lexists(tmp_path / "weights.bin")
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *(chunk for chunk in MANIFEST.chunks if MANIFEST.files[chunk.file].path == "weights.bin"))
        store.seal(right(store))
    assert tree(tmp_path) == CONTENTS


def test_is_sealing_possible_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
    assert tree(tmp_path) == CONTENTS


def test_is_a_flush_that_failed_once_never_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", failing(errno.EIO))
            with pytest.raises(StoreError, match="Input/output error"):
                store.seal(right(store))
        with pytest.raises(StoreError, match="Input/output error"):
            store.seal(right(store))
        assert not (tmp_path / "weights.bin").exists()


def test_is_data_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fdatasync, link, fsync = os.fdatasync, os.link, os.fsync

    def note(what: str, function: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: object, **keywords: object) -> None:
            order.append(what)
            function(*arguments, **keywords)

        return noted

    monkeypatch.setattr(os, "fdatasync", note("data", fdatasync))
    monkeypatch.setattr(os, "link", note("name", link))
    monkeypatch.setattr(os, "fsync", note("directory", fsync))
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
    assert order == ["data"] * 4 + ["name"] * 4 + ["directory"] * 3  # a/b, a and the top
    order.clear()
    with closing(DirectoryStore(tmp_path / "fast", MANIFEST, fsync=False)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
    assert order == ["name"] * 4


def test_is_a_second_fetch_of_the_same_turned_away(tmp_path: Path) -> None:
    with (
        closing(DirectoryStore(tmp_path, MANIFEST)),
        pytest.raises(StoreConflict, match=rf"another fetch \(process {os.getpid()}\)"),
    ):
        DirectoryStore(tmp_path, MANIFEST)
    DirectoryStore(tmp_path, MANIFEST).close()
    assert list(tmp_path.iterdir()) == []


def test_does_a_closed_store_refuse_work(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, MANIFEST)
    landing = store.landing(MANIFEST.chunks[0])
    next(landing)
    store.close()
    with pytest.raises(StoreError):
        list(landing)
    with pytest.raises(StoreError):
        next(store.spans(MANIFEST.chunks[0]))
    with pytest.raises(StoreError):
        store.seal(right(store))
    with pytest.raises(StoreError):
        list(store.present())


def test_is_a_sealed_file_that_changes_withdrawn(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
        rewrite(tmp_path / "weights.bin")
        with pytest.raises(SourceChanged, match=r"weights\.bin"):
            read(store, MANIFEST.chunks[-1])
        assert read(store, MANIFEST.chunks[0]) == content(MANIFEST.chunks[0])


def test_does_a_sealed_file_that_is_moved_on_stay_good(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
        (tmp_path / "weights.bin").rename(tmp_path / "elsewhere")
        assert read(store, MANIFEST.chunks[-1]) == content(MANIFEST.chunks[-1])


def rewrite(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)
    os.utime(path, ns=(0, 0))  # clocks of file systems are coarse: two writes can share a moment


def replace(path: Path) -> None:
    status = path.stat()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(path.with_suffix(".old").read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 10)


CHANGES = [(rewrite, "written"), (replace, "took its place"), (truncate, "became 10"), (Path.unlink, "gone")]


@contextmanager
def served(root: Path) -> Iterator[DirectorySource]:
    for path, data in CONTENTS.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    with closing(DirectorySource(root, MANIFEST, paths=[root / path for path in CONTENTS])) as source:
        yield source


def test_does_a_source_serve_files_where_they_lie(tmp_path: Path) -> None:
    with served(tmp_path) as source:
        assert all(read(source, chunk) == content(chunk) for chunk in MANIFEST.chunks)
        assert "4 files" in repr(source)
    with pytest.raises(StoreError):
        read(source, MANIFEST.chunks[0])


def rewrite_and_restore_mtime(path: Path) -> None:
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(("change", "why"), [*CHANGES, (rewrite_and_restore_mtime, "modification time set back")])
def test_a_source_notices_a_change_that_no_peer_asked_for(
    tmp_path: Path, change: Callable[[Path], None], why: str
) -> None:
    with served(tmp_path) as source:
        check = partial(is_right, source)
        source.demand_unchanged(check)
        change(tmp_path / "weights.bin")
        with pytest.raises(SourceChanged, match=why):
            source.demand_unchanged(check)


def test_a_source_whose_files_only_got_other_names_or_modes_is_unchanged(tmp_path: Path) -> None:
    with served(tmp_path) as source:
        asked: list[Chunk] = []
        os.link(tmp_path / "weights.bin", tmp_path / "backup")
        (tmp_path / "config.json").chmod(0o600)
        source.demand_unchanged(lambda chunk: asked.append(chunk) or is_right(source, chunk))  # type: ignore[func-returns-value]
        assert {MANIFEST.files[chunk.file].path for chunk in asked} == {"config.json", "weights.bin"}
        source.demand_unchanged(lambda _: pytest.fail("hashed twice for one change"))


@pytest.mark.parametrize("change", [rewrite, truncate, rewrite_and_restore_mtime])
def test_a_sealed_store_notices_a_change_that_no_peer_asked_for(tmp_path: Path, change: Callable[[Path], None]) -> None:
    with closing(DirectoryStore(tmp_path, MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        store.seal(right(store))
        store.demand_unchanged(lambda _: pytest.fail("hashed though unchanged"))
        change(tmp_path / "weights.bin")
        with pytest.raises(SourceChanged, match=r"weights\.bin"):
            store.demand_unchanged(right(store))


@pytest.mark.parametrize(("change", "why"), CHANGES)
@pytest.mark.parametrize("opened", [False, True])
def test_is_a_source_that_changes_withdrawn(
    tmp_path: Path, change: Callable[[Path], None], why: str, opened: bool
) -> None:
    with served(tmp_path) as source:
        if opened:
            read(source, MANIFEST.chunks[-1])
        change(tmp_path / "weights.bin")
        with pytest.raises(SourceChanged, match=why):
            read(source, MANIFEST.chunks[-1])


@pytest.mark.parametrize(("change", "why"), CHANGES)
def test_is_a_change_seen_while_a_chunk_is_sent(tmp_path: Path, change: Callable[[Path], None], why: str) -> None:
    with served(tmp_path) as source:
        spans = source.spans(MANIFEST.chunks[-1])
        next(spans)
        change(tmp_path / "weights.bin")
        with pytest.raises(SourceChanged, match=why):
            next(spans)


def test_is_a_source_that_changed_after_hashing_refused(tmp_path: Path) -> None:
    with served(tmp_path):
        truncate(tmp_path / "weights.bin")
    with pytest.raises(SourceChanged, match="became 10"):
        DirectorySource(tmp_path, MANIFEST, paths=[tmp_path / path for path in CONTENTS])


def test_is_the_limit_of_open_files_raised_when_needed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"this process may open {hard} files at most")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
        reserve_descriptors(1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1256
        reserve_descriptors(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 1256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_store_works_with_fewer_open_files_than_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.store.open_files.resource.getrlimit", lambda _: (4, 4))
    with closing(DirectoryStore(tmp_path / "out", MANIFEST)) as store:
        land(store, *MANIFEST.chunks)
        assert list(store.present()) == list(MANIFEST.chunks)
        store.seal(right(store))
        for _ in range(2):
            assert all(read(store, chunk) == content(chunk) for chunk in MANIFEST.chunks)
        (tmp_path / "out").rename(tmp_path / "moved")
        store.moved(tmp_path / "moved")
        assert all(read(store, chunk) == content(chunk) for chunk in MANIFEST.chunks)
        replace(tmp_path / "moved" / "weights.bin")
        read(store, MANIFEST.chunks[0])
        assert read(store, MANIFEST.chunks[1]) == content(MANIFEST.chunks[1])
        with pytest.raises(SourceChanged, match=r"weights\.bin"):
            _ = [read(store, chunk) for chunk in (*MANIFEST.chunks, *MANIFEST.chunks)]
    with served(tmp_path / "source") as source:
        for _ in range(2):
            assert all(read(source, chunk) == content(chunk) for chunk in MANIFEST.chunks)
