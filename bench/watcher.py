"""A monitoring client: `watcher.py ADDRESS [ADDRESS ...]` has the first node's dashboard open and scrapes all.

Prints `ready` once it has seen the swarm, and goes on until it is ended. A node that does not answer is asked again a
second later.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import aiohttp

SCRAPE_EVERY_S = 1.0
TIMEOUT_S = 10.0


async def watch(addresses: list[str]) -> None:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_read=TIMEOUT_S)) as session,
        session.get(f"http://{addresses[0]}/events") as events,
    ):
        events.raise_for_status()
        await events.content.readline()
        print("ready", flush=True)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_drain(events.content))
            for address in addresses:
                tasks.create_task(_scrape(session, address))


async def _drain(events: aiohttp.StreamReader) -> None:
    while await events.readany():
        pass


async def _scrape(session: aiohttp.ClientSession, address: str) -> None:
    while True:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with session.get(f"http://{address}/metrics") as answer:
                await answer.read()
        await asyncio.sleep(SCRAPE_EVERY_S)


if __name__ == "__main__":
    asyncio.run(watch(sys.argv[1:]))
