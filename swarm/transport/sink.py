"""Both ends of a transfer, for all transports: spans cut into pieces, and views being filled.

`pieces` cuts the spans that the holder's store lends. `Landing` fills the views that the asker's store lends, and keeps
a rule: `outcome` returns only once the views are left alone. A thread must hold the landing's lock to touch the views.
The I/O thread takes the lock for one piece at a time. To stop a landing, set `_stop_error`, then try the lock; the I/O
thread checks `_stop_error` after it releases the lock. Exactly one of the two ends the landing, and neither blocks
while bytes are in flight. An I/O thread pins the landing while a GPU fills borrowed views.

`Mailbox` passes calls from threads to the loop, `Tray` items that may wait for others, and an `Outcome` is awaited for
the end of work on a thread: with small chunks, waking the loop and its turns are most of the cost of a transfer.

An ended landing lends no views; the transport drops the rest of its bytes. Must not know: sockets, frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, overload

from swarm.errors import LocalProtocolError, SourceChanged, TransportError
from swarm.store import AnySpan, DeviceView, FileSpan, Span, View
from swarm.transport import Transfer

LOOK_EVERY_S = 50e-6  # period of polling a GPU, which wakes no thread
TAKE_EVERY_S = 0.005  # by then the next announcement of chunks is seldom due

T = TypeVar("T")

_NO_VIEW: View = memoryview(b"")


def span_bytes(span: AnySpan) -> int:
    """The span's size in bytes."""
    return span.size if isinstance(span, FileSpan) else span.nbytes


def pieces(spans: Iterator[AnySpan], *, size: int, most: int) -> Iterator[AnySpan]:
    """The bytes of `spans` in pieces of at most `most` bytes.

    Raises LocalProtocolError unless they are `size` in all, before a byte too many is handed out.
    """
    lent = 0
    for span in spans:
        length = span_bytes(span)
        if lent + length > size:
            raise LocalProtocolError(f"the spans of a transfer of {size} bytes hold at least {lent + length}")
        lent += length
        whole = span if isinstance(span, FileSpan) else span.cast("B")
        for offset in range(0, length, most):
            yield _part(whole, offset, min(most, length - offset))
    if lent != size:
        raise LocalProtocolError(f"the spans of a transfer of {size} bytes hold only {lent}")


@overload
def on_host(span: View) -> memoryview: ...
@overload
def on_host(span: AnySpan) -> Span: ...
def on_host(span: AnySpan) -> Span:
    """The span, on the host. Raises LocalProtocolError for GPU memory: only sessions with `on_device` take it."""
    if isinstance(span, DeviceView):
        raise LocalProtocolError("GPU memory was lent to a transport that moves host memory")
    return span


def read_file(span: FileSpan, offset: int, room: memoryview) -> int:
    """Reads some bytes, from `offset` of the span on, into `room`. Raises SourceChanged when the file ends before."""
    read = os.preadv(span.fd, [room], span.offset + offset)
    if not read:
        raise SourceChanged(os.readlink(f"/proc/self/fd/{span.fd}"), f"it ends at byte {span.offset + offset}")
    return read


def _part(span: AnySpan, offset: int, size: int) -> AnySpan:
    if isinstance(span, FileSpan):
        return FileSpan(span.fd, span.offset + offset, size)
    return span[offset : offset + size]


class Mailbox:
    """Calls from other threads to the loop, in order. Calls posted before the loop runs wake it once. Made on the
    loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], object]] = deque()
        self._rung = False

    def post(self, call: Callable[[], object]) -> None:
        """Posts a call; any thread. Dropped once the loop is closed."""
        self._calls.append(call)
        if not self._rung:  # read after the append: the call is either seen or rung for
            self._ring()

    def _ring(self) -> None:
        self._rung = True
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._rung = False
        try:
            while self._calls:
                self._calls.popleft()()
        finally:
            if self._calls:  # a call raised: the rest is still to run
                self._ring()


class Tray(Generic[T]):
    """Items from other threads to the loop, which passes them to `take` together. Made on the loop.

    An item after a pause wakes the loop; while more follow, the loop looks every TAKE_EVERY_S by itself.
    """

    def __init__(self, take: Callable[[list[T]], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._take = take
        self._items: deque[T] = deque()
        self._awaited = False  # the loop is about to look
        self._looked_at = 0.0

    def put(self, item: T, *, followed: bool = False) -> None:
        """Any thread. `followed`: `collect` is called soon. Dropped once the loop is closed."""
        self._items.append(item)
        if not (self._awaited or followed):  # read after the append: the item is either seen or rung for
            self._awaited = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._look, False)

    def collect(self) -> None:
        """Takes what is there. On the loop."""
        if self._items:
            self._take([self._items.popleft() for _ in range(len(self._items))])

    def _look(self, timed: bool) -> None:
        now = self._loop.time()
        self._awaited = bool(self._items) and (timed or now - self._looked_at < TAKE_EVERY_S)
        self._looked_at = now
        if self._awaited:
            self._loop.call_later(TAKE_EVERY_S, self._look, True)
        self.collect()


class Outcome(asyncio.Future[None]):
    """The end of work on another thread. Cancelling a task in `reached` stops the work and waits for its end, since the
    thread may still use the task's memory."""

    def __init__(self, stop: Callable[[], object]) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._stop: Callable[[], object] | None = stop  # None once settled: breaks the reference circle
        self._was_cancelled = False

    async def reached(self) -> None:
        """Returns, or raises the error of the work, or CancelledError after a cancellation."""
        try:
            await self
        finally:
            if self._was_cancelled:
                raise asyncio.CancelledError

    def cancel(self, msg: object = None) -> bool:
        """Called when a waiting task is cancelled: stops the work."""
        if self._stop is None:
            return False
        self._was_cancelled = True
        self._stop()
        return True

    def settle(self, error: BaseException | None) -> None:
        """Sets the result, unless it is set. On the loop's thread."""
        if self._stop is None:
            return
        self._stop = None
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)
            self.exception()  # retrieved: else asyncio logs it when the task was cancelled


class Landing:
    """The views of a transfer while they are filled. Made on the loop; `borrow` to `finish` are for the I/O thread."""

    def __init__(self, transfer: Transfer, views: Iterator[View], *, mailbox: Mailbox) -> None:
        self.transfer = transfer
        self.received = 0
        self._views = views
        self._view = _NO_VIEW
        self._lent = _NO_VIEW
        self._lock = threading.Lock()
        self._pins = 0
        self._stop_error: Exception | None = None
        self._ended = False
        self._mailbox = mailbox
        self._loop_thread = threading.get_ident()
        self._outcome = Outcome(stop=lambda: self.stop(TransportError("cancelled")))

    async def outcome(self) -> None:
        """Returns when all bytes have landed, or raises the error; the views are left alone from then on."""
        await self._outcome.reached()

    def borrow(self, most: int) -> View | None:
        """A view for the next bytes, at most `most`, which must be known to follow; None once the landing has ended.

        Must be given back before any other call.
        """
        self._lock.acquire()
        if not self._ended:
            try:
                self._find_room(most)
            except Exception as error:
                self._fail(error)
            else:
                self._lent = self._view[:most]
                return self._lent
        self._lock.release()
        return None

    def give_back(self, filled: int) -> None:
        """Ends a `borrow` whose first `filled` bytes are in place."""
        self._lent.release()  # the caller may unmap the memory next
        self._view = self._view[filled:]
        self.received += filled
        self._lock.release()
        if self._stop_error is not None:
            self.stop(self._stop_error)

    def pin(self) -> None:
        """Borrowed views are filled after `give_back`, by a GPU: an error ends the landing only after `unpin`."""
        self._pins += 1

    def unpin(self) -> None:
        """Undoes one `pin`."""
        self._pins -= 1
        if self._stop_error is not None:
            self.stop(self._stop_error)

    def finish(self) -> None:
        """The peer has sent all bytes: advances the views beyond the last, and ends the landing. Blocks."""
        while not self.try_finish():
            time.sleep(LOOK_EVERY_S)

    def try_finish(self) -> bool:
        """As `finish`, but returns False when the views wait for a GPU, which they show by an empty view."""
        with self._lock:
            if self._ended:
                return True
            try:
                if self._is_complete():
                    self._end(None)
            except Exception as error:
                self._fail(error)
            return self._ended

    def stop(self, error: Exception) -> None:
        """Ends the landing with `error`, at once or at the next `give_back` or `unpin`. Any thread."""
        if self._stop_error is None:
            self._stop_error = error
        if self._lock.acquire(blocking=False):
            try:
                if not self._ended and not self._pins:
                    self._end(self._stop_error)
            finally:
                self._lock.release()

    @property
    def ended(self) -> bool:
        """Whether the views are left alone."""
        return self._ended

    def _find_room(self, most: int) -> None:
        if self._stop_error is not None:
            raise self._stop_error
        if self.received + most > self.transfer.size:
            raise TransportError(f"the peer sends more than the {self.transfer.size} bytes agreed on")
        while not self._view.nbytes:
            view = next(self._views, None)
            if view is None:
                raise LocalProtocolError(
                    f"the views of a transfer of {self.transfer.size} bytes end after {self.received}"
                )
            self._view = view.cast("B")

    def _is_complete(self) -> bool:
        if self._stop_error is not None:
            raise self._stop_error
        if self.received != self.transfer.size:
            raise TransportError(f"the peer sent {self.received} of {self.transfer.size} bytes")
        view = self._view if self._view.nbytes else next(self._views, None)
        if view is not None and view.nbytes:
            room = view.nbytes + sum(view.nbytes for view in self._views)
            raise LocalProtocolError(f"the views of a transfer of {self.transfer.size} bytes have room for {room} more")
        return view is None

    def _fail(self, error: Exception) -> None:
        if self._pins:
            self._stop_error = self._stop_error or error
        else:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._ended = True
        self._view = self._lent = _NO_VIEW
        if error is not None:
            try:
                close_iterator(self._views)
            except Exception as closing:  # the first error is the cause
                error.add_note(f"closing its views failed too: {closing!r}")
        if threading.get_ident() == self._loop_thread:
            self._outcome.settle(error)
        else:
            self._mailbox.post(lambda: self._outcome.settle(error))

    def __repr__(self) -> str:
        state = "ended" if self._ended else "landing"
        return f"<Landing {self.transfer.id} {state} {self.received}/{self.transfer.size}>"


def close_iterator(iterator: Iterator[object]) -> None:
    """Closes a generator; other iterators need no closing."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
