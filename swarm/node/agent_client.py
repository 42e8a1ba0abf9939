"""Asks the agent of this machine over its control socket.

    async with agent(cache) as found:            # None if none runs here
        answer = await found.ask(Pull(...), progress)

The socket is in the cache directory: programs that share it share the agent. It counts only if the process at its
other end is of this user or of root.

Must not know: what an agent does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from swarm.errors import AgentError, clean
from swarm.protocol import agent_messages as messages
from swarm.protocol.agent_messages import Answer, Failed, Greeting, PullProgress, Request

GREET_TIMEOUT_S = 2.0  # a local socket; the agent may be hashing
SILENCE_MAX_S = 30.0  # the agent reports progress every second

log = logging.getLogger("swarm")


class AgentLink:
    """A connection to an agent, for one request."""

    def __init__(self, greeting: Greeting, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.greeting = greeting
        self._reader = reader
        self._writer = writer

    async def ask(self, request: Request, progress: Callable[[PullProgress], object] = lambda _: None) -> Answer:
        """The last line of the answer. Raises AgentError for a failure, or an agent that falls silent."""
        try:
            self._writer.write(messages.encode(request))
            await self._writer.drain()
            while True:
                async with asyncio.timeout(SILENCE_MAX_S):
                    answer = messages.decode_line(await self._reader.readuntil())
                match answer:
                    case PullProgress():
                        progress(answer)
                    case Failed(why, exit_code):
                        raise AgentError(clean(why), exit_code=exit_code)
                    case Greeting():
                        raise AgentError("the agent of this machine greets twice")
                    case _:
                        return answer
        except TimeoutError:
            why = f"the agent (process {self.greeting.pid}) says nothing for {SILENCE_MAX_S:g} s"
            raise AgentError(why, gone=True) from None
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            why = f"the agent (process {self.greeting.pid}) broke off: {error or 'it ended'}"
            raise AgentError(why, gone=True) from error


@contextlib.asynccontextmanager
async def agent(cache: Path) -> AsyncIterator[AgentLink | None]:
    """The agent whose cache directory this is, None without a usable one."""
    found = await _connected(cache)
    try:
        yield found
    finally:
        if found:
            found._writer.close()


async def _connected(cache: Path) -> AgentLink | None:
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(GREET_TIMEOUT_S):
            reader, writer = await _open(cache)
            greeting = messages.decode_line(await reader.readuntil())
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        if writer:
            writer.close()
        if not isinstance(error, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
            log.debug("the agent at %s is not used: %s", cache, error)
        return None
    if not isinstance(greeting, Greeting) or greeting.version != messages.VERSION:
        writer.close()
        log.info("the agent of this machine has another version; this program goes on without it")
        return None
    return AgentLink(greeting, reader, writer)


async def _open(cache: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        with at(cache) as path:
            sock.connect(path)
        if peer_uid(sock) not in (0, os.geteuid()):
            raise PermissionError("it belongs to another user")
        return await asyncio.open_unix_connection(sock=sock.dup(), limit=messages.LINE_BYTES_MAX)


@contextlib.contextmanager
def at(cache: Path) -> Iterator[str]:
    """A path of the socket that is short enough, whatever the length of the cache directory's (108 bytes at most)."""
    fd = os.open(cache / messages.FOLDER, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{messages.SOCKET}"
    finally:
        os.close(fd)


def peer_uid(sock: socket.socket) -> int:
    """The user of the process at the other end."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(uid)
