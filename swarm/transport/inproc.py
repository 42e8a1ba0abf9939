"""In-process: sessions between nodes of one process, for simulations, tests, and several nodes in one program.

Spans are copied into views, slice by slice, on the loop's executor. Everything else happens on the loop, in
the order in which it was asked for: on a loop whose clock is virtual and whose executor runs inline, a run is
a function of its inputs. `line`, if given, stands for the network: it is awaited before each slice and takes
as long as that slice would.

Behaves like TCP where the contract leaves a choice: the sends of a session go in order, a send waits for its
receive, and bytes that nobody wants any more are still 'sent'. Must not know: what a simulation is, or any
clock but the loop's.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias

from swarm.errors import LocalProtocolError, SourceChanged, TransportError
from swarm.store import AnySpan, FileSpan, Span, View
from swarm.transport import Pace, Transfer
from swarm.transport.sink import Landing, Mailbox, Outcome, close_iterator, on_host, pieces, span_bytes

REMEMBERED_MAX = 4096  # transfers of which one end is over and the other has not come; the oldest never will
SLICE_BYTES = 1 << 20  # bounds what a cancelled transfer still copies

Line: TypeAlias = Callable[[str, str, int], Awaitable[None]]
"""Source address, target address, bytes: returns when they would have arrived."""


class InprocHub:
    """The transports that can reach each other. `name` tells hubs apart in their addresses."""

    def __init__(self, name: str | None = None) -> None:
        self._name = name or secrets.token_hex(8)  # another process' addresses must not look reachable
        self._count = itertools.count()
        self._transports: dict[str, InprocTransport] = {}

    def join(self, transport: InprocTransport) -> str:
        """The address under which the transport is found from now on."""
        address = f"inproc://{self._name}/{next(self._count)}"
        self._transports[address] = transport
        return address

    def leave(self, address: str) -> None:
        """The address leads nowhere from now on."""
        self._transports.pop(address, None)

    def find(self, address: str) -> InprocTransport | None:
        """The transport at this address."""
        return self._transports.get(address)


_default_hub = InprocHub()


def _start_afresh() -> None:
    """In a forked child, which is another process."""
    global _default_hub
    _default_hub = InprocHub()


os.register_at_fork(after_in_child=_start_afresh)


class InprocTransport:
    """One node's plane within this process."""

    scheme = "inproc"
    reason = "both nodes are in this process"
    usual_bytes_per_s = 0.0

    def __init__(self, hub: InprocHub | None = None, *, line: Line | None = None, pace: Pace | None = None) -> None:
        """`line` and `pace` are charged by the holder, for what it sends."""
        self._hub = hub or _default_hub
        self._line = line
        self._pace = pace
        self._address = self._hub.join(self)
        self._admitted: dict[str, _Admission] = {}
        self._dialled: set[_Session] = set()

    @property
    def address(self) -> str:
        """inproc://HUB/NUMBER."""
        return self._address

    def reach(self, address: str) -> bool:
        """Whether the address is that of a live transport of the same hub."""
        return self._hub.find(address) is not None

    async def connect(self, address: str, token: str, *, timeout_s: float) -> InprocInbound:
        """See `Transport`. Never waits."""
        holder = self._hub.find(address)
        if holder is None or self._hub.find(self._address) is not self:
            raise TransportError(f"inproc to {address}: nobody is there")
        session = holder.open_session(token, asker=self._address)
        self._dialled = {known for known in self._dialled if known.lost is None} | {session}
        return InprocInbound(session)

    def open_session(self, token: str, *, asker: str) -> _Session:
        """What an asker's `connect` calls at the holder. Raises TransportError."""
        admission = self._admitted.get(token)
        if admission is None:
            raise TransportError(f"inproc to {self._address}: it does not know the token")
        session = _Session(source=self._address, target=asker, line=self._line, pace=self._pace)
        admission.add(session)
        return session

    def admit(self, token: str) -> None:
        """See `Transport`."""
        self._admitted.setdefault(token, _Admission())

    async def accept(self, token: str, *, timeout_s: float) -> InprocOutbound:
        """See `Transport`."""
        admission = self._admitted.get(token)
        if admission is None:
            raise TransportError("inproc: the token is not admitted")
        try:
            async with asyncio.timeout(timeout_s):
                return InprocOutbound(await admission.latest())
        except TimeoutError as error:
            raise TransportError(f"inproc: the peer opened no session within {timeout_s:g} s") from error

    async def revoke(self, token: str) -> None:
        """See `Transport`."""
        admission = self._admitted.pop(token, None)
        if admission is not None:
            admission.revoke()

    async def close(self) -> None:
        """Closes every session, and leaves the hub."""
        self._hub.leave(self._address)
        for token in list(self._admitted):
            await self.revoke(token)
        for session in self._dialled:
            session.lose("the asker closed")

    def __repr__(self) -> str:
        return f"<InprocTransport {self._address}>"


class InprocInbound:
    """The asker's end."""

    on_device = False

    def __init__(self, session: _Session) -> None:
        self._session = session

    async def receive(self, transfer: Transfer, views: Iterator[View]) -> None:
        """See `Inbound`."""
        await self._session.receive(transfer, views)

    @property
    def received_bytes(self) -> int:
        """See `Inbound`."""
        return self._session.received_bytes

    @property
    def alive(self) -> bool:
        """Whether the session can carry another transfer."""
        return self._session.lost is None

    async def close(self) -> None:
        """Ends the session; transfers in flight fail with TransportError."""
        self._session.lose("the asker closed the session")


class InprocOutbound:
    """The holder's end."""

    on_device = False

    def __init__(self, session: _Session) -> None:
        self._session = session

    async def send(self, transfer: Transfer, spans: Iterator[AnySpan]) -> None:
        """See `Outbound`."""
        await self._session.send(transfer, spans)


class _Admission:
    """One admitted token and the session opened with it last."""

    def __init__(self) -> None:
        self._revoked = False
        self._sessions: list[_Session] = []
        self._changed = asyncio.Event()

    def add(self, session: _Session) -> None:
        self._sessions = [known for known in self._sessions if known.lost is None] + [session]
        self._changed.set()

    async def latest(self) -> _Session:
        while not self._revoked:
            if self._sessions and self._sessions[-1].lost is None:
                return self._sessions[-1]
            self._changed.clear()
            await self._changed.wait()
        raise TransportError("inproc: the token was revoked")

    def revoke(self) -> None:
        self._revoked = True
        self._changed.set()
        for session in self._sessions:
            session.lose("the holder revoked the token or closed")


class _Session:
    """Where the two ends meet: receives by id, sends in order."""

    def __init__(self, *, source: str, target: str, line: Line | None, pace: Pace | None) -> None:
        self.lost: str | None = None
        self.received_bytes = 0
        self._source, self._target = source, target
        self._line, self._pace = line, pace
        self._landings: dict[int, Landing] = {}
        self._posted = asyncio.Event()
        self._abandoned: dict[int, None] = {}  # receives that ended before their send began
        self._aborted: dict[int, None] = {}  # sends that ended before their receive was posted
        self._turn = asyncio.Lock()
        self._movers: set[asyncio.Task[None]] = set()
        self._moving: Landing | None = None
        self._on_line = False  # charged for, so that it is no silence
        self._watches: dict[Landing, asyncio.TimerHandle] = {}
        self._mailbox = Mailbox()

    async def receive(self, transfer: Transfer, views: Iterator[View]) -> None:
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
        if self.lost is not None:
            raise self._error()
        mover = asyncio.create_task(self._move(transfer, spans), name=f"inproc transfer {transfer.id}")
        self._movers.add(mover)
        mover.add_done_callback(self._movers.discard)
        try:
            await _finished(mover, stop=mover.cancel)
        finally:
            close_iterator(spans)

    def lose(self, why: str) -> None:
        if self.lost is not None:
            return
        self.lost = why
        for landing in list(self._landings.values()):
            landing.stop(self._error())
        for mover in list(self._movers):
            mover.cancel()

    def _error(self) -> TransportError:
        return TransportError(f"inproc session {self._source} -> {self._target}: {self.lost}")

    def _post(self, landing: Landing) -> None:
        transfer_id = landing.transfer.id
        if self.lost is not None:
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
        """Looks once per idle timeout whether more has landed, from the first byte on."""
        if landing.ended:
            return
        idle_timeout_s = landing.transfer.idle_timeout_s
        if received and received == landing.received and not self._on_line:
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
            if self.lost is not None:
                raise self._error() from None
            raise
        except Exception:
            self._abort(transfer)
            raise
        finally:
            self._moving = None

    async def _meet(self, transfer: Transfer) -> Landing | None:
        """The receive of this transfer; None when it was posted and has ended."""
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
        self._on_line = True
        try:
            if self._pace is not None and (wait_s := self._pace.take(size)):
                await asyncio.sleep(wait_s)
            if self._line is not None:
                await self._line(self._source, self._target, size)
        finally:
            self._on_line = False

    def _abort(self, transfer: Transfer) -> None:
        landing = self._landings.get(transfer.id)
        if landing is not None:
            landing.stop(self._abortion(transfer.id))
        else:
            _remember(self._aborted, transfer.id)

    def _abortion(self, transfer_id: int) -> TransportError:
        return TransportError(f"{self._source} aborted transfer {transfer_id}")


class _Feed:
    """Copies what spans hold into a landing, any number of bytes at a time; into nothing once that has ended."""

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
                    copied = _read_into(on_host(room), self._piece, self._used)
                finally:
                    self._landing.give_back(copied)
            self._used += copied
            size -= copied

    def finish(self) -> None:
        for _ in self._source:  # its last check of the size
            raise LocalProtocolError("spans go on after their end")
        if self._landing is not None:
            self._landing.finish()


def _read_into(room: memoryview, piece: Span, offset: int) -> int:
    if not isinstance(piece, FileSpan):
        room[:] = piece[offset : offset + room.nbytes]
        return room.nbytes
    read = os.preadv(piece.fd, [room], piece.offset + offset)
    if not read:
        where = os.readlink(f"/proc/self/fd/{piece.fd}")
        raise SourceChanged(where, f"it ends at byte {piece.offset + offset}")
    return read


async def _on_thread(work: Callable[[], None]) -> None:
    """A cancellation waits until the thread has let go of spans and views; that takes one slice."""
    await _finished(asyncio.get_running_loop().run_in_executor(None, work), stop=lambda: None)


async def _finished(work: asyncio.Future[None], *, stop: Callable[[], object]) -> None:
    """Waits for the end of work, which a cancellation stops but does not leave alone."""
    outcome = Outcome(stop)

    def settle(_: asyncio.Future[None]) -> None:
        outcome.settle(TransportError("cancelled") if work.cancelled() else work.exception())

    work.add_done_callback(settle)
    await outcome.reached()


def _remember(ids: dict[int, None], transfer_id: int) -> None:
    ids[transfer_id] = None
    if len(ids) > REMEMBERED_MAX:
        del ids[next(iter(ids))]
