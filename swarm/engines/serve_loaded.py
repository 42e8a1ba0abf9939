"""Serves the loaded tensors of a rank, while the engine uses them and may change them.

    keep(tensors) -> publish                           hashed and served
    pause -> resume                                    memory released and restored: served again if no byte changed
    begin_change -> end_change -> set_version(v)       updated: served as weight version v, under another id

A fingerprint names the loaded content, and for updated weights also the version. Tensors are served only under an id
that matches their bytes: a peer that asks for no version never gets an updated tensor, nor the reverse.

A thread reads the tensors, or decides whether they are served, under a lock; an engine that is about to release their
memory waits for it. Must not know: engines, files, nodes, beyond the functions that it is given.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

from swarm.checkpoint import manifest_builder
from swarm.content.manifest import Digest, ModelId
from swarm.engines.layout import Fingerprint
from swarm.store import Source

if TYPE_CHECKING:
    import torch

RESTART = "the engine starts anew"
TENSORS = "loaded tensors"  # their name in the log

log = logging.getLogger("swarm")


class TensorServer:
    """The tensors that the rank `label` serves.

    `describe(version)` returns artifact id and fingerprint for a weight version, or for the checkpoint if None; it
    returns None while the content is unknown. `serve(id, source)` takes over the source. `withdraw(digests, why)`
    returns when no transfer reads their tensors any more.
    """

    def __init__(
        self,
        label: str,
        *,
        version: str | None,
        describe: Callable[[str | None], tuple[ModelId, Fingerprint] | None],
        serve: Callable[[ModelId, Source], None],
        withdraw: Callable[[set[Digest], str], None],
    ) -> None:
        self.version = version
        self.serving: Future[None] | None = None  # done when the last `begin` has ended
        self._label = label
        self._describe = describe
        self._serve = serve
        self._withdraw = withdraw
        self._kept: Callable[[], dict[str, torch.Tensor]] | None = None
        self._served: set[Digest] = set()
        self._twin: Digest | None = None  # of fetched tensors, which the node serves since
        self._hashed: Digest | None = None  # of the kept tensors, once hashed here
        self._lock = threading.Lock()
        self._stopped = ""  # why nothing is served
        self._paused = False
        self._changes = 0  # since tensors were last served: 0 none, 1 under way, 2 finished
        self._versions = {version}  # all versions that these tensors have had

    def adopt(self, digest: Digest) -> None:
        """The node already serves these tensors, since it fetched them."""
        self._twin = digest
        self._served.add(digest)

    def release_twin(self, why: str) -> None:
        """Withdraws the fetched tensors."""
        if self._twin is not None:
            self._withdraw({self._twin}, why)
            self._served.discard(self._twin)
            self._twin = None

    def keep(self, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        """Sets the tensors to serve; `publish` calls `tensors`."""
        self._kept = tensors

    def pause(self, why: str) -> None:
        """Withdraws them until `resume`: their memory is about to be released. Returns when no transfer reads it."""
        self._paused = True
        self._stop(why, "they are back")

    def resume(self) -> None:
        """Their memory is back: hashes them in the background, and serves them if no byte changed."""
        self._paused = False
        if not self._stopped or self._kept is None:
            return
        if self._expected is None:
            self._give_up("their memory was released before they were hashed, so that a change would go unnoticed")
            return
        self._stopped = ""
        self.begin({TENSORS: self.publish})

    def begin_change(self, why: str, until: str = RESTART) -> None:
        """Withdraws them: the engine is about to change them. Returns when no transfer reads them."""
        self._changes = 1
        self._stop(why, until)
        self._kept = None

    def end_change(self) -> None:
        """The engine has finished the change."""
        if self._changes:
            self._changes = 2

    def set_version(self, version: str, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        """The engine names its current weights: serves them as this weight version, in the background."""
        if why := self._unfit(version):
            log.info("%s: weight version %r is not served: %s", self._label, version, why)
            return
        self._versions.add(version)
        self.version, self._kept, self._twin, self._hashed = version, tensors, None, None
        self._changes, self._stopped = 0, ""
        self.begin({TENSORS: self.publish})

    def _unfit(self, version: str) -> str:
        """Why the tensors cannot be served as a version; '' if they can."""
        if self._changes < 2:
            return "no change of the weights has finished since they were last served"
        if self._paused:
            return "their memory is away"
        if version in self._versions or not version:
            return "other weights had that name before"
        return ""

    def publish(self) -> None:
        """Hashes and serves the kept tensors. Raises SettingsError, ManifestInvalid, StoreError."""
        with self._lock:
            described = self._describe(self.version)
            if self._stopped or self._kept is None or self._hashed in self._served:
                return
            if described is None:
                log.info("%s: %s are not served: the checkpoint's content is not known", self._label, TENSORS)
                return
            artifact, ours = described
            source = manifest_builder.tensors(self._kept(), loaded_as=ours.text)
            digest = source.manifest.digest
            if self._stopped or self._expected not in (None, digest):
                source.close()
                if not self._stopped:
                    self._give_up("their bytes changed")
                return
            if self._twin is not None:
                self._withdraw({self._twin}, "it moved")
            self._serve(artifact, source)
            self._served.add(digest)
            self._hashed = digest
        log.info("%s: ready, serves %d loaded bytes as %s", self._label, source.manifest.size, ours.digest)

    @property
    def _expected(self) -> Digest | None:
        """The digest that the tensors must have, if known."""
        return self._hashed or self._twin

    def _stop(self, why: str, until: str) -> None:
        self._stopped = why  # before the lock: a thread that is hashing sees it and does not serve
        with self._lock:
            served, self._served = self._served, set()
        if served:
            self._withdraw(served, why)
        if served or self._kept:
            log.info("%s: loaded tensors are served no longer, until %s: %s", self._label, until, why)

    def _give_up(self, why: str) -> None:
        self._kept = None
        log.info("%s: loaded tensors are not served again: %s", self._label, why)

    def begin(self, steps: Mapping[str, Callable[[], object]]) -> None:
        """Runs these in order on a thread, by name. A failing step is logged and does not keep the others from running.

        `serving` raises the first failure.
        """
        self.serving = serving = Future[None]()

        def run() -> None:
            failures: list[Exception] = []
            for name, step in steps.items():
                try:
                    step()
                except Exception as error:
                    log.warning("%s: %s cannot be served: %s", self._label, name, error)
                    failures.append(error)
            if failures:
                serving.set_exception(failures[0])
            else:
                serving.set_result(None)

        threading.Thread(target=run, name="swarm-serve", daemon=True).start()
