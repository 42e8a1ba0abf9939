"""The asyncio half of `Download`: a fetch, from its first request to its last verified chunk.

Carries out the machine's actions: sends requests, receives transfers into the store, cancels them. Turns messages,
arrived bytes and errors into events. Runs on the node's loop; transports fill views on threads of their own.

Must not know: when to cancel, retry, announce or connect (the machine decides), HTTP, files.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
from collections.abc import Callable, Coroutine, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Digest, ModelId
from swarm.content.selection import part_id
from swarm.errors import (
    LocalProtocolError,
    PeerError,
    RemoteProtocolError,
    Stalled,
    StoreError,
    SwarmError,
    TransportError,
)
from swarm.journal import OriginNode, Received
from swarm.peers.host import Host
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import NodeId, RefusalReason
from swarm.store import Store, View
from swarm.transfer import download_events as events
from swarm.transfer.download import Download
from swarm.transfer.promise_driver import PromiseDriver
from swarm.transfer.verify import LandedChunk, Verifier
from swarm.transport import Inbound, Transfer
from swarm.transport.sink import Tray

NAMES_MAX = 4096  # of peers that were asked

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class _Sender:
    """The source of a transfer, and the scheme of the transport or of the origin that brought it."""

    node: NodeId
    scheme: str
    is_origin: bool = False


@dataclass
class _Receiving:
    peer: Peer
    ask: events.Ask
    chunks: asyncio.Future[tuple[int, ...]]  # done from the start, unless a seed chooses them
    granted: bool = False
    session: Inbound | None = None
    task: asyncio.Task[None] | None = None


class DownloadDriver:
    """A fetch. `announce` is called with newly verified chunks, as often as the machine says, and with the seconds that
    they may wait.

    `transfers` maps the open transfers of all fetches of the node to their drivers.
    """

    def __init__(
        self,
        model_id: ModelId,
        store: Store,
        held: Bitfield,
        *,
        host: Host,
        idle_timeout_s: float,
        stall_timeout_s: float,
        abandon_s: float = math.inf,
        wanted: Bitfield | None = None,
        blake3: bool = False,
        transfer_ids: Iterator[int],
        transfers: MutableMapping[int, DownloadDriver],
        rng: random.Random,
        announce: Callable[[list[int], float], None],
        promise: PromiseDriver | None = None,
    ) -> None:
        self.machine = Download(
            store.manifest,
            held,
            node=host.id,
            now=host.now(),
            idle_timeout_s=idle_timeout_s,
            stall_timeout_s=stall_timeout_s,
            abandon_s=abandon_s,
            transfer_ids=transfer_ids,
            rng=rng,
            wanted=wanted,
        )
        self.part = part_id(self.machine.wanted)
        self.transports: set[str] = set()  # schemes that brought verified chunks
        self.names: dict[NodeId, str] = {}  # by node id, of every peer that was asked: some have left by the end
        self._announce = announce
        self._model_id = model_id
        self._manifest = store.manifest
        self._host = host
        self._idle_timeout_s = idle_timeout_s
        self._mates = events.Mates(frozenset(), frozenset())
        self.promise = promise
        if promise:
            self._verifier = Verifier(store.manifest, store, held, blake3=True, judge=promise.is_right)
        else:
            self._verifier = Verifier(store.manifest, store, held, blake3=blake3)
        self._loop = asyncio.get_running_loop()
        self._arrived: Tray[tuple[int, _Sender, LandedChunk]] = Tray(self._take)  # with the transfer
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._due: asyncio.TimerHandle | None = None
        self._preparing: asyncio.Future[None] | None = None
        self._receiving: dict[int, _Receiving] = {}
        self._transfers = transfers
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Returns when every wanted chunk is verified and no thread writes any more. Raises FetchError, StoreError."""
        self.handle(events.Tick())
        if self.promise:
            self.promise.begin(self, self._verifier)
        try:
            await self._ended
        finally:
            self._carry_out(self.machine.stop())
            if self._due:
                self._due.cancel()
            while self._tasks:
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks)
            if self.promise:
                await self.promise.end()

    @property
    def digest(self) -> Digest:
        """The digest of the artifact."""
        return self._manifest.digest

    def sources(self) -> dict[str, int]:
        """Bytes of verified chunks by the name of the peer that sent them."""
        return {self.names.get(node, node): size for node, size in self.machine.sources.items()}

    def meet(self, peer: Peer) -> None:
        """Remembers the name of a peer. A second peer of the same name gets its address appended.

        Beyond NAMES_MAX the oldest name of a node that sent no chunk is forgotten.
        """
        if len(self.names) >= NAMES_MAX and peer.node not in self.names:
            spare = (node for node in self.names if node not in self.machine.sources)
            self.names.pop(next(spare, peer.node), None)
        others = {name for node, name in self.names.items() if node != peer.node}
        self.names[peer.node] = f"{peer.name} ({peer.address})" if peer.name in others else peer.name

    def placed(self, node: NodeId, distance: int) -> None:
        """The distance of a peer is known now, or has changed."""
        if self.machine.distance(node) not in (None, distance):
            self.handle(events.PeerPlaced(node, distance))

    def met(self, mates: events.Mates) -> None:
        """The nodes nearby that fetch the same artifact."""
        if mates != self._mates:
            self._mates = mates
            self.handle(mates)

    def fail(self, error: SwarmError) -> None:
        """Ends the fetch with this error, unless it has ended."""
        if not self._ended.done():
            self._ended.set_exception(error)

    def handle(self, event: events.Event) -> None:
        """Passes an event to the machine and carries out its actions."""
        self._host.record(self.digest, event)
        if isinstance(event, events.PeerLeft):
            self._stop_ungranted(event.peer)
        self._carry_out(self.machine.handle(event, self._host.now()))
        if self._due is None and self.machine.due_at < math.inf:
            self._due = self._loop.call_later(max(0.0, self.machine.due_at - self._host.now()), self._come_due)

    def tick(self) -> None:
        """Passes the machine the time, and the bytes that each peer's session has received."""
        self._arrived.collect()
        if self.promise:
            self.promise.tick()
        sessions = {r.peer.node: r.session for r in self._receiving.values() if r.session}
        self.handle(events.Tick({node: session.received_bytes for node, session in sessions.items()}))

    def granted(self, peer: Peer, number: int, chunks: tuple[int, ...]) -> None:
        """A peer grants a transfer of these chunks.

        Raises RemoteProtocolError when other chunks were requested, and for a second grant of the same transfer.
        """
        if receiving := self._of(peer, number):
            if receiving.granted:
                raise RemoteProtocolError(peer.name, f"grants transfer {number} twice")
            if not _fits(receiving.ask, chunks, wanted=self.machine.wanted):
                raise RemoteProtocolError(peer.name, f"grants {len(chunks)} chunks that it was not asked for")
            receiving.granted = True
            if not receiving.chunks.done():
                receiving.chunks.set_result(chunks)
            self.handle(events.Granted(peer.node, number, chunks))

    def refused(self, peer: Peer, number: int, *, reason: RefusalReason, retry_s: float) -> None:
        """A peer refuses a transfer. The machine learns of it when the transfer's memory is free again."""

        async def stop(receiving: _Receiving) -> None:
            await self._stop(receiving)
            self.handle(events.Refused(peer.node, number, reason, retry_s))

        if receiving := self._of(peer, number):
            self._spawn(stop(receiving), f"end refused transfer {number}")

    def _carry_out(self, actions: Sequence[events.Action]) -> None:
        for action in actions:
            self._host.record(self.digest, action)
            match action:
                case events.Connect(node):
                    if peer := self._host.peers.get(node):
                        self._spawn(self._connect(peer), f"connect to {peer.name}")
                case events.Ask(node):
                    self._ask(self._host.peers[node], action)
                case events.Cancel(node, number):
                    self._cancel(node, number)
                case events.Announce(chunks, within_s):
                    self._announce(list(chunks), within_s)
                case events.Ban(node, why):
                    peer = self._host.peers[node]
                    log.warning("banned %s (%s): %s", peer.name, peer.address, why)
                case events.Complete():
                    if not self._ended.done():
                        self._ended.set_result(None)
                case events.GiveUp(missing, waited_s, tried):
                    total = len(self.machine.wanted)
                    words = [self._with_name(text) for text in tried]
                    self.fail(Stalled(self._model_id, missing=missing, total=total, waited_s=waited_s, tried=words))

    def _come_due(self) -> None:
        self._due = None
        self.tick()

    async def _connect(self, peer: Peer) -> None:
        with contextlib.suppress(PeerError, TransportError):  # the first request meets the same error
            await peer.session()

    def _ask(self, peer: Peer, ask: events.Ask) -> None:
        self.meet(peer)
        number = ask.transfer
        chunks: asyncio.Future[tuple[int, ...]] = self._loop.create_future()
        if ask.chunks:
            chunks.set_result(ask.chunks)
        receiving = self._receiving[number] = _Receiving(peer, ask, chunks)
        self._transfers[number] = self
        if self.promise:
            self.promise.asked(number, peer.node)
        receiving.task = self._spawn(self._receive(receiving), f"receive {number} from {peer.name}")
        receiving.task.add_done_callback(lambda _: self._close_transfer(number))

    def _close_transfer(self, number: int) -> None:
        self._receiving.pop(number, None)
        self._transfers.pop(number, None)
        if self.promise:
            self.promise.closed(number)

    async def _receive(self, receiving: _Receiving) -> None:
        """Requests a transfer, receives it and reports its end; a cancelled transfer is not reported."""
        peer, ask, number = receiving.peer, receiving.ask, receiving.ask.transfer

        sender = _Sender(peer.node, peer.scheme)
        event: events.Event = events.TransferEnded(peer.node, number)
        try:
            session = await peer.session()
            if session.on_device:
                await self._prepared()
            due = ask.starving, ask.sources, ask.pace_bytes_per_s, ask.streams
            peer.post(messages.Request(peer.scheme, self.digest, number, ask.chunks, ask.count, *due))
            chunks = await receiving.chunks
            size = sum(self._manifest.chunks[index].size for index in chunks)
            receiving.session = session

            def report(landed: Sequence[LandedChunk]) -> None:
                for arrival in landed:  # the end of the transfer follows its last chunk
                    self._arrived.put((number, sender, arrival), followed=arrival.chunk.index == chunks[-1])

            views: Iterator[View] = (
                self._verifier.device_views(number, chunks, report)
                if session.on_device
                else self._verifier.views(number, chunks, report)
            )
            try:
                await session.receive(Transfer(number, size, self._idle_timeout_s), views)
            finally:
                self._arrived.collect()  # so the machine knows all chunks before the end of their transfer
            if session.streams > ask.streams:
                self.handle(events.SessionGrew(peer.node, session.streams))
        except (TransportError, PeerError) as error:
            event = events.TransferBroke(peer.node, number, str(error))
        except StoreError as error:
            event = events.TransferBroke(peer.node, number, str(error))
            self.fail(error)
        self.handle(event)

    def _take(self, arrived: Sequence[tuple[int, _Sender, LandedChunk]]) -> None:
        for number, group in itertools.groupby(arrived, key=itemgetter(0)):
            several = list(group)
            self._landed(several[0][1], number, [arrival for _, _, arrival in several])

    async def _prepared(self) -> None:
        """Returns when the GPUs are ready to hash, which the first transfer over a GPU session starts."""
        if self._preparing is None:
            self._preparing = self._loop.run_in_executor(None, self._verifier.prepare)
        await asyncio.shield(self._preparing)

    def origin_landed(self, origin: OriginNode, number: int, landed: Sequence[LandedChunk]) -> None:
        """Chunks from the origin."""
        self._landed(_Sender(origin.node, origin.scheme, is_origin=True), number, landed)

    def _landed(self, sender: _Sender, number: int, landed: Sequence[LandedChunk]) -> None:
        if verified := [arrival for arrival in landed if arrival.correct and arrival.spare is None]:
            self._verified(sender, number, verified)
        for arrival in landed:
            index = arrival.chunk.index
            if not arrival.correct:
                self.handle(events.ChunkCorrupt(sender.node, number, index))
            elif arrival.spare is not None and index not in self.machine.held:
                self._spawn(self._settle(sender, number, arrival), f"settle chunk {index}")

    async def _settle(self, sender: _Sender, number: int, landed: LandedChunk) -> None:
        """Stops the slower transfer of a chunk and puts the second copy, which is verified, in its place."""
        first = self._verifier.holder(landed.chunk.index)
        if first is not None and (slow := self._receiving.get(first)):
            slow.peer.post(messages.Cancel(first))
            await self._stop(slow)
            self.handle(events.TransferBroke(slow.peer.node, first, "another peer was faster"))
        elif first is not None and self.promise:
            await self.promise.stop_read(first)
        job = self._loop.run_in_executor(None, self._verifier.settle, landed, number)
        try:
            await asyncio.wait([job])
        finally:
            await asyncio.wait([job])  # cancelled or not: `run` returns only when no thread writes
        if error := job.exception():
            self.fail(error if isinstance(error, StoreError) else LocalProtocolError(f"settling failed: {error!r}"))
        elif job.result():
            self._verified(sender, number, [landed])

    def _verified(self, sender: _Sender, number: int, landed: Sequence[LandedChunk]) -> None:
        self.transports.add(sender.scheme)
        node, chunks = sender.node, [arrival.chunk for arrival in landed]
        if self.promise:
            for arrival in landed:
                if arrival.digests:
                    self.promise.landed(None if sender.is_origin else node, arrival.chunk, arrival.digests)
        for chunk in chunks:
            self._host.record(node, Received(node, self.digest, chunk.index, chunk.size))
        self.handle(events.ChunksVerified(node, number, tuple(chunk.index for chunk in chunks)))
        if self.promise:
            for chunk in chunks:
                self.promise.held(chunk)

    async def _stop(self, receiving: _Receiving) -> None:
        if receiving.task:
            receiving.task.cancel()
            await asyncio.gather(receiving.task, return_exceptions=True)

    def _cancel(self, node: NodeId, number: int) -> None:
        if peer := self._host.peers.get(node):
            peer.post(messages.Cancel(number))
        if (receiving := self._receiving.get(number)) and receiving.task:
            receiving.task.cancel()

    def _stop_ungranted(self, node: NodeId) -> None:
        """Ends the transfers that a peer that left will not grant. Granted transfers end with their session."""
        for receiving in self._receiving.values():
            if receiving.peer.node == node and receiving.task and not receiving.chunks.done():
                receiving.task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts a task that ends with the fetch."""
        task = self._host.spawn(work, name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _of(self, peer: Peer, number: int) -> _Receiving | None:
        receiving = self._receiving.get(number)
        return receiving if receiving and receiving.peer is peer else None

    def _with_name(self, words: str) -> str:
        name, _, rest = words.partition(":")
        node = NodeId(name)
        peer = self._host.peers.get(node)
        return f"{peer.name if peer else self.names.get(node, node)}:{rest}"


def _fits(ask: events.Ask, chunks: tuple[int, ...], *, wanted: Bitfield) -> bool:
    """Whether a grant answers its request: the same chunks, or up to `count` distinct chunks of `wanted`."""
    if ask.chunks:
        return chunks == ask.chunks
    distinct = 0 < len(chunks) <= ask.count and len(set(chunks)) == len(chunks)
    return distinct and all(chunk < wanted.length and chunk in wanted for chunk in chunks)
