"""The parameters of a simulated burst, their command-line form, and the lower bound of its time.

`swarm.cli.main` makes its flags of the fields, so this module imports little.

Must not know: how a burst is simulated.
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

SLOWER = 4  # the rate of a slow newcomer's link is divided by this

_SECONDS = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(us|ms|s)\s*", re.ASCII)
_UNITS_PER_S = {"us": 1e6, "ms": 1e3, "s": 1.0}


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


def _seconds(name: str, text: str, *, unit: str = "s") -> float:
    text = text if text.endswith("s") else text + unit
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise SettingsError(name, f"{text!r} is not a time such as 0.5ms or 2s")
    return _number(name, match[1]) / _UNITS_PER_S[match[2]]


def _milliseconds(name: str, text: str) -> float:
    return _seconds(name, text, unit="ms")


def _written(value: float, unit: str) -> str:
    for prefix, scale in {"G": 10**9, "M": 10**6}.items():
        if value % scale == 0:
            return f"{int(value) // scale}{prefix}{unit}"
    return f"{value}{unit}"


# The inverse of each reader: the text that it reads as the same value again.
_WRITERS: dict[Callable[[str, str], float], Callable[[float], str]] = {
    _size: lambda value: _written(value, "B"),
    parse_rate: lambda value: _written(value, "B/s"),
    _milliseconds: lambda value: f"{value}s",
    _seconds: lambda value: f"{value}s",
}


def _flag(
    default: Any, metavar: str, help_text: str, *, read: Callable[[str, str], float], name: str | None = None
) -> Any:
    metadata = {"metavar": metavar, "help": help_text, "read": read, "flag": name}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Burst:
    """The parameters of a run; a run is a function of them. Raises SettingsError for values that cannot be simulated.

    Parts are 0 to 1, of the newcomers, or of the time that a copy of the model takes through a link.
    """

    newcomers: int = _flag(32, "N", "newcomers that ask for the model at once", read=_count)
    seeds: int = _flag(1, "S", "seeds that hold the model", read=_count)
    chunks: int = _flag(1024, "K", "chunks of the model, all of the same size", read=_count)
    model_bytes: int = _flag(16_000_000_000, "SIZE", "size of the model, e.g. 16GB", read=_size, name="model")
    rate_bytes_per_s: float = _flag(
        1.25e9, "RATE", "rate of every machine's link, each way, e.g. 10Gbit/s", read=parse_rate, name="rate"
    )
    delay_s: float = _flag(
        0.0005, "MS", "one-way delay, with the time that both ends need, e.g. 0.5ms", read=_milliseconds, name="delay"
    )
    origin_bytes_per_s: float | None = _flag(
        None,
        "RATE",
        "rate of an origin that newcomers read from, all streams together",
        read=parse_rate,
        name="origin-rate",
    )
    origin_each_bytes_per_s: float | None = _flag(
        None, "RATE", "rate of each stream from the origin, at most", read=parse_rate, name="origin-each"
    )
    origin_limit_bytes_per_s: float | None = _flag(
        None, "RATE", "rate at which a newcomer reads from the origin, at most", read=parse_rate, name="origin-limit"
    )
    origin_readers: int | None = _flag(None, "N", "newcomers that read from the origin at once, at most", read=_count)
    false_claims: int = _flag(0, "N", "newcomers that claim wrong digests of what they read", read=_count)
    seeds_at: float = _flag(0.0, "PART", "part of the time after which the seeds appear", read=_part)
    rng_seed: int = _flag(0, "n", "seed of the random generator: the same seed gives the same run", read=_count)
    kill_newcomers: float = _flag(0.0, "PART", "part of the newcomers that dies, at random times", read=_part)
    kill_seed_at: float | None = _flag(None, "PART", "part of the time after which the first seed dies", read=_part)
    noticed_s: float = _flag(0.0, "S", "seconds after which others notice a death", read=_seconds, name="noticed")
    slow: float = _flag(0.0, "PART", f"part of the newcomers with links {SLOWER} times slower", read=_part)
    late: float = _flag(0.0, "PART", "part of the newcomers that asks at half time", read=_part)
    spread: float = _flag(0.0, "PART", "part of the time over which newcomers ask in sequence", read=_part)
    corrupt: float = _flag(0.0, "PART", "part of the chunks that arrives corrupt, from any member", read=_part)
    liars: int = _flag(0, "N", "newcomers that send corrupt chunks", read=_count)
    per_machine: int = _flag(1, "N", "newcomers per machine, which share its link", read=_count)
    racks: int = _flag(1, "N", "racks, to which machines are assigned in turn", read=_count)
    rack_slower: float = _flag(4.0, "X", "links of a rack's machines together, over the rack's uplink", read=_number)

    def __post_init__(self) -> None:
        from swarm.content.manifest import CHUNK_BYTES_MAX

        for name in ("newcomers", "chunks", "model_bytes", "rate_bytes_per_s", "per_machine", "racks"):
            if not 1 <= getattr(self, name) < math.inf:  # which excludes NaN
                raise SettingsError(_name(name), f"{getattr(self, name)}; at least 1 is needed")
        self._check_sources()
        for name in ("kill_newcomers", "kill_seed_at", "seeds_at", "slow", "late", "spread", "corrupt"):
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

    def _check_sources(self) -> None:
        origin, each, killed_at = self.origin_bytes_per_s, self.origin_each_bytes_per_s, self.kill_seed_at
        limit, readers = self.origin_limit_bytes_per_s, self.origin_readers
        for name, rate in {"origin-rate": origin, "origin-each": each, "origin-limit": limit}.items():
            if rate is not None and not 1 <= rate < math.inf:
                raise SettingsError(name, f"{rate}; at least 1 is needed")
        if not (0 if origin else 1) <= self.seeds < math.inf:
            raise SettingsError(
                "seeds",
                f"{self.seeds}; at least 1 is needed, or 0 with an origin, for example --origin-rate 1Gbit/s",
            )
        given = {"origin-each": each, "origin-limit": limit, "origin-readers": readers, "seeds-at": self.seeds_at}
        for name, value in {**given, "false-claims": self.false_claims}.items():
            if value and not origin:
                raise SettingsError(name, "there is no origin; name its --origin-rate")
        if readers is not None and readers < 1:
            raise SettingsError("origin-readers", f"{readers}; at least 1 is needed")
        if self.false_claims and self.seeds:
            raise SettingsError("false-claims", "seeds know the digests; claims are of a burst with --seeds 0")
        if not 0 <= self.false_claims < max(2, self.newcomers):
            raise SettingsError("false-claims", f"{self.false_claims} of {self.newcomers} newcomers")
        if (killed_at is not None or self.seeds_at) and not self.seeds:
            raise SettingsError("seeds-at" if self.seeds_at else "kill-seed-at", "there are no seeds")
        if killed_at is not None and killed_at < self.seeds_at:
            raise SettingsError("kill-seed-at", f"{killed_at} is before the seeds appear, at {self.seeds_at}")

    @classmethod
    def read(cls, given: Mapping[str, str | None]) -> Burst:
        """From the texts of a command line, by field; None for a flag that is not given. Raises SettingsError."""
        readers = {field.name: field.metadata["read"] for field in dataclasses.fields(cls)}
        return cls(**{name: readers[name](_name(name), text) for name, text in given.items() if text is not None})

    @property
    def command(self) -> str:
        """The command that repeats the run."""
        given = (field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        words = (
            f"--{flag_of(field)} {_WRITERS.get(field.metadata['read'], str)(getattr(self, field.name))}"
            for field in given
        )
        return " ".join(["swarm simulate", *words])

    @property
    def machines(self) -> int:
        """Number of machines: each seed has its own, and `per_machine` newcomers share theirs."""
        return self.seeds + math.ceil(self.newcomers / self.per_machine)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return self.model_bytes // self.chunks

    @property
    def copy_bytes(self) -> int:
        """Bytes of all chunks together."""
        return self.chunks * self.chunk_bytes

    @property
    def copy_s(self) -> float:
        """Seconds that a copy of the model takes through a link."""
        return self.copy_bytes / self.rate_bytes_per_s

    @property
    def bound_s(self) -> float:
        """The least time of any schedule in whole chunks when all newcomers ask at once, in seconds.

        (K - 1 + ceil(log2(M / S))) / K copies for M machines (Mundinger, Weber and Weiss, 2008): newcomers of a
        machine could share each chunk. A rack without a seed takes in a copy as well. All links have the same rate, so
        the fluid bound (Kumar and Ross, 2006) is a copy through a link, which is less. An origin counts as so many
        seeds as its rate has links, and all bytes leave it or the seeds.
        """
        origin = self.origin_bytes_per_s or 0.0
        first = self.seeds if not self.seeds_at else 0
        rounds = math.ceil(math.log2(self.machines / max(1.0, first + origin / self.rate_bytes_per_s)))
        whole_s = (self.chunks - 1 + max(1, rounds)) / self.chunks * self.copy_s
        readers = min(self.newcomers, self.origin_readers or self.newcomers)
        out_s = 0.0 if self.seeds else self.copy_bytes / min(origin, readers * self._reads_at_most)
        in_s = self.copy_bytes / self.rack_bytes_per_s if self.racks > 1 and self.seeds < self.racks else 0.0
        return max(whole_s, out_s, in_s)

    @property
    def _reads_at_most(self) -> float:
        """Rate at which a newcomer reads from the origin, at most."""
        return min(self.rate_bytes_per_s, self.origin_limit_bytes_per_s or math.inf)

    @property
    def rack_bytes_per_s(self) -> float:
        """Rate of a rack's uplink, each way."""
        return self.machines / self.racks * self.rate_bytes_per_s / self.rack_slower


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The command-line flag of a field of `Burst`, without the dashes."""
    return str(field.metadata["flag"] or field.name.replace("_", "-"))


def _name(name: str) -> str:
    return next(flag_of(field) for field in dataclasses.fields(Burst) if field.name == name)
