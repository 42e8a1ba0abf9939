"""Opens connections to other nodes: by address, over several addresses side by side, and with the fault if none opens.

Must not know: TLS, HTTP beyond one question, links.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from swarm.errors import PeerUnreachable
from swarm.net import cards, no_answer
from swarm.net.no_answer import Fault
from swarm.settings import split_address

T = TypeVar("T")

STAGGER_S = 0.25  # RFC 8305: between two attempts while the first has not failed
TWIN_TIMEOUT_S = 0.5  # of a connection within this machine
ASK_TIMEOUT_S = 1.0
ASKED_BYTES_MAX = 4096


async def connect(address: str) -> socket.socket:
    """A connected socket, non-blocking. Raises PeerUnreachable, whose line says what the failure means."""
    host, port = split_address("peer", address)
    loop = asyncio.get_running_loop()
    sock: socket.socket | None = None
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, where = found[0]
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        await loop.sock_connect(sock, where)
    except OSError as error:
        if sock:
            sock.close()
        if isinstance(error, socket.gaierror):
            raise PeerUnreachable(address, f"this name is not known ({error.strerror})") from error
        raise PeerUnreachable(address, await _why(error, address)) from error
    except RuntimeError as error:  # the interpreter ends, and takes no more work for threads
        raise PeerUnreachable(address, f"is not dialled: {error}") from error
    except BaseException:
        if sock:
            sock.close()
        raise
    return sock


async def race(
    attempts: Sequence[Callable[[], Awaitable[T]]],
    *,
    discard: Callable[[T], Awaitable[None]],
    stagger_s: float = STAGGER_S,
) -> T:
    """The result of the first attempt that succeeds; others are cancelled, and a second result is discarded.

    The next attempt begins when the one before has failed, or after `stagger_s`. Raises an ExceptionGroup with the
    error of each attempt, in order, if none succeeds.
    """
    waiting = list(attempts)
    tasks: list[asyncio.Future[T]] = []
    try:
        while True:
            if waiting:
                tasks.append(asyncio.ensure_future(waiting.pop(0)()))
            running = [task for task in tasks if not task.done()]
            if running:
                timeout_s = stagger_s if waiting else None
                await asyncio.wait(running, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is None:
                    tasks.remove(task)
                    return task.result()
            if not waiting and all(task.done() for task in tasks):
                errors = [error for task in tasks if isinstance(error := task.exception(), Exception)]
                raise ExceptionGroup("no attempt succeeded", errors)
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(ended, BaseException):
                await discard(ended)


async def speaks(address: str, path: str, word: bytes) -> bool:
    """Whether the answer to a plain GET of `path` at an address contains a word."""
    host, _ = split_address("peer", address)
    request = f"GET {path} HTTP/1.1\r\nHost: {host.partition('%')[0]}\r\nConnection: close\r\n\r\n".encode()
    with contextlib.suppress(OSError, PeerUnreachable):  # TimeoutError is one
        async with asyncio.timeout(ASK_TIMEOUT_S):
            loop = asyncio.get_running_loop()
            with await connect(address) as sock:
                await loop.sock_sendall(sock, request)
                answer = b""
                while len(answer) < ASKED_BYTES_MAX and (part := await loop.sock_recv(sock, ASKED_BYTES_MAX)):
                    answer += part
                return word in answer
    return False


async def _why(error: OSError, address: str) -> str:
    twin = no_answer.loopback_twin(address, cards.read())
    fault = no_answer.fault_of(error.errno, address)
    if twin and fault is Fault.REFUSED and await _answers(twin):
        fault = no_answer.fault_of(error.errno, address, loopback_answers=True)
    reason = error.strerror or str(error)
    return no_answer.line(fault, address, detail=f" ({reason})" if fault is Fault.SILENT else reason)


async def _answers(where: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError):
        async with asyncio.timeout(TWIN_TIMEOUT_S):
            _, writer = await asyncio.open_connection(*where)
            writer.close()
            return True
    return False
