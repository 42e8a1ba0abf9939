"""Lists the files of a model directory that are served, and the skipped paths with reasons.

All regular files below the directory are served, links inside it included, except bystanders: what people, git,
editors and Python leave beside a model (`bystander`). Files of a Hugging Face snapshot link to `../../blobs` of the
same repository folder, which may link into `blobs` of the cache, and are served. A link to a file anywhere else is an
error: the artifact would depend on a file outside the named directory.

Must not know: contents of files.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from swarm.content.manifest import FILES_MAX, PATH_BYTES_MAX, unsafe_path
from swarm.errors import ManifestInvalid
from swarm.store.stamp import Stamp

SINGLE = (".safetensors", ".gguf")  # a file that is a model by itself
NOT_SERVED = {
    ".git": "belongs to git",
    ".github": "belongs to git",
    ".hg": "belongs to Mercurial",
    ".svn": "belongs to Subversion",
    ".swarm": "belongs to swarm",
    ".cache": "belongs to the hub's download cache",
    ".huggingface": "belongs to the hub's download cache",
    ".locks": "belongs to the hub's download cache",
    "__pycache__": "holds Python's byte code",
    ".ipynb_checkpoints": "belongs to Jupyter",
    ".idea": "belongs to an editor",
    ".vscode": "belongs to an editor",
    "__MACOSX": "belongs to the desktop",
    ".venv": "holds a Python environment",
    "lost+found": "belongs to the file system",
    ".snapshot": "belongs to the file system",
}
# Patterns of file names, in any case; loaders open none of these files.
_OF_COMMITS = 4  # the first are in commits, the others on machines
_BYSTANDERS = [
    (re.compile(pattern, re.IGNORECASE), why)
    for pattern, why in (
        (r"\.git(attributes|ignore|modules|keep)", "belongs to git"),
        (r".*\.(png|jpe?g|gif|svg|webp|bmp|ico|tiff?)", "is a picture"),
        (
            r"((READ_?ME|LICEN[SC]E|NOTICE|COPYING|COPYRIGHT|CITATION|CHANGELOG|CONTRIBUTING|MODEL_?CARD)"
            r"|(ACCEPTABLE_)?USE_POLICY)([._-].*)?(?<!\.py)(?<!\.json)(?<!\.safetensors)(?<!\.bin)(?<!\.gguf)",
            "is documentation",
        ),
        (r".*\.(md|markdown|rst)", "is documentation"),
        (r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini", "belongs to the desktop"),
        (r".*\.py[co]", "holds Python's byte code"),
        (r".*~|\.#.*|#.*#|\..*\.sw[a-p]|.*\.(orig|rej|bak)", "belongs to an editor"),
        (r"\.nfs[0-9a-f]+|\.fuse_hidden[0-9a-f]+", "belongs to the file system"),
        (r".*\.(lock|incomplete)", "belongs to a program that runs or was interrupted"),
        (r"(.*\.)?swarm-signatures\.json", "has signatures of publishers"),
    )
]


@dataclass(frozen=True, slots=True)
class SkippedPath:
    """A path that is not served, relative to the directory and printable."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file to serve: its path in the artifact, its real path with links resolved, and its stamp."""

    path: str
    real: Path
    stamp: Stamp


def bystander(path: str) -> str | None:
    """Why a path of a directory is never part of an artifact, or None.

    Two directories with the same model differ in such files, and must have the same identity.
    """
    parts = path.split("/")
    why = next((NOT_SERVED[part] for part in parts if part in NOT_SERVED), None)
    return why or next((why for pattern, why in _BYSTANDERS if pattern.fullmatch(parts[-1])), None)


def of_commit(path: str) -> bool:
    """Whether a path is that of a bystander which a commit of the hub may have: documentation, a picture, git's own."""
    parts = path.split("/")
    if any(part in NOT_SERVED for part in parts):
        return False
    return any(pattern.fullmatch(parts[-1]) for pattern, _ in _BYSTANDERS[:_OF_COMMITS])


def real_inside(root: Path, path: str) -> Path | None:
    """Where a file of a directory really is; None if that is neither in the directory nor in the blobs of its cache."""
    base, real = Path(os.path.realpath(root)), Path(os.path.realpath(root / path))
    return real if any(real.is_relative_to(place) for place in (base, *_blobs(base))) else None


def walk(path: Path, *, dangling: list[str] | None = None) -> tuple[list[CheckpointFile], list[SkippedPath]]:
    """The files of a directory, sorted by path, or a single file of weights.

    `dangling` gets the paths of links to nowhere, which are an error without it. Raises ManifestInvalid if there is no
    file to serve or a link leads out of the directory, and OSError.
    """
    if path.is_dir():
        walker = _Walk(os.path.realpath(path), dangling)
        walker.visit(walker.root, prefix="")
        if not walker.found:
            raise ManifestInvalid(str(path), "holds no file to serve")
        return sorted(walker.found, key=lambda found: found.path), walker.skipped
    if not path.exists():
        raise ManifestInvalid(str(path), "no such directory or file")
    if path.suffix not in SINGLE or not path.is_file():
        raise ManifestInvalid(str(path), "is neither a directory nor a .safetensors or .gguf file")
    if why := _unservable(path.name):
        raise ManifestInvalid(str(path), why)
    real = Path(os.path.realpath(path))
    return [CheckpointFile(path.name, real, Stamp.at(real))], []


class _Walk:
    def __init__(self, root: str, dangling: list[str] | None) -> None:
        self._dangling = dangling
        self.root = root  # links resolved, as in every directory path here
        self.found: list[CheckpointFile] = []
        self.skipped: list[SkippedPath] = []
        self._blobs = _blobs(Path(root))

    def visit(self, directory: str, *, prefix: str, linked: bool = False) -> None:
        """Adds the entries of `directory`, which has the path `prefix` in the artifact. `linked`: reached by a link."""
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = prefix + entry.name
                why = NOT_SERVED.get(entry.name) if os.path.isdir(entry.path) else bystander(path)
                if why := why or _unservable(path):
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
            if self._dangling is not None:
                self._dangling.append(path)
                return
            raise ManifestInvalid(path, f"is a link to nowhere ({os.readlink(link)}); remove or repair it") from error
        inside = Path(target).is_relative_to(self.root)
        if not os.path.isdir(target):
            if not inside and not any(Path(target).is_relative_to(blobs) for blobs in self._blobs):
                raise ManifestInvalid(path, f"is a link out of the directory, to {target}; put the file itself here")
            self._add(path, target)
        elif not inside:
            self._skip(path, f"is a link to a directory elsewhere, {target}")
        elif Path(os.path.dirname(link)).is_relative_to(target):
            self._skip(path, "is a link to a directory that it is in")
        elif linked:
            # Linked directories may contain links to each other.
            self._skip(path, "is a link to a directory, found through another link")
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
    except UnicodeEncodeError:  # Python decodes other bytes as lone surrogates
        return "has a name that is not UTF-8"
    if size > PATH_BYTES_MAX:
        return f"has a path of more than {PATH_BYTES_MAX} bytes"
    return unsafe_path(path)


def _blobs(root: Path) -> tuple[Path, ...]:
    """`models--org--name/blobs` for a snapshot of the Hugging Face cache, and the cache's own `blobs`."""
    for commit in (root, *root.parents):
        repository = commit.parent.parent
        if commit.parent.name == "snapshots" and repository.name.startswith("models--"):
            return tuple(Path(os.path.realpath(place / "blobs")) for place in (repository, repository.parent))
    return ()
