"""The dashboard of a recording: the page and JSON of a node's dashboard, from a trace.

    /events                       the recording from its beginning, at its own speed
    /events/FROM/SPEED            from FROM milliseconds on, SPEED times as fast; speed 0 pauses

All other paths are those of a node's dashboard. Position and speed are in the path of the events alone, so that several
browsers can show different times of one recording. The view has the field `replay`. Served on loopback only.
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
from swarm.errors import StoreError, clean
from swarm.net.http_pages import EventPage, Page
from swarm.net.link import Link
from swarm.net.listener import Listener
from swarm.net.websocket import HttpLinks
from swarm.observe.trace import lines

HOST = "127.0.0.1"
FROM = "{from_ms:[0-9]{1,9}}"
SPEED = "{speed:[0-9]{1,3}(?:[.][0-9]{1,2})?}"


class ReplayServer:
    """A trace as a dashboard. Raises StoreError if the file is no trace."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._whole = Recording(lines(path))
            self._whole.to(math.inf)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise StoreError(f"{path}: is no trace that can be shown ({clean(error)})") from error
        self._seconds = self._whole.at_s - self._whole.begin_s

    def pages(self) -> dict[str, Page]:
        """All pages by path."""
        return {
            "/": asset("index.html"),
            **{f"/web/{name}": asset(name) for name in ASSETS},
            "/view": lambda: self._view(self._whole, speed=0.0),
            "/events": EventPage(self.play),
            f"/events/{FROM}/{SPEED}": EventPage(self.play),
            f"/tree/{DIGEST}/{INDEX}": lambda digest, index: self._whole.tree(digest, int(index)),
            f"/timeline/{DIGEST}": self._whole.timeline,
            f"/timeline/{DIGEST}/of/{NODE}": self._timeline_of,
        }

    async def play(self, from_ms: str = "0", speed: str = "1") -> AsyncGenerator[bytes]:
        """A snapshot of the view at `from_ms`, then patches until the end of the recording."""
        recording = await asyncio.to_thread(Recording, lines(self._path))
        at_s, factor = recording.begin_s + int(from_ms) / 1000, float(speed)
        await asyncio.to_thread(recording.to, at_s)
        view = self._view(recording, speed=factor)
        yield event("snapshot", view)
        clock = asyncio.get_running_loop().time
        began_s = clock()
        while factor and recording.at_s < self._whole.at_s:
            await asyncio.sleep(UPDATE_EVERY_S)
            await asyncio.to_thread(recording.to, at_s + (clock() - began_s) * factor)
            before, view = view, self._view(recording, speed=factor)
            yield event("patch", patch(before, view))
        while True:
            await asyncio.sleep(ALIVE_EVERY_S)
            yield b": alive\n\n"

    @contextlib.asynccontextmanager
    async def serve(self, port: int) -> AsyncIterator[str]:
        """Serves while the block runs; yields the address. Port 0 takes a free port. Raises SettingsError if the port
        is in use."""
        listener = await Listener.open(HOST, port)
        links = HttpLinks(self.pages())
        try:
            await links.open(_close)
            listener.serve({}, links.adopt)
            yield "{}:{}".format(*listener.address)
        finally:
            await listener.close()
            await links.close()

    def _view(self, recording: Recording, *, speed: float) -> Json:
        at_s = recording.at_s - self._whole.begin_s
        replay = {"at_s": round(at_s, 3), "seconds": round(self._seconds, 3), "speed": speed, "file": self._path.name}
        return {**recording.view(), "replay": replay}

    def _timeline_of(self, digest: Digest, node: str) -> Json | None:
        found = self._whole.timeline(digest)
        return found if found and found["node"] == node else None


async def _close(link: Link) -> None:
    """A recording has no peers."""
    await link.close()
