"""Complete files as a source: `DirectorySource` serves them where they lie.

A file is what it was when it was hashed as long as it has the stamp of then, by its name and as it is open.

Must not know: hash functions, peers, transports, how files got there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from swarm.content.manifest import Chunk, Manifest
from swarm.errors import SourceChanged, StoreError
from swarm.store import FileSpan, IsRight
from swarm.store.open_files import OpenFiles, reserve_descriptors
from swarm.store.stamp import Stamp

SCRATCH_BYTES = 2 << 20  # buffer of a chunk that is read or written: fits a core's cache
SCRATCHES_KEPT = 16  # as many as a session has threads that receive

_scratches: deque[bytearray] = deque(maxlen=SCRATCHES_KEPT)


class DirectorySource:
    """Complete files; `paths[i]` holds the bytes of `manifest.files[i]`.

    `stamps` were taken before the files were hashed; default: now. Raises SourceChanged when a file no longer has its
    stamp, here and on each read.
    """

    def __init__(
        self, root: Path, manifest: Manifest, *, paths: Sequence[Path], stamps: Sequence[Stamp] | None = None
    ) -> None:
        self.root = root
        self.manifest = manifest
        self._paths = tuple(paths)
        self._stamps = list(stamps) if stamps is not None else [Stamp.at(path) for path in paths]
        for path, stamp, entry in zip(self._paths, self._stamps, manifest.files, strict=True):
            if stamp.size != entry.size:
                raise SourceChanged(path, f"{entry.size} bytes became {stamp.size}")
        self._files = OpenFiles(self._open)
        self._closed = False
        reserve_descriptors(len(self._paths))

    def spans(self, chunk: Chunk) -> Iterator[FileSpan]:
        """The chunk's bytes. Raises SourceChanged, before or after the span is used, if the file changed."""
        path, stamp = self._paths[chunk.file], self._stamps[chunk.file]
        if self._closed:
            raise StoreError(f"{self.root} is not served any more")
        with self._files.lend(chunk.file) as fd:
            stamp.check(path, fd)
            yield FileSpan(fd, chunk.offset, chunk.size)
            stamp.check(path, fd)

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """The chunk's bytes; a view is valid until the next. Raises StoreError, and as `spans` does."""
        return read_spans(self.spans(chunk), chunk.size, self._paths[chunk.file])

    def demand_unchanged(self, is_right: IsRight) -> None:
        """As WatchedSource: compares the stamps, and hashes a file if its time of change alone moved."""
        for number, path in enumerate(self._paths):
            stamp, found = self._stamps[number], Stamp.at(path)
            if found != stamp:
                stamp.demand(path, found)
                demand_right(path, [chunk for chunk in self.manifest.chunks if chunk.file == number], is_right)
                self._stamps[number] = found

    def promised(self, promise: Manifest) -> DirectorySource | None:
        """The same files as a source of a promise; None if that has other paths or sizes. Raises as the constructor."""
        own = {file.path: number for number, file in enumerate(self.manifest.files)}
        if {file.path: file.size for file in promise.files} != {file.path: file.size for file in self.manifest.files}:
            return None
        numbers = [own[file.path] for file in promise.files]
        paths, stamps = [self._paths[number] for number in numbers], [self._stamps[number] for number in numbers]
        return DirectorySource(self.root, promise, paths=paths, stamps=stamps)

    def close(self) -> None:
        """Closes the files and so ends all spans."""
        self._closed = True
        self._files.close()

    def _open(self, number: int) -> int:
        path = self._paths[number]
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SourceChanged(path, "it is gone") from error
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            raise StoreError(f"{path}: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"<DirectorySource {self.root} {len(self._paths)} files, {self.manifest.size} bytes>"


def demand_right(path: Path, chunks: Sequence[Chunk], is_right: IsRight) -> None:
    """Hashes the chunks of a file. Raises SourceChanged for a wrong one."""
    if not all(map(is_right, chunks)):
        raise SourceChanged(path, "it was written to, and its modification time set back")


def read_spans(spans: Iterator[FileSpan], size: int, subject: object) -> Iterator[memoryview]:
    """The bytes of spans of `size` bytes; a view is valid until the next. Raises StoreError, SourceChanged."""
    scratch = memoryview(bytearray(min(size, SCRATCH_BYTES)))
    for span in spans:
        for position in range(0, span.size, len(scratch)):
            view = scratch[: span.size - position]
            try:
                filled = os.preadv(span.fd, [view], span.offset + position)
            except OSError as error:
                raise StoreError(f"{subject}: cannot be read at {span.offset + position}: {error.strerror}") from error
            if filled != len(view):
                raise SourceChanged(str(subject), f"it ends before byte {span.offset + position + len(view)}")
            yield view


@contextlib.contextmanager
def lent_scratch() -> Iterator[memoryview]:
    """SCRATCH_BYTES that were used before, if there are any: the kernel would clear new pages for each chunk."""
    try:
        scratch = _scratches.pop()
    except IndexError:
        scratch = bytearray(SCRATCH_BYTES)
    try:
        yield memoryview(scratch)
    finally:
        _scratches.append(scratch)
