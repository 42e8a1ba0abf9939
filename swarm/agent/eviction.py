"""Which models leave a bounded cache: the least recently used, without those that are pinned or in use.

    absent ──reserve──> arriving ──settle──> absent, or kept after `add` ──reserve of others──> absent

Bytes of arriving models count from their reservation on, so that two pulls never promise the same room. A model that
does not fit is refused before a byte is fetched. `limit_bytes` may be infinite.

Pure: no clock, no files. `check()` asserts the invariants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace


class NoRoom(Exception):
    """`need` bytes do not fit into `limit`, however much is evicted: the others are `pinned` or `busy`."""

    def __init__(self, *, need: int, limit: float, pinned: int, busy: int) -> None:
        super().__init__(f"{need} bytes beside {pinned} pinned and {busy} in use, of {limit:.15g}")
        self.need, self.limit, self.pinned, self.busy = need, limit, pinned, busy


@dataclass(frozen=True)
class KeptModel:
    """A model of the cache: its bytes, when it was last used (seconds of any clock), and whether it stays."""

    size: int
    used_at: float
    pinned: bool = False


class Eviction:
    """The cache as its policy sees it, by keys that name a model and its commit."""

    def __init__(self, limit_bytes: float) -> None:
        self.limit_bytes = limit_bytes
        self._kept: dict[str, KeptModel] = {}
        self._arriving: dict[str, list[int]] = {}  # reservations of bytes beyond those that are kept
        self._leases: Counter[str] = Counter()

    @property
    def kept(self) -> Mapping[str, KeptModel]:
        """All models that are there, in part or whole."""
        return self._kept

    @property
    def bytes(self) -> int:
        """Bytes that are there or arriving."""
        return sum(model.size for model in self._kept.values()) + sum(map(sum, self._arriving.values()))

    def add(self, key: str, size: int, *, used_at: float, pinned: bool = False) -> None:
        """A model that is there already, or has another size now."""
        known = self._kept.get(key)
        pinned = pinned or (known is not None and known.pinned)
        self._kept[key] = KeptModel(size, max(used_at, known.used_at if known else used_at), pinned)

    def forget(self, key: str) -> None:
        """It is not there any more."""
        self._kept.pop(key, None)

    def use(self, key: str, now: float) -> None:
        """It is used."""
        if key in self._kept:
            self._kept[key] = replace(self._kept[key], used_at=now)

    def pin(self, key: str, *, pinned: bool) -> None:
        """It stays whatever comes, or does not any more. Raises KeyError."""
        self._kept[key] = replace(self._kept[key], pinned=pinned)

    def lease(self, key: str) -> None:
        """It is being read; until `release` it stays."""
        self._leases[key] += 1

    def release(self, key: str) -> None:
        """Ends a lease."""
        self._leases[key] -= 1
        self._leases += Counter()  # drops counts of 0

    def leased(self, key: str) -> bool:
        """Whether it is being read, or arriving."""
        return self._leases[key] > 0 or key in self._arriving

    def reserve(self, key: str, more: int) -> list[str]:
        """Makes room for `more` bytes of a model; returns the models to evict, which count as gone. Raises NoRoom."""
        over = self.bytes + more - self.limit_bytes
        chosen: list[str] = []
        for candidate in sorted(self._evictable(key), key=lambda each: (self._kept[each].used_at, each)):
            if over <= 0:
                break
            chosen.append(candidate)
            over -= self._kept[candidate].size
        if over > 0:
            raise self._no_room(key, more)
        for candidate in chosen:
            del self._kept[candidate]
        self._arriving.setdefault(key, []).append(more)
        return chosen

    def settle(self, key: str, more: int) -> None:
        """Ends a reservation of `more` bytes: `add` tells what has come of it."""
        self._arriving[key].remove(more)
        if not self._arriving[key]:
            del self._arriving[key]

    def would_fit(self, key: str, more: int) -> bool:
        """Whether there is room for it beside what is pinned, once all that is read or arriving has gone."""
        fixed = sum(model.size for name, model in self._kept.items() if model.pinned or name == key)
        return fixed + more <= self.limit_bytes

    def overdue(self) -> list[str]:
        """Models to evict because the limit shrank, or others count more than before; they count as gone."""
        try:
            return self.reserve("", 0)
        except NoRoom:  # what is pinned or in use exceeds the limit: the rest goes
            gone = list(self._evictable(""))
            for key in gone:
                del self._kept[key]
            return gone
        finally:
            self._arriving.pop("", None)

    def check(self) -> None:
        """Asserts what always holds."""
        leases = min(self._leases.values(), default=1)
        sizes = min([*map(sum, self._arriving.values()), *(model.size for model in self._kept.values())], default=0)
        assert leases > 0, self._leases
        assert sizes >= 0, (self._arriving, self._kept)

    def _evictable(self, beside: str) -> list[str]:
        return [
            key
            for key, model in self._kept.items()
            if not (model.pinned or key == beside or self._leases[key] or key in self._arriving)
        ]

    def _no_room(self, key: str, more: int) -> NoRoom:
        pinned = sum(model.size for name, model in self._kept.items() if model.pinned and name != key)
        busy = self.bytes - pinned - sum(self._kept[name].size for name in self._evictable(key))
        return NoRoom(need=more, limit=self.limit_bytes, pinned=pinned, busy=busy)

    def __repr__(self) -> str:
        pinned = sum(model.pinned for model in self._kept.values())
        return (
            f"<Eviction {self.bytes} of {self.limit_bytes:.15g} bytes | {len(self._kept)} models, {pinned} pinned | "
            f"{len(self._leases)} in use | {len(self._arriving)} arriving>"
        )
