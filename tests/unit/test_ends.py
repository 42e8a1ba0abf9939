"""The ends of a transfer: what do threads tell the loop, and is nobody released before a thread has let go?"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Awaitable, Callable

import pytest

from swarm.errors import TransportError
from swarm.transport.ends import Mailbox, Outcome


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

    asyncio.run(make()).post(lambda: None)


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
