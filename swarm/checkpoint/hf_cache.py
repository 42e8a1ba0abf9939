"""The local Hugging Face cache: finds models in it, and puts fetched ones where `from_pretrained(id)` looks.

Owns the layout of the cache, which several programs share, and therefore its rules:

    <root>/models--org--name/
        blobs/<etag>                   contents, named as the hub names them: sha256, or git's sha1 for small files
        blobs/swarm-<hash>             contents whose hub name nobody told us (see `_own_name`)
        snapshots/<commit>/<path>      relative links to blobs
        refs/main                      the commit that the plain model id means
        .swarm-incoming/<digest>       fetches that are not complete; an interrupted one is found again by its digest

- A blob gets a hub name only after its content was compared with that name. The hub's own tools believe blob names, so
  a lying peer must never plant something under one.
- A commit that a peer claims cannot be compared with anything offline. So it may add files to a snapshot, and never
  changes what the cache already says about that commit.
- Everything is checked before anything moves; `refs/main` moves last. A publication that breaks off leaves blobs and
  links that are right, and whoever loads by id gets the old snapshot.
- After a fetch of an id, loading that id must give what was fetched, so `refs/main` is moved even from another
  commit. The hub's tools move it back as soon as they are online and the hub says otherwise.

Must not know: peers, chunks in flight, and `huggingface_hub`, which is heavy and not needed for a layout (the tests use
it as the judge).
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from swarm.content.manifest import FileEntry, Manifest, unsafe_path
from swarm.errors import SettingsError, StoreConflict, StoreError
from swarm.protocol.messages import Origin
from swarm.store.disk import replacing

MODEL_ID_CHARS_MAX = 96  # of each of the two parts; the hub's limit

_PART = rf"\w(?:[\w.\-]{{0,{MODEL_ID_CHARS_MAX - 2}}}\w)?"
_MODEL_ID = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_GIT_SHA1 = _COMMIT
_SHA256 = re.compile(r"[0-9a-f]{64}")

_INCOMING = ".swarm-incoming"
_READ_BYTES = 1 << 20
_HASH_THREADS_MAX = 8  # sha256 runs at 1.6 GB/s a thread; more would outrun the disk


def cache_root() -> Path:
    """The directory that the hub's own tools would use with this process's environment."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    legacy = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return Path(os.path.expandvars(os.path.expanduser(os.environ.get("HF_HUB_CACHE", legacy))))


def is_model_id(text: str) -> bool:
    """Whether the hub could have a model `name` or `org/name` of this text. Such a text may be a local path as well."""
    forbidden = "--" in text or ".." in text or text.endswith(".git")
    return _MODEL_ID.fullmatch(text) is not None and not forbidden


def snapshot(model_id: str, *, root: Path | None = None, revision: str = "main") -> Path | None:
    """The cached snapshot of a branch, tag or commit, None if there is none. Files nobody asked for may be missing."""
    if not is_model_id(model_id) or unsafe_path(revision):
        return None
    folder = _folder(model_id, root)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text()
        except (OSError, UnicodeDecodeError):
            return None
    found = folder / "snapshots" / commit
    return found if _COMMIT.fullmatch(commit) and found.is_dir() else None


def model_id_of(snapshot_dir: Path) -> str | None:
    """The model id whose snapshot this directory is; None when it is no snapshot in a cache."""
    path = Path(os.path.abspath(snapshot_dir))  # not resolve(): the layout is in the names, links and all
    kind, _, name = path.parent.parent.name.partition("--")
    model_id = name.replace("--", "/")
    if path.parent.name != "snapshots" or kind != "models" or not is_model_id(model_id):
        return None
    return model_id


def origin(snapshot_dir: Path) -> Origin | None:
    """The hub's names for a snapshot and its files; None when nothing there bears a name that the hub gave."""
    path = Path(os.path.abspath(snapshot_dir))
    if model_id_of(path) is None or not _COMMIT.fullmatch(path.name):
        return None
    etags = {name: etag for name, etag in _links(path) if _is_etag(etag)}
    return Origin(commit=path.name, etags=etags) if etags else None


class CacheEntry:
    """One model's place in the cache: `staging` is where a fetch writes, `publish` makes it loadable by its id.

    Raises SettingsError for anything that is not a model id: it becomes a directory name.
    """

    def __init__(self, model_id: str, *, root: Path | None = None) -> None:
        if not is_model_id(model_id):
            raise SettingsError(
                "model id", f"{model_id!r} cannot be a model of the hub (NAME or ORG/NAME); fetch it with --out DIR"
            )
        self.model_id = model_id
        self.folder = _folder(model_id, root)
        self._incoming = self.folder / _INCOMING  # drafts too: a crash would leave them in `refs` or a snapshot

    def __repr__(self) -> str:
        return f"<CacheEntry {self.model_id} in {self.folder.parent}>"

    def staging(self, manifest: Manifest) -> Path:
        """The directory to fetch this artifact into, made if missing; the same one each time. Raises StoreError."""
        staged = self._staged(manifest)
        with _store_errors(staged):
            staged.mkdir(parents=True, exist_ok=True)
            # The hub's tools call a model's directory without this one corrupt.
            (self.folder / "snapshots").mkdir(exist_ok=True)
        return staged

    def publish(self, manifest: Manifest, origin: Origin | None) -> Path:
        """Moves the complete and verified files out of `staging`, removes it, and returns the snapshot.

        Blocks: what has an etag is hashed. Files stay on their file system, so those that are open are served on.
        Raises StoreConflict when a file is not what `origin` calls it, or when the cache has something else in its
        place, and StoreError. Nothing has moved then, unless the disk itself failed half way: the next fetch brings
        back what is missing.
        """
        staged = self._staged(manifest)
        commit = origin.commit if origin else manifest.digest[:40]
        target = self.folder / "snapshots" / commit
        names = self._blob_names(manifest, origin, staged)
        with _store_errors(self.folder):
            for file in manifest.files:
                self._check_place(file, staged=staged, target=target, blob=self._blob(names[file.path]), origin=origin)
            for file in manifest.files:
                self._place(staged / file.path, target / file.path, self._blob(names[file.path]))
            target.mkdir(parents=True, exist_ok=True)  # an artifact may have no file
            self._point_main(commit)
            shutil.rmtree(staged)
            with contextlib.suppress(OSError):  # another fetch may be under way beside it
                staged.parent.rmdir()
        return target

    def _staged(self, manifest: Manifest) -> Path:
        return self._incoming / manifest.digest[:16]

    def _blob(self, name: str) -> Path:
        return self.folder / "blobs" / name

    def _blob_names(self, manifest: Manifest, origin: Origin | None, staged: Path) -> dict[str, str]:
        etags = origin.etags if origin else {}

        def name(file: FileEntry) -> str:
            path = staged / file.path
            with _store_errors(path):
                size = path.stat(follow_symlinks=False).st_size
                if size != file.size:
                    raise StoreError(f"{path} has {size} bytes, not {file.size}: fetch it again")
                etag = etags.get(file.path)
                if etag is None:
                    return _own_name(manifest, file)
                if _content_etag(path, like=etag, size=size) != etag:
                    raise StoreConflict(
                        path,
                        f"its content does not have the name {etag} that its source says the hub gave it; "
                        "fetch from another source, or with --out DIR",
                    )
                return etag

        workers = min(_HASH_THREADS_MAX, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers, thread_name_prefix="swarm-etag") as pool:
            return dict(zip((file.path for file in manifest.files), pool.map(name, manifest.files), strict=True))

    def _check_place(self, file: FileEntry, *, staged: Path, target: Path, blob: Path, origin: Origin | None) -> None:
        if blob.exists() and not blob.is_file():
            raise StoreConflict(blob, "a file belongs here; remove what is in its place")
        link = target / file.path
        if link.exists() and not link.is_symlink():
            raise StoreConflict(link, "is not a link into the cache's blobs; remove it, or fetch with --out DIR")
        # A commit derived from the manifest is our own, so what differs there is damage, and ours is right.
        if origin is None or not link.exists() or os.path.basename(os.readlink(link)) == blob.name:
            return
        if not filecmp.cmp(link, staged / file.path, shallow=False):
            raise StoreConflict(
                link,
                f"the cache has another content for this file of commit {origin.commit[:12]} than the source; "
                "one of them is wrong: remove the snapshot, or fetch with --out DIR",
            )

    def _place(self, staged: Path, link: Path, blob: Path) -> None:
        blob.parent.mkdir(parents=True, exist_ok=True)
        # The staged file is what the blob's name says. So is a blob of that size; another size is a broken copy.
        if blob.exists() and blob.stat().st_size == staged.stat().st_size:
            staged.unlink()
        else:
            staged.replace(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        with replacing(link, draft_dir=self._incoming) as draft:
            draft.symlink_to(os.path.relpath(blob, link.parent))

    def _point_main(self, commit: str) -> None:
        main = self.folder / "refs" / "main"
        main.parent.mkdir(parents=True, exist_ok=True)
        with replacing(main, draft_dir=self._incoming) as draft, draft.open("w") as file:
            file.write(commit)  # no newline: the hub's tools compare the whole file
            file.flush()
            os.fsync(file.fileno())


def _folder(model_id: str, root: Path | None) -> Path:
    return (cache_root() if root is None else root) / f"models--{model_id.replace('/', '--')}"


def _links(directory: Path) -> Iterator[tuple[str, str]]:
    """Path in the snapshot, and name of the blob, of each link to a blob."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                continue
            # One hop only: a blob may itself be a link into a store that several models share.
            target = Path(os.readlink(path))
            if target.parent.name == "blobs":
                yield path.relative_to(directory).as_posix(), target.name


def _is_etag(name: str) -> bool:
    return _GIT_SHA1.fullmatch(name) is not None or _SHA256.fullmatch(name) is not None


def _own_name(manifest: Manifest, file: FileEntry) -> str:
    """A blob name made of what was verified already, so that nothing is read again: hashing 100 GB takes a minute.

    No etag looks like it, so neither the hub's tools nor `origin` can take it for a name that the hub gave.
    """
    state = hashlib.sha256(f"swarm blob\n{manifest.scheme.name} {manifest.scheme.leaf_bytes} {file.size}\n".encode())
    for chunk in file.chunks:
        state.update(f"{chunk.size} {chunk.digest}\n".encode())
    return f"swarm-{state.hexdigest()[:40]}"


def _content_etag(path: Path, *, like: str, size: int) -> str:
    """The hub's name for a content: of large files the sha256, of others what git calls them."""
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    state = hashlib.sha256() if _SHA256.fullmatch(like) else git
    buffer = memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


@contextlib.contextmanager
def _store_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{error.filename or where}: {error.strerror or error}") from error
