"""What the simulation of a burst depends on, how a command line says it, and the time that no schedule beats.

The command line makes its flags of the fields, so this imports next to nothing.

Must not know: how a burst is played.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swarm.errors import SettingsError
from swarm.settings import parse_rate

SLOWER = 4  # a slow newcomer's links carry so many times less

_SECONDS = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(us|ms|s)\s*", re.ASCII)
_UNIT_S = {"us": 1e6, "ms": 1e3, "s": 1.0}  # so many in a second


def _count(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise SettingsError(name, f"{text!r} is not a whole number") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SettingsError(name, f"{text!r} is not a number") from None


def _part(name: str, text: str) -> float:
    return _number(name, text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def _size(name: str, text: str) -> int:
    try:
        return int(parse_rate(name, f"{text}/s"))
    except SettingsError:
        raise SettingsError(name, f"{text!r} is not a size such as 16GB or 500MiB") from None


def _seconds(name: str, text: str) -> float:
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise SettingsError(name, f"{text!r} is not a time such as 0.5ms or 2s")
    return _number(name, match[1]) / _UNIT_S[match[2]]


def _delay(name: str, text: str) -> float:
    return _seconds(name, text if text.endswith("s") else f"{text}ms")


def _noticed(name: str, text: str) -> float:
    return _seconds(name, text if text.endswith("s") else f"{text}s")


def _written(value: float, unit: str) -> str:
    for prefix, scale in {"G": 10**9, "M": 10**6}.items():
        if value % scale == 0:
            return f"{int(value) // scale}{prefix}{unit}"
    return f"{value}{unit}"


# How the value that a reader read is written, so that it reads the same again.
_WRITERS: dict[Callable[[str, str], float], Callable[[float], str]] = {
    _size: lambda value: _written(value, "B"),
    parse_rate: lambda value: _written(value, "B/s"),
    _delay: lambda value: f"{value}s",
    _noticed: lambda value: f"{value}s",
}


def _flag(
    default: Any, metavar: str, help_text: str, *, read: Callable[[str, str], float], name: str | None = None
) -> Any:
    metadata = {"metavar": metavar, "help": help_text, "read": read, "flag": name}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setup:
    """Everything a run depends on. Raises SettingsError for what cannot be played.

    Parts, of the newcomers or of the time that one copy of the model takes through one link, are 0 to 1.
    """

    newcomers: int = _flag(32, "N", "newcomers that want the model, at once", read=_count)
    seeds: int = _flag(1, "S", "seeds that have it", read=_count)
    chunks: int = _flag(1024, "K", "chunks that it is cut into, all alike", read=_count)
    model_bytes: int = _flag(16_000_000_000, "SIZE", "size of the model, e.g. 16GB", read=_size, name="model")
    rate_bytes_per_s: float = _flag(
        1.25e9, "RATE", "what every machine's link carries, each way, e.g. 10Gbit/s", read=parse_rate, name="rate"
    )
    delay_s: float = _flag(
        0.0005, "MS", "delay one way, with what both ends take to think, e.g. 0.5ms", read=_delay, name="delay"
    )
    dice: int = _flag(0, "n", "number of the dice: the same dice, the same run", read=_count)
    kill_newcomers: float = _flag(0.0, "PART", "part of the newcomers that dies, at random times", read=_part)
    kill_seed_at: float | None = _flag(None, "PART", "part of the time at which the first seed dies", read=_part)
    noticed_s: float = _flag(0.0, "S", "how late others notice a death", read=_noticed, name="noticed")
    slow: float = _flag(0.0, "PART", f"part of the newcomers whose links carry {SLOWER} times less", read=_part)
    late: float = _flag(0.0, "PART", "part of the newcomers that asks at half time", read=_part)
    spread: float = _flag(0.0, "PART", "part of the time over which newcomers ask, one after another", read=_part)
    corrupt: float = _flag(0.0, "PART", "part of the chunks that arrives wrong, from anybody", read=_part)
    liars: int = _flag(0, "N", "newcomers that send wrong chunks", read=_count)
    per_machine: int = _flag(1, "N", "newcomers on one machine, which share its link", read=_count)
    racks: int = _flag(1, "N", "racks that the machines stand in, by turns", read=_count)
    rack_slower: float = _flag(
        4.0, "X", "a rack's way out carries so many times less than its machines' links together", read=_number
    )

    def __post_init__(self) -> None:
        from swarm.content.manifest import CHUNK_BYTES_MAX

        for name in ("newcomers", "seeds", "chunks", "model_bytes", "rate_bytes_per_s", "per_machine", "racks"):
            if not 1 <= getattr(self, name) < math.inf:  # which a NaN is not either
                raise SettingsError(_name(name), f"{getattr(self, name)}; at least 1 is needed")
        for name in ("kill_newcomers", "kill_seed_at", "slow", "late", "spread", "corrupt"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise SettingsError(_name(name), f"{getattr(self, name)} is not a part between 0 and 1")
        for name in ("delay_s", "noticed_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(_name(name), f"{getattr(self, name)} s; it cannot be less than 0")
        if self.corrupt == 1:
            raise SettingsError("corrupt", "when every chunk arrives wrong there is nothing to simulate")
        if not 0 < self.rack_slower < math.inf:
            raise SettingsError(_name("rack_slower"), f"{self.rack_slower} is not a number above zero")
        if not 0 <= self.liars <= self.newcomers:
            raise SettingsError("liars", f"{self.liars} of {self.newcomers} newcomers")
        if self.racks > self.machines:
            raise SettingsError("racks", f"{self.racks} for {self.machines} machines")
        least = math.ceil(self.model_bytes / CHUNK_BYTES_MAX)
        if not least <= self.chunks <= self.model_bytes:
            why = f"{self.chunks} for {self.model_bytes} bytes: it takes at least {least}, of a byte or more"
            raise SettingsError("chunks", why)

    @classmethod
    def read(cls, given: Mapping[str, str | None]) -> Setup:
        """From what a command line says, by field; None counts as not given. Raises SettingsError."""
        kinds = {field.name: field for field in dataclasses.fields(cls)}
        texts = {name: text for name, text in given.items() if text is not None}
        return cls(**{name: kinds[name].metadata["read"](_name(name), text) for name, text in texts.items()})

    @property
    def command(self) -> str:
        """What replays the run."""
        given = (field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        words = (
            f"--{flag_of(field)} {_WRITERS.get(field.metadata['read'], str)(getattr(self, field.name))}"
            for field in given
        )
        return " ".join(["swarm simulate", *words])

    @property
    def machines(self) -> int:
        """Each seed has one; newcomers may share theirs."""
        return self.seeds + math.ceil(self.newcomers / self.per_machine)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk; all are alike."""
        return self.model_bytes // self.chunks

    @property
    def copy_bytes(self) -> int:
        """Bytes of all chunks together."""
        return self.chunks * self.chunk_bytes

    @property
    def copy_s(self) -> float:
        """Seconds that one copy of the model takes through one link."""
        return self.copy_bytes / self.rate_bytes_per_s

    @property
    def bound_s(self) -> float:
        """No schedule in whole chunks is faster, if all newcomers ask at once (Mundinger, Weber and Weiss, 2008).

        Machines count, for newcomers on one machine could share what it gets; and a rack without a seed takes in one
        copy. All links are alike, so that the fluid bound (Kumar and Ross, 2006) is one copy through one link: less.
        """
        rounds = math.ceil(math.log2(self.machines / self.seeds))
        whole_s = (self.chunks - 1 + rounds) / self.chunks * self.copy_s
        return max(whole_s, self.copy_bytes / self.rack_bytes_per_s if self.seeds < self.racks else 0.0)

    @property
    def rack_bytes_per_s(self) -> float:
        """What goes out of a rack, or in."""
        return self.machines / self.racks * self.rate_bytes_per_s / self.rack_slower


def flag_of(field: dataclasses.Field[Any]) -> str:
    """What a field of `Setup` is called on the command line."""
    return str(field.metadata["flag"] or field.name.replace("_", "-"))


def _name(field: str) -> str:
    return next(flag_of(one) for one in dataclasses.fields(Setup) if one.name == field)
