"""What is fed: a decoder, inputs that it accepts, and its share of all inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A decoder. `feed` returns whether it accepted an input, and raises for whatever it should not have done."""

    name: str
    seeds: Sequence[bytes]
    feed: Callable[[bytes], bool]
    share: float  # of all inputs: those that need sockets or files are slower
