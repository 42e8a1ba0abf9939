"""Which files of a model directory are served, and which are not, with the reason.

Every regular file below the directory is, links within it included. A Hugging Face cache snapshot, whose files link to
`../../blobs` of the same repository folder, is taken as it stands. Any other file link that leads out is an error: the
artifact would depend on something that nobody named.

Must not know: what is in the files.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from swarm.content.manifest import FILES_MAX, PATH_BYTES_MAX, unsafe_path
from swarm.errors import ManifestInvalid
from swarm.store.disk import Stamp

NOT_SERVED = {
    ".git": "belongs to git",
    ".swarm": "belongs to swarm",
    ".cache": "belongs to the hub's download cache",
}


@dataclass(frozen=True, slots=True)
class SkippedPath:
    """Something that is not served. `path` is printable, relative to the directory."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file to serve: its path in the artifact, where its bytes are with links resolved, and its stamp."""

    path: str
    real: Path
    stamp: Stamp


def walk(path: Path) -> tuple[list[CheckpointFile], list[SkippedPath]]:
    """Files of a directory in order of their paths, or one safetensors file alone.

    Raises ManifestInvalid when there is nothing to serve or a link leads out, OSError when the disk fails.
    """
    if path.is_dir():
        walker = _Walk(os.path.realpath(path))
        walker.visit(walker.root, prefix="")
        if not walker.found:
            raise ManifestInvalid(str(path), "holds no file to serve")
        return sorted(walker.found, key=lambda found: found.path), walker.skipped
    if not path.exists():
        raise ManifestInvalid(str(path), "no such directory or file")
    if path.suffix != ".safetensors" or not path.is_file():
        raise ManifestInvalid(str(path), "is neither a directory nor a .safetensors file")
    if why := _unservable(path.name):
        raise ManifestInvalid(str(path), why)
    real = Path(os.path.realpath(path))
    return [CheckpointFile(path.name, real, Stamp.at(real))], []


class _Walk:
    def __init__(self, root: str) -> None:
        self.root = root  # with links resolved, like every directory here
        self.found: list[CheckpointFile] = []
        self.skipped: list[SkippedPath] = []
        self._blobs = _blobs(Path(root))

    def visit(self, directory: str, *, prefix: str, linked: bool = False) -> None:
        """Adds what is in `directory`, which the artifact calls `prefix`. `linked`: a link led here."""
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = prefix + entry.name
                if why := NOT_SERVED.get(entry.name) or _unservable(path):
                    self._skip(path, why)
                elif entry.is_symlink():
                    self._follow(entry.path, path, linked=linked)
                elif entry.is_dir(follow_symlinks=False):
                    self.visit(entry.path, prefix=f"{path}/", linked=linked)
                else:
                    self._add(path, entry.path)

    def _follow(self, link: str, path: str, *, linked: bool) -> None:
        try:
            target = os.path.realpath(link, strict=True)
        except OSError as error:
            raise ManifestInvalid(path, f"is a link to nowhere ({os.readlink(link)}); remove or repair it") from error
        inside = Path(target).is_relative_to(self.root)
        if not os.path.isdir(target):
            if not inside and not (self._blobs and Path(target).is_relative_to(self._blobs)):
                raise ManifestInvalid(path, f"is a link out of the directory, to {target}; put the file itself here")
            self._add(path, target)
        elif not inside:
            self._skip(path, f"is a link to a directory elsewhere, {target}")
        elif Path(os.path.dirname(link)).is_relative_to(target):
            self._skip(path, "is a link to a directory that it is in")
        elif linked:
            # Two linked directories may lead to each other, and several of them would multiply.
            self._skip(path, "is a link to a directory, found through another one")
        else:
            self.visit(target, prefix=f"{path}/", linked=True)

    def _add(self, path: str, real: str) -> None:
        status = os.stat(real, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            self._skip(path, "is neither a file nor a directory")
            return
        if len(self.found) == FILES_MAX:
            raise ManifestInvalid(self.root, f"holds more than {FILES_MAX} files")
        self.found.append(CheckpointFile(path, Path(real), Stamp.of(status)))

    def _skip(self, path: str, why: str) -> None:
        printable = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        self.skipped.append(SkippedPath(printable, why))


def _unservable(path: str) -> str | None:
    try:
        size = len(path.encode("utf-8"))
    except UnicodeEncodeError:  # Python carries bytes that are no UTF-8 as lone surrogates
        return "has a name that is not UTF-8"
    if size > PATH_BYTES_MAX:
        return f"has a path of more than {PATH_BYTES_MAX} bytes"
    return unsafe_path(path)


def _blobs(root: Path) -> Path | None:
    """Where files of a Hugging Face cache snapshot lie: `models--org--name/blobs`. None for other directories."""
    for commit in (root, *root.parents):
        repository = commit.parent.parent
        if commit.parent.name == "snapshots" and repository.name.startswith("models--"):
            return Path(os.path.realpath(repository / "blobs"))
    return None
