"""Checkpoints to measure with: several safetensors files of random bf16 tensors with the shapes of Qwen2.5.

Made once per size and kept; a directory is reused only when it is complete. `models.py PLACE BYTES` makes a model in a
process of its own, so that the measuring process stays small (see children.py).
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import children

FILES = 4  # fewer than published models of this size have, but several


@dataclass(frozen=True)
class Shape:
    """The dimensions of a published model."""

    name: str
    hidden: int
    inner: int
    keys: int
    vocabulary: int


LARGE = Shape("Qwen2.5-7B", hidden=3584, inner=18944, keys=512, vocabulary=152064)
SMALL = Shape("Qwen2.5-0.5B", hidden=896, inner=4864, keys=128, vocabulary=151936)
LARGE_FROM_BYTES = 2 << 30
BYTES_PER_ELEMENT = 2
LAST = "config.json"  # written last: with it, a directory is complete

Tensors = list[tuple[str, Sequence[int]]]


def model(place: Path, size: int) -> Path:
    """A model directory of at least `size` bytes below `place`: layers of the real shape until there are enough."""
    path = place / f"{_shape(size).name}-cut-to-{size >> 20}MiB"
    if not (path / LAST).exists():
        argv = [sys.executable, __file__, str(path.absolute()), str(size)]
        children.run(argv, cwd=place, timeout_s=60 + size / 50e6)
    return path


def size_of(path: Path) -> int:
    """Bytes of all files of a model directory."""
    return sum(file.stat().st_size for file in path.iterdir())


def warm(path: Path) -> None:
    """Reads all files once, so that they are in the page cache."""
    for file in path.iterdir():
        with file.open("rb", buffering=0) as opened:
            while opened.read(16 << 20):
                pass


def _make(path: Path, size: int) -> None:
    import numpy as np

    from swarm.cli.demo import write_made_up

    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.SFC64(1))
    files = _files(_shape(size), size)
    for number, tensors in enumerate(files, start=1):
        write_made_up(path / f"model-{number:05}-of-{len(files):05}.safetensors", tensors, rng=rng)
    (path / LAST).write_text(json.dumps({"model_type": "qwen2", "hidden_size": _shape(size).hidden}))


def _shape(size: int) -> Shape:
    return LARGE if size >= LARGE_FROM_BYTES else SMALL


def _files(shape: Shape, size: int) -> list[Tensors]:
    files: list[Tensors] = [[]]
    total = 0
    for tensor in _tensors(shape, size):
        if total >= size * len(files) / FILES and len(files) < FILES:
            files.append([])
        files[-1].append(tensor)
        total += BYTES_PER_ELEMENT * math.prod(tensor[1])
        if total >= size:
            break
    return files


def _tensors(shape: Shape, size: int) -> Iterator[tuple[str, Sequence[int]]]:
    hidden, inner, keys = shape.hidden, shape.inner, shape.keys
    if BYTES_PER_ELEMENT * shape.vocabulary * hidden <= size // 3:  # else the small sizes would be a single tensor
        yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for layer in itertools.count():
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows, columns in (("q", hidden, hidden), ("k", keys, hidden), ("v", keys, hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, columns)
            yield f"{prefix}.self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)


if __name__ == "__main__":
    _make(Path(sys.argv[1]), int(sys.argv[2]))
