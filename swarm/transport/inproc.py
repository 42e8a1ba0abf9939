"""In-process transport: sessions between nodes of one process, for simulations, tests and programs with several nodes.

Spans are copied into views, slice by slice, on the loop's executor. Everything else happens on the loop, in the order
of the calls: with a virtual clock and an inline executor, a run is a function of its inputs. `line`, if given, models
the network: the holder awaits it before each slice, for as long as the slice would travel.

Where the contract of `Transport` leaves a choice, this behaves like TCP: sends of a session go in order, a send waits
for its receive, and the bytes of a cancelled receive still count as sent. Must not know: simulations, other clocks
than the loop's.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

from swarm.errors import LocalProtocolError, TransportError
from swarm.store import AnySpan, FileSpan, Span, View
from swarm.transport import Pace, Transfer
from swarm.transport.admission import TokenTransport
from swarm.transport.sink import (
    Landing,
    Mailbox,
    Outcome,
    close_iterator,
    on_host,
    pieces,
    read_file,
    span_bytes,
)

REMEMBERED_MAX = 4096  # transfers whose other end has not called yet; beyond that, the oldest never will
SLICE_BYTES = 1 << 20  # bounds what a cancelled transfer still copies

Line: TypeAlias = Callable[[str, str, int], Awaitable[None]]
"""(source address, target address, bytes): returns when the bytes would have arrived."""


class InprocHub:
    """A set of transports that reach each other. Addresses contain `name`, random by default."""

    def __init__(self, name: str | None = None) -> None:
        self._name = name or secrets.token_hex(8)  # addresses of other processes must not look reachable
        self._count = itertools.count()
        self._transports: dict[str, InprocTransport] = {}

    def join(self, transport: InprocTransport) -> str:
        """Adds a transport and returns its address."""
        address = f"inproc://{self._name}/{next(self._count)}"
        self._transports[address] = transport
        return address

    def leave(self, address: str) -> None:
        """Removes the transport at this address."""
        self._transports.pop(address, None)

    def find(self, address: str) -> InprocTransport | None:
        """The transport at this address, or None."""
        return self._transports.get(address)


_default_hub = InprocHub()


def _start_afresh() -> None:
    """A forked child is another process: it gets a hub of its own."""
    global _default_hub
    _default_hub = InprocHub()


os.register_at_fork(after_in_child=_start_afresh)


class InprocTransport(TokenTransport["InprocSession"]):
    """One node's transport within this process."""

    scheme = "inproc"
    reason = "both nodes are in this process"

    def __init__(self, hub: InprocHub | None = None, *, line: Line | None = None, pace: Pace | None = None) -> None:
        """The holder waits for `line` and `pace` before it sends a slice."""
        super().__init__()
        self._hub = hub or _default_hub
        self._line = line
        self._pace = pace
        self._address = self._hub.join(self)
        self._dialled: set[InprocSession] = set()

    @property
    def address(self) -> str:
        """inproc://HUB/NUMBER."""
        return self._address

    def reach(self, address: str) -> bool:
        """Whether the address is that of a live transport of the same hub."""
        return self._hub.find(address) is not None

    async def connect(self, address: str, token: str, *, timeout_s: float) -> InprocSession:
        """Never waits. The asker and the holder share the session object."""
        holder = self._hub.find(address)
        if holder is None or self._hub.find(self._address) is not self:
            raise TransportError(f"inproc to {address}: no transport has this address")
        if not holder.is_admitted(token):
            raise TransportError(f"inproc to {address}: it does not know the token")
        session = InprocSession(source=address, target=self._address, line=holder._line, pace=holder._pace)
        await holder.add_session(token, session)
        self._dialled = {known for known in self._dialled if known.alive} | {session}
        return session

    async def close(self) -> None:
        """Closes every session and leaves the hub."""
        self._hub.leave(self._address)
        await super().close()
        for session in self._dialled:
            await session.close()

    def __repr__(self) -> str:
        return f"<InprocTransport {self._address}>"


class InprocSession:
    """Both ends of a session: receives by transfer id, sends in order."""

    on_device = False
    streams = 1

    def __init__(self, *, source: str, target: str, line: Line | None, pace: Pace | None) -> None:
        self.received_bytes = 0
        self._lost: str | None = None
        self._source, self._target = source, target
        self._line, self._pace = line, pace
        self._landings: dict[int, Landing] = {}
        self._posted = asyncio.Event()
        self._abandoned: dict[int, None] = {}  # receives that ended before their send began
        self._aborted: dict[int, None] = {}  # sends that ended before their receive was posted
        self._turn = asyncio.Lock()
        self._movers: set[asyncio.Task[None]] = set()
        self._moving: Landing | None = None
        self._in_line = False  # waits for `line` or `pace`, which does not count as silence
        self._watches: dict[Landing, asyncio.TimerHandle] = {}
        self._mailbox = Mailbox()

    @property
    def alive(self) -> bool:
        """Whether the session can carry another transfer."""
        return self._lost is None

    async def close(self) -> None:
        """Ends the session for both ends; transfers in flight fail with TransportError."""
        if self._lost is not None:
            return
        self._lost = "it was closed"
        for landing in list(self._landings.values()):
            landing.stop(self._error())
        for mover in list(self._movers):
            mover.cancel()

    async def receive(self, transfer: Transfer, views: Iterator[View]) -> None:
        """Fills the views on the loop's executor."""
        landing = Landing(transfer, views, mailbox=self._mailbox)
        self._post(landing)
        self._watch(landing, received=0)
        try:
            await landing.outcome()
        finally:
            if (timer := self._watches.pop(landing, None)) is not None:
                timer.cancel()
            if self._landings.get(transfer.id) is landing:
                del self._landings[transfer.id]
                if landing is not self._moving:
                    _remember(self._abandoned, transfer.id)

    async def send(self, transfer: Transfer, spans: Iterator[AnySpan]) -> None:
        """Waits for the receive of the transfer, then copies."""
        if self._lost is not None:
            raise self._error()
        mover = asyncio.create_task(self._move(transfer, spans), name=f"inproc transfer {transfer.id}")
        self._movers.add(mover)
        mover.add_done_callback(self._movers.discard)
        try:
            await _finished(mover, stop=mover.cancel)
        finally:
            close_iterator(spans)

    def _error(self) -> TransportError:
        return TransportError(f"inproc session {self._source} -> {self._target}: {self._lost}")

    def _post(self, landing: Landing) -> None:
        transfer_id = landing.transfer.id
        if self._lost is not None:
            landing.stop(self._error())
        elif transfer_id in self._landings:
            landing.stop(LocalProtocolError(f"transfer {transfer_id} was posted twice"))
        elif transfer_id in self._aborted:
            del self._aborted[transfer_id]
            landing.stop(self._abortion(transfer_id))
        else:
            self._landings[transfer_id] = landing
            self._posted.set()

    def _watch(self, landing: Landing, *, received: int) -> None:
        """Checks once per idle timeout that more bytes have landed, from the first byte on."""
        if landing.ended:
            return
        idle_timeout_s = landing.transfer.idle_timeout_s
        if received and received == landing.received and not self._in_line:
            landing.stop(TransportError(f"{self._source} was silent for {idle_timeout_s:g} s in a transfer"))
            return
        again = functools.partial(self._watch, landing, received=landing.received)
        self._watches[landing] = asyncio.get_running_loop().call_later(idle_timeout_s, again)

    async def _move(self, transfer: Transfer, spans: Iterator[AnySpan]) -> None:
        try:
            async with self._turn:
                self._moving = await self._meet(transfer)
                await self._copy(transfer, spans, self._moving)
        except asyncio.CancelledError:
            self._abort(transfer)
            if self._lost is not None:
                raise self._error() from None
            raise
        except Exception:
            self._abort(transfer)
            raise
        finally:
            self._moving = None

    async def _meet(self, transfer: Transfer) -> Landing | None:
        """The landing of this transfer; None when it was posted and has ended."""
        try:
            async with asyncio.timeout(transfer.idle_timeout_s):
                while transfer.id not in self._landings and transfer.id not in self._abandoned:
                    self._posted.clear()
                    await self._posted.wait()
        except TimeoutError as error:
            waited = f"for {transfer.idle_timeout_s:g} s"
            raise TransportError(f"{self._target} posted no receive {waited}") from error
        self._abandoned.pop(transfer.id, None)
        return self._landings.get(transfer.id)

    async def _copy(self, transfer: Transfer, spans: Iterator[AnySpan], landing: Landing | None) -> None:
        slice_bytes = (self._pace.slice_bytes if self._pace else None) or SLICE_BYTES
        feed = _Feed(pieces(spans, size=transfer.size, most=SLICE_BYTES), landing)
        moved = 0
        while moved < transfer.size:
            size = min(slice_bytes, SLICE_BYTES, transfer.size - moved)
            await self._charge(size)
            await _on_thread(functools.partial(feed.copy, size))
            moved += size
            self.received_bytes += size
        await _on_thread(feed.finish)

    async def _charge(self, size: int) -> None:
        self._in_line = True
        try:
            if self._pace is not None and (wait_s := self._pace.take(size)):
                await asyncio.sleep(wait_s)
            if self._line is not None:
                await self._line(self._source, self._target, size)
        finally:
            self._in_line = False

    def _abort(self, transfer: Transfer) -> None:
        landing = self._landings.get(transfer.id)
        if landing is not None:
            landing.stop(self._abortion(transfer.id))
        else:
            _remember(self._aborted, transfer.id)

    def _abortion(self, transfer_id: int) -> TransportError:
        return TransportError(f"{self._source} aborted transfer {transfer_id}")


class _Feed:
    """Copies the bytes of spans into a landing, in steps of any size; skips them once the landing has ended."""

    def __init__(self, source: Iterator[AnySpan], landing: Landing | None) -> None:
        self._source = source
        self._landing = landing
        self._piece: Span = memoryview(b"")
        self._used = 0

    def copy(self, size: int) -> None:
        while size:
            left = span_bytes(self._piece) - self._used
            if not left:
                self._piece, self._used = on_host(next(self._source, memoryview(b""))), 0
                continue
            room = self._landing.borrow(min(size, left)) if self._landing is not None else None
            copied = min(size, left)
            if room is not None and self._landing is not None:
                copied = 0
                try:
                    copied = _copy(self._piece, self._used, on_host(room))
                finally:
                    self._landing.give_back(copied)
            self._used += copied
            size -= copied

    def finish(self) -> None:
        for _ in self._source:  # `pieces` checks the total size at its end
            raise LocalProtocolError("spans go on after their end")
        if self._landing is not None:
            self._landing.finish()


def _copy(piece: Span, offset: int, room: memoryview) -> int:
    if isinstance(piece, FileSpan):
        return read_file(piece, offset, room)
    room[:] = piece[offset : offset + room.nbytes]
    return room.nbytes


async def _on_thread(work: Callable[[], None]) -> None:
    """Runs `work` on the executor. A cancellation waits for the thread, at most one slice: it uses spans and views."""
    await _finished(asyncio.get_running_loop().run_in_executor(None, work), stop=lambda: None)


async def _finished(work: asyncio.Future[None], *, stop: Callable[[], object]) -> None:
    """Waits for `work` to end. A cancellation calls `stop` and still waits."""
    outcome = Outcome(stop)

    def settle(_: asyncio.Future[None]) -> None:
        outcome.settle(TransportError("cancelled") if work.cancelled() else work.exception())

    work.add_done_callback(settle)
    await outcome.reached()


def _remember(ids: dict[int, None], transfer_id: int) -> None:
    ids[transfer_id] = None
    if len(ids) > REMEMBERED_MAX:
        del ids[next(iter(ids))]
