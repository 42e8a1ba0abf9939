"""Virtual time: an event loop that never waits, and whose clock jumps to the next timer when nothing is ready.

There is no socket, no thread and no real clock in it. What would run on a thread runs inline, at no cost of virtual
time, so that a run is a function of its inputs. What a loop on a real machine would hide as a hang is an error here:
nothing ready and no timer, a deadline passed, or callbacks that go round without time passing.

Must not know: nodes, networks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from swarm.errors import LocalProtocolError

T = TypeVar("T")

ROUNDS_MAX = 1_000_000  # of the loop at one instant: a thousand nodes do thousands of things at once, not a million
RESOLUTION_S = 1e-6  # timers this close fire together; must not vanish in the rounding of a large time
CLEANUP_S = 120.0  # virtual seconds for tasks to end once the run has failed
WAITING_NAMED_MAX = 20


class Stuck(LocalProtocolError):
    """A run cannot go on. `at_s` is the virtual time, `waiting` names the tasks and where each of them waits."""

    def __init__(self, why: str, *, at_s: float, waiting: tuple[str, ...]) -> None:
        named = "; ".join(waiting[:WAITING_NAMED_MAX]) or "no task"
        more = f"; and {len(waiting) - WAITING_NAMED_MAX} more" if len(waiting) > WAITING_NAMED_MAX else ""
        super().__init__(f"{why} at {at_s:.3f} s; waiting: {named}{more}")
        self.why = why
        self.at_s = at_s
        self.waiting = waiting


def run(main: Coroutine[Any, Any, T], *, limit_s: float) -> T:
    """The result of `main` on a loop of its own, at 0 s. Raises Stuck unless it ends in `limit_s` virtual seconds."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s=limit_s)) as runner:
        return runner.run(main)


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop without input and output. `time()` is virtual and starts at 0 seconds."""

    def __init__(self, *, limit_s: float) -> None:
        super().__init__()
        self._now_s = 0.0
        self._limit_s = limit_s
        self._rounds = 0
        self._clock_resolution = RESOLUTION_S
        self._selector = self  # where the loop looks for input, and the one place where it would wait

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    def select(self, timeout: float | None) -> list[object]:
        """Lets time pass instead of waiting. Raises Stuck."""
        if timeout is None:
            raise self._stuck("deadlock: nothing is ready and no timer is set")
        if timeout > 0:
            self._now_s += timeout
            self._rounds = 0
        self._rounds += 1
        if self._rounds > ROUNDS_MAX:
            raise self._stuck(f"{ROUNDS_MAX} rounds of the loop without time passing")
        if self._now_s > self._limit_s:
            raise self._stuck(f"not over within {self._limit_s:g} virtual seconds")
        return []

    def run_in_executor(  # type: ignore[override]  # the standard library's own stubs disagree on this one
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Runs the function at once, and returns its outcome as a future that is done."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _process_events(self, event_list: list[object]) -> None:
        """There is no input."""

    def _write_to_self(self) -> None:
        """Nobody sleeps, so nobody has to be woken."""

    def _stuck(self, why: str) -> Stuck:
        self._limit_s = self._now_s + CLEANUP_S
        self._rounds = 0
        waiting = sorted(_where(task) for task in asyncio.all_tasks(self))
        return Stuck(why, at_s=self._now_s, waiting=tuple(waiting))


def _where(task: asyncio.Task[Any]) -> str:
    frames = task.get_stack(limit=1)
    if not frames:
        return task.get_name()
    code = frames[0].f_code
    return f"{task.get_name()} in {code.co_name}, line {frames[0].f_lineno} of {code.co_filename.rsplit('/', 1)[-1]}"
