"""What several connections a pair reach over loopback, beside as many raw sockets.

    python bench/streams.py [--gb 8] [--streams 1 2 4 8 16] [--modes tensors tmpfs gpu] [--rounds 3] [--newcomers 4]

A seed process serves --gb of random tensors out of memory. A newcomer process (fresh in each line) fetches them
--rounds times into existing tensors, into a directory on tmpfs, or into a GPU; every chunk is verified. The raw sockets
move the same bytes between two processes, one thread a socket at each end, `recv_into` of 1 MiB into distinct memory;
they keep and check nothing. `transfer` is from the first request to the last verified chunk, `call` from call to
return. With --newcomers so many fetch at once, and so many pairs of raw sockets run at once. --tls encrypts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = "bench/streams"
TENSOR_BYTES = 64 << 20
PIECE_BYTES = 1 << 20


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        COMMANDS[sys.argv[1]](json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=8)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--modes", nargs="+", default=["tensors", "tmpfs"], choices=["tensors", "tmpfs", "gpu"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--newcomers", type=int, default=1)
    parser.add_argument("--tls", action="store_true")
    options = parser.parse_args()
    print(f"{platform.node()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}")
    print(" ".join(sys.argv), flush=True)
    tensors = max(1, round(options.gb * 1e9 / TENSOR_BYTES))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        for streams in options.streams:
            raw = raw_rates(streams, tensors * TENSOR_BYTES, options.newcomers)
            print(f"{streams:3} streams: raw sockets {told(raw)}", flush=True)
            for mode in options.modes:
                fetched(streams, mode, tensors, Path(place), options, statistics.median(raw))


def told(rates: list[float]) -> str:
    return f"{statistics.median(rates):6.2f} GB/s ({min(rates):.2f} to {max(rates):.2f})"


def fetched(streams: int, mode: str, tensors: int, place: Path, options: argparse.Namespace, raw: float) -> None:
    key = place / "swarm.key"
    if options.tls and not key.exists():
        subprocess.run(
            [sys.executable, "-m", "swarm", "keygen", str(key)], check=True, env=environment(place), stdout=2
        )
    given = {"streams": streams, "tensors": tensors, "mode": mode, "key": str(key) if options.tls else ""}
    seed = start("serve", given, place / "seed")
    assert seed.stdout is not None
    address = json.loads(seed.stdout.readline())["address"]
    given |= {"peer": address, "rounds": options.rounds}
    newcomers = [
        start("fetch", given | {"out": str(place / f"out{n}")}, place / f"newcomer{n}")
        for n in range(options.newcomers)
    ]
    for newcomer in newcomers:
        assert newcomer.stdout is not None
        newcomer.stdout.readline()  # it is ready
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for newcomer in newcomers:
            assert newcomer.stdin is not None
            newcomer.stdin.write("go\n")
            newcomer.stdin.flush()
        for newcomer in newcomers:
            assert newcomer.stdout is not None
            rounds.append(json.loads(newcomer.stdout.readline()))
    for process in (*newcomers, seed):
        process.communicate("\n", timeout=60)
    size = tensors * TENSOR_BYTES / 1e9
    transfer = [size / one["transfer_s"] for one in rounds]
    call = [size / one["call_s"] for one in rounds]
    cpu = statistics.median(one["cpu_s"] for one in rounds) / size
    used = max(one["streams"] for one in rounds)
    name = f"{mode}{', TLS' if options.tls else ''}"
    print(
        f"      {name:<13} transfer {told(transfer)} = {statistics.median(transfer) / raw:.2f} of raw; call"
        f" {told(call)}; newcomer {cpu:.2f} CPU s/GB; {used} streams open",
        flush=True,
    )


def environment(place: Path) -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "SWARM_CACHE": str(place), "PYTHONPATH": paths}


def start(command: str, given: dict[str, Any], place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, command, json.dumps(given)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(place),
    )  # fmt: skip


def settings(given: dict[str, Any]) -> Any:
    from swarm.settings import Settings
    from swarm.transport import tcp

    vars(tcp)["streams_most"] = lambda: given["streams"]
    key = {"key_file": given["key"]} if given["key"] else {}
    peers = {"peers": (given["peer"],)} if "peer" in given else {}
    return Settings.load({"mdns": False, **key, **peers})


def state(given: dict[str, Any], *, fill: bool, device: str = "cpu") -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    made = {}
    for number in range(given["tensors"]):
        tensor = torch.empty(TENSOR_BYTES // 8, dtype=torch.int64, device=device)
        if fill:
            tensor.random_(generator=generator)
        else:
            tensor.zero_()  # the pages exist: what is measured is not the kernel's handing them out
        made[f"tensor{number:04}"] = tensor
    return made


def serve(given: dict[str, Any]) -> None:
    import swarm

    with swarm.serve(state(given, fill=True), model_id=MODEL, settings=settings(given)) as served:
        print(json.dumps({"address": served.address}), flush=True)
        sys.stdin.readline()


def fetch(given: dict[str, Any]) -> None:
    import swarm
    from swarm import journal
    from swarm.transfer import download_events as download
    from swarm.transport.streams import InboundStreams

    how, mode = settings(given), given["mode"]
    into = None if mode == "tmpfs" else state(given, fill=False, device="cuda:0" if mode == "gpu" else "cpu")
    marks: dict[type, float] = {}
    most, real_record, real_open = [1], journal.Journal.record, InboundStreams.open

    def record(self: journal.Journal, at_s: float, subject: str, event: object) -> None:
        if type(event) in (download.Ask, download.Complete):
            marks.setdefault(type(event), time.perf_counter())
        real_record(self, at_s, subject, event)

    async def opened(self: InboundStreams, wanted: int) -> None:
        await real_open(self, wanted)
        most[0] = max(most[0], self.streams)

    journal.Journal.record = record  # type: ignore[method-assign]
    InboundStreams.open = opened  # type: ignore[method-assign]
    print("ready", flush=True)
    for _ in range(given["rounds"]):
        sys.stdin.readline()
        marks.clear()
        began, cpu = time.perf_counter(), time.process_time()
        if into is None:
            weights = swarm.fetch(MODEL, out=given["out"], settings=how, timeout_s=300)
        else:
            weights = swarm.fetch(MODEL, into=into, settings=how, timeout_s=300)
        call_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        weights.close()
        shutil.rmtree(given["out"], ignore_errors=True)
        transfer_s = marks[download.Complete] - marks[download.Ask]
        print(json.dumps({"call_s": call_s, "transfer_s": transfer_s, "cpu_s": cpu_s, "streams": most[0]}), flush=True)


def raw_rates(streams: int, size: int, pairs: int) -> list[float]:
    """GB/s of each of `pairs` pairs of processes that move `size` bytes over so many sockets, all at once."""
    with tempfile.TemporaryDirectory() as place:
        senders = [start("send", {"streams": streams, "bytes": size}, Path(place)) for _ in range(pairs)]
        ports = [json.loads(sender.stdout.readline())["port"] for sender in senders if sender.stdout]
        receivers = [start("receive", {"streams": streams, "bytes": size, "port": port}, Path(place)) for port in ports]
        for receiver in receivers:
            assert receiver.stdout is not None
            receiver.stdout.readline()
        for receiver in receivers:
            assert receiver.stdin is not None
            receiver.stdin.write("go\n")
            receiver.stdin.flush()
        rates = [size / json.loads(receiver.stdout.readline())["s"] / 1e9 for receiver in receivers if receiver.stdout]
        for process in (*receivers, *senders):
            process.communicate("\n", timeout=60)
    return rates


def send(given: dict[str, Any]) -> None:
    memory = memoryview(bytearray(os.urandom(PIECE_BYTES) * 64))
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(json.dumps({"port": server.getsockname()[1]}), flush=True)
        socks = [server.accept()[0] for _ in range(given["streams"])]

        def work(sock: socket.socket) -> None:
            sock.recv(1)
            left, at = given["bytes"] // given["streams"], 0
            while left > 0:
                left -= sock.send(memory[at : at + min(PIECE_BYTES, left)])
                at = (at + PIECE_BYTES) % len(memory)

        threads = [threading.Thread(target=work, args=(sock,)) for sock in socks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.stdin.readline()


def receive(given: dict[str, Any]) -> None:
    size = given["bytes"] // given["streams"]
    socks = [socket.create_connection(("127.0.0.1", given["port"])) for _ in range(given["streams"])]
    rooms = [memoryview(bytearray(size)) for _ in socks]

    def work(sock: socket.socket, room: memoryview) -> None:
        got = 0
        while got < size:
            got += sock.recv_into(room[got : got + PIECE_BYTES])

    print("ready", flush=True)
    sys.stdin.readline()
    threads = [threading.Thread(target=work, args=pair) for pair in zip(socks, rooms, strict=True)]
    began = time.perf_counter()
    for sock, thread in zip(socks, threads, strict=True):
        thread.start()
        sock.send(b"x")
    for thread in threads:
        thread.join()
    print(json.dumps({"s": time.perf_counter() - began}), flush=True)
    sys.stdin.readline()


COMMANDS = {"serve": serve, "fetch": fetch, "send": send, "receive": receive}

if __name__ == "__main__":
    main()
