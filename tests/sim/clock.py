"""Virtual time: an event loop that never waits, and whose clock jumps to the next timer when nothing is ready.

A process can be paused: code that runs `within` it stands still, and its clock leaves the pause out, as that of a real
node does.

There is no socket, no thread and no real clock in it. What would run on a thread runs inline, at no cost of virtual
time, so that a run is a function of its inputs. What a loop on a real machine would hide as a hang is an error here:
nothing ready and no timer, a deadline passed, or callbacks that go round without time passing.

Must not know: nodes, networks.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any, TypeVar

from swarm.errors import LocalProtocolError

T = TypeVar("T")

ROUNDS_MAX = 1_000_000  # of the loop at one instant: a thousand nodes do thousands of things at once, not a million
RESOLUTION_S = 1e-6  # timers this close fire together; must not vanish in the rounding of a large time
CLEANUP_S = 120.0  # virtual seconds for tasks to end once the run has failed
WAITING_NAMED_MAX = 20


_process: ContextVar[str] = ContextVar("process", default="")  # that the running code belongs to; "" is never paused


def within(process: str) -> Context:
    """A context for tasks and callbacks of this process."""
    context = copy_context()
    context.run(_process.set, process)
    return context


def network_time() -> float:
    """Seconds on the one clock that no pause of a process stops."""
    loop = asyncio.get_running_loop()
    return loop.elapsed_s if isinstance(loop, VirtualLoop) else loop.time()


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
        self._paused: dict[str, list[_Handle | _Timer]] = {}  # what waits for the end of each pause
        self._paused_at: dict[str, float] = {}
        self._skipped_s: defaultdict[str, float] = defaultdict(float)  # by process: what its clock leaves out
        self._clock_resolution = RESOLUTION_S
        self._selector = self  # where the loop looks for input, and the one place where it would wait

    def time(self) -> float:
        """Virtual seconds since the loop was made, without the pauses of the process that asks."""
        return self._now_s - self.paused_s

    @property
    def elapsed_s(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    @property
    def paused_s(self) -> float:
        """Seconds of the pauses of the process that asks."""
        return self._skipped_s[_process.get()]

    def pause(self, process: str) -> None:
        """Stops all code within the process."""
        self._paused[process], self._paused_at[process] = [], self._now_s

    def resume(self, process: str) -> None:
        """Lets it go on."""
        self._skipped_s[process] += self._now_s - self._paused_at.pop(process)
        for handle in self._paused.pop(process):
            self._again(handle)

    def call_at(  # type: ignore[override]  # the standard library's own stubs name the arguments otherwise
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio; `when` is on the clock of the process that asks."""
        timer = _Timer(when, callback, args, self, context)
        timer.process = _process.get() if context is None else context.get(_process, "")
        self._again(timer)
        return timer

    def _call_soon(self, callback: Callable[..., object], args: Any, context: Context | None) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        handle.process = _process.get() if context is None else context.get(_process, "")
        self._again(handle)
        return handle

    def holds(self, handle: _Handle | _Timer) -> bool:
        """Whether the process of a handle is paused; then the handle is kept until it goes on."""
        if (held := self._paused.get(handle.process)) is None:
            return False
        held.append(handle)
        return True

    def _again(self, handle: _Handle | _Timer) -> None:
        if isinstance(handle, _Timer):
            handle.set_due(self._skipped_s[handle.process])
            heapq.heappush(self._scheduled, handle)  # type: ignore[attr-defined]
            handle._scheduled = True  # type: ignore[attr-defined]
        else:
            self._ready.append(handle)  # type: ignore[attr-defined]

    def is_early(self, timer: _Timer) -> bool:
        """Whether a timer came due before its time, because its process was paused since it was set; sets it again."""
        if self._now_s + RESOLUTION_S >= timer.when() + self._skipped_s[timer.process]:
            return False
        self._again(timer)
        return True

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


class _Handle(asyncio.Handle):
    """A callback of a process."""

    process = ""
    _loop: VirtualLoop

    def _run(self) -> None:
        if not self._loop.holds(self):
            super()._run()


class _Timer(asyncio.TimerHandle):
    """A timer of a process. `when()` is on the clock of the process, `_when` on that of the loop."""

    process = ""
    _loop: VirtualLoop
    _when: float

    def __init__(self, when: float, *args: Any) -> None:
        super().__init__(when, *args)
        self._local = when

    def set_due(self, skipped_s: float) -> None:
        """Sets the time on the loop's clock."""
        self._when = self._local + skipped_s

    def when(self) -> float:
        return self._local

    def _run(self) -> None:
        if not self._loop.holds(self) and not self._loop.is_early(self):
            super()._run()


def _where(task: asyncio.Task[Any]) -> str:
    frames = task.get_stack(limit=1)
    if not frames:
        return task.get_name()
    code = frames[0].f_code
    return f"{task.get_name()} in {code.co_name}, line {frames[0].f_lineno} of {code.co_filename.rsplit('/', 1)[-1]}"
