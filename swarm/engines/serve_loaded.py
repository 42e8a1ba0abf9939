"""The loaded tensors of one rank, as others may fetch them, while the engine lives on with them.

    keep(tensors) -> publish                 hashed and served
    pause -> resume                          their memory goes and comes: served again if every byte is what it was
    change -> changed -> call(version)       they become others: served as that weight version, under an id of its own

What is served under an id is what the id says, or it is not served: a fingerprint names the content that was loaded,
and of weights that were updated since the version too. Whoever asks for no version can get none, and the reverse.

Whoever holds the lock reads the tensors, or decides whether they are served; an engine that is about to give their
memory away waits for it. Must not know: engines, files, nodes, beyond the two functions that it is given.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

from swarm.checkpoint import manifest_builder
from swarm.content.manifest import ChunkHash, Digest, ModelId
from swarm.engines.layout import Fingerprint
from swarm.store import Source

if TYPE_CHECKING:
    import torch

ANEW = "the engine starts anew"
TENSORS = "loaded tensors"  # what the log calls them

log = logging.getLogger("swarm")


class Offer:
    """What is served of the loaded tensors of the rank that `label` names.

    `describe(version)` says under which id and as what tensors of a weight version are served, None for those of the
    checkpoint; nothing while that is not known. `serve(id, source)` takes the source over; `withdraw(digests, why)`
    returns when nobody reads their tensors any more.
    """

    def __init__(
        self,
        label: str,
        *,
        version: str | None,
        chunk_hash: ChunkHash,
        describe: Callable[[str | None], tuple[ModelId, Fingerprint] | None],
        serve: Callable[[ModelId, Source], None],
        withdraw: Callable[[set[Digest], str], None],
    ) -> None:
        self.version = version
        self.serving: Future[None] | None = None  # done when what was last begun in the background has come to its end
        self._label = label
        self._chunk_hash = chunk_hash
        self._describe = describe
        self._serve = serve
        self._withdraw = withdraw
        self._kept: Callable[[], dict[str, torch.Tensor]] | None = None
        self._served: set[Digest] = set()  # digests
        self._twin: Digest | None = None  # digest of tensors that were fetched, and are served since
        self._hashed: Digest | None = None  # digest of what is kept, once it was hashed here
        self._lock = threading.Lock()
        self._stopped = ""  # why nothing is served
        self._asleep = False
        self._changes = 0  # since something was last served: 0, or 1 while one is under way, or 2
        self._called = {version}  # versions that these tensors have had

    def adopt(self, digest: Digest) -> None:
        """Tensors that were fetched are served already."""
        self._twin = digest
        self._served.add(digest)

    def release_twin(self, why: str) -> None:
        """Serves no longer what was fetched."""
        if self._twin is not None:
            self._withdraw({self._twin}, why)
            self._served.discard(self._twin)
            self._twin = None

    def keep(self, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        """What to serve; called once it shall be hashed."""
        self._kept = tensors

    def pause(self, why: str) -> None:
        """Their memory is about to go: served no longer, until `resume`. Returns when nobody reads them any more."""
        self._asleep = True
        self._stop(why, "they are back")

    def resume(self) -> None:
        """Their memory is back: serves them again, in the background, if they are what they were."""
        self._asleep = False
        if not self._stopped or self._kept is None:
            return
        if self._known is None:
            self._give_up("their memory went before they were hashed, so it is not known what they were")
            return
        self._stopped = ""
        self.begin({TENSORS: self.publish})

    def change(self, why: str, until: str = ANEW) -> None:
        """They are about to change: what they are is served no longer. Returns when nobody reads them any more."""
        self._changes = 1
        self._stop(why, until)
        self._kept = None

    def changed(self) -> None:
        """The change has come to its end, and all of them are what the engine wants them to be."""
        if self._changes:
            self._changes = 2

    def call(self, version: str, tensors: Callable[[], dict[str, torch.Tensor]]) -> None:
        """The engine calls what it has now by a weight version: these are served as such, in the background."""
        if why := self._unfit(version):
            log.info("%s: weight version %r is not served: %s", self._label, version, why)
            return
        self._called.add(version)
        self.version, self._kept, self._twin, self._hashed = version, tensors, None, None
        self._changes, self._stopped = 0, ""
        self.begin({TENSORS: self.publish})

    def _unfit(self, version: str) -> str:
        """Why tensors cannot be served as a version; '' when they can."""
        if self._changes < 2:
            return "no change of the weights has come to its end since they were last served"
        if self._asleep:
            return "their memory is away"
        if version in self._called or not version:
            return "other weights had that name before"
        return ""

    def publish(self) -> None:
        """Hashes and serves what is kept. Raises SettingsError, ManifestInvalid, StoreError."""
        with self._lock:
            described = self._describe(self.version)
            if self._stopped or self._kept is None or self._hashed in self._served:
                return
            if described is None:
                log.info("%s: %s are not served: it is not known which checkpoint they are of", self._label, TENSORS)
                return
            artifact, ours = described
            source = manifest_builder.tensors(self._kept(), loaded_as=ours.text, chunk_hash=self._chunk_hash)
            digest = source.manifest.digest
            if self._stopped or self._known not in (None, digest):
                source.close()
                if not self._stopped:
                    self._give_up("they are not the bytes that they were")
                return
            if self._twin is not None:
                self._withdraw({self._twin}, "it moved")
            self._serve(artifact, source)
            self._served.add(digest)
            self._hashed = digest
        log.info("%s: ready, serves %d loaded bytes as %s", self._label, source.manifest.size, ours.digest)

    @property
    def _known(self) -> str | None:
        """The digest that they must have, if anybody has hashed them."""
        return self._hashed or self._twin

    def _stop(self, why: str, until: str) -> None:
        self._stopped = why  # first, so that whoever hashes does not come to serve
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
        """Does these in the background, one after the other, by what each serves. See `serving`.

        One that fails is logged, and the others are done all the same. The first failure is what `serving` raises.
        """
        self.serving = serving = Future[None]()

        def run() -> None:
            failures: list[Exception] = []
            for what, step in steps.items():
                try:
                    step()
                except Exception as error:
                    log.warning("%s: %s cannot be served: %s", self._label, what, error)
                    failures.append(error)
            if failures:
                serving.set_exception(failures[0])
            else:
                serving.set_result(None)

        threading.Thread(target=run, name="swarm-serve", daemon=True).start()
