"""Finds an artifact with peers first, and with its origin when no peer has it.

    peers announce a whole artifact      it is fetched from them; the origin is not asked
    no node answers, or nodes read       the origin lists its files; their promise is the artifact
    the origin does not answer           what peers announce, as without an origin

The own listing pins a promise: a file counts when its content is the one that the origin lists, whatever peers say. A
node that cannot ask the origin believes the promise that all peers announce, as it believes a manifest.

For a pinned commit the caller asks the origin from the first moment on, beside the peers: its listing proves what they
serve (`transfer.commit_proof`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from swarm.checkpoint.files import bystander
from swarm.content.manifest import Digest, Manifest, ModelId
from swarm.content.promise import Listing, etags, promise
from swarm.errors import ManifestNotFound, OriginDenied, OriginError, OriginNotFound, SwarmError
from swarm.journal import OriginListed, OriginNode, Resolved
from swarm.node.agreement import FIND_TIMEOUT_S
from swarm.node.node import Node
from swarm.node.resolve import resolve
from swarm.origin import OriginReader
from swarm.protocol.messages import Origin
from swarm.transfer.origin_driver import OriginSource, on_daemon, origin_node

ASK_AFTER_S = 0.3  # without an announcement of the model
# From the call on: by then, and in `GATHER_S` of the driver after it, multicast DNS and gossip have found nodes that
# start at the same time; at the latest while an address has not answered.
READ_AFTER_S, READ_LATEST_S = 0.5, 2.0
ANSWER_SOON_S = 3.0  # without any node in sight, where the origin demands a token: it has the model
POLL_S = 0.05
PROMISE_OF_PEERS_S = 5.0  # without an answer of the origin, before the promise that peers announce is believed
PAUSE_FIRST_S = 0.5
WAIT_MAX_S = 600.0  # for an origin that asks to wait before it lists, in all

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class Found:
    """A manifest, its provenance, and the origin if chunks may be read there."""

    manifest: Manifest
    origin: Origin | None
    source: OriginSource | None = None


@dataclass(frozen=True)
class OriginModel:
    """A model at an origin. `limit_bytes_per_s`, `readers_max`: see `OriginSource`."""

    reader: OriginReader
    model: str
    revision: str | None
    limit_bytes_per_s: float | None = None
    readers_max: int | None = None

    @property
    def where(self) -> str:
        """The address of the model at its origin."""
        return f"{self.reader.address}/{self.model}"

    @property
    def node(self) -> OriginNode:
        """For the journal, alike before and after the listing."""
        address = self.model if "://" in self.model else f"{self.reader.address}/{self.model}"
        return origin_node(self.reader.scheme, address)


async def find(
    node: Node,
    model_id: ModelId,
    at: OriginModel,
    *,
    digest: Digest | None,
    find_timeout_s: float | None,
    trusted: Sequence[str],
    revision: str | None,
    lister: Lister | None = None,
) -> Found:
    """The artifact of a model id. `lister`: of a pinned commit; else one is made when it is needed.

    Raises as `resolve` does, with the failure of the origin in its line.
    """
    began = node.now()
    peers = asyncio.ensure_future(
        resolve(node, model_id, digest=digest, find_timeout_s=find_timeout_s, trusted=trusted, revision=revision)
    )
    given, reading = lister, False
    lister = given or Lister(node, at, find_timeout_s=find_timeout_s)
    try:
        while True:
            elapsed_s = node.now() - began
            if peers.done() and not peers.exception():
                manifest, origin = peers.result()
                waited = lister.listing is None and elapsed_s > PROMISE_OF_PEERS_S
                # The promise of this node alone is no more than what it asks the origin for.
                if not manifest.promised or (waited and node.holders_of(manifest.digest)):
                    return Found(manifest, origin)
            if (failure := _failure(peers)) and node.refused and node.named_peers:
                raise failure  # a wrong key is for the user to correct, not to be gone round
            heard = bool(node.holders(model_id))
            if peers.done() or node.promised(model_id) or (not heard and elapsed_s > ASK_AFTER_S):
                reading = True
                lister.start()
            met = elapsed_s > (READ_LATEST_S if node.searching else READ_AFTER_S)
            if reading and (listing := lister.listing) and (met or node.promised(model_id)):
                found = of_listing(listing, at)
                if digest in (None, found.manifest.digest):
                    listed = Resolved(model_id, found.manifest.digest, began, node.now(), None)
                    node.record("node", listed)
                    return found
                lister.failed(OriginError(at.reader.address, "its files have another digest than the one asked for"))
            if (error := lister.error) and peers.done():
                return _without(peers, model_id, error, waited_s=elapsed_s)
            if isinstance(error, OriginDenied) and not heard and not node.searching and elapsed_s > ANSWER_SOON_S:
                tried = [*node.tried(), str(error)]
                raise ManifestNotFound(model_id, tried=tried, waited_s=elapsed_s, advice=_advice(error))
            await asyncio.wait([peers, *lister.tasks], timeout=POLL_S)
            await asyncio.sleep(0 if not peers.done() else POLL_S)
    finally:
        peers.cancel()
        await asyncio.gather(peers, return_exceptions=True)
        if given is None:
            lister.stop()


def of_listing(listing: Listing, at: OriginModel) -> Found:
    """The promise of a listing without bystanders."""
    files = tuple(file for file in listing.files if not bystander(file.path))
    manifest = promise(Listing(listing.source, listing.commit, files, listing.revisions))
    origin = Origin(listing.commit, etags(manifest), listing.revisions) if listing.commit else None
    return Found(manifest, origin, OriginSource(at.reader, listing, at.limit_bytes_per_s, at.readers_max))


def _failure(peers: asyncio.Future[tuple[Manifest, Origin | None]]) -> BaseException | None:
    return peers.exception() if peers.done() else None


def _without(
    peers: asyncio.Future[tuple[Manifest, Origin | None]], model_id: ModelId, error: OriginError, *, waited_s: float
) -> Found:
    """What peers have, when the origin has failed. Raises what `resolve` raised."""
    failure = peers.exception()
    if failure is None:
        manifest, origin = peers.result()
        return Found(manifest, origin)
    if isinstance(failure, ManifestNotFound) and type(failure) is ManifestNotFound:
        tried = [*failure.tried, str(error)]
        raise ManifestNotFound(model_id, tried=tried, waited_s=waited_s, advice=_advice(error)) from failure
    raise failure


def _advice(error: OriginError) -> str:
    """What to do about a model that neither peers nor its origin have; the line of a denial says it."""
    if isinstance(error, OriginDenied):
        return ""
    first = "check the id" if isinstance(error, OriginNotFound) else f"check the way to {error.origin}"
    return f"{first}, start `swarm serve` on a machine that has the model, or name a peer with --peer"


class Lister:
    """The listing of an origin, asked for once: retried while the origin is not reachable, until the deadline.

    `error`: for good; `last`: of the last request, of `failures`.
    """

    def __init__(self, node: Node, at: OriginModel, *, find_timeout_s: float | None) -> None:
        self.address = at.reader.address
        self.listing: Listing | None = None
        self.error: OriginError | None = None
        self.last: OriginError | None = None
        self.failures = 0
        self.tasks: list[asyncio.Task[None]] = []
        self._node = node
        self._at = at
        self._deadline = node.now() + (FIND_TIMEOUT_S if find_timeout_s is None else find_timeout_s)
        # An origin that asks to wait is waited for, unless the user has said how long to look.
        self._latest = node.now() + WAIT_MAX_S if find_timeout_s is None else self._deadline

    def start(self) -> None:
        """Begins to ask; idempotent."""
        if not self.tasks:
            self.tasks = [self._node.spawn(self._list(), f"list {self._at.model}")]

    def failed(self, error: OriginError) -> None:
        """The listing is of no use."""
        self.listing, self.error = None, error

    def stop(self) -> None:
        """Asks no more."""
        for task in self.tasks:
            task.cancel()

    async def _list(self) -> None:
        pause_s = PAUSE_FIRST_S
        node = self._at.node
        name = node.name
        while self.listing is None and self.error is None:
            left_s = self._deadline - self._node.now()
            if left_s <= 0:
                self.failed(self.last or OriginError(name, "did not answer in time"))
                return
            asked_at_s = self._node.now()
            failure: OriginError | None = None
            try:
                # A thread that resolves a name cannot be stopped; it is left behind.
                async with asyncio.timeout(left_s):
                    self.listing = await on_daemon(lambda: self._at.reader.listing(self._at.model, self._at.revision))
            except TimeoutError:
                failure = OriginError(name, "did not answer in time")
            except OriginError as error:
                failure = error
            except SwarmError as error:  # a listing that cannot be an artifact
                failure = OriginNotFound(name, str(error))
            seconds, lasting = self._node.now() - asked_at_s, failure is not None and failure.lasting
            self._node.record("node", OriginListed(node, seconds, str(failure) if failure else None, lasting))
            if failure is None:
                return
            self.last = failure
            self.failures += 1
            if lasting:
                self.failed(failure)
            elif failure.retry_s:
                wait_s = min(failure.retry_s, WAIT_MAX_S)
                again_at_s = self._node.now() + wait_s
                if again_at_s > self._latest:
                    self.failed(failure)
                    return
                log.info("%s; asks again in %.0f s", failure, wait_s)
                self._deadline = max(self._deadline, again_at_s + PAUSE_FIRST_S)
                await asyncio.sleep(wait_s)
            else:
                await asyncio.sleep(max(0.0, min(pause_s, self._deadline - self._node.now())))
                pause_s *= 2
