"""The two ends of a transfer, as every transport needs them: spans cut into pieces, and views being filled.

`pieces` cuts what the holder's store lends. `Landing` fills what the asker's store lends, and owns the rule
that is hard to keep: whoever awaits a transfer is not released before its views are left alone. Views are
touched only by the holder of the landing's gate. The thread that moves bytes takes the gate for one piece at
a time; to stop a landing from outside, one leaves a note and then tries the gate, and the mover looks for a
note after it let go of the gate. So one of the two always ends the landing, and nobody waits for a lock while
bytes are on their way. A mover that has others fill what it borrowed (a GPU) pins the landing until they have.

What threads have to say to the loop goes through a `Mailbox`, and whoever waits for a thread awaits an `Outcome`: with
small chunks, waking the loop and walking through its turns is most of what a transfer costs.

A landing that ended lends no more room; the transport drops the rest of its bytes. Knows no sockets and no
frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import overload

from swarm.errors import LocalProtocolError, SourceChanged, TransportError
from swarm.store import AnySpan, DeviceView, FileSpan, Span, View
from swarm.transport import Transfer

LOOK_EVERY_S = 50e-6  # at work of a GPU, which wakes nobody when it is done

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
    """The span, which is not of a GPU. Raises LocalProtocolError: who lends those must know who can take them."""
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
    """Calls that other threads leave for the loop, which makes them in order. However many were left since it looked
    last, they wake it once. Made on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], object]] = deque()
        self._rung = False

    def post(self, call: Callable[[], object]) -> None:
        """Leaves a call; any thread. A loop that is closed has nobody left who waits."""
        self._calls.append(call)
        if not self._rung:  # looked at after the call was left, so that it is either seen or rung for
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
            if self._calls:  # one call failed; the others are still to be made
                self._ring()


class Outcome(asyncio.Future[None]):
    """How work on another thread ends. Whoever awaits `reached` and is cancelled has the work stopped, and is released
    only once it has ended: a thread does not let go of memory because a task was cancelled."""

    def __init__(self, stop: Callable[[], object]) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._stop: Callable[[], object] | None = stop  # None once it is settled: who is stopped holds this one
        self._unwanted = False

    async def reached(self) -> None:
        """Returns, or raises what the work failed with; CancelledError when it was cancelled meanwhile."""
        try:
            await self
        finally:
            if self._unwanted:
                raise asyncio.CancelledError

    def cancel(self, msg: object = None) -> bool:
        """What a task calls that is cancelled while it waits."""
        if self._stop is None:
            return False
        self._unwanted = True
        self._stop()
        return True

    def settle(self, error: BaseException | None) -> None:
        """Gives it its result unless it has one. On the loop's thread."""
        if self._stop is None:
            return
        self._stop = None
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)
            self.exception()  # seen: otherwise asyncio reports it as lost when its asker was cancelled


class Landing:
    """The views of one transfer while they are filled. Made on the loop; `borrow` to `finish` belong to one mover."""

    def __init__(self, transfer: Transfer, views: Iterator[View], *, mailbox: Mailbox) -> None:
        self.transfer = transfer
        self.received = 0
        self._views = views
        self._view = _NO_VIEW
        self._lent = _NO_VIEW
        self._gate = threading.Lock()
        self._pins = 0
        self._note: Exception | None = None
        self._ended = False
        self._mailbox = mailbox
        self._loop_thread = threading.get_ident()
        self._outcome = Outcome(stop=lambda: self.stop(TransportError("cancelled by its asker")))

    async def outcome(self) -> None:
        """Returns when everything has landed, or raises why it did not; in both cases the views are left alone."""
        await self._outcome.reached()

    def borrow(self, most: int) -> View | None:
        """Where the next bytes go, at most `most` of them, which are known to follow. None: the landing has ended.

        Room must be given back before anything else is done with the landing.
        """
        self._gate.acquire()
        if not self._ended:
            try:
                self._find_room(most)
            except Exception as error:
                self._fail(error)
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

    def pin(self) -> None:
        """What was borrowed is being filled although it is given back: only `unpin` lets the landing end badly."""
        self._pins += 1

    def unpin(self) -> None:
        """Undoes one `pin`."""
        self._pins -= 1
        if self._note is not None:
            self.stop(self._note)

    def finish(self) -> None:
        """The peer has sent everything: lets the views do what they do after the last one, and ends the landing."""
        while not self.try_finish():
            time.sleep(LOOK_EVERY_S)

    def try_finish(self) -> bool:
        """As `finish`, but False when the views have something to wait for, which they say by an empty one."""
        with self._gate:
            if self._ended:
                return True
            try:
                if self._is_complete():
                    self._end(None)
            except Exception as error:
                self._fail(error)
            return self._ended

    def stop(self, error: Exception) -> None:
        """Ends the landing with `error`, at once or as soon as the mover gives back what it borrowed. Any thread."""
        if self._note is None:
            self._note = error
        if self._gate.acquire(blocking=False):
            try:
                if not self._ended and not self._pins:
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

    def _is_complete(self) -> bool:
        if self._note is not None:
            raise self._note
        if self.received != self.transfer.size:
            raise TransportError(f"the peer sent {self.received} of {self.transfer.size} bytes")
        view = self._view if self._view.nbytes else next(self._views, None)
        if view is not None and view.nbytes:
            room = view.nbytes + sum(view.nbytes for view in self._views)
            raise LocalProtocolError(f"the views of a transfer of {self.transfer.size} bytes have room for {room} more")
        return view is None

    def _fail(self, error: Exception) -> None:
        if self._pins:
            self._note = self._note or error
        else:
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._ended = True
        self._view = self._lent = _NO_VIEW
        if error is not None:
            try:
                close_iterator(self._views)
            except Exception as closing:  # the first error is the cause, so it is the one that comes out
                error.add_note(f"closing its views failed too: {closing!r}")
        if threading.get_ident() == self._loop_thread:
            self._outcome.settle(error)
        else:
            self._mailbox.post(lambda: self._outcome.settle(error))

    def __repr__(self) -> str:
        state = "ended" if self._ended else "landing"
        return f"<Landing {self.transfer.id} {state} {self.received}/{self.transfer.size}>"


def close_iterator(iterator: Iterator[object]) -> None:
    """Closes a generator; other iterators hold nothing."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
