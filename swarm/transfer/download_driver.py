"""One fetch: the download machine of one artifact, driven by real transfers.

Carries out what `Download` decides: asks peers, receives through their transports into the store, cancels, and turns
everything that happens into events for the machine. Runs on the node's loop; only views are advanced on other threads.

Must not know: links' messages beyond those it sends, HTTP, files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk, Digest, ModelId
from swarm.errors import (
    LocalProtocolError,
    PeerError,
    RemoteProtocolError,
    Stalled,
    StoreError,
    SwarmError,
    TransportError,
)
from swarm.journal import Received
from swarm.peers.host import Host
from swarm.peers.peer import Peer
from swarm.protocol import messages
from swarm.protocol.messages import NodeId
from swarm.store import Store, View
from swarm.transfer import download, scheduler
from swarm.transfer.download import Download
from swarm.transfer.verify import Landed, Landings
from swarm.transport import Inbound, Transfer
from swarm.transport.sink import Mailbox

log = logging.getLogger("swarm")


@dataclass
class _Receiving:
    peer: Peer
    ask: download.Ask
    touched_at: float
    chunks: asyncio.Future[tuple[int, ...]]  # what comes: known from the start, unless the peer chooses
    granted: bool = False
    session: Inbound | None = None
    seen_bytes: int = 0  # what its session had received at the last look
    task: asyncio.Task[None] | None = None


class DownloadDriver:
    """A fetch in progress. `tell` is called with newly verified chunks, not more often than others gain from it."""

    def __init__(
        self,
        model_id: ModelId,
        store: Store,
        held: Bitfield,
        *,
        host: Host,
        idle_timeout_s: float,
        stall_timeout_s: float,
        transfer_ids: Iterator[int],
        rng: random.Random,
        tell: Callable[[list[int]], None],
    ) -> None:
        self.machine = Download(
            store.manifest,
            held,
            node=host.id,
            now=host.now(),
            stall_timeout_s=stall_timeout_s,
            transfer_ids=transfer_ids,
            rng=rng,
        )
        self.names: dict[NodeId, str] = {}  # of everyone ever asked, who may be gone by the end
        self._fresh: list[int] = []
        self._tell = tell
        self._told_at = -math.inf
        self._news: asyncio.TimerHandle | None = None
        self._model_id = model_id
        self._manifest = store.manifest
        self._host = host
        self._idle_timeout_s = idle_timeout_s
        self._mates = download.Mates(frozenset(), frozenset())
        self._landings = Landings(store.manifest, store, held)
        self._loop = asyncio.get_running_loop()
        self._mailbox = Mailbox()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._preparing: asyncio.Future[None] | None = None
        self._receiving: dict[int, _Receiving] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Returns when every chunk is verified and nothing is written any more. Raises FetchError or StoreError."""
        self.handle(download.Tick())
        try:
            await self._ended
        finally:
            for cancel in self.machine.stop():
                self._cancel(cancel.peer, cancel.transfer)
            while self._tasks:
                for task in self._tasks:
                    task.cancel()
                await asyncio.wait(self._tasks)
            if self._news:  # the last chunks too, before the fetch is forgotten
                self._news.cancel()
                self._tell_news()

    def sources(self) -> dict[str, int]:
        """Bytes of verified chunks by the name of the peer that they came from."""
        return {self.names[node]: size for node, size in self.machine.sources.items()}

    def meet(self, peer: Peer) -> None:
        """Remembers what to call a peer; two of one name are told apart by their addresses."""
        others = {name for node, name in self.names.items() if node != peer.node}
        self.names[peer.node] = f"{peer.name} ({peer.hello.address})" if peer.name in others else peer.name

    def placed(self, node: NodeId, distance: int) -> None:
        """So many borders are on the way to a peer."""
        if self.machine.distance(node) not in (None, distance):
            self.handle(download.PeerPlaced(node, distance))

    def met(self, mates: download.Mates) -> None:
        """Who fetches the same nearby, now."""
        if mates != self._mates:
            self._mates = mates
            self.handle(mates)

    @property
    def digest(self) -> Digest:
        """Of what is fetched."""
        return self._manifest.digest

    def fail(self, error: SwarmError) -> None:
        """Ends the fetch with this error, unless it has ended."""
        if not self._ended.done():
            self._ended.set_exception(error)

    def handle(self, event: download.Event) -> None:
        """Tells the machine, and does what it says."""
        subject = self._manifest.digest
        self._host.record(subject, event)
        if isinstance(event, download.PeerLeft):
            self._forsake(event.peer)
        elif isinstance(event, download.PeerJoined) and (joined := self._host.peers.get(event.peer)):
            self._spawn(self._connect(joined), f"connect to {joined.name}")
        for action in self.machine.handle(event, self._host.now()):
            self._host.record(subject, action)
            match action:
                case download.Ask(node):
                    self._ask(self._host.peers[node], action)
                case download.Cancel(node, number):
                    self._cancel(node, number)
                case download.Announce(chunks):
                    self._fresh += chunks
                    self._plan_news()
                case download.Ban(node, why):
                    peer = self._host.peers[node]
                    log.warning("banned %s (%s): %s", peer.name, peer.hello.address, why)
                case download.Complete():
                    if not self._ended.done():
                        self._ended.set_result(None)
                case download.GiveUp(missing, waited_s, tried):
                    total = self.machine.held.length
                    words = [self._with_name(text) for text in tried]
                    self.fail(Stalled(self._model_id, missing=missing, total=total, waited_s=waited_s, tried=words))

    def granted(self, peer: Peer, number: int, chunks: tuple[int, ...]) -> None:
        """A peer says that a transfer of these chunks starts.

        Raises RemoteProtocolError when they are not what it was asked for, or when it says so twice.
        """
        if receiving := self._of(peer, number):
            if receiving.granted:
                raise RemoteProtocolError(peer.name, f"grants transfer {number} twice")
            if not _fits(receiving.ask, chunks, total=len(self._manifest.chunks)):
                raise RemoteProtocolError(peer.name, f"grants {len(chunks)} chunks that it was not asked for")
            receiving.granted, receiving.touched_at = True, self._host.now()
            if not receiving.chunks.done():
                receiving.chunks.set_result(chunks)
            self.handle(download.Granted(peer.node, number, chunks))

    def refused(self, peer: Peer, number: int, *, reason: str, retry_s: float) -> None:
        """A peer says that a transfer will not happen."""
        if receiving := self._of(peer, number):
            if reason == "nothing_to_give":
                self._abandon(receiving, download.Declined(peer.node, number, retry_s))
            else:
                self._abandon(receiving, download.TransferFailed(peer.node, number, f"refused: {reason}", retry_s))

    def tick(self) -> None:
        """Time passed: tells the machine, and cuts granted transfers whose session has brought nothing for too long.

        Of whatever transfer: those of one session come one after another.
        """
        now = self._host.now()
        for number, receiving in list(self._receiving.items()):
            if receiving.session and receiving.session.received_bytes != receiving.seen_bytes:
                receiving.seen_bytes, receiving.touched_at = receiving.session.received_bytes, now
            if receiving.granted and now - receiving.touched_at > self._idle_timeout_s:
                receiving.touched_at = now  # once is enough
                receiving.peer.post(messages.Cancel(number))
                why = f"sent nothing for {self._idle_timeout_s:g} s"
                self._abandon(receiving, download.TransferFailed(receiving.peer.node, number, why))
        self.handle(download.Tick())

    async def _connect(self, peer: Peer) -> None:
        """Ahead: what will be asked of a peer should not wait for round trips on a link that is busy by then."""
        with contextlib.suppress(PeerError, TransportError):  # whoever asks will meet it again
            await peer.session()

    def _ask(self, peer: Peer, ask: download.Ask) -> None:
        self.meet(peer)
        number = ask.transfer
        chunks: asyncio.Future[tuple[int, ...]] = self._loop.create_future()
        if ask.chunks:
            chunks.set_result(ask.chunks)
        receiving = self._receiving[number] = _Receiving(peer, ask, self._host.now(), chunks)
        receiving.task = self._spawn(self._receive(receiving), f"receive {number} from {peer.name}")
        receiving.task.add_done_callback(lambda _: self._receiving.pop(number, None))

    async def _receive(self, receiving: _Receiving) -> None:
        """One transfer coming in; the machine is told how it ended, unless somebody cancelled it."""
        peer, ask, number = receiving.peer, receiving.ask, receiving.ask.transfer

        def report(landed: Sequence[Landed]) -> None:
            self._mailbox.post(lambda: self._landed(peer, number, landed))

        event: download.Event = download.TransferEnded(peer.node, number)
        try:
            session = await peer.session()
            if session.on_device:
                await self._prepared()
            due = ask.starving, ask.sources, ask.pace_bytes_per_s
            peer.post(messages.Request(peer.scheme, self._manifest.digest, number, ask.chunks, ask.count, *due))
            chunks = await receiving.chunks
            size = sum(self._manifest.chunks[index].size for index in chunks)
            receiving.session = session
            views: Iterator[View] = (
                self._landings.device_views(number, chunks, report)
                if session.on_device
                else self._landings.views(number, chunks, report)
            )
            await session.receive(Transfer(number, size, self._idle_timeout_s), views)
        except (TransportError, PeerError) as error:
            event = download.TransferFailed(peer.node, number, str(error))
        except StoreError as error:
            event = download.TransferFailed(peer.node, number, str(error))
            self.fail(error)
        self.handle(event)  # behind the chunks that the transfer's thread has reported: it did so before it ended

    async def _prepared(self) -> None:
        """Once, before anything is asked for that GPUs will move."""
        if self._preparing is None:
            self._preparing = self._loop.run_in_executor(None, self._landings.prepare)
        await asyncio.shield(self._preparing)

    def _landed(self, peer: Peer, number: int, landed: Sequence[Landed]) -> None:
        if verified := [one.chunk for one in landed if one.correct and one.spare is None]:
            self._verified(peer, number, verified)
        for one in landed:
            index = one.chunk.index
            if not one.correct:
                self.handle(download.ChunkCorrupt(peer.node, number, index))
            elif one.spare is not None and index not in self.machine.held:
                self._spawn(self._settle(peer, number, one), f"settle chunk {index}")

    async def _settle(self, peer: Peer, number: int, landed: Landed) -> None:
        """A second copy is right while the first is still on its way: the second takes its place."""
        first = self._landings.holder(landed.chunk.index)
        if first is not None and (slow := self._receiving.get(first)) and slow.task:
            slow.peer.post(messages.Cancel(first))
            await self._stop(slow)
            self.handle(download.TransferFailed(slow.peer.node, first, "another peer was faster"))
        job = self._loop.run_in_executor(None, self._landings.settle, landed, number)
        try:
            await asyncio.wait([job])
        finally:
            await asyncio.wait([job])  # cancelled or not: whoever ends the fetch counts on nobody writing
        if error := job.exception():
            self.fail(error if isinstance(error, StoreError) else LocalProtocolError(f"settling failed: {error!r}"))
        elif job.result():
            self._verified(peer, number, [landed.chunk])

    def _verified(self, peer: Peer, number: int, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._host.record(peer.node, Received(peer.node, self._manifest.digest, chunk.index, chunk.size))
        self.handle(download.ChunksVerified(peer.node, number, tuple(chunk.index for chunk in chunks)))

    def _plan_news(self) -> None:
        if self._news is None:
            every_s = scheduler.news_every_s(self._manifest.chunk_bytes, self.machine.rate_bytes_per_s)
            wait_s = max(0.0, self._told_at + every_s - self._host.now())
            self._news = self._loop.call_later(wait_s, self._tell_news)

    def _tell_news(self) -> None:
        self._news, self._told_at = None, self._host.now()
        fresh, self._fresh = self._fresh, []
        self._tell(fresh)

    def _abandon(self, receiving: _Receiving, event: download.TransferFailed | download.Declined) -> None:
        """Stops receiving; once the transfer's memory is free again, the machine hears of it."""

        async def stop() -> None:
            await self._stop(receiving)
            self.handle(event)

        self._spawn(stop(), f"abandon {event.transfer}")

    async def _stop(self, receiving: _Receiving) -> None:
        if receiving.task:
            receiving.task.cancel()
            await asyncio.gather(receiving.task, return_exceptions=True)

    def _cancel(self, node: NodeId, number: int) -> None:
        if peer := self._host.peers.get(node):
            peer.post(messages.Cancel(number))
        if (receiving := self._receiving.get(number)) and receiving.task:
            receiving.task.cancel()

    def _forsake(self, node: NodeId) -> None:
        """Nobody will say any more what a peer that is gone chose; the end of a session ends what is on its way."""
        for receiving in self._receiving.values():
            if receiving.peer.node == node and receiving.task and not receiving.chunks.done():
                receiving.task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs something that ends with the fetch."""
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


def _fits(ask: download.Ask, chunks: tuple[int, ...], *, total: int) -> bool:
    """Whether a grant is what was asked for: exactly these, or some that the peer chose out of `total`."""
    if ask.chunks:
        return chunks == ask.chunks
    return 0 < len(chunks) <= ask.count and len(set(chunks)) == len(chunks) and max(chunks) < total
