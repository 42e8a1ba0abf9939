"""A directory as a store: `DirectoryStore` fetches into it. `directory_source` serves files where they lie.

    out/.swarm/<digest[:16]>/<path>     an unfinished file (`partial_directory`)
    out/<path>                          a verified file

- **Nothing is overwritten.** A file under a final name is only read. A complete file counts as fetched, any other is a
  StoreConflict. Files that are not in the manifest are left alone.
- **Space is allocated first.** A fetch that does not fit fails at once and leaves nothing behind.
- **A resume needs no record** of verified chunks. Allocated space that was never written is a hole; all other data is
  hashed again. A record could disagree with the disk after a crash. A promise has no digests to compare with, so those
  of its chunks are recorded after they are written, and hashed again all the same.
- **Verified bytes stay verified.** A staged file is leased (`lease`): as long as no other program opens it, it holds
  the hashed bytes. `seal` hashes every other file again, just before it gets its final name. An entry in the place of
  the open file gets none.
- **Files stay open as long as the process may have them open** (`open_files`). A lent descriptor stays open: closed
  too early, its number may already name another file. The soft limit of open files is raised if needed; a file above
  the hard limit is opened again when it is needed, and must be the same file.
- **Power loss.** With `fsync` (the default) the data of each file is on the disk before it gets its final name, and the
  names are on the disk when `seal` returns. Writeback starts every 64 MiB of a file: one flush at the end would about
  double the time of a fetch to a slow disk. Without `fsync`, a killed process loses nothing, but a power loss may leave
  a final name without contents.

Must not know: hash functions, peers, transports; verification is the caller's.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from swarm.content.manifest import Chunk, FileEntry, Manifest
from swarm.content.selection import Part
from swarm.errors import LocalProtocolError, SourceChanged, StoreConflict, StoreError
from swarm.store import FileSpan, IsRight
from swarm.store.confined_directory import ConfinedDirectory
from swarm.store.directory_source import demand_right, lent_scratch, read_spans
from swarm.store.file_errors import store_errors
from swarm.store.lease import SoleUse
from swarm.store.open_files import OpenFiles, reserve_descriptors
from swarm.store.own_files import remove_if_empty
from swarm.store.partial_directory import PartialDirectory, next_data
from swarm.store.stamp import Stamp
from swarm.store.writeback import Writeback

CLOSE_TIMEOUT_S = 60.0
PROVING_THREADS = 4


@dataclass(slots=True)
class _File:
    """A file of the store; `stamp` is taken when it has its final name."""

    entry: FileEntry
    inode: int
    path: Path
    stamp: Stamp | None = None

    @property
    def final(self) -> bool:
        return self.stamp is not None


class DirectoryStore:
    """A fetch into the directory `out`, which is made if missing. Several threads may write chunks at once.

    With `part` only its files, each of them whole, are looked at and made.

    Raises StoreConflict for a final file of another size or another entry in its place, Claimed while another fetch of
    the same artifact writes here; StoreFull; StoreError. After each of them `out` is as it was.
    """

    def __init__(self, out: Path, manifest: Manifest, *, fsync: bool = True, part: Part | None = None) -> None:
        self.out = out.absolute()
        self.manifest = manifest
        self._entries = {n: f for n, f in enumerate(manifest.files) if part is None or n in part.files}
        self._fsync = fsync
        self._wrote = False
        self._closed = False
        self._users = 0  # threads that use descriptors
        self._state = threading.Condition()
        self._sealing = threading.Lock()
        self._made: list[Path] = []  # `out` and parents that this fetch made
        self._moved_to: Path | None = None
        self._files: dict[int, _File] = {}  # by number
        self._open_files = OpenFiles(self._open)
        self._sole_use = SoleUse(self._open_files)
        self._writeback = Writeback(self._sync)
        reserve_descriptors(len(self._entries))
        self._need_bytes = 0  # to be allocated
        # Outermost: it names the free bytes, after the undo.
        with store_errors(self.out, need_bytes=lambda: self._need_bytes), ExitStack() as held, ExitStack() as undo:
            self._final = self._open_out(held, undo)
            self._partial = PartialDirectory.claim(self._final, manifest.digest[:16], held=held, undo=undo)
            existing = self._existing()  # after the lock: its last holder may have added files
            self._files = self._prepare(existing, undo)
            self._held, self._undo = held.pop_all(), undo.pop_all()
            if not self._partial.fresh:
                self._undo.pop_all()  # data of an earlier fetch stays even if this fetch fails

    def present(self) -> Iterator[Chunk]:
        """Chunks of final files, and chunks whose range is not a hole."""
        data_at: dict[int, float] = {}  # by file: next offset with data, so that a new file costs one system call
        for chunk in self.manifest.chunks:
            if chunk.file not in self._files:
                continue
            file = self._file(chunk)
            if not file.final and data_at.get(chunk.file, -1) < chunk.offset:
                with self._open_files.lend(chunk.file) as fd:
                    data_at[chunk.file] = next_data(fd, chunk.offset)
            if file.final or data_at[chunk.file] < chunk.offset + chunk.size:
                yield chunk

    def spans(self, chunk: Chunk) -> Iterator[FileSpan]:
        """The chunk's bytes, under the partial or final name. Raises SourceChanged if a final file changed."""
        file = self._file(chunk)
        with self._open_files.lend(chunk.file) as fd:
            self._check(file, fd)
            yield FileSpan(fd, chunk.offset, chunk.size)
            self._check(file, fd)

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """The chunk's bytes; a view is valid until the next. Raises StoreError, and as `spans` does."""
        return read_spans(self.spans(chunk), chunk.size, self._file(chunk).path)

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        """Scratch views, each written to the file when the next is requested.

        Raises StoreConflict if the file has its final name already, StoreFull and StoreError if a write fails.
        """
        file = self._file(chunk)
        self._refuse_final(file)
        with lent_scratch() as scratch:
            for position in range(0, chunk.size, len(scratch)):
                view = scratch[: chunk.size - position]
                yield view
                self._write(chunk.file, view, chunk.offset + position)

    def record(self, chunk: int, digest: bytes, reader: str) -> None:
        """As RecordingStore."""
        line = f"{chunk} {digest.hex()} {reader}\n".encode()
        with self._state:
            if self._closed:
                return
            with store_errors(self.out, need_bytes=lambda: len(line)):
                self._partial.record(line)

    def recorded(self) -> dict[int, tuple[bytes, str]]:
        """As RecordingStore; a line that was cut off is left out."""
        found: dict[int, tuple[bytes, str]] = {}
        with store_errors(self.out):
            lines = list(self._partial.recorded())
        for line in lines:
            with contextlib.suppress(ValueError):
                chunk, digest, reader = line.decode().split(" ")
                found[int(chunk)] = bytes.fromhex(digest), reader
        return found

    def final(self, file: int) -> bool:
        """As RecordingStore."""
        return file in self._files and self._files[file].final

    def moved(self, to: Path) -> None:
        """The caller has moved the sealed files: they are at the same paths in `to`, maybe as links."""
        self._moved_to = to
        for number, file in self._files.items():  # a move changes the change time
            if file.stamp is not None:
                with self._open_files.lend(number) as fd:
                    file.stamp.check_open(file.path, fd)
                    file.stamp = Stamp.of(os.fstat(fd))

    def demand_unchanged(self, is_right: IsRight) -> None:
        """As WatchedSource, of the sealed files; by their open files, since the user may move them."""
        for number, file in self._files.items():
            if file.stamp is None:
                continue
            with self._open_files.lend(number) as fd:
                found = Stamp.of(os.fstat(fd))
            if found != file.stamp:
                file.stamp.demand(file.path, found)
                demand_right(file.path, [chunk for chunk in self.manifest.chunks if chunk.file == number], is_right)
                file.stamp = found

    def stamps(self) -> dict[str, Stamp]:
        """The stamps of the files with final names, by path: as long as they have them, their content is verified."""
        return {file.entry.path: file.stamp for file in self._files.values() if file.stamp is not None}

    def seal(self, is_right: IsRight) -> None:
        """Gives every file its final name and removes the partial directory. Idempotent.

        `is_right` hashes a chunk again, on any thread: of each file that other programs can have changed since its
        chunks were verified.

        Raises StoreConflict if an entry appeared under a final name during the fetch, StoreFull and StoreError if the
        disk fails or a file was changed. Files that already have final names keep them; the next fetch uses them.
        """
        with self._in_use(), self._sealing, store_errors(self.out):
            waiting = {number: file for number, file in self._files.items() if not file.final}
            for file in waiting.values():
                if self._final.lstat(file.entry.path) is not None:
                    raise _appeared(file)
            if self._fsync:
                self._writeback.flush(list(waiting))
            for number, file in self._files.items():
                if number in waiting:
                    self._place(number, file, is_right)
                else:
                    self._check_final(number, file, is_right)
            if self._fsync:
                self._flush_names()
            self._undo.pop_all()
            # Not if an earlier fetch left unfinished files of another part there.
            self._partial.remove_unless(
                f.path for number, f in enumerate(self.manifest.files) if number not in self._files
            )

    def close(self) -> None:
        """Closes the files. Written data stays for the next fetch; without any, the partial directory is removed.

        Raises StoreError if a write still hangs after `CLOSE_TIMEOUT_S`: to close its file could redirect it.
        """
        with self._state:
            if self._closed:
                return
            self._closed = True
            if not self._state.wait_for(lambda: self._users == 0, timeout=CLOSE_TIMEOUT_S):
                raise StoreError(f"{self.out}: a write still hangs after {CLOSE_TIMEOUT_S:g} s; its files stay open")
            self._partial.close()
        self._writeback.close()
        self._sole_use.close()
        self._open_files.close()
        if self._wrote:
            self._undo.pop_all()
        with contextlib.suppress(OSError):  # the disk became read-only
            self._undo.close()
        self._held.close()

    def _open_out(self, held: ExitStack, undo: ExitStack) -> ConfinedDirectory:
        missing = [place for place in (self.out, *self.out.parents) if not place.exists()]
        for place in reversed(missing):
            place.mkdir(exist_ok=True)
            undo.callback(remove_if_empty, place)
            self._made.append(place)
        return held.enter_context(contextlib.closing(ConfinedDirectory.open(self.out)))

    def _existing(self) -> set[str]:
        """Paths of files with final names. Raises StoreConflict for another kind of entry or another size."""
        existing = set()
        for entry in self._entries.values():
            status = self._final.lstat(entry.path)
            if status is None:
                continue
            where = self.out / entry.path
            if not stat.S_ISREG(status.st_mode):
                raise StoreConflict(where, "is not a regular file; move it away or fetch to another directory")
            if status.st_size != entry.size:
                raise StoreConflict(
                    where,
                    f"exists with {status.st_size} bytes instead of {entry.size}; "
                    "move it away or fetch to another directory",
                )
            existing.add(entry.path)
        return existing

    def _prepare(self, existing: set[str], undo: ExitStack) -> dict[int, _File]:
        missing = [entry for entry in self._entries.values() if entry.path not in existing]
        self._need_bytes = self._partial.demand_room(missing)
        files = {}
        for number, entry in self._entries.items():
            if entry.path in existing:
                fd = self._final.open_file(entry.path, os.O_RDONLY)
                stamp = Stamp.of(os.fstat(fd))
                os.close(fd)
                files[number] = _File(entry, stamp.inode, self.out / entry.path, stamp)
            else:
                files[number] = _File(entry, self._partial.allocate(entry, undo), self.out / entry.path)
        return files

    def _open(self, number: int) -> int:
        """Opens a file again, wherever it is now. Raises SourceChanged if it is another file."""
        file = self._files[number]
        try:
            fd = self._find(file)
        except FileNotFoundError as error:
            raise SourceChanged(file.path, "it is gone") from error
        if os.fstat(fd).st_ino != file.inode:
            os.close(fd)
            raise SourceChanged(file.path, "another file took its place")
        if not file.final:
            self._sole_use.opened(number, fd)
        return fd

    def _find(self, file: _File) -> int:
        if self._moved_to is not None:
            return os.open(self._moved_to / file.entry.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not file.final:
            with contextlib.suppress(FileNotFoundError):  # just got its final name
                return self._partial.files.open_file(file.entry.path, os.O_RDWR)
        return self._final.open_file(file.entry.path, os.O_RDONLY)

    def _sync(self, number: int) -> None:
        with self._open_files.lend(number) as fd:
            os.fdatasync(fd)

    def _file(self, chunk: Chunk) -> _File:
        if self._closed:
            raise StoreError(f"{self.out} is not served any more")
        if (file := self._files.get(chunk.file)) is None:
            raise LocalProtocolError(f"{self.manifest.files[chunk.file].path} is no file of this fetch")
        return file

    def _check(self, file: _File, fd: int) -> None:
        if self._closed:
            raise StoreError(f"{self.out} is not served any more")
        if file.stamp is not None:
            file.stamp.check_open(file.path, fd)  # not by name: the user may move a sealed file

    def _refuse_final(self, file: _File) -> None:
        if file.final:
            raise StoreConflict(
                file.path, "exists with other content; move it away and run the same fetch again, the rest is kept"
            )

    def _write(self, number: int, view: memoryview, offset: int) -> None:
        file = self._files[number]
        with (
            self._in_use(),
            store_errors(file.path, need_bytes=lambda: len(view)),
            self._open_files.lend(number) as fd,
        ):
            self._refuse_final(file)
            self._wrote = True
            rest = view
            while rest:
                written = os.pwrite(fd, rest, offset)
                rest, offset = rest[written:], offset + written
            if self._fsync:
                self._writeback.wrote(number, len(view))

    def _place(self, number: int, file: _File, is_right: IsRight) -> None:
        with self._open_files.lend(number) as fd:
            if self._sole_use.exposed(number, fd):
                self._prove(number, fd, is_right)
            self._demand_same(file, fd, self._partial.files)
            try:
                self._partial.files.move(file.entry.path, self._final)
            except FileExistsError as error:
                raise _appeared(file) from error
            self._demand_same(file, fd, self._final)  # exchanged since the first look
            file.stamp = Stamp.of(os.fstat(fd))
            self._sole_use.give_up(number, fd)

    def _demand_same(self, file: _File, fd: int, where: ConfinedDirectory) -> None:
        """Removes an entry that another program put in the place of the open file. Raises StoreError."""
        found = where.lstat(file.entry.path)
        if found is None or not os.path.samestat(found, os.fstat(fd)):
            where.unlink(file.entry.path)
            raise StoreError(
                f"{file.path}: another program exchanged the staged file for another entry; "
                "run the same fetch again, the rest is kept"
            )

    def _check_final(self, number: int, file: _File, is_right: IsRight) -> None:
        """Hashes a file again that had its final name before the fetch, if it may have changed since."""
        with self._open_files.lend(number) as fd:
            if (found := Stamp.of(os.fstat(fd))) != file.stamp:
                file.stamp = found
                self._prove(number, fd, is_right)

    def _prove(self, number: int, fd: int, is_right: IsRight) -> None:
        """Hashes a file again. Raises StoreError."""
        file, before = self._files[number], Stamp.of(os.fstat(fd))
        chunks = [chunk for chunk in self.manifest.chunks if chunk.file == number]
        with ThreadPoolExecutor(PROVING_THREADS, thread_name_prefix="swarm-prove") as pool:
            try:
                wrong = sum(not right for right in pool.map(is_right, chunks))
            except SourceChanged:
                wrong = len(chunks)
        if wrong or Stamp.of(os.fstat(fd)) != before:
            raise StoreError(
                f"{file.path}: another program changed {wrong} of its {len(chunks)} chunks after they were verified; "
                "run the same fetch again, the rest is kept"
            )

    def _flush_names(self) -> None:
        parents = {str(parent) for entry in self._entries.values() for parent in PurePosixPath(entry.path).parents}
        for parent in sorted(parents, reverse=True):  # deepest first: a name needs its target
            with contextlib.closing(self._final.enter("" if parent == "." else parent)) as directory:
                os.fsync(directory.fd)
        for made in self._made:
            with contextlib.closing(ConfinedDirectory.open(made.parent)) as directory:
                os.fsync(directory.fd)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._state:
            if self._closed:
                raise StoreError(f"{self.out}: this fetch was closed")
            self._users += 1
        try:
            yield
        finally:
            with self._state:
                self._users -= 1
                self._state.notify_all()

    def __repr__(self) -> str:
        final = sum(file.final for file in self._files.values())
        return f"<DirectoryStore {self.out} {final} of {len(self._files)} files final, {self.manifest.size} bytes>"


def _appeared(file: _File) -> StoreConflict:
    return StoreConflict(file.path, "appeared during the fetch; move it away and run the same fetch again")
