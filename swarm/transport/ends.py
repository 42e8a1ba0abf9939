"""The two ends of a transfer, as every transport needs them: spans cut into pieces, and views being filled.

`pieces` cuts what the holder's store lends. `Landing` fills what the asker's store lends, and owns the rule
that is hard to keep: whoever awaits a transfer is not released before its views are left alone. Views are
touched only by the holder of the landing's gate. The thread that moves bytes takes the gate for one piece at
a time; to stop a landing from outside, one leaves a note and then tries the gate, and the mover looks for a
note after it let go of the gate. So one of the two always ends the landing, and nobody waits for a lock while
bytes are on their way.

A landing that ended lends no more room; the transport drops the rest of its bytes. Knows no sockets and no
frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from swarm.errors import LocalProtocolError, TransportError
from swarm.store import FileSpan, Span
from swarm.transport import Transfer

T = TypeVar("T")
_NO_VIEW = memoryview(b"")


def span_bytes(span: Span) -> int:
    """The span's size in bytes."""
    return span.size if isinstance(span, FileSpan) else span.nbytes


def pieces(spans: Iterator[Span], *, size: int, most: int) -> Iterator[Span]:
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


def _part(span: Span, offset: int, size: int) -> Span:
    if isinstance(span, FileSpan):
        return FileSpan(span.fd, span.offset + offset, size)
    return span[offset : offset + size]


class Landing:
    """The views of one transfer while they are filled. Made on the loop; `borrow` to `finish` belong to one mover."""

    def __init__(self, transfer: Transfer, views: Iterator[memoryview]) -> None:
        self.transfer = transfer
        self.received = 0
        self._views = views
        self._view = _NO_VIEW
        self._lent = _NO_VIEW
        self._gate = threading.Lock()
        self._note: Exception | None = None
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._outcome: asyncio.Future[None] = self._loop.create_future()

    async def outcome(self) -> None:
        """Returns when everything has landed, or raises why it did not; in both cases the views are left alone."""
        await settled(self._outcome, stop=lambda: self.stop(TransportError("cancelled by its asker")))

    def borrow(self, most: int) -> memoryview | None:
        """Where the next bytes go, at most `most` of them, which are known to follow. None: the landing has ended.

        Room must be given back before anything else is done with the landing.
        """
        self._gate.acquire()
        if not self._ended:
            try:
                self._find_room(most)
            except Exception as error:
                self._end(error)
            else:
                self._lent = self._view[:most]
                return self._lent
        self._gate.release()
        return None

    def give_back(self, filled: int) -> None:
        """Ends a `borrow`: the first `filled` bytes of the room are in place."""
        self._lent.release()  # whoever awaits the landing may unmap the memory next
        self._view = self._view[filled:]
        self.received += filled
        self._gate.release()
        if self._note is not None:
            self.stop(self._note)

    def finish(self) -> None:
        """The peer has sent everything: lets the views do what they do after the last one, and ends the landing."""
        with self._gate:
            if self._ended:
                return
            try:
                self._check_complete()
            except Exception as error:
                self._end(error)
            else:
                self._end(None)

    def stop(self, error: Exception) -> None:
        """Ends the landing with `error`, at once or as soon as the mover gives back what it borrowed. Any thread."""
        if self._note is None:
            self._note = error
        if self._gate.acquire(blocking=False):
            try:
                if not self._ended:
                    self._end(self._note)
            finally:
                self._gate.release()

    @property
    def ended(self) -> bool:
        """Whether the views are left alone from now on."""
        return self._ended

    def _find_room(self, most: int) -> None:
        if self._note is not None:
            raise self._note
        if self.received + most > self.transfer.size:
            raise TransportError(f"the peer sends more than the {self.transfer.size} bytes agreed on")
        while not self._view.nbytes:
            view = next(self._views, None)
            if view is None:
                raise LocalProtocolError(
                    f"the views of a transfer of {self.transfer.size} bytes end after {self.received}"
                )
            self._view = view.cast("B")

    def _check_complete(self) -> None:
        if self._note is not None:
            raise self._note
        if self.received != self.transfer.size:
            raise TransportError(f"the peer sent {self.received} of {self.transfer.size} bytes")
        room = self._view.nbytes + sum(view.nbytes for view in self._views)
        if room:
            raise LocalProtocolError(f"the views of a transfer of {self.transfer.size} bytes have room for {room} more")

    def _end(self, error: Exception | None) -> None:
        self._ended = True
        self._view = self._lent = _NO_VIEW
        if error is not None:
            try:
                close_iterator(self._views)
            except Exception as closing:  # the first error is the cause, so it is the one that comes out
                error.add_note(f"closing its views failed too: {closing!r}")
        if threading.get_ident() == self._loop_thread:
            settle(self._outcome, error)
        else:
            call_on_loop(self._loop, lambda: settle(self._outcome, error))

    def __repr__(self) -> str:
        state = "ended" if self._ended else "landing"
        return f"<Landing {self.transfer.id} {state} {self.received}/{self.transfer.size}>"


async def settled(future: asyncio.Future[T], *, stop: Callable[[], None]) -> T:
    """The result of work on a thread. Cancelled, it calls `stop` and still waits until the thread has let go."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
            stop()
    if cancelled is not None:
        if not future.cancelled():
            future.exception()  # seen: otherwise asyncio reports it as lost
        raise cancelled
    return future.result()


def settle(future: asyncio.Future[None], error: Exception | None) -> None:
    """Gives a future its outcome unless it has one. On the loop's thread."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def call_on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Runs `call` on the loop, from any thread. A loop that is closed has nobody left who waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


def close_iterator(iterator: Iterator[object]) -> None:
    """Closes a generator; other iterators hold nothing."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
