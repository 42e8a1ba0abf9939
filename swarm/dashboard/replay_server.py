"""The dashboard of a recording: the same page and the same JSON as a node's, out of a trace instead of a node.

    /events                       the recording from its beginning, as fast as it was
    /events/FROM/SPEED            from so many milliseconds on, so many times as fast; speed 0 stands still

Everything else has the paths that a node's dashboard has. What a person chooses is in the path of the events alone, so
that several can look at one recording, each at another moment of it. The view says with `replay` that it is one.

Served on loopback only: whoever shows a trace is who looks at it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

from swarm.content.manifest import Digest
from swarm.dashboard.recording import Recording
from swarm.dashboard.server import ASSETS, DIGEST, INDEX, NODE, asset
from swarm.dashboard.sse import ALIVE_EVERY_S, UPDATE_EVERY_S, event
from swarm.dashboard.swarm_view import Json, patch
from swarm.errors import StoreError
from swarm.net.http_pages import EventPage, Page
from swarm.net.listener import Listener
from swarm.net.websocket import HttpLinks, Link
from swarm.observe.trace import lines

HOST = "127.0.0.1"
FROM = "{from_ms:[0-9]{1,9}}"
SPEED = "{speed:[0-9]{1,3}(?:[.][0-9]{1,2})?}"


class ReplayServer:
    """A trace in a dashboard. Raises StoreError for a file that is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._whole = Recording(lines(path))
            self._whole.to(math.inf)
        except OSError as error:
            raise StoreError(str(path), f"cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(str(path), f"is no trace that can be shown ({error})") from error
        self._seconds = self._whole.at_s - self._whole.begin_s

    def pages(self) -> dict[str, Page]:
        """All of them, by path."""
        return {
            "/": asset("index.html"),
            **{f"/web/{name}": asset(name) for name in ASSETS},
            "/view": lambda: self._shown(self._whole, speed=0.0),
            "/events": EventPage(self.play),
            f"/events/{FROM}/{SPEED}": EventPage(self.play),
            f"/tree/{DIGEST}/{INDEX}": lambda digest, index: self._whole.tree(digest, int(index)),
            f"/timeline/{DIGEST}": self._whole.timeline,
            f"/timeline/{DIGEST}/of/{NODE}": self._timeline_of,
        }

    async def play(self, from_ms: str = "0", speed: str = "1") -> AsyncGenerator[bytes]:
        """The view of that moment, and what changes from then on; at the end it stays."""
        recording = await asyncio.to_thread(Recording, lines(self._path))
        at_s, factor = recording.begin_s + int(from_ms) / 1000, float(speed)
        await asyncio.to_thread(recording.to, at_s)
        view = self._shown(recording, speed=factor)
        yield event("snapshot", view)
        clock = asyncio.get_running_loop().time
        began_s = clock()
        while factor and recording.at_s < self._whole.at_s:
            await asyncio.sleep(UPDATE_EVERY_S)
            await asyncio.to_thread(recording.to, at_s + (clock() - began_s) * factor)
            before, view = view, self._shown(recording, speed=factor)
            yield event("patch", patch(before, view))
        while True:
            await asyncio.sleep(ALIVE_EVERY_S)
            yield b": alive\n\n"

    @contextlib.asynccontextmanager
    async def serve(self, port: int) -> AsyncIterator[str]:
        """Its address while the block runs; port 0 takes a free one. Raises SettingsError where it is taken."""
        listener = await Listener.open(HOST, port)
        links = HttpLinks(self.pages())
        try:
            await links.open(_part)
            listener.serve({}, links.adopt)
            yield "{}:{}".format(*listener.address)
        finally:
            await listener.close()
            await links.close()

    def _shown(self, recording: Recording, *, speed: float) -> Json:
        at_s = recording.at_s - self._whole.begin_s
        replay = {"at_s": round(at_s, 3), "seconds": round(self._seconds, 3), "speed": speed, "file": self._path.name}
        return {**recording.view(), "replay": replay}

    def _timeline_of(self, digest: Digest, node: str) -> Json | None:
        found = self._whole.timeline(digest)
        return found if found and found["node"] == node else None


async def _part(link: Link) -> None:
    """Nobody is a peer of a recording."""
    await link.close()
