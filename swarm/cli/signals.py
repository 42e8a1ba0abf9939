"""Signals of a command: SIGINT, SIGTERM and SIGHUP end it within `EXIT_S`, also while a thread hashes or copies.

A seed drains first at SIGTERM, and reads its settings again at SIGHUP (`daemon`).

A thread cannot be stopped, and Python waits for its threads at exit. So a watchdog ends the process if that takes
longer. The files of a fetch survive that as they survive a crash: a resume hashes the bytes that are there.

A signal that the process was started to ignore (`nohup`, a background job of a shell) is ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

EXIT_S = 1.5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130  # exit code
INTERRUPTED_LINE = "swarm: interrupted; verified chunks are kept, run the same command again to resume"

_watchdogs: list[threading.Timer] = []


def heeded() -> list[signal.Signals]:
    """The signals that are not ignored."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def exit_soon(code: Callable[[], int] = lambda: INTERRUPTED, *, after_s: float = 0.0) -> None:
    """Ends the process with `code()` `EXIT_S` after `after_s`, unless it has ended by then."""

    def end() -> None:
        number = code()
        if number == INTERRUPTED:
            sys.stderr.write(f"{INTERRUPTED_LINE}\n")
            sys.stderr.flush()
        os._exit(number)

    timer = threading.Timer(after_s + EXIT_S, end)
    timer.daemon = True
    timer.start()
    _watchdogs.append(timer)


def disarm() -> None:
    """The process goes on: a command ran inside a program."""
    while _watchdogs:
        _watchdogs.pop().cancel()


@contextlib.contextmanager
def interrupting() -> Iterator[None]:
    """In the block, signals raise KeyboardInterrupt on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return

    def interrupt(*_: object) -> None:
        exit_soon()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
