"""The compile caches of an engine's start: fetched while the weights arrive, served after warm-up.

    begin()    searches and fetches in the background
    join()     before the engine compiles: waits for a cache that arrives, and not at all if no member offers one
    serve()    after warm-up

Compiling takes an engine tens of seconds, and a cache arrives in one or two. Most starts find no cache, so that a
search must cost nothing: it ends at `join`. A machine on which an equal engine has started does not search.

Must not know: engines.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from swarm.api import Served
from swarm.engines import cache_files, compile_caches
from swarm.engines.compile_caches import InstalledCache
from swarm.errors import SettingsError
from swarm.runtime import runtime
from swarm.settings import Settings
from swarm.store.own_files import read_regular, replacing

WAIT_S = 10.0  # for a cache that arrives; less than compiling takes
HERE = "compiled-here"  # below the cache directory: records of what engines have compiled on this machine
RECORD_BYTES_MAX = 1 << 20
SEARCH_S = 600.0  # at most, for an engine that never comes to `join`

log = logging.getLogger("swarm")
_record = msgspec.json.Decoder(dict[str, int])  # the number of files by the name of a directory


class CacheStart:
    """The cache with these fields in its key. `places`: the compilers' directories, by default this machine's.

    `begin` and `join` never raise: errors are logged.
    """

    def __init__(
        self, fields: Mapping[str, str], settings: Settings, *, places: Mapping[str, Path] | None = None
    ) -> None:
        self._wanted = compile_caches.key(fields)
        self._settings = settings
        self._places = compile_caches.directories() if places is None else places
        self._record = settings.cache / HERE / self._wanted.digest
        self._found = threading.Event()
        self._work: concurrent.futures.Future[InstalledCache] | None = None
        self._fetched: InstalledCache | None = None

    def begin(self) -> None:
        """Starts to search."""
        if why := compile_caches.refusal(self._settings):
            if self._settings.compile_caches:
                log.info("compile cache: %s", SettingsError("compile_caches", why))
            return
        if self._is_warm():
            return
        self._work = runtime().submit(
            compile_caches.fetch(
                self._wanted, self._settings, places=self._places, find_timeout_s=SEARCH_S, found=self._found.set
            )
        )

    def join(self) -> None:
        """Returns once the cache is installed, at once if no member offers one, and after WAIT_S in any case."""
        work, self._work = self._work, None
        if work is None:
            return
        if not self._found.is_set() and not work.done():
            work.cancel()
            log.info("compile cache: no member offers one; compiling here")
            return
        try:
            self._fetched = work.result(WAIT_S)
        except concurrent.futures.TimeoutError:
            log.info("compile cache: still arriving after %.0f s; compiling here", WAIT_S)
        except Exception as error:  # a cache is no reason for an engine not to start
            log.info("compile cache: compiling here (%s)", error)
        else:
            log.info("compile cache: %s", self._fetched)

    def serve(self) -> Served | None:
        """Serves what was compiled here; a fetched cache is served already. Raises as `compile_caches.offer` does."""
        if compile_caches.refusal(self._settings):
            return None
        with contextlib.suppress(OSError):  # then the next start looks for a cache again
            self._record.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._record) as draft:
                draft.write_bytes(msgspec.json.encode(self._counts()))
        if self._fetched is not None:
            return self._fetched.served
        served = compile_caches.offer(self._wanted, self._settings, places=self._places)
        if served is not None:
            log.info("compile cache: serves it as %s", served.model_id)
        return served

    def _is_warm(self) -> bool:
        """Whether an engine with this key has started here, and the compilers' directories have what it left there."""
        try:
            left = _record.decode(read_regular(self._record, bytes_max=RECORD_BYTES_MAX))
        except (OSError, ValueError, RecursionError):
            return False
        now = self._counts()
        return any(left.values()) and all(now.get(name, 0) >= count for name, count in left.items())

    def _counts(self) -> dict[str, int]:
        """The number of files in each directory."""
        return {name: sum(1 for _ in cache_files.servable(place)) for name, place in self._places.items()}
