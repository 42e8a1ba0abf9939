"""The part of BitTorrent that lets its clients compete: a torrent of a single file, and a tracker.

    python bench/torrent.py HOST PORT        prints `ready`, then `seeded` when a peer announces the whole file

The torrent is of version 1 (BEP 3), which every client reads. The tracker tells every peer about all others; it lives
as long as a measurement and has a single torrent, so it never forgets a peer.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import sys
from pathlib import Path
from typing import TypeAlias

from aiohttp import web

PIECE_BYTES = 256 << 10
ANNOUNCE_EVERY_S = 5

Bencodable: TypeAlias = "int | bytes | str | list[Bencodable] | dict[str, Bencodable]"


def make(file: Path, *, announce: str) -> bytes:
    """The torrent of a single file."""
    pieces = bytearray()
    with file.open("rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            pieces += hashlib.sha1(piece, usedforsecurity=False).digest()
    info: dict[str, Bencodable] = {
        "length": file.stat().st_size,
        "name": file.name,
        "piece length": PIECE_BYTES,
        "pieces": bytes(pieces),
    }
    return bencode({"announce": announce, "info": info})


def bencode(value: Bencodable) -> bytes:
    """BitTorrent's encoding; dictionaries are sorted by the bytes of their keys."""
    match value:
        case int():
            return b"i%de" % value
        case str():
            return bencode(value.encode())
        case bytes():
            return b"%d:%s" % (len(value), value)
        case list():
            return b"l" + b"".join(map(bencode, value)) + b"e"
        case dict():
            pairs = sorted((key.encode(), item) for key, item in value.items())
            return b"d" + b"".join(bencode(key) + bencode(item) for key, item in pairs) + b"e"


async def tracker(host: str, port: int) -> None:
    """Serves until the process is ended."""
    peers: dict[tuple[str, int], None] = {}

    async def announce(request: web.Request) -> web.Response:
        asker = (request.remote or "", int(request.query["port"]))
        others = [peer for peer in peers if peer != asker]
        peers[asker] = None
        if request.query.get("left") == "0":
            print("seeded", flush=True)
        compact = b"".join(ipaddress.ip_address(ip).packed + number.to_bytes(2, "big") for ip, number in others)
        return web.Response(body=bencode({"interval": ANNOUNCE_EVERY_S, "peers": compact}))

    app = web.Application()
    app.router.add_get("/announce", announce)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(tracker(sys.argv[1], int(sys.argv[2])))
