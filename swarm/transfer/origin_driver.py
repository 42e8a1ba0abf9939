"""The asyncio half of `OriginReads`: the streams of one fetch that read from the origin.

    OriginReads.next ── range ──> OriginReader (thread) ── bytes ──> verifier ──> the download, as from ORIGIN

Each read runs on a thread of its own and fills the places of chunks as transports do. After a failure all streams
pause, `PAUSE_FIRST_S` to `PAUSE_LONGEST_S` or as long as the origin says, and after some in a row other nodes are told.

Must not know: HTTP, which origin it is, claims, how chunks come from peers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast
from urllib.parse import urlsplit

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Manifest
from swarm.content.promise import Listing
from swarm.errors import OriginError, OriginUnreachable, StoreError, SwarmError
from swarm.journal import OriginNode, OriginRead
from swarm.origin import OriginReader, OriginStream
from swarm.peers.host import Host
from swarm.protocol.messages import NodeId
from swarm.transfer import download_events as events
from swarm.transfer.download import Download
from swarm.transfer.origin_reads import STREAMS_MAX, OriginReads, ReadRange
from swarm.transfer.verify import LandedChunk, Verifier
from swarm.transport.sink import Mailbox

PAUSE_FIRST_S, PAUSE_LONGEST_S = 0.5, 30.0  # after a failure, doubling with each in a row
WAIT_MAX_S = 600.0  # of what an origin asks to wait
FAILURES_TOLD = 3  # in a row, before other nodes are told that this one cannot read
ALONE_S = 2.0  # without a peer, before a fetch with a lasting failure of the origin ends
GREET_S = 1.5  # for peers that announce chunks to tell which, before the first read
GATHER_S = 0.5  # for nodes that start at the same time to say so: the chunks are divided among those that are known
POLL_S = 0.25
NAME_CHARS_MAX = 200

T = TypeVar("T")


@dataclass(frozen=True)
class OriginSource:
    """An origin and the listing of a promise. `limit_bytes_per_s`: of this node; `readers_max`: nodes at once."""

    origin: OriginReader
    listing: Listing
    limit_bytes_per_s: float | None = None
    readers_max: int | None = None

    @property
    def node(self) -> OriginNode:
        """For the journal."""
        return origin_node(self.origin.scheme, self.listing.source)

    @property
    def name(self) -> str:
        """For messages."""
        return self.node.name


def origin_node(scheme: str, address: str) -> OriginNode:
    """The origin of a model's address as a node: its host, bucket or directory, without user and password."""
    host, parts = "", None
    with contextlib.suppress(ValueError):  # an address that is no URL
        parts = urlsplit(address)
        host = parts.netloc.rpartition("@")[2]
    place = host if host and parts and parts.scheme in ("http", "https") else f"{scheme}://{host}" if host else address
    node = hashlib.sha256(f"{scheme} {place}".encode("utf-8", "replace")).hexdigest()[:16]
    return OriginNode(NodeId(node), f"origin {place}"[:NAME_CHARS_MAX], scheme)


class OriginDownload(Protocol):
    """The download that the chunks belong to."""

    machine: Download
    names: dict[NodeId, str]

    def handle(self, event: events.Event) -> None:
        """Passes an event to the machine."""

    def fail(self, error: SwarmError) -> None:
        """Ends the fetch."""

    def origin_landed(self, origin: OriginNode, number: int, landed: Sequence[LandedChunk]) -> None:
        """Chunks from the origin."""


class OriginDriver:
    """The reads of one fetch. `urgent()`: held chunks to read again. `tell()`: `reads` or `able` have changed."""

    def __init__(
        self,
        source: OriginSource,
        manifest: Manifest,
        held: Bitfield,
        *,
        host: Host,
        reads: OriginReads,
        urgent: Callable[[], Collection[int]],
        transfer_ids: Iterator[int],
        tell: Callable[[], None],
        rng: random.Random,
    ) -> None:
        self.source = source
        self._node = source.node
        self.able = True
        self.transfers: set[int] = set()  # of the reads that run
        self.failure = ""  # of the last read, with the origin's name
        self._manifest = manifest
        self._held = held
        self._host = host
        self._reads = reads
        self._urgent = urgent
        self._transfer_ids = transfer_ids
        self._tell = tell
        self._rng = rng
        self._mailbox = Mailbox()
        self._changed = asyncio.Event()
        self._files = {file.path: file for file in source.listing.files}
        self._open: dict[int, OriginStream] = {}  # by transfer
        self._stopping: set[int] = set()  # transfers that end early, which is no failure of the origin
        self._running: dict[int, asyncio.Future[None]] = {}  # by transfer: done when its thread is
        self._stopped = threading.Event()
        self._failures = 0
        self._paused_until = 0.0
        self._over: OriginError | None = None  # a lasting failure
        self._progress_at = self._began = host.now()
        self._budget = _Budget(source.limit_bytes_per_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._download: OriginDownload
        self._verifier: Verifier

    def begin(self, download: OriginDownload, verifier: Verifier) -> None:
        """Starts to read."""
        self._download, self._verifier = download, verifier
        download.names[self._node.node] = self._node.name
        self._tasks = [
            self._host.spawn(self._stream(number), f"origin stream {number}") for number in range(STREAMS_MAX)
        ]

    async def end(self) -> None:
        """Ends all reads; returns when no thread writes any more."""
        self._stopped.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.able = False  # others need not leave a part to this node
        self._tell()
        for stream in list(self._open.values()):
            stream.close()
        # A thread that still connects writes nothing, and is not waited for.
        if writing := [self._running[transfer] for transfer in list(self._open) if transfer in self._running]:
            await asyncio.wait(writing)

    def look(self) -> None:
        """There may be something else to read now."""
        self._changed.set()
        self._changed = asyncio.Event()

    def progressed(self) -> None:
        """A chunk is verified."""
        self._progress_at = self._host.now()

    async def stop(self, transfer: int) -> None:
        """Ends a read that another source was faster than; returns when its thread writes no more."""
        stream, running = self._open.get(transfer), self._running.get(transfer)
        if stream and running:
            self._stopping.add(transfer)
            stream.close()
            await asyncio.wait([running])

    def tick(self) -> None:
        """Watches all reads. Ends a fetch that only the origin could serve, after its lasting failure."""
        machine = self._download.machine
        self._reads.watch(self._host.now(), missing=machine.missing, elsewhere=machine.elsewhere)
        alone = not machine.elsewhere.any()
        if self._over and alone and self._host.now() - self._progress_at > ALONE_S:
            self._download.fail(self._over)

    def _gathers(self) -> bool:
        """Whether a node that starts at the same time may not have said yet that it fetches the same."""
        if self._host.now() - self._began > GATHER_S or self._download.machine.elsewhere.any():
            return False
        peers = self._host.peers
        return not peers or any(not self._reads.knows(node) for node in peers)

    def _expects_peers(self) -> bool:
        """Whether a peer announces chunks and has not told yet which: nothing that it holds is to be read."""
        if self._host.now() - self._began > GREET_S or self._download.machine.elsewhere.any():
            return False
        announced = (peer.artifacts.get(self._manifest.digest) for peer in self._host.peers.values())
        return any(artifact and artifact.chunks for artifact in announced)

    async def _stream(self, number: int) -> None:
        while self._gathers() or self._expects_peers():
            await self._wait(POLL_S / 10)
        reading: ReadRange | None = None
        while True:
            before, reading = reading, self._next(number)
            if reading or before:
                self._tell()  # once for the end of a range and its successor: peers see no gap between them
            if reading is None:
                pause_s = self._paused_until - self._host.now()
                await self._wait(pause_s if pause_s > 0 else POLL_S)
                continue
            first = reading.at
            try:
                await self._read(reading, urgent=first in self._urgent())
                self._download.handle(events.OriginReadEnded())
            finally:
                self._reads.ended(number, self._host.now())
            if reading.at == first:
                reading = None
                self._tell()
                await self._wait(POLL_S)  # another node has it: what it announces next decides

    def _next(self, number: int) -> ReadRange | None:
        machine, now, urgent, found = self._download.machine, self._host.now(), self._urgent(), None
        missing, elsewhere = machine.missing, machine.elsewhere
        if self._over or now < self._paused_until:
            return None
        if number < self._reads.streams:
            found = self._reads.next(number, now, missing=missing, elsewhere=elsewhere, urgent=urgent)
        elif urgent and not number:
            found = self._reads.next(number, now, missing=missing & False, elsewhere=elsewhere, urgent=urgent)
        # One stream at a time, the first idle one: the others may be those that stand still.
        stands_in = all(lower in self._reads.own for lower in range(number))
        stands_in &= not any(own.late for own in self._reads.own.values())
        if found is None and stands_in and not self._reads.limited:
            found = self._reads.late(number, now - self._progress_at, missing)
        return found

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    async def _read(self, reading: ReadRange, *, urgent: bool) -> None:
        """Reads a range, on a thread; failures pause all streams."""
        transfer, first, began = next(self._transfer_ids), reading.at, self._host.now()
        self.transfers.add(transfer)
        error: SwarmError | None = None
        try:
            done = self._running[transfer] = on_daemon(lambda: self._fill(transfer, reading, urgent=urgent))
            done.add_done_callback(lambda _: self._running.pop(transfer))
            done.add_done_callback(lambda ended: ended.exception())  # told to the loop, were this task cancelled
            await asyncio.wait([done])  # not cancelled with this task: `end` waits for it
            done.result()
        except OriginError as failure:
            error = None if transfer in self._stopping else failure
        except StoreError as failure:
            error = failure
            self._download.fail(failure)
        finally:
            self.transfers.discard(transfer)
            self._stopping.discard(transfer)
            chunks = self._manifest.chunks[first : reading.at]
            chunk = self._manifest.chunks[first]
            path, size = self._manifest.files[chunk.file].path, sum(c.size for c in chunks)
            seconds = self._host.now() - began
            why, lasting = (str(error) if error else None), isinstance(error, OriginError) and error.lasting
            self._host.record("node", OriginRead(self._node, path, chunk.offset, size, seconds, why, lasting))
        if reading.at > first:
            self._failures, self.failure = 0, ""
        if isinstance(error, OriginError):
            self._failed(error)
        elif not self.able and reading.at > first:
            self.able = True
            self._tell()

    def _failed(self, error: OriginError) -> None:
        self._failures += 1
        self.failure = str(error)
        pause_s = min(PAUSE_FIRST_S * 2.0 ** (self._failures - 1), PAUSE_LONGEST_S) * self._rng.uniform(0.75, 1.25)
        wait_s = min(error.retry_s, WAIT_MAX_S)
        self._paused_until = max(self._paused_until, self._host.now() + max(pause_s, wait_s))
        if error.lasting:
            self._over = error
        if self.able and (error.lasting or wait_s or self._failures >= FAILURES_TOLD):
            self.able = False
            self._tell()
        patient = self._host.now() - self._progress_at < WAIT_MAX_S  # without a chunk; then a fetch may stall
        self._download.handle(events.OriginFailed(self._node.node, error.why, wait_s if patient else 0.0))

    def _fill(self, transfer: int, reading: ReadRange, *, urgent: bool) -> None:
        """Fills the places of a range's chunks, on a thread. Raises OriginError and StoreError."""
        if not self._is_due(reading, urgent=urgent):
            return
        chunks = self._manifest.chunks
        first, last = chunks[reading.at], chunks[reading.end - 1]
        file = self._files[self._manifest.files[first.file].path]
        size = last.offset + last.size - first.offset
        stream = self.source.origin.read(self.source.listing, file, first.offset, size)
        self._open[transfer] = stream
        try:
            going = self._going(transfer, reading, urgent=urgent)
            with contextlib.closing(self._verifier.views(transfer, going, self._report(transfer))) as views:
                for view in views:
                    rest = view
                    while rest:
                        if not (filled := stream.readinto(rest)):
                            raise OriginUnreachable(self.source.origin.address, f"{file.path} ended early")
                        self._budget.spend(filled)
                        rest = rest[filled:]
        finally:
            stream.close()
            del self._open[transfer]

    def _report(self, transfer: int) -> Callable[[Sequence[LandedChunk]], None]:
        def report(landed: Sequence[LandedChunk]) -> None:
            self._mailbox.post(lambda: self._download.origin_landed(self._node, transfer, landed))

        return report

    def _going(self, transfer: int, reading: ReadRange, *, urgent: bool) -> Iterator[int]:
        """The chunks of a range, as long as they are to be read."""
        while self._is_due(reading, urgent=urgent):
            if urgent:
                self._verifier.reclaim(reading.at, transfer)
            yield reading.at
            reading.at += 1

    def _is_due(self, reading: ReadRange, *, urgent: bool) -> bool:
        """Whether the next chunk of a range is still to be read."""
        if reading.at >= reading.end or self._stopped.is_set():
            return False
        if urgent:
            return True
        return reading.at not in self._held and (reading.late or not self._download.machine.elsewhere[reading.at])


def on_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
    """Does blocking work on a daemon thread: one that resolves a name cannot be stopped, and holds up no exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(cast("T", result))

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as failure:
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="swarm-origin", daemon=True).start()
    return done


class _Budget:
    """Holds the reads of a node to a rate, on their threads."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def spend(self, size: int) -> None:
        """Sleeps until so many bytes are due."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + size / self._bytes_per_s
            wait_s = self._free_at - now
        time.sleep(max(0.0, wait_s))
