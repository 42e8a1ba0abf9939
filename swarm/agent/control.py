"""The control socket of the agent: a Unix socket in its cache directory, for programs of its user.

Mode 0600 in a directory of mode 0700; a connection of another user than this one or root is closed. At most
CONNECTIONS_MAX connections at once, each with one request, which must come within REQUEST_TIMEOUT_S.

A lock beside the socket tells whether an agent runs: the socket of a killed one is replaced.

Must not know: what requests mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from swarm.errors import SettingsError, SwarmError
from swarm.node.agent_client import at, peer_uid
from swarm.protocol import agent_messages as messages
from swarm.protocol.agent_messages import Answer, Failed, Greeting, Pulled, Request
from swarm.store.file_errors import store_errors
from swarm.store.file_lock import open_locked
from swarm.store.own_files import close_to_others, demand_own

CONNECTIONS_MAX = 64
REQUEST_TIMEOUT_S = 5.0
TAKE_TIMEOUT_S = 600.0  # for a copy of the files to another disk
PROGRESS_EVERY_S = 1.0  # also without progress: a program takes silence for a dead agent
BACKLOG = 64

log = logging.getLogger("swarm")

Handle = Callable[[Request], AsyncGenerator[Answer]]


class Control:
    """Listens from `open` to `close`; `handle(request)` yields the lines of an answer, or raises SwarmError."""

    def __init__(self, cache: Path, handle: Handle) -> None:
        self._cache = cache
        self._handle = handle
        self._server: asyncio.Server | None = None
        self._lock: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def claim(self) -> None:
        """Makes this process the agent of the cache directory. Raises SettingsError while another one is, and
        StoreError if another user may write there."""
        folder = self._cache / messages.FOLDER
        with store_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(OSError):  # else it is not the user's own, or a link
                close_to_others(folder)
            demand_own(folder)
            try:
                self._lock = open_locked(folder / "lock", timeout_s=0)
            except BlockingIOError:
                raise SettingsError("cache", f"an agent runs here already, with {folder}; one is enough") from None

    async def open(self, greeting: Greeting) -> None:
        """Listens, after `claim`. Raises StoreError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with store_errors(self._cache), at(self._cache) as path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.fchmod(sock.fileno(), 0o600)  # before it has a name: that could be another file's by then
            sock.bind(path)
        sock.listen(BACKLOG)
        line = messages.encode(greeting)

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if len(self._tasks) >= CONNECTIONS_MAX:
                log.warning("%d programs ask the agent already; another one is refused", CONNECTIONS_MAX)
                writer.close()
                return
            task = asyncio.create_task(serve(reader, writer), name="swarm-control")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await self._serve(line, reader, writer)
            finally:
                writer.close()

        self._server = await asyncio.start_unix_server(accept, sock=sock, limit=messages.LINE_BYTES_MAX)

    async def close(self) -> None:
        """Ends all connections; idempotent."""
        if self._server:
            self._server.close()
            with contextlib.suppress(OSError), at(self._cache) as path:
                os.unlink(path)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def _serve(self, greeting: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if peer_uid(writer.get_extra_info("socket")) not in (0, os.geteuid()):
            return
        try:
            writer.write(greeting)
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request = messages.decode_request(await reader.readuntil())
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            if not isinstance(error, EOFError | TimeoutError):  # the program only wanted the greeting
                await _say(writer, Failed(f"the agent does not understand this: {error}", 1))
            return
        gone = asyncio.ensure_future(reader.read(1))  # a program that hangs up wants nothing any more
        work = asyncio.ensure_future(self._answer(request, writer, gone))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter, gone: asyncio.Future[bytes]) -> None:
        try:
            async with contextlib.aclosing(self._handle(request)) as answers:
                async for answer in answers:
                    await _say(writer, answer)
                    if isinstance(answer, Pulled):  # `_handle` keeps the files until the program has them
                        await asyncio.wait([gone], timeout=TAKE_TIMEOUT_S)
        except SwarmError as error:
            await _say(writer, Failed(str(error), error.exit_code))
        except (ConnectionError, TimeoutError):
            pass  # it hung up, or does not read
        except Exception as error:
            log.exception("the agent failed at %s", request)
            await _say(writer, Failed(f"the agent failed: {error!r}; its log has more", 70))


async def _say(writer: asyncio.StreamWriter, answer: Answer) -> None:
    with contextlib.suppress(ConnectionError):
        writer.write(messages.encode(answer))
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await writer.drain()
