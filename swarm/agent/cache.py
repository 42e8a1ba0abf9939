"""The models that the agent keeps: those of the Hugging Face cache, by id and commit.

    <cache>/agent/models.json    when each model was last used, and which are pinned

All models of the cache are listed and served. Only files that swarm wrote (`checkpoint.kept`) count towards the limit
and are evicted; what other programs put there stays. Listing reads directories, no file.

Must not know: nodes; `withdraw` is called for each model before its files are removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from swarm.agent.eviction import Eviction, NoRoom
from swarm.checkpoint import hf_cache, kept
from swarm.content.manifest import ModelId
from swarm.errors import StoreFull, SwarmError
from swarm.observe.prometheus import Figure
from swarm.observe.units import size_text
from swarm.protocol.agent_messages import FOLDER, MODELS_MAX
from swarm.store.own_files import read_own, replacing

SAVE_EVERY_S = 30.0
FILE_BYTES_MAX = 16 << 20

log = logging.getLogger("swarm")


class _Use(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    used_at: float
    pinned: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    models: dict[str, _Use]
    version: Literal[1] = 1


_decoder = msgspec.json.Decoder(_File)


@dataclass(frozen=True)
class CachedModel:
    """A snapshot of the Hugging Face cache."""

    model_id: ModelId
    commit: str
    place: Path

    @property
    def key(self) -> str:
        """Names it among all."""
        return key_of(self.model_id, self.commit)


def key_of(model_id: str, commit: str) -> str:
    """The name of a model and its commit."""
    return f"{model_id}@{commit}"


def snapshots(root: Path) -> list[CachedModel]:
    """All snapshots of a cache, by id and commit; at most MODELS_MAX."""
    found = []
    for place in sorted(root.glob("models--*/snapshots/*"))[:MODELS_MAX]:
        model_id = hf_cache.model_id_of(place)
        if model_id and place.is_dir():
            found.append(CachedModel(ModelId(model_id), place.name, place))
    return found


def pinned(cache_dir: Path) -> frozenset[str]:
    """The keys of the models that are pinned, as the last agent of this cache directory left them."""
    return frozenset(key for key, use in _read(cache_dir / FOLDER / "models.json").items() if use.pinned)


class Cache:
    """What is kept, within `limit_bytes`. All methods run on one loop."""

    def __init__(
        self,
        cache_dir: Path,
        root: Path,
        *,
        limit_bytes: float,
        withdraw: Callable[[str], object],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.root = root
        self.evicted = self.evicted_bytes = 0  # since the start
        self.policy = Eviction(limit_bytes)
        self._dir = cache_dir
        self._withdraw = withdraw
        self._now = now
        self._place = cache_dir / FOLDER / "models.json"
        self._uses = _read(self._place)
        self._saved_at = now()
        self.turn = asyncio.Lock()  # for who waits for room: the first in line gets it

    def look(self) -> None:
        """Counts what is there, which other programs may have removed, and evicts what exceeds the limit."""
        there = {self._key(each): each for each in kept.all_kept(self._dir) if self._is_here(each)}
        for key in self.policy.kept.keys() - there.keys():
            self.policy.forget(key)
        for key, each in there.items():
            use = self._uses.get(key) or _Use(_written_at(each))
            self.policy.add(key, each.size, used_at=use.used_at, pinned=use.pinned)
        for key in self.policy.overdue():
            self._evict(key)

    def room(self, key: str, more: int) -> None:
        """Makes room for `more` bytes of a model that is about to arrive. Raises StoreFull."""
        try:
            gone = self.policy.reserve(key, more)
        except NoRoom as error:
            beside = [f"{size_text(error.pinned)} are pinned"] if error.pinned else []
            beside += [f"{size_text(error.busy)} are in use or arriving"] if error.busy else []
            said = f" ({' and '.join(beside)})" if beside else ""
            why = f"{size_text(more)} do not fit into the {size_text(error.limit)} of the agent{said}"
            free = max(0, int(error.limit - error.pinned - error.busy))
            raise StoreFull(self.root, need_bytes=more, free_bytes=free, why=why) from error
        for each in gone:
            self._evict(each)

    def would_fit(self, key: str, more: int) -> bool:
        """Whether `room` may succeed later."""
        return self.policy.would_fit(key, more)

    def arrived(self, key: str, more: int) -> None:
        """The `more` bytes for which room was made are there, or as many of them as were written."""
        self.policy.settle(key, more)
        found = next((each for each in kept.all_kept(self._dir) if self._key(each) == key), None)
        if found:
            self.policy.add(key, found.size, used_at=self._now())
            use = self._uses.get(key)
            self._uses[key] = _Use(self._now(), pinned=use.pinned if use else False)
            self.policy.pin(key, pinned=self._uses[key].pinned)
        self.save()

    @contextlib.contextmanager
    def in_use(self, key: str) -> Iterator[None]:
        """In the block, a model is read, and stays."""
        self.policy.lease(key)
        try:
            yield
        finally:
            self.policy.release(key)
            self.used(key)

    def hold(self, key: str, seconds: float) -> None:
        """Keeps a model for so long: the programs that wait for it have not begun to read it."""
        self.policy.lease(key)
        asyncio.get_running_loop().call_later(seconds, self.policy.release, key)

    def used(self, key: str) -> None:
        """A model is used."""
        now = self._now()
        self.policy.use(key, now)
        self._uses[key] = _Use(now, pinned=self.pinned(key))
        if now - self._saved_at > SAVE_EVERY_S:
            self.save()

    def pin(self, key: str, *, pinned: bool) -> None:
        """Keeps a model, or not any more; also one that other programs wrote, or that is about to come."""
        use = self._uses.get(key)
        self._uses[key] = _Use(use.used_at if use else self._now(), pinned=pinned)
        with contextlib.suppress(KeyError):
            self.policy.pin(key, pinned=pinned)
        self.save()

    def pinned(self, key: str) -> bool:
        """Whether it is kept whatever comes."""
        return (use := self._uses.get(key)) is not None and use.pinned

    def used_at(self, key: str) -> float:
        """When it was last used, seconds since the epoch; 0 if that is not known."""
        use = self._uses.get(key)
        return use.used_at if use else 0.0

    def size(self, key: str) -> int:
        """Bytes that swarm wrote of it."""
        found = self.policy.kept.get(key)
        return found.size if found else 0

    def remove(self, key: str) -> int:
        """Removes what swarm wrote of a model; returns the bytes. Raises OSError."""
        self._withdraw(key)
        self.policy.forget(key)
        self._uses.pop(key, None)
        self.save()
        return sum(kept.remove(self._dir, each) for each in kept.all_kept(self._dir) if self._key(each) == key)

    def figures(self) -> Iterable[Figure]:
        """The metrics of the cache."""
        kept = self.policy.kept
        counts = {
            "pinned": float(sum(model.pinned for model in kept.values())),
            "in use": float(sum(self.policy.leased(key) for key in kept)),
            "other": float(sum(not (model.pinned or self.policy.leased(key)) for key, model in kept.items())),
        }
        yield Figure("gauge", "swarm_cache_models", "Models that swarm keeps in the hub's cache", counts, "kept")
        yield Figure("gauge", "swarm_cache_bytes", "Their bytes, with those arriving", {"": self.policy.bytes})
        yield Figure("gauge", "swarm_cache_limit_bytes", "The limit", {"": self.policy.limit_bytes})
        yield Figure("counter", "swarm_cache_evictions", "Models that were evicted", {"": self.evicted})
        yield Figure("counter", "swarm_cache_evicted_bytes", "Their bytes", {"": self.evicted_bytes})

    def save(self) -> None:
        """Writes uses and pins. A failure is logged only."""
        self._saved_at = self._now()
        try:
            self._place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(self._place) as draft:
                draft.touch(0o600)
                draft.write_bytes(msgspec.json.encode(_File(self._uses)))
        except OSError as error:
            log.warning("%s: %s; pins are lost when the agent ends", self._place, error.strerror)

    def _evict(self, key: str) -> None:
        size = self.size(key)
        try:
            freed = self.remove(key)
        except (OSError, SwarmError) as error:
            log.warning("%s cannot be evicted: %s", key, error)
            return
        self.evicted += 1
        self.evicted_bytes += freed or size
        log.info("%s is evicted, %s: the least recently used", key, size_text(freed))

    def _is_here(self, each: kept.Kept) -> bool:
        return each.folder.parent == self.root

    @staticmethod
    def _key(each: kept.Kept) -> str:
        return key_of(each.model_id, each.commit)

    def __repr__(self) -> str:
        return f"<Cache {self.root} {self.policy!r}>"


def _read(place: Path) -> dict[str, _Use]:
    try:
        return _decoder.decode(read_own(place, bytes_max=FILE_BYTES_MAX)).models
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is ignored, pins are lost: %s", place, error)
        return {}


def _written_at(each: kept.Kept) -> float:
    with contextlib.suppress(OSError):
        return os.stat(each.snapshot).st_mtime
    return 0.0
