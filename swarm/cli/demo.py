"""`swarm demo`: one seed and three newcomers on this machine, as real commands in processes of their own.

The seed's upload is capped, so that the newcomers have to exchange chunks; the seed sends little more than one copy.
Newcomers know the seed's address only. Every copy is compared with the source byte by byte; processes and files are
removed at the end, also after an interruption.

    seed ──100 MB/s──> newcomer-1 <──> newcomer-2 <──> newcomer-3        (each of the three reads from all others)

Uses commands, status pages and notes of running nodes as a user does. Must not know: the inside of a node.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

import swarm
from swarm.checkpoint import files
from swarm.content import safetensors_header
from swarm.errors import FetchError, PeerUnreachable, StoreFull
from swarm.node import local_nodes, status_client
from swarm.observe.units import size_text
from swarm.settings import ENVIRONMENT_PREFIX

NEWCOMERS = ("newcomer-1", "newcomer-2", "newcomer-3")
SEED_LIMIT_BYTES_PER_S = 100_000_000
LOOK_EVERY_S = 0.1
STOP_TIMEOUT_S = 10.0
# Without any exchange the seed needs three times size / limit; twice that, and the time to start, is too late.
TIMEOUT_S, TIMEOUT_COPIES = 60.0, 6.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COLUMNS = 100  # of a table, without a terminal
BLOCK_BYTES = 16 << 20


def demo(path: Path | None) -> int:
    """Distributes a model directory, by default random weights, to three newcomers. Returns the exit code.

    Raises ManifestInvalid for a directory that cannot be served, StoreFull, and FetchError when a process fails.
    """
    console = Console() if sys.stdout.isatty() else Console(width=COLUMNS)
    before = {number: signal.signal(number, _interrupt) for number in SIGNALS}
    nodes = _Nodes(Path(tempfile.mkdtemp(prefix="swarm-demo-")))
    try:
        return _demo(path, nodes, console)
    finally:
        _ignore_interrupts()
        nodes.end()
        shutil.rmtree(nodes.place, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def write_made_up(path: Path, tensors: Sequence[tuple[str, Sequence[int]]], *, rng: np.random.Generator) -> None:
    """Writes a safetensors file of BF16 tensors with these names and shapes, filled with random bytes."""
    sized = [(name, "BF16", shape, 2 * int(np.prod(shape, dtype=np.int64))) for name, shape in tensors]
    header = safetensors_header.compose(sized, {"format": "pt"})
    left = sum(size for *_, size in sized)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(safetensors_header.LENGTH_BYTES, "little") + header)
        while left:
            file.write(rng.bytes(min(left, BLOCK_BYTES)))
            left -= min(left, BLOCK_BYTES)


def differences(found: Sequence[files.CheckpointFile], out: Path) -> list[str]:
    """One line for each file of `out` that differs from the source; compares every byte."""
    lines = []
    for file in found:
        copy = out / file.path
        if not copy.is_file():
            lines.append(f"{file.path} is missing")
        elif not filecmp.cmp(file.real, copy, shallow=False):
            lines.append(f"{file.path} is different")
    there = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    extra = sorted(path for path in there - {file.path for file in found} if not path.startswith(".swarm/"))
    return lines + [f"{path} is not in the source" for path in extra]


def _demo(path: Path | None, nodes: _Nodes, console: Console) -> int:
    if path is None:
        path = nodes.place / "SmolLM2-135M-made-up"
        console.print(f"{path.name}: the shapes of SmolLM2-135M in bf16; [bold]the weights are made up[/] (random)")
        _make_up(path)
    found, _ = files.walk(path)
    size = max(1, sum(file.stamp.size for file in found))
    free_bytes = shutil.disk_usage(nodes.place).free
    if free_bytes < len(NEWCOMERS) * size:
        raise StoreFull(nodes.place, need_bytes=len(NEWCOMERS) * size, free_bytes=free_bytes)
    limit, model_id = f"{SEED_LIMIT_BYTES_PER_S // 10**6}MB/s", path.resolve().name
    console.print(
        f"one seed of {size_text(size)}, its upload [bold]capped at {limit}[/] so that the sharing shows; "
        f"{len(NEWCOMERS)} newcomers at once, each told the seed's address only"
    )
    timeout_s = TIMEOUT_S + TIMEOUT_COPIES * size / SEED_LIMIT_BYTES_PER_S
    nodes.start("seed", ["serve", str(path.resolve()), "--model-id", model_id, "--upload-limit", limit])
    deadline = time.monotonic() + timeout_s
    while not nodes.printed("seed"):
        nodes.check(deadline)
        time.sleep(LOOK_EVERY_S)
    address = nodes.printed("seed").split()[0]
    began = time.monotonic()
    for name in NEWCOMERS:
        out = ["--out", str(nodes.place / name)]
        nodes.start(name, ["fetch", model_id, "--json", "--timeout", f"{timeout_s:g}", *out, "--peer", address])
    _watch(nodes, console, size=size, deadline=began + timeout_s)
    total_s = time.monotonic() - began
    sent = _moved(status_client.ask(address), "up")
    reports = {name: json.loads(nodes.printed(name)) for name in NEWCOMERS}
    problems = {name: differences(found, nodes.place / name) for name in NEWCOMERS}

    table = Table("newcomer", *(f"from {source}" for source in ("seed", *NEWCOMERS)), "seconds", "byte by byte")
    for name, report in reports.items():
        sources = {source: report["sources"].get(source, 0) / size for source in ("seed", *NEWCOMERS)}
        parts = ("" if source == name else f"{part:.0%}" for source, part in sources.items())
        table.add_row(name, *parts, f"{report['seconds']:.1f}", "[red]DIFFERENT[/]" if problems[name] else "equal")
    console.print(table)
    for name in NEWCOMERS:
        for problem in problems[name]:
            console.print(f"{name}: {problem}", style="red", markup=False, soft_wrap=True)
    alone_s = len(NEWCOMERS) * size / SEED_LIMIT_BYTES_PER_S
    console.print(
        f"{len(NEWCOMERS)} copies in {total_s:.1f} s, while the seed sent {sent / size:.2f} of one; "
        f"from the seed alone they would have taken {alone_s:.1f} s"
    )
    return 1 if any(problems.values()) else 0


def _make_up(path: Path) -> None:
    """Writes a checkpoint with the shapes of SmolLM2-135M: 30 layers, 9 heads of 64, 3 of them keys and values."""
    hidden, inner, keys, vocabulary, layers = 576, 1536, 192, 49152, 30
    shapes = {
        "input_layernorm": (hidden,), "mlp.down_proj": (hidden, inner), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "post_attention_layernorm": (hidden,), "self_attn.k_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (keys, hidden),
    }  # fmt: skip
    tensors: list[tuple[str, Sequence[int]]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(layers):
        tensors += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    tensors.append(("model.norm.weight", (hidden,)))
    path.mkdir()
    write_made_up(path / "model.safetensors", tensors, rng=np.random.Generator(np.random.SFC64()))
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _watch(nodes: _Nodes, console: Console, *, size: int, deadline: float) -> None:
    """Shows a bar for each newcomer until all are complete. Raises FetchError when a process fails."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    waiting = list(NEWCOMERS)
    with Progress(*columns, console=console) as bars:
        rows = {name: bars.add_task(name, total=size) for name in NEWCOMERS}
        while waiting:
            nodes.check(deadline)
            received = nodes.received()
            for name in tuple(waiting):
                if nodes.printed(name):
                    waiting.remove(name)
                    console.print(f"{name} is complete and serves on")
                bars.update(rows[name], completed=received.get(name, 0) if name in waiting else size)
            time.sleep(LOOK_EVERY_S)


def _moved(report: dict[str, Any], direction: str) -> int:
    return sum(transfer["bytes"] for transfer in report["transfers"] if transfer["direction"] == direction)


def _ignore_interrupts() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(*_: object) -> None:
    """The handler of the first signal; a second must not interrupt the end of the processes."""
    _ignore_interrupts()
    raise KeyboardInterrupt


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delays an interruption to the end of the block."""
    pending: list[object] = []
    before = {number: signal.signal(number, lambda *_: pending.append(_)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pending:
        _interrupt()


class _Nodes:
    """The processes of the demo; each prints to `NAME.out` and logs to `NAME.log` in `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Runs a `swarm` command as the node `name`, without settings of the user: it must not join a real swarm."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        package = str(Path(swarm.__file__).parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        with (
            _interrupts_held(),
            (self.place / f"{name}.out").open("wb") as out,
            (self.place / f"{name}.log").open("wb") as log,
        ):
            self._processes[name] = subprocess.Popen(  # noqa: S603 - this very program, without a shell
                [sys.executable, "-m", "swarm", *arguments, "--name", name, "--no-mdns", "--listen", "127.0.0.1:0"],
                cwd=self.place,  # has no swarm.toml
                env={**kept, f"{ENVIRONMENT_PREFIX}CACHE": str(self.place / "cache"), "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the demo alone, which ends the nodes
            )

    def printed(self, name: str) -> str:
        """The first line that a node printed, or an empty text."""
        line, end, _ = (self.place / f"{name}.out").read_text(encoding="utf-8").partition("\n")
        return line if end else ""

    def check(self, deadline: float) -> None:
        """Raises FetchError if a process has ended or the deadline has passed."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                lines = (self.place / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                last = lines[-1] if lines else "without a message"
                raise FetchError(f"the demo's {name} ended with exit code {process.returncode}: {last}")
        if time.monotonic() > deadline:
            raise FetchError("the demo's nodes took too long; is this machine very busy?")

    def received(self) -> dict[str, int]:
        """Bytes received by each node that answers, by its name."""
        received = {}
        for address in local_nodes.addresses(self.place / "cache"):
            with contextlib.suppress(PeerUnreachable):  # it is opening or closing
                report = status_client.ask(address)
                received[str(report["node"]["name"])] = _moved(report, "down")
        return received

    def end(self) -> None:
        """Terminates all processes, and kills those that still run after `STOP_TIMEOUT_S`."""
        for process in self._processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
