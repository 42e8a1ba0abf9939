"""Parts of a commit: nodes with different files of it serve them as parts of one artifact.

    `org/model`         the artifact that a fetch of the id gets: the whole model
    `org/model#part`    artifacts that nodes hold and a fetch must not get: half a model, or a smaller one

A node that serves files of a commit looks at what other members announce under both ids, gets the manifests of the same
commit, and shares its files as a part of the whole of them (`content.commit.whole`). Every node does so by itself; the
same manifests make the same whole. While members announce all files of the whole, it has the id of the model and the
node's own artifact, if it is a smaller one, is a part. When holders leave, the ids change back, and transfers go on.

A node trusts the claim that files are of one commit as it trusts the claim of a model id, and `trusted` limits both. It
announces only chunks of files that it hashed itself.

Must not know: files, how a part is cut out of a whole (`PartOfCommit`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from swarm.content.bitfield import Bitfield
from swarm.content.commit import lacking, part_name, whole
from swarm.content.manifest import Digest, Manifest, ModelId, decode
from swarm.errors import ManifestError, PeerError, SourceChanged
from swarm.node.holders import Announced
from swarm.node.manifest_answers import LINK_S, MANIFEST_TIMEOUT_S, ORIGIN_TIMEOUT_S
from swarm.node.node import Node
from swarm.node.trust import may_introduce, networks
from swarm.peers.peer import Peer
from swarm.protocol.messages import REVISIONS_MAX, Origin, Signature
from swarm.store import Source

KNOWN_MAX = 64  # artifacts of an id whose manifests are kept
LOOK_EVERY_S = 1.0
REPLACED_KEPT_S = 60.0  # a newcomer may have chosen it just now

log = logging.getLogger("swarm")


class PartialSource(Source, Protocol):
    """A source of some chunks of an artifact."""

    @property
    def held(self) -> Bitfield:
        """The chunks that it has."""


@runtime_checkable
class PartOfCommit(Source, Protocol):
    """Files of a commit. `missing` says what the model lacks; empty for a whole model."""

    missing: str

    def would_be_whole(self, paths: Iterable[str]) -> bool:
        """Whether the model would lack nothing with files at all these paths."""

    def part_of(self, whole: Manifest) -> PartialSource | None:
        """The files as a part of a larger artifact; None if they have other contents there. Blocks."""


def serve(node: Node, model_id: ModelId, source: Source, *, origin: Origin | None, trusted: Sequence[str] = ()) -> None:
    """Serves a source, and its files as a part of its commit. Raises as `Node.serve` does."""
    if not isinstance(source, PartOfCommit) or origin is None or not origin.commit:
        node.serve(model_id, source, origin=origin)
        return
    node.serve(part_name(model_id) if source.missing else model_id, source, origin=origin)
    parts = _CommitParts(node, model_id, source, origin=origin, trusted=trusted)
    node.spawn(parts.run(), f"parts of {model_id}")


def join(node: Node, model_id: ModelId, source: PartOfCommit, *, origin: Origin, trusted: Sequence[str] = ()) -> None:
    """Serves the files of an artifact that this node has fetched as a part of their commit too. It owns `source`."""
    parts = _CommitParts(node, model_id, source, origin=origin, trusted=trusted)

    async def run() -> None:
        try:
            await parts.run()
        finally:
            source.close()

    node.spawn(run(), f"parts of {model_id}")


class _CommitParts:
    """What one node shares of a commit."""

    def __init__(
        self, node: Node, model_id: ModelId, source: PartOfCommit, *, origin: Origin, trusted: Sequence[str]
    ) -> None:
        self._node = node
        self._id = model_id
        self._source = source
        self._own = source.manifest
        self._origin = origin
        self._trusted = networks(trusted)
        self._known: dict[Digest, tuple[Manifest, Origin] | None] = {}  # None: of another commit, or unusable
        self._shared: dict[Digest, float] = {}  # wholes, and when each was last of use

    async def run(self) -> None:
        """Follows what others announce, until the own artifact is withdrawn."""
        while self._node.described(self._own.digest):
            others = self._others()
            live = {announced.digest for announced in others}
            if len(self._known) >= KNOWN_MAX:
                self._known = {digest: known for digest, known in self._known.items() if digest in live}
            for announced in others:
                await self._ask(announced)
            await self._share(others)
            await self._node.changed(LOOK_EVERY_S)
        for digest in self._shared:
            self._node.release(digest)

    def _others(self) -> list[Announced]:
        """Artifacts of the commit, as far as known, that others announce."""
        ids = {self._id, part_name(self._id)}
        return [
            announced
            for announced in self._node.announced()
            if announced.model_id in ids and announced.digest != self._own.digest and self._may_tell(announced)
        ]

    def _may_tell(self, announced: Announced) -> bool:
        peer = announced.holder.peer
        return not self._trusted or (peer is not None and may_introduce(peer, self._trusted))

    async def _ask(self, announced: Announced) -> None:
        """Gets the manifest and the provenance of an artifact, once."""
        digest = announced.digest
        if digest in self._known or len(self._known) >= KNOWN_MAX:
            return
        if described := self._node.described(digest):
            self._know(digest, *described)
            return
        with self._node.seeking(digest):
            if (peer := announced.holder.peer) is None:
                await self._node.changed(LINK_S)
                return
            try:
                self._know(digest, *await self._answers(peer, digest))
            except (PeerError, ManifestError) as error:
                log.debug("%s: %s", self._id, error)

    async def _answers(self, peer: Peer, digest: Digest) -> tuple[Manifest, Origin | None]:
        requests = self._node.manifest_requests
        data = await requests.manifest(peer, digest, timeout_s=MANIFEST_TIMEOUT_S)
        manifest = await asyncio.to_thread(lambda: decode(data, digest=digest))
        return manifest, await requests.answered_origin(peer, digest, timeout_s=ORIGIN_TIMEOUT_S)

    def _know(self, digest: Digest, manifest: Manifest, origin: Origin | None) -> None:
        of_commit = origin is not None and origin.commit == self._origin.commit and manifest.tier == "checkpoint"
        self._known[digest] = (manifest, origin) if of_commit and origin is not None else None

    async def _share(self, others: Sequence[Announced]) -> None:
        """Shares the own files as a part of the whole, and gives both artifacts their ids."""
        known = {a.digest: found for a in others if (found := self._known.get(a.digest))}
        target = self._whole([manifest for manifest, _ in known.values()])
        self._forget(target.digest, {announced.digest for announced in others if announced.fetching})
        if target.digest == self._own.digest or (self._origin.signatures and not _signatures(target, known)):
            self._name(None)  # a fetch that wants a signature must find what a publisher signed
            return
        if not self._node.described(target.digest) and not await self._share_part(target, known):
            return
        # A node that has not announced the target has no part in it: one that holds its fetch in memory never will.
        joined = {a.holder.node for a in others if a.digest == target.digest}
        complete = {a.digest for a in others if a.complete and a.holder.node in joined}
        there = {file.path for d, (manifest, _) in known.items() if d in complete for file in manifest.files}
        there |= {file.path for file in self._own.files}
        named = any(a.digest == target.digest and a.model_id == self._id for a in others)
        is_whole = named or self._source.would_be_whole(file.path for file in target.files)
        self._name(target.digest if is_whole and not lacking(target, there) else None)

    def _whole(self, manifests: Sequence[Manifest]) -> Manifest:
        """The whole of the own and these manifests, without those that contradict the own files."""
        fitting = [m for m in manifests if whole([self._own, m])]
        return whole([self._own, *fitting]) or self._own

    async def _share_part(self, target: Manifest, known: dict[Digest, tuple[Manifest, Origin]]) -> bool:
        try:
            part = await asyncio.to_thread(self._source.part_of, target)
        except SourceChanged as error:
            log.debug("%s: %s", self._id, error)
            return False
        if part is None:
            for digest, (manifest, _) in known.items():
                if manifest.digest == target.digest or await asyncio.to_thread(self._contradicts, manifest):
                    log.warning(
                        "%s: a member serves %s as files of the same commit, and has other contents in them than are "
                        "here; one of the two copies is damaged: check this one with `swarm verify %s`",
                        self._id, digest[:16], self._id,
                    )  # fmt: skip
                    self._known[digest] = None
            return False
        origin = _merged([*(origin for _, origin in known.values()), self._origin])
        origin = origin.signed(_signatures(target, known))
        self._node.serve_part(part_name(self._id), part, part.held, origin=origin)
        self._shared[target.digest] = self._node.now()
        return True

    def _contradicts(self, manifest: Manifest) -> bool:
        both = whole([self._own, manifest])
        part = self._source.part_of(both) if both else None
        if part is not None:
            part.close()
        return part is None

    def _forget(self, target: Digest, fetched: set[Digest]) -> None:
        """Withdraws wholes that have been replaced, a while after their last fetch."""
        now = self._node.now()
        self._shared |= {digest: now for digest in self._shared if digest == target or digest in fetched}
        for digest, used_at_s in list(self._shared.items()):
            if now - used_at_s > REPLACED_KEPT_S:
                del self._shared[digest]
                self._node.release(digest)

    def _name(self, target: Digest | None) -> None:
        """`target`: the artifact that a fetch of the id gets; None for the own one."""
        for digest in self._shared:
            self._node.rename(digest, self._id if digest == target else part_name(self._id))
        own = self._id if target is None and not self._source.missing else part_name(self._id)
        self._node.rename(self._own.digest, own)


def _signatures(target: Manifest, known: Mapping[Digest, tuple[Manifest, Origin]]) -> tuple[Signature, ...]:
    """What publishers signed of the artifact, as its holders say."""
    return known[target.digest][1].signatures if target.digest in known else ()


def _merged(origins: Sequence[Origin]) -> Origin:
    """One provenance of several of the same commit; the last counts where they differ."""
    etags = {path: etag for origin in origins for path, etag in origin.etags.items()}
    revisions = dict.fromkeys(name for origin in reversed(origins) for name in origin.revisions)
    beside = next((origin.beside for origin in reversed(origins) if origin.beside), {})
    return Origin(origins[-1].commit, etags, tuple(revisions)[:REVISIONS_MAX], beside)
