"""Memory and rate of a communicator of two by its settings: two GPUs, `python bench/gpu_nccl.py`.

For each setting two new processes: GPU memory that is gone after the communicator was made, after the first bytes,
after a second communicator did the same (the cost of each, without libraries and kernels), and after both ended; the
rate of grouped sends; and the memory of the host that stays when communicators are made, used and ended.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

CHUNK_BYTES, GROUP, GROUPS = 16 << 20, 32, 16
MIB = 1 << 20
SETTINGS: dict[str, tuple[int | None, dict[str, str]]] = {
    "as it is": (None, {}),
    "32 CTAs at most": (32, {}),
    "16 CTAs at most": (16, {}),
    "8 CTAs at most": (8, {}),
    "4 CTAs at most": (4, {}),
    "buffers of 1 MiB": (None, {"NCCL_BUFFSIZE": str(MIB)}),
    "16 CTAs, buffers of 1 MiB": (16, {"NCCL_BUFFSIZE": str(MIB)}),
    "no cuMem": (None, {"NCCL_CUMEM_ENABLE": "0"}),
    "lazy modules": (None, {"CUDA_MODULE_LOADING": "LAZY"}),
    "sockets, as between hosts": (None, {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}),
}


class Pair:
    """A communicator, blocking except for the calls that are polled."""

    def __init__(self, rank: int, line: Connection, max_ctas: int | None) -> None:
        from swarm.transport import nccl

        self.nccl, self.rank = nccl._library(), rank
        unique = nccl._UniqueId()
        if rank == 0:
            self.nccl.ncclGetUniqueId(ctypes.byref(unique))
            line.send_bytes(bytes(unique.bytes))
        else:
            unique = nccl._UniqueId.from_buffer_copy(line.recv_bytes())
        config = nccl._Config()
        config.blocking = 1
        if max_ctas:
            config.max_ctas = max_ctas
        self.comm = ctypes.c_void_p()
        status = self.nccl.ncclCommInitRankConfig(ctypes.byref(self.comm), 2, unique, rank, ctypes.byref(config))
        if status:
            raise RuntimeError(f"ncclCommInitRankConfig: {status}")

    def move(self, address: int, groups: int) -> float:
        """Seconds for so many groups of chunks from rank 0 to rank 1."""
        import torch

        torch.cuda.synchronize()
        began = time.perf_counter()
        call = self.nccl.ncclSend if self.rank == 0 else self.nccl.ncclRecv
        where = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        for _ in range(groups):
            self.nccl.ncclGroupStart()
            for number in range(GROUP):
                call(
                    ctypes.c_void_p(address + number * CHUNK_BYTES),
                    ctypes.c_size_t(CHUNK_BYTES), 1, 1 - self.rank, self.comm, where,
                )  # fmt: skip
            self.nccl.ncclGroupEnd()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def end(self, how: str) -> None:
        if how == "abort":
            self.nccl.ncclCommAbort(self.comm)
            return
        self.nccl.ncclCommFinalize(self.comm)
        self.nccl.ncclCommDestroy(self.comm)


def process(rank: int, line: Connection, told: Connection, max_ctas: int | None, how: str, cycles: int) -> None:
    import torch

    torch.cuda.set_device(rank)
    memory = torch.zeros(GROUP * CHUNK_BYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    start = torch.cuda.mem_get_info()[0]
    gone: list[int] = []

    def look() -> None:
        gone.append((start - torch.cuda.mem_get_info()[0]) // MIB)

    first = Pair(rank, line, max_ctas)
    look()
    first.move(memory.data_ptr(), 1)
    look()
    seconds = [first.move(memory.data_ptr(), GROUPS) for _ in range(5)]
    second = Pair(rank, line, max_ctas)
    second.move(memory.data_ptr(), 1)
    look()
    second.end(how)
    first.end(how)
    look()
    host = [rss_mib()]
    for _ in range(2):  # halves: does it go on growing?
        for _ in range(cycles // 2):
            one = Pair(rank, line, max_ctas)
            one.move(memory.data_ptr(), 1)
            one.end(how)
        host.append(rss_mib())
    began = time.perf_counter()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    trim_ms = 1e3 * (time.perf_counter() - began)
    host.append(rss_mib())
    gb_per_s = GROUPS * GROUP * CHUNK_BYTES / statistics.median(seconds) / 1e9
    told.send((gone, gb_per_s, host, trim_ms))


def rss_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // MIB


def measure(words: str, max_ctas: int | None, environment: dict[str, str], how: str, cycles: int) -> None:
    os.environ |= environment
    context = get_context("spawn")
    lines = context.Pipe()
    ends = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=process, args=(rank, lines[rank], ends[rank][1], max_ctas, how, cycles), daemon=True)
        for rank in range(2)
    ]
    for one in processes:
        one.start()
    for rank, (end, _) in enumerate(ends):
        if not _answers(end, processes[rank]):
            print(f"{words:<28} {how:<8} rank {rank}: no answer")
            break
        (init, first, second, ended), rate, host, trim_ms = end.recv()
        print(
            f"{words:<28} {how:<8} rank {rank}: MiB after init {init:>5}, first bytes {first:>5}, a second "
            f"{second - first:>+5}, ended {ended:>5}; {rate:5.0f} GB/s",
            flush=True,
        )
        if cycles:
            before, half, whole, trimmed = host
            print(
                f"    host MiB before {before}, after {cycles // 2} more {half}, after {cycles} {whole}, "
                f"after malloc_trim {trimmed} in {trim_ms:.1f} ms"
            )
    for one in processes:
        one.kill()
        one.join()
    for name in environment:
        del os.environ[name]


def _answers(end: Connection, one: BaseProcess) -> bool:
    """Within two minutes, and while it lives."""
    return any(end.poll(0.5) or not one.is_alive() for _ in range(240)) and end.poll()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=20, help="communicators made and ended, for the host's memory")
    options = parser.parse_args()
    import torch

    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {nccl}")
    for words, (max_ctas, environment) in SETTINGS.items():
        measure(words, max_ctas, environment, "abort", 0)
    for how in ("abort", "destroy"):
        measure("as it is", None, {}, how, options.cycles)


if __name__ == "__main__":
    main()
