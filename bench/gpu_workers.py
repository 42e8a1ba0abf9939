"""The processes that `gpu_two.py` and `gpu_tree.py` measure: a GPU each, obeying lines of JSON.

    python bench/gpu_workers.py DEVICE LAYERS

Each has tensors of the shapes of Qwen2.5-7B, in bf16, with so many of its 28 layers (all: 15.2 GB). Rates that a
transport could reach are measured with the same tensors: the driver's copy out of another process's memory, and
torch.distributed's NCCL calls.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import swarm
from swarm.journal import Journal
from swarm.settings import Settings
from swarm.store import cuda
from swarm.transfer.download_events import Ask, Complete

MODEL = "bench/qwen2.5-7b"
HIDDEN, INNER, KEYS, VOCABULARY = 3584, 18944, 512, 152064
ENDS = {"embed": (VOCABULARY, HIDDEN), "head": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
LAYER = {
    "q": (HIDDEN, HIDDEN), "q_bias": (HIDDEN,), "k": (KEYS, HIDDEN), "k_bias": (KEYS,), "v": (KEYS, HIDDEN),
    "v_bias": (KEYS,), "o": (HIDDEN, HIDDEN), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
    "norm_in": (HIDDEN,), "norm_out": (HIDDEN,),
}  # fmt: skip
GROUP_BYTES = 512 << 20  # of raw NCCL calls made at once
LOOK_EVERY_S = 0.002


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    return ENDS | {f"layer{n:02}.{name}": shape for n in range(layers) for name, shape in LAYER.items()}


class Load(threading.Thread):
    """Matrix products back to back; counts those that are done."""

    def __init__(self, device: torch.device, rows: int) -> None:
        super().__init__(daemon=True)
        self._device = device
        self._left = torch.randn(rows, 8192, device=device, dtype=torch.bfloat16)
        self._right = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        self._at_once = 1 if rows > 100 else 16
        self._over = threading.Event()
        self.done = 0
        self.start()

    def run(self) -> None:
        ahead: list[torch.cuda.Event] = []
        out = torch.mm(self._left, self._right)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            while not self._over.is_set():
                for _ in range(self._at_once):
                    torch.mm(self._left, self._right, out=out)
                ahead.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
                ahead[-1].record()
                if len(ahead) > 4:
                    ahead.pop(0).synchronize()
                    self.done += self._at_once

    def end(self) -> None:
        self._over.set()
        self.join()


class Worker:
    """A process. Its methods are the commands."""

    def __init__(self, device: int, layers: int) -> None:
        self._device = torch.device("cuda", device)
        torch.cuda.set_device(self._device)
        self._wanted = shapes(layers)
        self._tensors: dict[str, torch.Tensor] = {}
        self._served: list[Any] = []
        self._load: Load | None = None
        self._opened: dict[str, int] = {}

    def make(self, *, random: bool) -> dict[str, Any]:
        """Tensors, with values that are the same in every process or none."""
        dice = torch.Generator(device=self._device).manual_seed(7)
        for name, shape in self._wanted.items():
            if random:
                made = torch.empty(shape, device=self._device, dtype=torch.bfloat16)
                words = made.view(torch.int16) if made.dim() == 1 else made.view(torch.int64)
                words.random_(generator=dice)
            else:
                made = torch.zeros(shape, device=self._device, dtype=torch.bfloat16)
            self._tensors[name] = made
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return {
            "bytes": sum(tensor.nbytes for tensor in self._tensors.values()),
            "tensors": len(self._tensors),
            "gpu": torch.cuda.get_device_name(self._device),
            "torch": torch.__version__,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
            "free_mb": self._free_mb(),
        }

    def wipe(self) -> None:
        """Overwrites the received tensors."""
        for tensor in self._tensors.values():
            tensor.zero_()
        torch.cuda.synchronize()

    def checksum(self) -> dict[str, int]:
        """Of all tensors' bytes: equal in all processes that have the same."""
        total = 0
        for number, tensor in enumerate(self._tensors.values(), 1):
            words = tensor.reshape(-1).view(torch.int32)
            total = (total * 31 + number * int(words.sum(dtype=torch.int64))) % (1 << 61)
        return {"checksum": total}

    def serve(self, *, settings: dict[str, Any]) -> dict[str, Any]:
        before, began = self._free_mb(), time.perf_counter()
        served = swarm.serve(self._tensors, model_id=MODEL, settings=_settings(settings))
        self._served.append(served)
        seconds = time.perf_counter() - began
        return {"address": served.address, "seconds": seconds, "extra_mb": before - self._free_mb()}

    def stay(self, *, settings: dict[str, Any]) -> None:
        """Keeps the node of these settings open between fetches, as an engine's would be."""
        tiny = {"tiny": torch.zeros(8)}
        self._served.append(swarm.serve(tiny, model_id=f"bench/{time.time_ns()}", settings=_settings(settings)))

    def leave(self) -> None:
        """Serves nothing any more."""
        for served in self._served:
            served.close()
        self._served.clear()

    def fetch(self, *, settings: dict[str, Any], repeat: int = 1, keep: bool = False) -> dict[str, Any]:
        """Into the tensors, so often in a row: seconds of each from call to return, and of its transfers alone."""
        given = _settings(settings)
        seconds, transfers, openings = list[float](), list[float](), list[float]()
        for _ in range(repeat):
            with _watched() as watched:
                began = time.perf_counter()
                weights = swarm.fetch(MODEL, into=self._tensors, settings=given, timeout_s=60)
                seconds.append(time.perf_counter() - began)
            transfers.append(watched.complete_at - watched.asked_at)
            openings.append(watched.open_s)
            if keep:
                self._served.append(weights)
            else:
                weights.close()
        fetched = weights.fetched
        return {
            "seconds": seconds, "transfer_s": transfers, "open_s": openings, "sources": fetched.sources,
            "rejected": fetched.rejected_chunks, "digest": fetched.digest,
        }  # fmt: skip

    def extra(self, *, command: str, **arguments: Any) -> dict[str, Any]:
        """Does another command, and says how much more of the GPU's memory was in use meanwhile."""
        before, lowest, over = self._free_mb(), [self._free_mb()], threading.Event()

        def look() -> None:
            while not over.wait(LOOK_EVERY_S):
                lowest.append(min(lowest[-1], self._free_mb()))

        looker = threading.Thread(target=look)
        looker.start()
        try:
            answer: dict[str, Any] = self.obey(command, arguments)
        finally:
            over.set()
            looker.join()
        return answer | {"extra_mb": before - lowest[-1]}

    def memory(self) -> dict[str, float]:
        return {"free_mb": self._free_mb()}

    def work(self, *, rows: int) -> None:
        """Products of so many rows by 8192x8192, back to back; 0: none."""
        if self._load:
            self._load.end()
        self._load = Load(self._device, rows) if rows else None
        time.sleep(0.3 if rows else 0)

    def products(self) -> dict[str, float]:
        return {"done": self._load.done if self._load else 0, "at": time.perf_counter()}

    def handles(self) -> dict[str, Any]:
        """Where the tensors are, for `copy` in another process."""
        gpu, told = cuda.gpu(self._device.index), []
        for tensor in self._tensors.values():
            start, _, _ = gpu.allocation(tensor.data_ptr())
            told.append((gpu.export(start).hex(), tensor.data_ptr() - start))
        return {"handles": told}

    def copy(self, *, handles: list[tuple[str, int]], repeat: int) -> dict[str, Any]:
        """The driver's copies alone, of all tensors; handles are opened the first time."""
        gpu, began = cuda.gpu(self._device.index), time.perf_counter()
        for handle, _ in handles:
            if handle not in self._opened:
                self._opened[handle] = gpu.open(bytes.fromhex(handle))
        opened_s, seconds = time.perf_counter() - began, list[float]()
        for _ in range(repeat):
            began = time.perf_counter()
            for (handle, offset), tensor in zip(handles, self._tensors.values(), strict=True):
                source = self._opened[handle] + offset
                gpu.copy(tensor.data_ptr(), source, tensor.nbytes, stream=gpu.side.cuda_stream)
            gpu.side.synchronize()
            seconds.append(time.perf_counter() - began)
        return {"open_s": opened_s, "handles": len(self._opened), "seconds": seconds}

    def close_handles(self) -> dict[str, float]:
        gpu, began = cuda.gpu(self._device.index), time.perf_counter()
        for start in self._opened.values():
            gpu.close(start)
        self._opened.clear()
        return {"seconds": time.perf_counter() - began}

    def join(self, *, port: int, rank: int, ranks: int) -> dict[str, float]:
        """torch.distributed's group, as the origin makes it."""
        began = time.perf_counter()
        dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
        return {"seconds": time.perf_counter() - began}

    def broadcast(self, *, repeat: int) -> dict[str, Any]:
        """Tensor by tensor, from rank 0."""
        return {"seconds": [self._timed(self._broadcast) for _ in range(repeat)]}

    def pairs(self, *, rank: int, ranks: int) -> dict[str, Any]:
        """Tensor by tensor from rank 0 to each other rank through a group of those two, all groups at once."""
        groups = [dist.new_group([0, other]) for other in range(1, ranks)]
        mine = groups if rank == 0 else groups[rank - 1 : rank]
        warm = torch.zeros(8, device=self._device)

        def move(tensors: Iterable[torch.Tensor]) -> None:
            works = [dist.broadcast(tensor, 0, group, async_op=True) for tensor in tensors for group in mine]
            for work in works:
                work.wait()

        self._timed(lambda: move([warm]))
        return {"seconds": [self._timed(lambda: move(self._tensors.values()))]}

    def pass_on(self, *, send: bool, repeat: int) -> dict[str, Any]:
        """Sends or receives all tensors in groups of calls, between ranks 0 and 1."""
        return {"seconds": [self._timed(lambda: self._pass_on(send)) for _ in range(repeat)]}

    def part(self) -> dict[str, float]:
        began = time.perf_counter()
        dist.destroy_process_group()
        return {"seconds": time.perf_counter() - began}

    def origin(self, *, port: int, rank: int) -> dict[str, float]:
        """The origin's algorithm, whole: make a group of two, broadcast tensor by tensor, take it down."""
        made = self.join(port=port, rank=rank, ranks=2)["seconds"]
        moved = self._timed(self._broadcast)
        return {"join_s": made, "broadcast_s": moved, "part_s": self.part()["seconds"]}

    def obey(self, do: str, arguments: dict[str, Any]) -> Any:
        commands: dict[str, Callable[..., Any]] = {
            name: getattr(self, name) for name in vars(Worker) if not name.startswith("_")
        }
        return commands[do](**arguments) or {}

    def _broadcast(self) -> None:
        for tensor in self._tensors.values():
            dist.broadcast(tensor, src=0)

    def _pass_on(self, send: bool) -> None:
        group, size, works = list[dist.P2POp](), 0, list[Any]()
        for tensor in self._tensors.values():
            for part in torch.split(tensor.reshape(-1), 32 << 20):  # 64 MiB, as the largest chunks
                group.append(dist.P2POp(dist.isend if send else dist.irecv, part, 1 if send else 0))
                size += part.nbytes
                if size >= GROUP_BYTES:
                    works += dist.batch_isend_irecv(group)
                    group, size = [], 0
        if group:
            works += dist.batch_isend_irecv(group)
        for work in works:
            work.wait()

    def _timed(self, move: Callable[[], object]) -> float:
        began = time.perf_counter()
        move()
        torch.cuda.current_stream().synchronize()
        return time.perf_counter() - began

    def _free_mb(self) -> float:
        return torch.cuda.mem_get_info(self._device)[0] / 1e6


@dataclass
class _Watched:
    """Times of a fetch: its first request, its end, and how long it opened handles."""

    asked_at: float = 0.0
    complete_at: float = 0.0
    open_s: float = 0.0


@contextmanager
def _watched() -> Iterator[_Watched]:
    watched = _Watched()
    real_record, real_open = Journal.record, cuda.Gpu.open

    def record(journal: Journal, at_s: float, subject: str, what: object) -> None:
        if isinstance(what, Ask):
            watched.asked_at = watched.asked_at or time.perf_counter()
        elif isinstance(what, Complete):
            watched.complete_at = time.perf_counter()
        real_record(journal, at_s, subject, what)

    def timed_open(gpu: cuda.Gpu, handle: bytes) -> int:
        began = time.perf_counter()
        try:
            return real_open(gpu, handle)
        finally:
            watched.open_s += time.perf_counter() - began

    with mock.patch.object(Journal, "record", record), mock.patch.object(cuda.Gpu, "open", timed_open):
        yield watched


def _settings(given: dict[str, Any]) -> Settings:
    return Settings.load({"mdns": False, **{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}})


def main() -> None:
    worker = Worker(*(int(word) for word in sys.argv[1:3]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        told = json.loads(line)
        print(json.dumps(worker.obey(told.pop("do"), told)), flush=True)
    worker.leave()


if __name__ == "__main__":
    main()
