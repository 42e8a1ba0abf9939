"""The asyncio half of `Upload`: sends granted transfers from the artifacts that a node shares.

Withdraws an artifact whose source has changed. Runs on the node's loop; transports read spans on threads of their own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from swarm.content.manifest import Chunk, Digest
from swarm.errors import RemoteProtocolError, StoreError, TransportError
from swarm.journal import Sent
from swarm.peers.host import Host
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import NodeId, RefusalReason
from swarm.store import AnySpan, DeviceSource, Source
from swarm.transfer import upload
from swarm.transfer.shares import Share
from swarm.transfer.upload import Upload
from swarm.transport import Transfer, Transport

ACCEPT_TIMEOUT_S = 5.0  # a peer opens its session before its first request
REFUSED_RETRY_S = 1.0
NOTHING_RETRY_S = 0.1  # by then the newcomer may be starving

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class _Sending:
    """A transfer that holds a slot. `task` returns whether all bytes were sent."""

    task: asyncio.Task[bool]
    share: Share | None
    began_at: float


class UploadDriver:
    """The uploads of a node.

    `rank(digest)` returns this node's rank among the seeds of an artifact, and their number. `withdraw(digest,
    failure)` is called when a source has changed. `only_here(share)`: the chunks that peers want and no other node is
    known to hold.
    """

    def __init__(
        self,
        *,
        host: Host,
        transports: Sequence[Transport],
        shares: Mapping[Digest, Share],
        rank: Callable[[Digest], tuple[int, int]],
        withdraw: Callable[[Digest, StoreError], object],
        only_here: Callable[[Share], frozenset[int]],
        slots: int,
        idle_timeout_s: float,
    ) -> None:
        self.machine = Upload(slots=slots)
        self._host = host
        self._transports = {transport.scheme: transport for transport in transports}
        self._shares = shares
        self._rank = rank
        self._withdraw = withdraw
        self._only_here = only_here
        self._draining = False
        self._idle_timeout_s = idle_timeout_s
        self._requests: dict[tuple[NodeId, int], messages.Request] = {}
        self._sending: dict[tuple[NodeId, int], _Sending] = {}

    def requested(self, peer: Peer, request: messages.Request) -> None:
        """A peer requests chunks. Raises RemoteProtocolError for a transfer number in use or a malformed request."""
        key = (peer.node, request.transfer)
        if key in self._requests or key in self._sending:
            raise RemoteProtocolError(peer.name, f"asked for transfer {request.transfer} twice")
        share = self._shares.get(request.digest)
        if share is None:
            self._refuse(peer, request.transfer, "unknown_artifact", REFUSED_RETRY_S)
        elif bool(request.chunks) == bool(request.count):
            raise RemoteProtocolError(peer.name, "asked for chunks in a way that cannot be answered")
        elif not _answerable(share, request):
            self._refuse(peer, request.transfer, "not_held", REFUSED_RETRY_S)
        elif request.scheme not in self._transports:
            self._refuse(peer, request.transfer, "no_transport", REFUSED_RETRY_S)
        else:
            self._requests[key] = request
            expected = sum(share.manifest.chunks[index].size for index in request.chunks)
            size = expected or request.count * share.manifest.chunk_bytes
            terms = request.sources, request.pace_bytes_per_s, request.streams
            only_here = self._draining and self._is_only_here(request)
            self._handle(upload.Requested(peer.node, request.transfer, size, *terms, only_here))

    def drain(self) -> None:
        """Sends, from now on, only chunks that no other node is known to hold. Running transfers go on."""
        self._draining = True
        keep = frozenset(key for key, request in self._requests.items() if self._is_only_here(request))
        self._handle(upload.Drain(keep))

    @property
    def drained(self) -> bool:
        """Whether no transfer is left, and no peer lacks a chunk that only this node has."""
        return self.machine.idle and not any(map(self._only_here, self._shares.values()))

    def _is_only_here(self, request: messages.Request) -> bool:
        share = self._shares.get(request.digest)
        chunks = self._only_here(share) if share else frozenset()
        return bool(chunks) if request.count else not chunks.isdisjoint(request.chunks)

    def cancelled(self, peer: Peer, number: int) -> None:
        """A peer cancels a transfer."""
        self._requests.pop((peer.node, number), None)
        self._handle(upload.Cancelled(peer.node, number))

    def left(self, node: NodeId) -> None:
        """A peer is gone."""
        self._requests = {key: request for key, request in self._requests.items() if key[0] != node}
        self._handle(upload.PeerLeft(node))

    async def stop(self, share: Share) -> None:
        """Ends every transfer of an artifact that is on the wire; its source is not read afterwards."""
        tasks = [sending.task for sending in self._sending.values() if sending.share is share]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _handle(self, event: upload.Event) -> None:
        """Passes an event to the machine and carries out its actions."""
        for action in self.machine.handle(event):
            self._host.record("upload", action)
            peer = self._host.peers.get(action.peer)
            match action:
                case upload.Grant(node, number, sequence):
                    request = self._requests.pop((node, number))
                    if peer:
                        share = self._shares.get(request.digest)
                        task = self._host.spawn(
                            self._send(peer, request, share, sequence), f"send {number} to {peer.name}"
                        )
                        self._sending[node, number] = _Sending(task, share, self._host.now())
                        task.add_done_callback(partial(self._sent, node, number))
                case upload.Stop(node, number):
                    if sending := self._sending.get((node, number)):
                        sending.task.cancel()
                case upload.Refuse(node, number, reason, retry_s):
                    self._requests.pop((node, number))
                    if peer:
                        self._refuse(peer, number, reason, retry_s)

    async def _send(self, peer: Peer, request: messages.Request, share: Share | None, sequence: int) -> bool:
        """Sends a granted transfer; returns whether all of it was sent. Its chunks may be gone since the request."""
        number = request.transfer
        if share is None:
            self._refuse(peer, number, "unknown_artifact", REFUSED_RETRY_S)
            return False
        if not _answerable(share, request):
            self._refuse(peer, number, "not_held", REFUSED_RETRY_S)
            return False
        indices = request.chunks or self._choose(peer, share, request)
        if not indices:
            self._refuse(peer, number, "nothing_to_give", NOTHING_RETRY_S)
            return False
        peer.post(messages.Grant(number, sequence, indices))
        sent = False
        try:
            chunks = [share.manifest.chunks[index] for index in indices]
            outbound = await self._transports[request.scheme].accept(peer.token, timeout_s=ACCEPT_TIMEOUT_S)
            transfer = Transfer(number, sum(chunk.size for chunk in chunks), self._idle_timeout_s)
            await outbound.send(transfer, _spans(share.source, chunks, on_device=outbound.on_device))
            self._host.record("upload", Sent(peer.node, request.digest, transfer.size))
            sent = True
        except TransportError as error:
            log.debug("transfer %d to %s: %s", number, peer.name, error)
        except StoreError as error:
            self._refuse(peer, number, "source_changed", REFUSED_RETRY_S)
            self._withdraw(request.digest, error)
        finally:
            if share.superseed and not sent:
                share.superseed.failed(peer.node, indices)
        return sent

    def _choose(self, peer: Peer, share: Share, request: messages.Request) -> tuple[int, ...]:
        if share.superseed is None:
            return ()
        rank, seeds = self._rank(request.digest)
        among = self._only_here(share) if self._draining else None
        return share.superseed.choose(
            peer.node, request.count, starving=request.starving, rank=rank, seeds=seeds, among=among
        )

    def _sent(self, node: NodeId, number: int, task: asyncio.Task[bool]) -> None:
        seconds = self._host.now() - self._sending.pop((node, number)).began_at
        whole = not task.cancelled() and task.exception() is None and task.result()
        self._handle(upload.Ended(node, number, seconds, whole))

    def _refuse(self, peer: Peer, number: int, reason: RefusalReason, retry_s: float) -> None:
        peer.post(messages.Refuse(number, reason, retry_s))


def _answerable(share: Share, request: messages.Request) -> bool:
    """Whether all requested chunks are here. A peer may ask for a choice before it learns that this is no seed."""
    if request.count:
        return share.superseed is not None
    return all(share.readable(index) for index in request.chunks)


def _spans(source: Source, chunks: Sequence[Chunk], *, on_device: bool) -> Iterator[AnySpan]:
    for chunk in chunks:
        yield from source.device_spans(chunk) if on_device and isinstance(source, DeviceSource) else source.spans(chunk)
