"""A directory of this machine as an origin: a disk, or a file system that several machines mount (NFS, Lustre).

It has no hashes, so a file is identified by its size and time of change; a link into the blobs of a Hugging Face cache
by the hash that names the blob. Nodes agree on a promise if they see the same times, as clients of one server do.

Must not know: peers, how other origins work.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from swarm.checkpoint.files import walk
from swarm.content.promise import ETAG, GIT_SHA1, SHA256, ListedFile, Listing
from swarm.errors import ManifestInvalid, OriginChanged, OriginNotFound, OriginUnreachable

_HASH = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")


class FileOrigin:
    """Directories by path, `/path` or `file:///path`."""

    scheme = "file"
    address = "file:"

    def listing(self, model: str, revision: str | None) -> Listing:
        """As `OriginReader`; a directory has no revisions."""
        root = _path(model)
        if revision is not None:
            raise OriginNotFound(str(root), f"has no revisions, so not {revision!r}")
        try:
            found, _ = walk(root)
            files = tuple(_listed(root, file.path, file.real) for file in found)
        except ManifestInvalid as error:
            raise OriginNotFound(error.subject, error.why) from error
        except OSError as error:
            raise OriginUnreachable(str(root), f"cannot be read ({error.strerror})") from error
        return Listing(f"file://{root}", "", files)

    def read(self, listing: Listing, file: ListedFile, offset: int, size: int) -> _FileStream:
        """As `OriginReader`."""
        root = _path(listing.source)
        path = root if root.is_file() else root / file.path
        return _FileStream(path, file, offset, size, root=root)


class _FileStream:
    def __init__(self, path: Path, file: ListedFile, offset: int, size: int, *, root: Path) -> None:
        self._path = path
        self._file = file
        self._root = root
        self._at, self._end = offset, offset + size
        try:
            self._fd: int | None = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise OriginChanged(str(path), "is gone since it was listed") from error
        except OSError as error:
            raise OriginUnreachable(str(path), f"cannot be read ({error.strerror})") from error
        self._check()

    def readinto(self, view: memoryview, /) -> int:
        """As `OriginStream`. The file is compared with the listing after the last byte."""
        if self._fd is None:
            raise OriginUnreachable(str(self._path), "was closed")
        view = view[: self._end - self._at]
        if not view:
            return 0
        try:
            count = os.preadv(self._fd, [view], self._at)
        except OSError as error:
            raise OriginUnreachable(str(self._path), f"cannot be read ({error.strerror})") from error
        if not count:
            raise OriginChanged(str(self._path), f"ends at byte {self._at}")
        self._at += count
        if self._at == self._end:
            self._check()
        return count

    def close(self) -> None:
        """As `OriginStream`."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _check(self) -> None:
        try:
            now = _listed(self._root, self._file.path, self._path)
        except OSError as error:
            raise OriginChanged(str(self._path), "is gone since it was listed") from error
        if now != self._file:
            self.close()
            raise OriginChanged(str(self._path), "changed since it was listed")


def _path(model: str) -> Path:
    return Path(unquote(model.removeprefix("file://")) if model.startswith("file://") else model)


def _listed(root: Path, path: str, real: Path) -> ListedFile:
    status = os.stat(real)
    link = root / path
    name = Path(os.readlink(link)) if link.is_symlink() else Path()
    if name.parent.name == "blobs" and _HASH.fullmatch(name.name):
        return ListedFile(path, status.st_size, (SHA256 if len(name.name) == 64 else GIT_SHA1) + name.name)
    return ListedFile(path, status.st_size, f"{ETAG}{status.st_size}-{status.st_mtime_ns}")
