"""The ends of a transfer: what do threads tell the loop, and is nobody released before a thread has let go?"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest

from swarm.errors import StoreError, TransportError
from swarm.store import View
from swarm.transport import Transfer, sink
from swarm.transport.sink import Landing, Mailbox, Outcome, Tray


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))


def post_from_a_thread(mailbox: Mailbox, *calls: Callable[[], object]) -> None:
    def post() -> None:
        for call in calls:
            mailbox.post(call)

    thread = threading.Thread(target=post)
    thread.start()
    thread.join()


def test_does_a_mailbox_keep_the_order_and_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        wake, woken = loop.call_soon_threadsafe, list[object]()

        def count(call: Callable[[], object]) -> None:
            woken.append(call)
            wake(call)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        mailbox, made = Mailbox(), list[int]()
        for turn in range(2):
            post_from_a_thread(mailbox, *(functools.partial(made.append, number) for number in range(3)))
            assert made == [0, 1, 2] * turn  # not before the loop has its turn
            await asyncio.sleep(0)
            assert made == [0, 1, 2] * (turn + 1)
            assert len(woken) == turn + 1

    run(scenario)


def put_from_a_thread(tray: Tray[int], *items: int, followed: bool = False) -> None:
    def put() -> None:
        for item in items:
            tray.put(item, followed=followed)

    thread = threading.Thread(target=put)
    thread.start()
    thread.join()


def test_are_items_that_follow_each_other_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        wake, woken, taken = loop.call_soon_threadsafe, list[object](), list[list[int]]()

        def count(call: Callable[[bool], object], timed: bool) -> None:
            woken.append(call)
            wake(call, timed)

        tray = Tray[int](taken.append)
        monkeypatch.setattr(sink, "TAKE_EVERY_S", 1e9)
        tray._looked_at = -1e10
        tray.put(1)  # after a pause
        await asyncio.sleep(0)
        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        put_from_a_thread(tray, 2, 3)
        assert (taken, len(woken)) == ([[1]], 1)
        await asyncio.sleep(0)
        assert taken == [[1], [2, 3]]
        put_from_a_thread(tray, 4, 5)
        assert len(woken) == 1  # the loop looks by itself
        tray.collect()
        assert taken == [[1], [2, 3], [4, 5]]

    run(scenario)


def test_does_the_loop_stop_looking_when_nothing_comes_and_hear_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        came, taken = asyncio.Event(), list[int]()

        def take(items: list[int]) -> None:
            taken.extend(items)
            came.set()

        async def put(*items: int) -> None:
            put_from_a_thread(tray, *items)
            came.clear()
            await came.wait()

        tray = Tray[int](take)
        await put(1, 2)
        await put(3)
        while tray._awaited:  # noqa: ASYNC110 - the loop's timer ends it
            await asyncio.sleep(0.001)
        await put(4)
        assert taken == [1, 2, 3, 4]

    run(scenario)


def test_is_an_item_before_its_end_left_to_the_collector() -> None:
    async def scenario() -> None:
        taken = list[list[int]]()
        tray = Tray[int](taken.append)
        put_from_a_thread(tray, 1, followed=True)
        await asyncio.sleep(0)
        assert taken == []
        tray.collect()
        tray.collect()
        assert taken == [[1]]

    run(scenario)


def test_does_a_call_that_fails_keep_no_other_from_being_made() -> None:
    async def scenario() -> None:
        reported = list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        mailbox, made = Mailbox(), asyncio.Event()
        post_from_a_thread(mailbox, lambda: 1 // 0, made.set)
        await made.wait()
        assert isinstance(reported[0], ZeroDivisionError)

    run(scenario)


def test_is_a_closed_loop_left_alone() -> None:
    async def make() -> Mailbox:
        return Mailbox()

    made = list[str]()
    mailbox = asyncio.run(make())
    mailbox.post(lambda: made.append("late"))
    assert made == []


def test_is_whoever_is_cancelled_released_only_once_the_work_has_ended() -> None:
    async def scenario() -> None:
        stops = list[str]()
        outcome = Outcome(stop=lambda: stops.append("stop"))
        waiting = asyncio.create_task(outcome.reached())
        await asyncio.sleep(0)
        waiting.cancel()
        for _ in range(3):
            await asyncio.sleep(0)
        assert stops == ["stop"]
        assert not waiting.done()
        outcome.settle(TransportError("stopped"))
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(scenario)


def test_does_an_outcome_say_how_it_went_once() -> None:
    async def scenario() -> None:
        well, badly = Outcome(stop=lambda: None), Outcome(stop=lambda: None)
        well.settle(None)
        well.settle(TransportError("too late"))
        badly.settle(TransportError("broke"))
        await well.reached()
        assert not well.cancel()
        with pytest.raises(TransportError, match="broke"):
            await badly.reached()

    run(scenario)


def test_does_a_deadline_hold_only_when_the_work_lets_go() -> None:
    async def scenario() -> None:
        outcome = Outcome(stop=lambda: asyncio.get_running_loop().call_soon(outcome.settle, None))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0):
                await outcome.reached()
            raise AssertionError("the deadline was missed")
        assert outcome.done()

    run(scenario)


def test_does_a_pinned_landing_end_badly_only_when_it_is_unpinned() -> None:
    async def scenario() -> None:
        views = iter([memoryview(bytearray(4))])
        landing = Landing(Transfer(1, 4, 1.0), views, mailbox=Mailbox())
        for _ in range(2):
            landing.pin()
        assert landing.borrow(2) is not None
        landing.give_back(2)
        landing.stop(TransportError("not wanted"))
        landing.unpin()
        assert not landing.ended  # one of two that fill it still does
        assert landing.borrow(2) is None  # but nothing more is lent
        landing.unpin()
        assert landing.ended
        with pytest.raises(TransportError, match="not wanted"):
            await landing.outcome()

    run(scenario)


def test_does_an_error_out_of_the_views_of_a_pinned_landing_wait_for_it() -> None:
    def broken() -> Iterator[View]:
        yield memoryview(bytearray(2))
        raise StoreError("disk full")

    async def scenario() -> None:
        landing = Landing(Transfer(1, 4, 1.0), broken(), mailbox=Mailbox())
        landing.pin()
        assert landing.borrow(2) is not None
        landing.give_back(2)
        assert landing.borrow(2) is None
        assert not landing.ended
        landing.stop(TransportError("and nobody wants it"))
        landing.unpin()
        with pytest.raises(StoreError, match="disk full"):  # the first error is the cause
            await landing.outcome()

    run(scenario)


def test_does_a_pinned_landing_end_well() -> None:
    async def scenario() -> None:
        landing = Landing(Transfer(1, 4, 1.0), iter([memoryview(bytearray(4))]), mailbox=Mailbox())
        landing.pin()
        assert landing.borrow(4) is not None
        landing.give_back(4)
        assert landing.try_finish()
        landing.unpin()
        await landing.outcome()

    run(scenario)
