"""Proof that the files of a fetch are those of a pinned commit: the origin's listing against the bytes that arrive.

    listing   asked for beside the fetch; may come late, or not at all
    manifest  ── paths and sizes ──> NotOfCommit, before the bytes are here
    chunks    ── in order, per file ──> sha256 or git's sha1 ──> NotOfCommit, before a file gets its final name

A member can say of any files that they are a commit. BLAKE3 pins bytes to the manifest of that member; only the hashes
that the origin lists pin them to the commit. A file is hashed while later ones arrive, on threads of its own.

Where the listing does not come within `LISTING_S`, where a file is fetched in part or its bytes are not kept, the
result says so: the fetch goes on, and is what members say. Must not know: peers, which origin it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Manifest
from swarm.content.promise import ETAG, ListedFile, Listing
from swarm.errors import NotOfCommit, OriginError
from swarm.peers.host import Host
from swarm.store import DeviceStore, LossyStore, Store
from swarm.transfer.proof import FileProver

LISTING_S = 3.0  # from the begin of the fetch on, or until its bytes are here if that takes longer
FAILURES_MAX = 2  # of requests for the listing, once the bytes are here
HASHERS_MAX = 8
POLL_S = 0.05
PATHS_SHOWN = 3

log = logging.getLogger("swarm")


class PendingListing(Protocol):
    """The listing of an origin, on its way. `error`: for good; `last`: of the last request, of `failures`."""

    address: str
    listing: Listing | None
    error: OriginError | None
    last: OriginError | None
    failures: int


def warn_unproven(model_id: str, commit: str, why: str) -> None:
    """Logs what a pin means that could not be proven."""
    log.warning(
        "%s: that the files are those of commit %s is the word of members alone (%s); a digest pins without the hub: "
        "--digest D",
        model_id, commit[:12], why,
    )  # fmt: skip


class PinnedCommit:
    """A commit that is pinned: `commit` of the model at `lister`'s origin.

    `beside`: files of the artifact that are no files of the commit, such as descriptions of it.
    """

    def __init__(self, commit: str, lister: PendingListing, *, beside: frozenset[str] = frozenset()) -> None:
        self.commit = commit
        self.lister = lister
        self.beside = beside

    def differences(self, manifest: Manifest, numbers: Sequence[int], listing: Listing) -> list[str]:
        """What paths and sizes of these files, by number, tell against the commit; of a promise also contents."""
        if listing.commit != self.commit:
            return [f"{self.lister.address} lists commit {listing.commit[:12] or 'none'} in its place"]
        listed = {file.path: file for file in listing.files}
        return [why for number in numbers if (why := self._difference(manifest, number, listed))]

    def _difference(self, manifest: Manifest, number: int, listed: Mapping[str, ListedFile]) -> str:
        file = manifest.files[number]
        if (right := listed.get(file.path)) is None:
            return "" if file.path in self.beside else f"{file.path} is no file of it"
        if file.size != right.size:
            return f"{file.path} has {right.size} bytes there, not {file.size}"
        return f"{file.path} has another content there" if manifest.promised and file.content != right.content else ""


class CommitProof:
    """The proof of one fetch. After `conclude`, `unproven` says why nothing is proven; '' if all files are."""

    def __init__(
        self, pinned: PinnedCommit, model_id: str, store: Store, held: Bitfield, wanted: Bitfield, *, host: Host
    ) -> None:
        self.unproven = ""
        self._pinned = pinned
        self._model_id = model_id
        self._store = store
        self._held = held
        self._wanted = wanted
        self._host = host
        self._began = host.now()
        self._landed = asyncio.Event()  # all wanted chunks
        self._task: asyncio.Future[None] | None = None
        manifest = store.manifest
        chunks = manifest.chunks
        wanted_files = {chunks[index].file for index in wanted}
        wanted_files |= {number for number, file in enumerate(manifest.files) if not file.size}
        self._files = sorted(wanted_files)

    def begin(self, fail: Callable[[NotOfCommit], None]) -> None:
        """Starts to prove. `fail` ends the download when the files cannot be those of the commit."""
        self._task = asyncio.ensure_future(self._prove(fail))

    async def conclude(self) -> None:
        """Returns when all wanted files, which are here by now, are proven or cannot be. Raises NotOfCommit."""
        self._landed.set()
        if self._task is not None:
            await self._task

    async def end(self) -> None:
        """Stops; returns when no thread reads the store any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _prove(self, fail: Callable[[NotOfCommit], None]) -> None:
        listing = await self._listed()
        if listing is None:
            return
        manifest = self._store.manifest
        if differences := self._pinned.differences(manifest, self._files, listing):
            error = self._refuted(differences)
            fail(error)
            raise error
        if manifest.promised:
            return  # its own proof compares the files with these contents
        listed = {file.path: file.content for file in listing.files}
        contents = [listed.get(file.path, ETAG) for file in manifest.files]
        self.unproven = self._unprovable(contents)
        if not self.unproven:
            await self._hash(contents)

    async def _listed(self) -> Listing | None:
        lister = self._pinned.lister
        while lister.listing is None:
            late = self._host.now() - self._began > LISTING_S or lister.failures >= FAILURES_MAX
            if lister.error or (self._landed.is_set() and late):
                last = lister.error or lister.last
                self.unproven = str(last) if last else f"{lister.address}: no answer within {LISTING_S:g} s"
                return None
            await asyncio.sleep(POLL_S)
        return lister.listing

    def _unprovable(self, contents: Sequence[str]) -> str:
        """Why the wanted files have no bytes to be hashed, or no hash to be compared with; '' if they have both."""
        manifest = self._store.manifest
        if isinstance(self._store, LossyStore):
            return "tensors are cast as they arrive, and the hub's hashes are those of whole files"
        for number in self._files:
            path = manifest.files[number].path
            if any(chunk.index not in self._wanted for chunk in manifest.chunks_of(number)):
                return f"{path} is fetched in part, and the hub's hashes are those of whole files"
            if contents[number].startswith(ETAG) and path not in self._pinned.beside:
                return f"{self._pinned.lister.address} lists {path} without a hash"
        return ""

    async def _hash(self, contents: Sequence[str]) -> None:
        prover = FileProver(self._store, lambda chunk: chunk in self._held, contents)
        todo = [number for number in self._files if not contents[number].startswith(ETAG)]
        if isinstance(self._store, DeviceStore) and self._store.devices:
            await self._landed.wait()  # GPU memory is read back after the last byte, not in turns with the others
        while todo:
            ready = [number for number in todo if prover.advances(number)]
            ready = ready[: min(HASHERS_MAX, os.cpu_count() or 1)]
            await asyncio.gather(*(self._advance(prover, number) for number in ready))
            for number in [number for number in todo if prover.complete(number)]:
                todo.remove(number)
                if not prover.right(number):
                    path = self._store.manifest.files[number].path
                    raise self._refuted([f"{path} has another content there"])
            if not ready and todo:
                await asyncio.sleep(POLL_S)

    async def _advance(self, prover: FileProver, number: int) -> None:
        job = asyncio.get_running_loop().run_in_executor(None, prover.advance, number)
        try:
            await asyncio.shield(job)
        finally:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([job])

    def _refuted(self, differences: Sequence[str]) -> NotOfCommit:
        more = len(differences) - PATHS_SHOWN
        why = "; ".join(differences[:PATHS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        return NotOfCommit(
            self._model_id, self._store.manifest.digest, self._pinned.commit, self._pinned.lister.address, why
        )
