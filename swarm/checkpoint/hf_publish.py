"""Publishes fetched models in the local Hugging Face cache, whose layout is that of `hf_cache`.

Other programs share this layout, so:

- A blob gets a hub name only after its content is compared with that name: the hub's tools trust blob names, and a
  malicious peer must not plant content under such a name.
- A commit that a peer claims cannot be verified offline. It may add files to a snapshot and never changes a file that
  the cache has for this commit.
- A fetch starts with what lies here: files of the right name or path get a second name (hard link) in the fetch's
  directory, if their chunks have the digests of the manifest. A damaged blob is fetched again and replaced.
- What was verified is what is published: a file is moved only with the stamp that it had when it was verified.
- All checks precede the first move, and `refs/main` moves last. After an interruption blobs and links are right, and
  loading by id gives the old snapshot.
- A fetch by id moves `refs/main` even from another commit, so that loading the id gives the fetched files. The hub's
  tools move it back when they are online.

Must not know: peers, unverified chunks, `huggingface_hub` (a heavy import; the tests compare with it).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import filecmp
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from swarm.checkpoint import hub_tree
from swarm.checkpoint.blob_check import HASH_THREADS_MAX, content_name, git_name
from swarm.checkpoint.files import bystander, of_commit
from swarm.checkpoint.hf_cache import INCOMING, is_model_id, model_folder
from swarm.checkpoint.manifest_builder import verify
from swarm.content.manifest import FileEntry, Manifest, unsafe_path
from swarm.content.selection import Part
from swarm.errors import SettingsError, StoreConflict, StoreError
from swarm.protocol.messages import Origin
from swarm.store.file_errors import store_errors
from swarm.store.file_lock import open_locked
from swarm.store.own_files import replacing, write_new
from swarm.store.partial_directory import PARTIAL
from swarm.store.stamp import Stamp

# Of file systems without symbolic links (exFAT, some SMB and FUSE mounts).
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_LOCK = "lock"


class CacheEntry:
    """A model in the cache: `staging` is the directory of its fetch, `publish` makes it loadable by id.

    Raises SettingsError for an invalid model id, which would become a directory name.
    """

    def __init__(self, model_id: str, *, root: Path | None = None) -> None:
        if not is_model_id(model_id):
            raise SettingsError(
                "model id", f"{model_id!r} cannot be a model of the hub (NAME or ORG/NAME); fetch it with --out DIR"
            )
        self.model_id = model_id
        self.wrote: list[Path] = []  # by `publish`: blobs, and names in the snapshot
        self.folder = model_folder(model_id, root=root)
        self._incoming = self.folder / INCOMING  # drafts too: a crash would leave them in `refs` or a snapshot

    def __repr__(self) -> str:
        return f"<CacheEntry {self.model_id} in {self.folder.parent}>"

    def staging(self, manifest: Manifest) -> Path:
        """The directory to fetch this artifact into, made if missing, the same for each call. Raises StoreError."""
        staged = self._staged(manifest)
        with store_errors(staged):
            staged.mkdir(parents=True, exist_ok=True)
            # Without it the hub's tools report the model's directory as corrupt.
            (self.folder / "snapshots").mkdir(exist_ok=True)
        return staged

    def claim(self, manifest: Manifest) -> int | None:
        """Locks `staging` until `unclaim`; None while another fetch has it. Raises StoreError."""
        lock = self.staging(manifest) / PARTIAL / _LOCK
        # FileNotFoundError: another fetch is removing the directory.
        with store_errors(lock), contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock.parent.mkdir(exist_ok=True)
            return open_locked(lock, timeout_s=0)
        return None

    def unclaim(self, manifest: Manifest, lock: int) -> None:
        """Ends a claim, published or not."""
        place = self._staged(manifest) / PARTIAL
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(lock), os.stat(place / _LOCK)):
                (place / _LOCK).unlink()
                place.rmdir()
        os.close(lock)

    def reuse(self, manifest: Manifest, origin: Origin | None, part: Part | None = None) -> None:
        """Puts right files of the cache into `staging`, compared with the manifest, during a claim. Raises StoreError.

        With `part` only its files. A file that the cache lacks, or has damaged, is left out, to be fetched.
        """
        with store_errors(self.folder):
            for file in _files(manifest, part):
                self._reuse(manifest, file, origin, self._staged(manifest))

    def publish(
        self,
        manifest: Manifest,
        origin: Origin | None,
        revision: str | None = None,
        *,
        stamps: Mapping[str, Stamp] = MappingProxyType({}),
        part: Part | None = None,
        proven: bool = False,
    ) -> Path:
        """Moves the verified files out of `staging`, removes it, and returns the snapshot.

        With `part` only its files, as the hub's tools do with `allow_patterns`; unfinished files of others stay staged.
        The ref of `revision` names it afterwards, `main` without one. `stamps`: of the files when they were verified.
        `proven`: they were compared with their etags then.

        Blocks while files with etags are hashed. Files stay on their file system, so open files are served on. Raises
        StoreError, also if a file no longer has its stamp, and StoreConflict if a file does not match its etag or the
        cache has other content in its place.
        Then no file has moved, except after a disk failure, which the next fetch repairs.
        """
        staged = self._staged(manifest)
        origin = origin if origin and origin.commit else None
        commit = origin.commit if origin else manifest.digest[:40]
        target = self.folder / "snapshots" / commit
        files = _files(manifest, part)
        names = self._blob_names(manifest, files, origin, staged, proven=proven or manifest.promised)
        with store_errors(self.folder):
            for file in files:
                self._check_place(file, staged=staged, target=target, blob=self._blob(names[file.path]), origin=origin)
            for file in files:
                _demand(staged / file.path, stamps.get(file.path))
            for file in files:
                stamp = stamps.get(file.path)
                self._place(staged / file.path, target / file.path, self._blob(names[file.path]), stamp)
            target.mkdir(parents=True, exist_ok=True)  # for an artifact without files
            if origin and part is None:
                self._place_beside(origin, target)
            self._point("main" if revision is None else revision, commit)
            if part is None or not _unfinished(staged):
                shutil.rmtree(staged)
            with contextlib.suppress(OSError):  # not empty during another fetch
                staged.parent.rmdir()
        return target

    def discard(self, manifest: Manifest) -> None:
        """Removes what was fetched of an artifact that is refused. Raises StoreError."""
        with store_errors(self.folder):
            shutil.rmtree(self._staged(manifest), ignore_errors=True)

    def draft(self, name: str) -> Path:
        """Where a file may be written before `add`. Raises StoreError."""
        with store_errors(self._incoming):
            self._incoming.mkdir(parents=True, exist_ok=True)
            (self.folder / "snapshots").mkdir(exist_ok=True)
        return self._incoming / f"draft-{name}"

    def add(self, commit: str, path: str, *, name: str, draft: Path) -> Path:
        """Moves a draft into the snapshot of a commit; the caller has compared it with its name of the hub.

        Returns its place. Raises StoreError.
        """
        place = self.folder / "snapshots" / commit / path
        with store_errors(place):
            self._place(draft, place, self._blob(name), None)
            with contextlib.suppress(OSError):  # not empty during a fetch
                self._incoming.rmdir()
        return place

    def _staged(self, manifest: Manifest) -> Path:
        return self._incoming / manifest.digest[:16]

    def _blob(self, name: str) -> Path:
        return self.folder / "blobs" / name

    def _reuse(self, manifest: Manifest, file: FileEntry, origin: Origin | None, staged: Path) -> None:
        """Gives a right file of the cache a second name in `staged`."""
        place, alone = staged / file.path, _only(manifest, file)
        if place.exists():
            # A file with a second name may have been changed under that name since.
            if place.stat().st_nlink == 1 or _right(staged, alone):
                return
            place.unlink()
        for found in self._candidates(manifest, file, origin):
            with contextlib.suppress(OSError):  # else the file is fetched
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(found, place)
                except FileExistsError:  # another fetch
                    return
                except OSError:  # no hard links here
                    with replacing(place, draft_dir=self._incoming) as draft:
                        shutil.copyfile(found, draft)
                if _right(staged, alone):
                    return
                place.unlink()

    def _candidates(self, manifest: Manifest, file: FileEntry, origin: Origin | None) -> Iterator[Path]:
        """Files of the cache, by blob name or by path in a snapshot, that have the size of `file`; links resolved."""
        etag = origin.etags.get(file.path) if origin else None
        own = None if manifest.promised else _own_name(manifest, file)
        blobs = [self._blob(name) for name in (etag, own) if name]
        snapshots = (snapshot / file.path for snapshot in sorted((self.folder / "snapshots").iterdir()))
        inside = (Path(os.path.realpath(self.folder)), Path(os.path.realpath(self.folder.parent / "blobs")))
        seen = set()
        for path in (*blobs, *snapshots):
            real = Path(os.path.realpath(path))
            if real in seen or not any(real.is_relative_to(place) for place in inside):
                continue
            seen.add(real)
            with contextlib.suppress(OSError):
                if real.is_file() and real.stat().st_size == file.size:
                    yield real

    def _blob_names(
        self, manifest: Manifest, files: Sequence[FileEntry], origin: Origin | None, staged: Path, *, proven: bool
    ) -> dict[str, str]:
        etags = origin.etags if origin else {}

        def name(file: FileEntry) -> str:
            path = staged / file.path
            with store_errors(path):
                size = path.stat(follow_symlinks=False).st_size
                if size != file.size:
                    raise StoreError(f"{path} has {size} bytes, not {file.size}: fetch it again")
                etag = etags.get(file.path)
                if etag is None:
                    return _own_name(manifest, file)
                if not proven and content_name(path, like=etag, size=size) != etag:
                    raise StoreConflict(
                        path,
                        f"its content does not have the name {etag} that its source says the hub gave it; "
                        "fetch from another source, or with --out DIR",
                    )
                return etag

        workers = min(HASH_THREADS_MAX, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers, thread_name_prefix="swarm-etag") as pool:
            return dict(zip((file.path for file in files), pool.map(name, files), strict=True))

    def _check_place(self, file: FileEntry, *, staged: Path, target: Path, blob: Path, origin: Origin | None) -> None:
        if blob.exists() and not blob.is_file():
            raise StoreConflict(blob, "a file belongs here; remove what is in its place")
        link = target / file.path
        if link.exists() and not link.is_symlink():
            listed = (hub_tree.read(self.folder, target.name) or {}).get(file.path)
            mends = listed is not None and listed.name == blob.name  # the staged file has the content of the listing
            if link.is_file() and (mends or filecmp.cmp(link, staged / file.path, shallow=False)):
                return
            raise StoreConflict(
                link, "is not a link into the cache's blobs and differs; remove it, or fetch with --out DIR"
            )
        # A commit that is derived from the manifest is swarm's own: a different file there is damaged.
        if origin is None or not link.exists() or os.path.basename(os.readlink(link)) == blob.name:
            return
        if not filecmp.cmp(link, staged / file.path, shallow=False):
            raise StoreConflict(
                link,
                f"the cache has another content for this file of commit {origin.commit[:12]} than the source; "
                "remove the snapshot if the source is right, or fetch with --out DIR",
            )

    def _place(self, staged: Path, link: Path, blob: Path, stamp: Stamp | None) -> None:
        if link.is_file() and not link.is_symlink():  # the same content as a plain file, or a damaged one
            if filecmp.cmp(link, staged, shallow=False):
                staged.unlink()
            else:
                staged.replace(link)
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        # The staged file matches the blob's name. A blob of another content is a broken copy.
        if blob.exists() and (blob.samefile(staged) or filecmp.cmp(blob, staged, shallow=False)):
            staged.unlink()
        else:
            _demand(staged, stamp)
            if not os.path.lexists(blob):
                self.wrote.append(blob)
            if not self._mend_shared(staged, blob):
                staged.replace(blob)
        if link.exists() and os.path.basename(os.readlink(link)) == blob.name:
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        self.wrote.append(link)
        try:
            if _is_true("HF_HUB_DISABLE_SYMLINKS"):
                raise OSError(errno.EPERM, "symbolic links are turned off")
            with replacing(link, draft_dir=self._incoming) as draft:
                draft.symlink_to(os.path.relpath(blob, link.parent))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._place_plain(blob, link)

    def _mend_shared(self, staged: Path, blob: Path) -> bool:
        """Replaces a damaged file of the cache-wide store; False if the blob is no link to one of the right size.

        Models that are downloaded later get links to that file. huggingface_hub ignores one of another size.
        """
        shared = Path(os.path.realpath(blob))
        if not blob.is_symlink() or shared.parent.parent != Path(os.path.realpath(self.folder.parent / "blobs")):
            return False
        with contextlib.suppress(OSError):  # of another user
            if shared.stat().st_size == staged.stat().st_size:
                shutil.copymode(shared, staged)
                staged.replace(shared)
                return True
        return False

    def _place_beside(self, origin: Origin, target: Path) -> None:
        """Adds the commit's bystanders that the source sent and the snapshot lacks; a wrong one is left out.

        huggingface_hub 2 compares a snapshot with the listing of its commit, if it has one: without a README the whole
        model counts as incomplete. A listing of which bystanders alone are missing now is removed; the hub's tools get
        it again when they are online.
        """
        listed = hub_tree.read(self.folder, origin.commit)
        for path, data in origin.beside.items():
            if unsafe_path(path) or not of_commit(path) or (listed is not None and path not in listed):
                continue
            name = listed[path].name if listed is not None else git_name(data)
            with contextlib.suppress(OSError):  # something else lies in its place
                draft = self._incoming / f"beside-{secrets.token_hex(8)}"
                write_new(draft, data)
                if content_name(draft, like=name, size=len(data)) == name and _lacks(target / path, name):
                    self._place(draft, target / path, self._blob(name), None)
                draft.unlink(missing_ok=True)
        missing = [path for path in listed or () if not (target / path).exists()]
        if missing and all(bystander(path) for path in missing):
            hub_tree.place(self.folder, origin.commit).unlink(missing_ok=True)

    def _place_plain(self, blob: Path, link: Path) -> None:
        """Makes `link` a plain file, as the hub's tools do without links: the blob itself, a copy of a shared one."""
        if blob.is_symlink() or len([*self.folder.glob("snapshots/*")]) > 1:
            with replacing(link, draft_dir=self._incoming) as draft:
                shutil.copyfile(blob, draft)
        else:
            blob.replace(link)

    def _point(self, revision: str, commit: str) -> None:
        if revision == commit or unsafe_path(revision):
            return
        main = self.folder / "refs" / revision
        main.parent.mkdir(parents=True, exist_ok=True)
        with replacing(main, draft_dir=self._incoming) as draft, draft.open("w") as file:
            file.write(commit)  # no newline: the hub's tools compare the whole file
            file.flush()
            os.fsync(file.fileno())


def _lacks(link: Path, name: str) -> bool:
    """Whether a snapshot lacks a file: there is nothing, or a link to its lost blob."""
    return not os.path.lexists(link) or (not link.exists() and os.path.basename(os.readlink(link)) == name)


def _files(manifest: Manifest, part: Part | None) -> Sequence[FileEntry]:
    return manifest.files if part is None else [manifest.files[number] for number in part.files]


def _unfinished(staged: Path) -> bool:
    """Whether an interrupted fetch has left a file there, which the next one goes on with."""
    return any(path.is_file() and path.name not in (_LOCK, PARTIAL) for path in staged.rglob("*"))


def _right(staged: Path, alone: Manifest) -> bool:
    """Whether the only file of a manifest is there with its content."""
    if not alone.promised:
        return not verify(staged, alone)
    (file,) = alone.files
    name, path = file.content.partition(":")[2], staged / file.path
    return path.stat().st_size == file.size and content_name(path, like=name, size=file.size) == name


def _only(manifest: Manifest, file: FileEntry) -> Manifest:
    return Manifest(1, manifest.tier, manifest.fingerprint, manifest.scheme, manifest.chunk_bytes, (file,))


def _demand(path: Path, stamp: Stamp | None) -> None:
    """Raises StoreError if a file was changed since it had the stamp."""
    if stamp is None:
        return
    status = path.stat(follow_symlinks=False)
    found = Stamp.of(status)
    # The change time of a file with several names moves with each name that `publish` moves or removes.
    if found != (stamp if status.st_nlink == 1 else dataclasses.replace(stamp, ctime_ns=found.ctime_ns)):
        raise StoreError(f"{path}: another program changed it after it was verified; run the same fetch again")


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


def _own_name(manifest: Manifest, file: FileEntry) -> str:
    """A blob name made of the verified chunk digests: to hash 100 GB again would take a minute.

    It does not match the syntax of etags, so neither the hub's tools nor `origin` take it for a hub name.
    """
    state = hashlib.sha256(f"swarm blob\n{manifest.scheme.name} {manifest.scheme.leaf_bytes} {file.size}\n".encode())
    for chunk in file.chunks:
        state.update(f"{chunk.size} {chunk.digest}\n".encode())
    return f"swarm-{state.hexdigest()[:40]}"
