"""Fetches between two hosts over every kind of network, and the table of what became of them.

    python -m tests.integration.address_cells        # as root: makes network namespaces, prints the table

Each network is a pair of namespaces with a cable between them. One process on the first host has two seeds, one with a
key and one without (`--insecure`). One process on the second host plays all newcomers, one after the other. Networks
run side by side. Every cell is a complete fetch, or one line that says why not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = "org/model"
PORT, OPEN_PORT = 7000, 7001
DEADLINE_S = 120.0
TOOLS = ("ip", "sysctl")

CABLE = ("{ip} link set eth0 up",)
FOUR = ("{ip} addr add 10.97.0.{n}/24 dev eth0",)
SIX = ("{ip} addr add fd97::{n}/64 dev eth0 nodad",)
NO_SIX = ("{exec} sysctl -qw net.ipv6.conf.all.disable_ipv6=1",)
CARD = (
    "{ip} link add card1 type veth peer name beyond",
    "{ip} addr add 192.0.2.{n}/24 dev card1",
    "{ip} link set card1 up",
    "{ip} link set beyond up",
    "{ip} route add default via 192.0.2.254",
)
# Commands for each host, number {n} of two; the seed's address, as --peer says it.
NETWORKS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "default route": ((*NO_SIX, *FOUR, *CABLE, "{ip} route add default via 10.97.0.254"), "10.97.0.1"),
    "no default route": ((*NO_SIX, *FOUR, *CABLE), "10.97.0.1"),
    "two cards": ((*NO_SIX, *CARD, *FOUR, *CABLE), "10.97.0.1"),  # the default route leads to the other card
    "IPv6 only": ((*SIX, *CABLE), "[fd97::1]"),
    "link-local only": (CABLE, "[fe80::97:1%eth0]"),
    "dual": ((*FOUR, *SIX, *CABLE, "{ip} route add default via 10.97.0.254"), "10.97.0.1"),
}


@dataclass(frozen=True)
class Cell:
    """What a newcomer was given, and what became of it. `error` is empty after a complete fetch."""

    network: str
    key: bool
    listens: bool
    mdns: bool
    seconds: float
    error: str

    def __str__(self) -> str:
        given = ("key" if self.key else "no key", "--listen" if self.listens else "", "mDNS" if self.mdns else "--peer")
        columns = (f"{text:<{width}}" for text, width in zip((self.network, *given), (17, 7, 9, 7), strict=True))
        return f"{' '.join(columns)} {self.seconds:5.2f} s  {self.error or 'complete'}"


@contextlib.contextmanager
def hosts(rules: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Two namespaces with a cable between them, after these commands have run in each."""
    names = [f"swarm-{secrets.token_hex(4)}" for _ in range(2)]

    def run(command: str) -> None:
        subprocess.run(command.split(), check=True, timeout=DEADLINE_S, capture_output=True)

    try:
        for name in names:
            run(f"ip netns add {name}")
            run(f"ip -n {name} link set lo up")
            run(f"ip netns exec {name} sysctl -qw net.ipv6.conf.default.accept_dad=0")
        run(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
        for number, name in enumerate(names, 1):
            run(f"ip -n {name} link set eth0 addrgenmode none")
            run(f"ip -n {name} addr add fe80::97:{number}/64 dev eth0 nodad")
            for rule in rules:
                run(rule.format(ip=f"ip -n {name}", exec=f"ip netns exec {name}", n=number))
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=DEADLINE_S, capture_output=True)


def play(network: str) -> list[Cell]:
    """All cells of a network."""
    rules, seed = NETWORKS[network]
    with tempfile.TemporaryDirectory() as folder, hosts(rules) as (one, other):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SWARM_", "HF_"))}
        environment |= {"HOME": folder, "SWARM_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}

        def start(host: str, *arguments: str) -> subprocess.Popen[str]:
            command = ["ip", "netns", "exec", host, sys.executable, str(Path(__file__).resolve()), *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            return subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes)  # type: ignore[call-overload,no-any-return]

        with start(one, "seed", folder) as seeds:
            try:
                assert seeds.stdout is not None
                assert seeds.stdout.readline() == "ready\n", seeds.communicate(timeout=DEADLINE_S)[1]
                with start(other, "fetch", folder, network, seed) as newcomers:
                    out, err = newcomers.communicate(timeout=DEADLINE_S)
            finally:
                seeds.kill()
        assert newcomers.returncode == 0, err
        return [Cell(**json.loads(line)) for line in out.splitlines()]


def play_all() -> list[Cell]:
    """All cells of all networks."""
    with ThreadPoolExecutor(len(NETWORKS)) as pool:
        return [cell for cells in pool.map(play, NETWORKS) for cell in cells]


async def serve(folder: Path) -> None:
    """Two seeds, until the process is killed."""
    from swarm.api import open_source
    from swarm.runtime import new_node
    from swarm.security import cluster_key
    from swarm.settings import Settings

    cluster_key.create(folder / "key")
    model = folder / "model"
    model.mkdir()
    (model / "data.bin").write_bytes(secrets.token_bytes(300_000))
    async with contextlib.AsyncExitStack() as opened:
        for settings in (
            Settings(listen=f"0.0.0.0:{PORT}", key_file=folder / "key", name="seed"),
            Settings(listen=f"[::]:{OPEN_PORT}", insecure=True, name="open seed"),
        ):
            node, _ = new_node(settings)
            await opened.enter_async_context(node)
            node.serve(*open_source(model, model_id=MODEL, settings=settings)[:2])
        print("ready", flush=True)
        await asyncio.Event().wait()


async def fetch_all(folder: Path, network: str, seed: str) -> None:
    """A newcomer for each cell, printed as JSON."""
    import swarm.api  # not part of the first cell's time
    import swarm.runtime  # noqa: F401

    for key, listens, mdns in itertools.product((True, False), (True, False), (True, False)):
        given: dict[str, object] = {"mdns": mdns, "name": "newcomer", "origin": "none"}
        if key:
            given["key_file"] = folder / "key"
        if listens:
            given |= {"listen": "0.0.0.0:0"} if key else {"listen": "0.0.0.0:0", "insecure": True}
        if not mdns:
            given["peers"] = (f"{seed}:{PORT if key else OPEN_PORT}",)
        began = time.monotonic()
        error = await _fetch(folder, given)
        cell = Cell(network, key, listens, mdns, round(time.monotonic() - began, 2), error)
        print(json.dumps(asdict(cell)), flush=True)


async def _fetch(folder: Path, given: Mapping[str, object]) -> str:
    from swarm.api import fetch_on
    from swarm.errors import SwarmError
    from swarm.runtime import new_node
    from swarm.settings import Settings

    out = folder / secrets.token_hex(4)
    try:
        settings = Settings(**given)  # type: ignore[arg-type]
        node, _ = new_node(settings)
        async with node:
            await fetch_on(node, MODEL, out=out, settings=settings)
        assert (out / "data.bin").read_bytes() == (folder / "model" / "data.bin").read_bytes()
    except SwarmError as error:
        return str(error)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return ""


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["seed", folder]:
            asyncio.run(serve(Path(folder)))
        case ["fetch", folder, network, seed]:
            asyncio.run(fetch_all(Path(folder), network, seed))
        case _:
            for cell in play_all():
                print(cell)
