"""`swarm demo`: one seed and three newcomers on this machine, as the real commands in processes of their own.

The seed's upload is capped, so that one can watch what the swarm is for: the newcomers feed each other, and the seed
sends little more than one copy. They know the seed's address only; each other they find through it. What they got is
compared with the source byte by byte, and nothing is left behind, whatever happens.

    seed ──100 MB/s──> newcomer-1 <──> newcomer-2 <──> newcomer-3        (each of the three reads from all the others)

Knows the command line, the status page and the notes of running nodes, as any user does; nothing of a node's inside.
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
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
LOOK_EVERY_S = 0.2  # how often the nodes are asked what they have
STOP_TIMEOUT_S = 10.0
# Patience beyond any healthy run: the seed alone needs a model / limit for each newcomer if nobody shares.
PATIENCE_S, PATIENCE_PER_SEED_SECOND = 60.0, 6.0
COLUMNS = 100  # of the table, when there is no terminal to ask

_BLOCK_BYTES = 16 << 20


def demo(path: Path | None) -> int:
    """Shows a model directory (a made-up one for None) spreading to three newcomers; 0 when all of it arrived intact.

    Raises ManifestInvalid for a directory that cannot be served, StoreFull, and FetchError when a process fails.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=COLUMNS)
    with _Interrupts() as interrupts, tempfile.TemporaryDirectory(prefix="swarm-demo-") as place:
        try:
            return _demo(path, Path(place), console, interrupts)
        finally:
            interrupts.ignore()


def write_made_up(path: Path, tensors: Sequence[tuple[str, Sequence[int]]], *, rng: np.random.Generator) -> None:
    """Writes a safetensors file of BF16 tensors with these names and shapes, filled with random bytes."""
    sized = [(name, "BF16", shape, 2 * int(np.prod(shape, dtype=np.int64))) for name, shape in tensors]
    header = safetensors_header.compose(sized, {"format": "pt"})
    left = sum(size for *_, size in sized)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(safetensors_header.LENGTH_BYTES, "little") + header)
        while left:
            file.write(rng.bytes(min(left, _BLOCK_BYTES)))
            left -= min(left, _BLOCK_BYTES)


def differences(found: Sequence[files.CheckpointFile], out: Path) -> list[str]:
    """How the files of a directory differ from the source's, a line for each; every byte is compared."""
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


@dataclass(frozen=True)
class _Outcome:
    """What one newcomer printed when it was done."""

    name: str
    seconds: float
    sources: dict[str, int]
    problems: list[str]


def _demo(path: Path | None, place: Path, console: Console, interrupts: _Interrupts) -> int:
    if path is None:
        path = place / "SmolLM2-135M-made-up"
        console.print(f"{path.name}: the shapes of SmolLM2-135M in bf16; [bold]the weights are made up[/] (random)")
        _make_up(path)
    found, _ = files.walk(path)
    size = max(1, sum(file.stamp.size for file in found))
    _demand_room(place, len(NEWCOMERS) * size)
    limit = f"{SEED_LIMIT_BYTES_PER_S // 10**6}MB/s"
    console.print(
        f"one seed of {size_text(size)}, its upload [bold]capped at {limit}[/] so that the sharing shows; "
        f"{len(NEWCOMERS)} newcomers at once, each told the seed's address only"
    )
    model_id = path.resolve().name
    patience_s = PATIENCE_S + PATIENCE_PER_SEED_SECOND * size / SEED_LIMIT_BYTES_PER_S
    with _Cast(place, interrupts) as cast:
        common = ["--no-mdns", "--listen", "127.0.0.1:0"]
        serve = ["serve", str(path.resolve()), "--model-id", model_id, "--upload-limit", limit]
        seed = cast.start("seed", [*serve, *common])
        address = seed.line(time.monotonic() + patience_s).split()[0]
        began = time.monotonic()
        for name in NEWCOMERS:
            fetch = ["fetch", model_id, "--json", "--timeout", f"{patience_s:g}", "--out", str(place / name)]
            cast.start(name, [*fetch, "--peer", address, *common])
        _watch(cast, console, size=size, deadline=began + patience_s)
        total_s = time.monotonic() - began
        sent = _sent(status_client.ask(address))
        outcomes = [_outcome(cast.members[name], place / name, found) for name in NEWCOMERS]
    _conclude(outcomes, console, size=size, sent=sent, total_s=total_s)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def _make_up(path: Path) -> None:
    """A checkpoint with the layer shapes of SmolLM2-135M: 30 layers, 9 heads of 64, 3 of them keys and values."""
    hidden, inner, keys, vocabulary, layers = 576, 1536, 192, 49152, 30
    tensors: list[tuple[str, Sequence[int]]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(layers):
        shapes = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, inner),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (keys, hidden),
        }
        tensors += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    tensors.append(("model.norm.weight", (hidden,)))
    path.mkdir()
    write_made_up(path / "model.safetensors", tensors, rng=np.random.Generator(np.random.SFC64()))
    config = {"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _demand_room(place: Path, need_bytes: int) -> None:
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < need_bytes:
        raise StoreFull(place, need_bytes=need_bytes, free_bytes=free_bytes)


def _watch(cast: _Cast, console: Console, *, size: int, deadline: float) -> None:
    """One bar a newcomer, until all have said that they are complete. Raises FetchError for a failed process."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    waiting = set(NEWCOMERS)
    with Progress(*columns, console=console) as bars:
        rows = {name: bars.add_task(name, total=size) for name in NEWCOMERS}
        while waiting:
            cast.check(deadline)
            for name in sorted(waiting):
                if cast.members[name].lines:
                    waiting.remove(name)
                    bars.update(rows[name], completed=size)
                    console.print(f"{name} is complete and serves on")
            for name, done in cast.received().items():
                if name in waiting:
                    bars.update(rows[name], completed=done)
            cast.wait_for_news(LOOK_EVERY_S)


def _sent(report: Mapping[str, Any]) -> int:
    return sum(flow["bytes"] for flow in report["transfers"] if flow["direction"] == "up")


def _outcome(newcomer: _Member, out: Path, found: Sequence[files.CheckpointFile]) -> _Outcome:
    report = json.loads(newcomer.lines[0])
    return _Outcome(newcomer.name, report["seconds"], report["sources"], differences(found, out))


def _conclude(outcomes: Sequence[_Outcome], console: Console, *, size: int, sent: int, total_s: float) -> None:
    givers = ["seed", *NEWCOMERS]
    table = Table("who got it", *(f"from {giver}" for giver in givers), "seconds", "byte by byte")
    for outcome in outcomes:
        parts = [f"{outcome.sources.get(giver, 0) / size:.0%}" if giver != outcome.name else "" for giver in givers]
        table.add_row(
            outcome.name, *parts, f"{outcome.seconds:.1f}", "[red]DIFFERENT[/]" if outcome.problems else "equal"
        )
    console.print(table)
    for outcome in outcomes:
        for problem in outcome.problems:
            console.print(f"{outcome.name}: {problem}", style="red", markup=False, soft_wrap=True)
    alone_s = len(outcomes) * size / SEED_LIMIT_BYTES_PER_S
    console.print(
        f"{len(outcomes)} copies in {total_s:.1f} s, while the seed sent {sent / size:.2f} of one; "
        f"from the seed alone they would have taken {alone_s:.1f} s"
    )


class _Interrupts:
    """Lets SIGTERM and a closed terminal end the block as Ctrl-C does: once, and never between the start of a process
    and the note that it was started. Only the main thread may set handlers, and only it is interrupted.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._holding = self._pending = self._ignoring = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """An interruption that comes meanwhile takes effect at the end of this block."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            self._interrupt()

    def ignore(self) -> None:
        """From now on nothing interrupts: what follows is cleaning up, which has deadlines of its own."""
        self._ignoring = True

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: object) -> None:
        if self._holding:
            self._pending = True
        elif not self._ignoring:
            self._interrupt()

    def _interrupt(self) -> None:
        self._ignoring = True
        raise KeyboardInterrupt


class _Member:
    """One node in a process of its own; `lines` collects what it prints. `news` is set with each and at the end."""

    def __init__(self, name: str, popen: subprocess.Popen[str], complaints: Path, news: threading.Event) -> None:
        self.name = name
        self.lines: list[str] = []
        self._popen = popen
        self._complaints = complaints
        self._news = news
        self._reader = threading.Thread(target=self._read, name=f"read {name}", daemon=True)
        self._reader.start()

    def line(self, deadline: float) -> str:
        """Its first line. Raises FetchError when it ends without one or the deadline passes."""
        while not self.lines:
            self.check(deadline)
            self._news.wait(LOOK_EVERY_S)
            self._news.clear()
        return self.lines[0]

    def check(self, deadline: float) -> None:
        """Raises FetchError when the process has ended, or when it is too late."""
        if self._popen.poll() is not None:
            complaints = self._complaints.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = complaints[-1] if complaints else "without a word"
            raise FetchError(f"the demo's {self.name} ended with exit code {self._popen.returncode}: {last}")
        if time.monotonic() > deadline:
            raise FetchError(f"the demo's {self.name} took too long; is this machine very busy?")

    def terminate(self) -> None:
        """Asks it to end."""
        self._popen.terminate()

    def end(self, deadline: float) -> None:
        """Waits until it has ended, and kills it at the deadline."""
        try:
            self._popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._reader.join()
        if self._popen.stdout:
            self._popen.stdout.close()

    def _read(self) -> None:
        if self._popen.stdout:
            for line in self._popen.stdout:
                self.lines.append(line)
                self._news.set()
        self._news.set()


class _Cast:
    """All processes of the demo; leaving the block ends them."""

    def __init__(self, place: Path, interrupts: _Interrupts) -> None:
        self.members: dict[str, _Member] = {}
        self._place = place
        self._interrupts = interrupts
        self._cache = place / "cache"
        self._news = threading.Event()

    def start(self, name: str, arguments: Sequence[str]) -> _Member:
        """Runs a `swarm` command as the node `name`."""
        complaints = self._place / f"{name}.log"
        with self._interrupts.held(), complaints.open("wb") as stderr:
            popen = subprocess.Popen(  # noqa: S603 - this very program, without a shell
                [sys.executable, "-m", "swarm", *arguments, "--name", name],
                cwd=self._place,  # no swarm.toml there
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # Ctrl-C is for the demo, which ends the others in order
            )
            member = self.members[name] = _Member(name, popen, complaints, self._news)
        return member

    def check(self, deadline: float) -> None:
        """Raises FetchError when any process has ended, or when it is too late."""
        for member in self.members.values():
            member.check(deadline)

    def received(self) -> dict[str, int]:
        """Bytes that every node has received by now, by its name; nodes that do not answer are left out."""
        received = {}
        for address in local_nodes.addresses(self._cache):
            with contextlib.suppress(PeerUnreachable):  # it opens or closes just now
                report = status_client.ask(address)
                flows = [flow["bytes"] for flow in report["transfers"] if flow["direction"] == "down"]
                received[str(report["node"]["name"])] = sum(flows)
        return received

    def wait_for_news(self, timeout_s: float) -> None:
        """Returns when some process has printed something or ended, or when the time is over."""
        self._news.wait(timeout_s)
        self._news.clear()

    def __enter__(self) -> _Cast:
        return self

    def __exit__(self, *_: object) -> None:
        self._interrupts.ignore()
        for member in self.members.values():
            member.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for member in self.members.values():
            member.end(deadline)

    def _environment(self) -> dict[str, str]:
        """The caller's, without its settings for `swarm`: the demo must not join a real swarm."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
        package = str(Path(swarm.__file__).parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**kept, f"{ENVIRONMENT_PREFIX}CACHE": str(self._cache), "PYTHONPATH": path}
