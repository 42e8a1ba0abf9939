"""The processes at the ends of a measurement: `workers.py fetcher MODEL`, `http-server MODEL`, `http-client URL...`.

Each prints `ready ...`; a fetcher and a client then answer every JSON line with another. Timing begins in a warm
process: libraries imported, loop running, memory touched, but no connection made yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from swarm import Settings

Answer = dict[str, Any]

PAGE_BYTES = 4096
READ_BYTES = 1 << 20


def main() -> None:
    kind, *arguments = sys.argv[1:]
    if kind == "fetcher":
        fetcher(Path(arguments[0]))
    elif kind == "http-server":
        asyncio.run(http_server(Path(arguments[0])))
    else:
        http_client(arguments)


def fetcher(model: Path) -> None:
    """Answers `into` (existing tensors) and `fresh` (new memory), both from a `peer`; `populate` and `check`."""
    import swarm
    from swarm.runtime import runtime
    from swarm.store.memory import buffer

    files = read_all(model)
    targets = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    runtime()  # starts its loop
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        answer: Answer = {}
        if question["do"] == "check":
            answer["equal"] = equal(model, files)
        elif question["do"] == "populate":
            with timed(answer):
                memory = buffer(question["bytes"])
                memory[::PAGE_BYTES] = bytes(len(memory[::PAGE_BYTES]))
            del memory
        else:
            into = question["do"] == "into"
            for tensor in targets.values():
                tensor.zero_()  # an earlier fetch must not pass for this fetch
            reset_peak()
            peers, cache = (question["peer"],), Path("cache").absolute()
            settings = swarm.Settings(peers=peers, mdns=False, cache=cache, **question["settings"])
            with contextlib.ExitStack() as open_:
                with timed(answer):
                    if question.get("trace"):
                        open_.enter_context(traced(settings, Path(question["trace"])))
                    weights = swarm.fetch(model.name, into=targets if into else None, settings=settings)
                answer |= {"transfer_s": weights.fetched.seconds, "peak_rss_bytes": peak_rss_bytes()}
                weights.close()
                del weights
        print(json.dumps(answer), flush=True)


@contextmanager
def traced(settings: Settings, path: Path) -> Iterator[None]:
    """Opens the node of these settings, and writes its journal to a file."""
    from swarm.observe.trace import tracing
    from swarm.runtime import runtime

    node = runtime().run(runtime().acquire(settings))
    try:
        with tracing(node.journal, path):
            yield
    finally:
        runtime().run(runtime().release(settings))


async def http_server(model: Path) -> None:
    """aiohttp's own way to serve files: FileResponse, which is sendfile."""
    from aiohttp import web

    app = web.Application()
    app.router.add_static("/", model)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"ready {runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def http_client(urls: list[str]) -> None:
    """Answers every question by reading all URLs over a single connection."""
    import aiohttp

    async def read() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_read=30)) as session:
            for url in urls:
                async with session.get(url) as response:
                    response.raise_for_status()
                    async for _ in response.content.iter_chunked(READ_BYTES):
                        pass

    print("ready", flush=True)
    for _ in sys.stdin:
        answer: Answer = {}
        with timed(answer):
            asyncio.run(read())
        print(json.dumps(answer | {"peak_rss_bytes": peak_rss_bytes()}), flush=True)


def read_all(model: Path) -> dict[Path, dict[str, torch.Tensor]]:
    """New tensors like those of the model, touched and still empty, by file in the order of their bytes."""
    import torch

    from swarm.content import safetensors_header

    found = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            size = path.stat().st_size
            start = safetensors_header.header_bytes(file.read(8), subject=path.name, file_bytes=size)
            header = file.read(start - safetensors_header.LENGTH_BYTES)
        tensors, _ = safetensors_header.parse(header, subject=path.name, file_bytes=size)
        found[path] = {tensor.name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for tensor in tensors}
        for made in found[path].values():
            made.fill_(1)  # torch.zeros alone leaves pages for later
    return found


def equal(model: Path, files: dict[Path, dict[str, torch.Tensor]]) -> bool:
    """Whether tensors equal the files."""
    import torch

    for path, tensors in files.items():
        theirs = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        position = len(theirs) - sum(tensor.nbytes for tensor in tensors.values())
        for tensor in tensors.values():
            ours = tensor.view(torch.uint8).flatten()
            if not torch.equal(ours, theirs[position : position + len(ours)]):
                return False
            position += len(ours)
    return True


@contextmanager
def timed(answer: Answer) -> Iterator[None]:
    """Writes how long the block took and how much CPU time this process used meanwhile."""
    cpu_s, began = _cpu_s(), time.perf_counter()
    yield
    answer |= {"seconds": time.perf_counter() - began, "cpu_s": _cpu_s() - cpu_s}


def reset_peak() -> None:
    """Lets the peak of this process's memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """The most memory this process had since `reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
