"""The processes on the hosts of a burst: `burst_workers.py seed|newcomer SYSTEM TASK`, with the task as JSON.

A seed prints `ready` once newcomers can fetch from it. A newcomer prints `ready` when it is warm: everything imported,
nothing connected. On a line of input it fetches the model and answers with a JSON object: when it `began` and `ended`
on the machine's monotonic clock. Then it stays, as a seed where the system has seeds, until it is ended.

Every system writes to a file on the same tmpfs, without fsync. The measuring process compares the files.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import mmap
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loop_cost
from workers import traced

if TYPE_CHECKING:
    import libtorrent
    import torch
    from torch.distributed import ProcessGroupGloo

    from swarm.content.manifest import Chunk
    from swarm.store import Source, Span

Answer = dict[str, Any]

MODEL_ID = "bench/model"
SWARM_PORT, HTTP_PORT, TORRENT_PORT, STAR_PORT = 7000, 8080, 6881, 29500
COUNT = "BENCH_COUNT"  # in the environment: newcomers of swarm count the events of their loops, which costs time
LIE_EVERY = 10  # chunks, more or less
DIGEST_BYTE_VALUES = 256


@dataclass(frozen=True)
class Task:
    """The task of a process. `file` is the file of a seed, or the place of a newcomer's copy; `index` counts newcomers.

    `seeds` and `newcomers` are all hosts' addresses, this host's included; `torrent` is the torrent's file.
    """

    address: str
    rack: str
    file: Path
    torrent: Path
    seeds: tuple[str, ...]
    newcomers: tuple[str, ...]
    index: int
    deadline_s: float
    chunk_bytes: int
    leaf_bytes: int

    @classmethod
    def read(cls, text: str) -> Task:
        """The inverse of `written`."""
        values = json.loads(text)
        values |= {name: Path(values[name]) for name in ("file", "torrent")}
        return cls(**values | {name: tuple(values[name]) for name in ("seeds", "newcomers")})

    @property
    def written(self) -> str:
        """As an argument of the command."""
        return json.dumps(self.__dict__, default=str)


def main() -> None:
    role, system, task = sys.argv[1:]
    ROLES[role, system](Task.read(task))


def swarm_newcomer(task: Task, *, watched: bool = False) -> None:
    import swarm
    from swarm.runtime import runtime

    fetch = swarm.fetch  # loads everything that it needs
    runtime()  # starts its loop
    settings = swarm.Settings(
        listen=f"{task.address}:{SWARM_PORT}",
        host=task.address,
        rack=task.rack,
        peers=tuple(f"{seed}:{SWARM_PORT}" for seed in task.seeds),
        insecure=True,
        mdns=False,
        fsync=False,
        cache=Path("cache").absolute(),
    )
    counts = loop_cost.counting() if COUNT in os.environ else {}
    with contextlib.ExitStack() as open_:
        with going() as answer:
            counts.clear()
            loop_s, process_s = loop_cost.loop_s(), loop_cost.process_s()
            if watched:
                open_.enter_context(traced(settings, Path("newcomer.trace")))
            weights = fetch(MODEL_ID, out=task.file.parent, timeout_s=task.deadline_s, settings=settings)
            done(answer)
            answer |= {"loop_s": loop_cost.loop_s() - loop_s, "process_s": loop_cost.process_s() - process_s}
            answer |= {"counts": dict(counts)} if counts else {}
            answer |= {"sources": weights.fetched.sources, "rejected_chunks": weights.fetched.rejected_chunks}
        stay()


def swarm_watched_newcomer(task: Task) -> None:
    swarm_newcomer(task, watched=True)


def swarm_liar(task: Task) -> None:
    """Announces the whole model; about every tenth chunk that it sends is wrong."""
    import swarm
    from swarm.checkpoint import manifest_builder
    from swarm.content.manifest import ModelId
    from swarm.runtime import runtime

    peers = tuple(f"{seed}:{SWARM_PORT}" for seed in task.seeds)
    cache = Path("cache").absolute()
    settings = swarm.Settings(
        listen=f"{task.address}:{SWARM_PORT}",
        host=task.address,
        rack=task.rack,
        peers=peers,
        insecure=True,
        mdns=False,
        cache=cache,
    )
    _, source, _ = manifest_builder.checkpoint(
        task.file.parent, cache_dir=cache, chunk_bytes=task.chunk_bytes, leaf_bytes=task.leaf_bytes
    )

    async def serve() -> None:
        node = await runtime().acquire(settings)
        node.serve(ModelId(MODEL_ID), Lies(source))

    runtime().run(serve())
    ready()
    stay()


class Lies:
    """A source that answers about every tenth chunk with zeroes.

    Digests choose the chunks: seeds share chunks out by index, so that a choice by index might never be requested.
    """

    def __init__(self, truth: Source) -> None:
        self.manifest = truth.manifest
        self._truth = truth

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        if chunk.digest[0] < DIGEST_BYTE_VALUES / LIE_EVERY:
            yield memoryview(bytes(chunk.size))
        else:
            yield from self._truth.spans(chunk)

    def close(self) -> None:
        self._truth.close()


def star_seed(task: Task) -> None:
    """A thread, a store and a group for each newcomer that is this seed's; all of them send at once."""
    import torch.distributed  # noqa: F401 - imported once, here, and not by all threads together

    with task.file.open("rb") as opened:
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of memory it cannot write to
    mine = range(task.seeds.index(task.address), len(task.newcomers), len(task.seeds))
    pairs = [threading.Thread(target=_send_all, args=(task, index, memory)) for index in mine]
    for pair in pairs:
        pair.start()
    ready()
    stay()


def star_newcomer(task: Task) -> None:
    import torch
    import torch.distributed

    with going() as answer:
        group = _pair(task, task.index, rank=1)
        length = torch.zeros(1, dtype=torch.int64)
        _broadcast(group, length)
        header = torch.zeros(int(length), dtype=torch.uint8)
        _broadcast(group, header)
        ends = _tensor_ends(bytes(header.numpy()))
        with task.file.open("w+b") as opened:
            opened.truncate(ends[-1])
            memory = mmap.mmap(opened.fileno(), 0)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        whole[: len(header)] = header
        for begin, end in itertools.pairwise(ends):
            _broadcast(group, whole[begin:end])
        done(answer)
    stay()


def http_seed(task: Task) -> None:
    """aiohttp's own way to serve files: FileResponse, which is sendfile."""
    from aiohttp import web

    async def serve() -> None:
        app = web.Application()
        app.router.add_static("/", task.file.parent)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, task.address, HTTP_PORT).start()
        ready()
        await asyncio.Event().wait()

    asyncio.run(serve())


def http_newcomer(task: Task) -> None:
    url = f"http://{task.seeds[task.index % len(task.seeds)]}:{HTTP_PORT}/{task.file.name}"
    with going() as answer:
        curl = ["curl", "-sS", "--fail", "--max-time", str(task.deadline_s), "-o", str(task.file), url]
        subprocess.run(curl, check=True, timeout=task.deadline_s)
        done(answer)
    stay()


def libtorrent_seed(task: Task) -> None:
    session = _session(task)
    _wait_until_complete(session, _add(session, task, verified=True), task.deadline_s)
    ready()
    stay()


def libtorrent_newcomer(task: Task) -> None:
    """All peers are known from the start, as if a tracker had answered in no time."""
    session = _session(task)
    with going() as answer:
        handle = _add(session, task, verified=False)
        for peer in (*task.seeds, *task.newcomers):
            if peer != task.address:
                handle.connect_peer((peer, TORRENT_PORT))
        _wait_until_complete(session, handle, task.deadline_s)
        done(answer)
        handle.flush_cache()  # not counted: complete pieces may still be on their way to the file
    stay()


def aria2_seed(task: Task) -> None:
    """Ready before it is: the tracker says when it has announced itself."""
    with subprocess.Popen(_aria2c(task, "--bt-seed-unverified=true")):
        ready()
        stay()


def aria2_newcomer(task: Task) -> None:
    """Complete when aria2c runs the hook for that, which writes to a pipe; aria2c itself goes on as a seed."""
    pipe, hook = Path("complete").absolute(), Path("complete.sh").absolute()
    os.mkfifo(pipe)
    hook.write_text(f"#!/bin/sh\necho complete > {pipe}\n")
    hook.chmod(0o700)
    fd = os.open(pipe, os.O_RDWR)  # so that it never reads as ended
    with going() as answer:
        aria2c = subprocess.Popen(_aria2c(task, f"--on-bt-download-complete={hook}"))
        if not select.select([fd], [], [], task.deadline_s)[0]:
            raise TimeoutError(f"aria2c is not complete after {task.deadline_s:g} s")
        done(answer)
    stay()
    aria2c.kill()


ROLES: dict[tuple[str, str], Callable[[Task], None]] = {
    ("liar", "swarm"): swarm_liar,
    ("newcomer", "swarm"): swarm_newcomer,
    ("newcomer", "swarm-watched"): swarm_watched_newcomer,
    ("seed", "star"): star_seed,
    ("newcomer", "star"): star_newcomer,
    ("seed", "http"): http_seed,
    ("newcomer", "http"): http_newcomer,
    ("seed", "libtorrent"): libtorrent_seed,
    ("newcomer", "libtorrent"): libtorrent_newcomer,
    ("seed", "aria2"): aria2_seed,
    ("newcomer", "aria2"): aria2_newcomer,
}


def ready() -> None:
    print("ready", flush=True)


@contextlib.contextmanager
def going() -> Iterator[Answer]:
    """Waits for the word to go; prints the answer at the end of the block."""
    ready()
    sys.stdin.readline()
    answer: Answer = {"began": time.monotonic()}
    yield answer
    print(json.dumps(answer), flush=True)


def done(answer: Answer) -> None:
    answer["ended"] = time.monotonic()


def stay() -> None:
    """Until the measuring process closes the pipe, or ends this process."""
    sys.stdin.read()


def _send_all(task: Task, index: int, memory: mmap.mmap) -> None:
    """The origin's algorithm: a two-rank group, and a broadcast for each tensor, in sequence."""
    import torch

    group = _pair(task, index, rank=0)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    header_bytes = 8 + int.from_bytes(memory[:8], "little")
    _broadcast(group, torch.tensor([header_bytes], dtype=torch.int64))
    _broadcast(group, whole[:header_bytes])
    ends = _tensor_ends(memory[:header_bytes])
    for begin, end in itertools.pairwise(ends):
        _broadcast(group, whole[begin:end])


def _pair(task: Task, index: int, *, rank: int) -> ProcessGroupGloo:
    """Needs GLOO_SOCKET_IFNAME in the environment: gloo takes the address that the host's name stands for otherwise."""
    from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

    deadline = timedelta(seconds=task.deadline_s)
    host = task.seeds[index % len(task.seeds)]
    store = TCPStore(host, STAR_PORT + index, 2, is_master=rank == 0, wait_for_workers=False, timeout=deadline)
    return ProcessGroupGloo(store, rank, 2, deadline)


def _broadcast(group: ProcessGroupGloo, tensor: torch.Tensor) -> None:
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()  # type: ignore[attr-defined]


def _tensor_ends(header: bytes) -> list[int]:
    """Where the tensors of a safetensors file end, in order, after where the first begins."""
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return sorted({len(header)} | {len(header) + entry["data_offsets"][1] for entry in entries.values()})


def _session(task: Task) -> libtorrent.session:
    """As it comes, but for TCP (uTP would yield to everything), and no search for peers beyond those it is told."""
    import libtorrent

    return libtorrent.session(
        {
            "listen_interfaces": f"{task.address}:{TORRENT_PORT}",
            "enable_outgoing_utp": False,
            "enable_incoming_utp": False,
            "enable_dht": False,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "alert_mask": libtorrent.alert.category_t.status_notification,
        }
    )


def _add(session: libtorrent.session, task: Task, *, verified: bool) -> libtorrent.torrent_handle:
    import libtorrent

    torrent = libtorrent.load_torrent_file(str(task.torrent))
    torrent.trackers = []  # those are aria2's
    torrent.save_path = str(task.file.parent)
    torrent.flags &= ~(libtorrent.torrent_flags.auto_managed | libtorrent.torrent_flags.paused)
    if verified:
        torrent.flags |= libtorrent.torrent_flags.seed_mode
    return session.add_torrent(torrent)


def _wait_until_complete(session: libtorrent.session, handle: libtorrent.torrent_handle, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not handle.status().is_seeding:
        if time.monotonic() > deadline:
            raise TimeoutError(f"libtorrent is not complete after {timeout_s:g} s")
        session.wait_for_alert(10)  # milliseconds
        session.pop_alerts()


def _aria2c(task: Task, *more: str) -> list[str]:
    """aria2c takes no list of peers; the torrent names a tracker. It ends with the process that started it."""
    return [
        *("aria2c", "--no-conf", "--quiet", f"--stop-with-process={os.getpid()}", f"--dir={task.file.parent}"),
        *("--enable-dht=false", "--enable-dht6=false", "--disable-ipv6=true", "--file-allocation=none"),
        *(f"--listen-port={TORRENT_PORT}", "--seed-time=60", "--seed-ratio=0", "--allow-overwrite=true"),
        *(*more, str(task.torrent)),
    ]


if __name__ == "__main__":
    main()
