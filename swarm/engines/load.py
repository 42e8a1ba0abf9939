"""Loads the weights of a rank: surveys peers, tries tiers in order, and serves the result after warm-up.

    loader = RankLoader(...)         looks at the files on this machine
    loader.begin()                   opens the node and looks for twins, while the engine builds the model
    loader.load(ways)                tries the tiers in the order of `tiers.choose`; each decision is a log line
    loader.server                    the loaded tensors, as peers fetch them
    loader.ready()                   after warm-up: hashes and serves in the background

Every wait has a deadline, and every failure leads to the next tier; only the last tier's error is raised.

Must not know: engines. Knows tensors only as stores take them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from swarm.api import BRING_FIND_S, HUB_CACHE, fetch_on
from swarm.checkpoint import hf_cache
from swarm.content.manifest import Digest, FileEntry, Manifest, ModelId
from swarm.engines import metadata
from swarm.engines.checkpoint_files import CheckpointFiles, model_id_of
from swarm.engines.layout import CONTENT, WEIGHT_VERSION, Fingerprint, TensorLayout, is_loaded
from swarm.engines.pin import EnginePin
from swarm.engines.rank import LOOK_BESIDE_FILES_S, LOOK_S, TIERS, LoadOptions, Rank, RankNode
from swarm.engines.serve_loaded import TENSORS, TensorServer
from swarm.engines.start_log import REASON_MAX, EngineStart, TierAttempt, record
from swarm.engines.tiers import Availability, OtherLayout, TierChoice, TierName, choose
from swarm.errors import SettingsError, StoreConflict, SwarmError
from swarm.node.fetch import Fetched
from swarm.node.holders import Holder
from swarm.node.node import Node
from swarm.node.resolve import resolve
from swarm.runtime import runtime
from swarm.store.tensor_source import VIRTUAL_PATH, TensorSource
from swarm.store.tensors import IntoStore

if TYPE_CHECKING:
    import torch

SETTLE_S = 0.4  # wait for further announcements after the first
POLL_S = 0.05
OTHERS_ASKED_MAX = 3  # layouts that are compared with ours, for the log
OTHER_TIMEOUT_S = 2.0
OTHERS_S = 0.3  # for all of these comparisons
ABANDON_S = 0.8  # without a peer that holds a missing chunk, before a tier gives way to the next

Unread: TypeAlias = "Callable[[metadata.CheckpointDescription], str]"
Ways: TypeAlias = Mapping[TierName, Callable[[], object]]

log = logging.getLogger("swarm")


class RankLoader:
    """The load of a rank of an engine, such as 'vllm 0.33.0', that was given a `model`, a directory or model id.

    `fields`: the fingerprint's fields, without the content. Raises SettingsError, ManifestInvalid, StoreError.
    """

    def __init__(
        self,
        engine: str,
        model: str,
        revision: str | None,
        rank: Rank,
        *,
        fields: Mapping[str, str],
        options: LoadOptions,
    ) -> None:
        self.model_id = ModelId(options.model_id or model_id_of(model))
        self.pin = EnginePin.of(self.model_id, digest=options.digest, revision=revision)
        self.node = RankNode(self.model_id, rank, self.pin.settings(options.settings))
        self.settings = self.node.settings
        # A weight version belongs to a content, so that must be known.
        hash_unknown = bool(options.weight_version or options.digest)
        self.files = CheckpointFiles(self.node, model, revision, hash_unknown=hash_unknown, pin=self.pin)
        self.options = options
        self.fingerprint: Fingerprint | None = None
        self.server = TensorServer(
            repr(self),
            version=options.weight_version,
            describe=self._describe,
            serve=self.node.serve,
            withdraw=self.node.withdraw,
        )
        self.fields = dict(fields)
        self._engine = engine
        self._attempts: list[TierAttempt] = []
        self._abandon_s = math.inf  # of the tier that is tried
        self._peers: int | None = None  # that serve the model
        self._first_s: float | None = None  # when a peer with the model was first known, on the node's clock
        self._ahead: dict[ModelId, Manifest] = {}  # of twins, requested before the model was built

    def begin(self) -> None:
        """Opens the node, looks for twins and requests their manifest, in the background. `load` reports errors."""
        if self._wants_peers or self.options.serve:
            runtime().submit(self._begin())

    async def _begin(self) -> None:
        with contextlib.suppress(SwarmError, OSError):
            node = await self.node.open()
            if not self._wants_peers:
                return
            await self._settle(node)
            ours = self._fingerprint(self.server.version)
            if ours is not None and self._twins(node) and "loaded" in self.options.tiers:
                artifact = ours.model_id(self.model_id)
                self._ahead[artifact] = await self._resolve(node, artifact)

    @property
    def _wants_peers(self) -> bool:
        """Whether a peer could help."""
        unhashed = self.files.local == "whole" and self.files.content is None
        return bool(set(TIERS).intersection(self.options.tiers)) and not unhashed

    def load(self, ways: Ways, *, unsafe: str = "", unread: Unread | None = None) -> TierName:
        """Loads weights by the first of `ways` that works; returns its tier.

        `unsafe`: why ranks cannot exchange tensors. `unread(description)`: the decision that the engine took without
        these headers, '' if none depends on them. Raises the error of the last tier.
        """
        try:
            choices = choose(self._available(unsafe, unread))
        except Exception as error:  # no failure of the network keeps the engine from starting
            self._decide("swarm", False, f"failed: {error}", failed=True)
            choices = [TierChoice("disk", not self.server.version, "the swarm cannot be used")]
        try:
            tier = self._try(choices, ways)
        finally:
            fields = dict(self.fingerprint.fields) if self.fingerprint else self.fields
            start = EngineStart(
                self._engine, self.model_id, self.node.rank.label, fields, tuple(self._attempts), self._peers
            )
            record(self.settings.cache, start)
        if tier == "disk" and self.files.local != "whole":
            self.files.look_again()
        return tier

    def _try(self, choices: list[TierChoice], ways: Ways) -> TierName:
        for choice in choices:
            if not choice.wanted:
                self._decide(choice.tier, False, choice.why)
                continue
            began = time.monotonic()
            self._abandon_s = ABANDON_S if choice.alternative else math.inf
            try:
                if choice.tier == "disk":
                    self._bring()
                    self.files.demand_pinned()
                ways[choice.tier]()
            except Exception as error:
                self._decide(choice.tier, False, f"failed: {error}", time.monotonic() - began, failed=True)
                if choice is choices[-1]:
                    raise
            else:
                self._decide(choice.tier, True, choice.why, time.monotonic() - began)
                return choice.tier
        why = self._attempts[0].why
        raise SwarmError(f"{self.model_id}: no tier is left to load weight version {self.server.version!r} from: {why}")

    def _bring(self) -> None:
        """Reads a model of the hub together with other replicas, before the engine's own loader downloads it alone."""
        files, plain = self.files, hf_cache.is_model_id(self.model_id) and "/" in self.model_id
        if files.local != "config" or files.is_directory or not plain or self.settings.origin == "none":
            return
        try:
            place = runtime().run(self._fetch_to_hub_cache())
        except SwarmError as error:
            log.info("%s: the engine's own loader gets the files (%s)", self, error)
        else:
            log.info("%s: the files are in the Hugging Face cache now, at %s", self, place)

    async def _fetch_to_hub_cache(self) -> Path | None:
        find_timeout_s = min(self.settings.find_timeout_s or BRING_FIND_S, BRING_FIND_S)
        quick = dataclasses.replace(self.settings, find_timeout_s=find_timeout_s)
        fetched, _, place = await fetch_on(
            await self.node.open(), self.model_id, out=HUB_CACHE,
            timeout_s=quick.timeout_s, settings=quick, revision=self.files.revision,
        )  # fmt: skip
        self.node.log_fetch(fetched)
        return place

    def _decide(self, tier: str, taken: bool, why: str, seconds: float = 0.0, *, failed: bool = False) -> None:
        self._attempts.append(TierAttempt(tier, taken, why[:REASON_MAX], seconds, failed))
        verb = f"taken in {seconds:.2f} s" if taken else "skipped"
        log.log(logging.WARNING if failed else logging.INFO, "%s: %s tier %s: %s", self, tier, verb, why)

    # The survey of peers

    def _available(self, unsafe: str, unread: Unread | None) -> Availability:
        barred = frozenset(TIERS) - set(self.options.tiers)
        files = self.files
        known = Availability(
            files.content, files.local, unsafe=unsafe, barred=barred, version=self.server.version or ""
        )
        if not self._wants_peers:
            return known
        return runtime().run(self._survey(known, unread))

    async def _survey(self, known: Availability, unread: Unread | None) -> Availability:
        """Adds the peers' artifacts to the facts of this machine."""
        node = await self.node.open()
        await self._settle(node)
        files, holders, unseen = self.files, node.holders(self.model_id), ""
        if files.content is None and files.local == "config" and unread is not None and holders:
            manifest = await self._resolve(node, self.model_id, revision=files.revision, digest=self.pin.digest)
            files.description, files.content = metadata.describe(manifest), manifest.digest
            unseen = unread(files.description)
            await self._settle(node)
        strangers = [
            f"{peer.name} ({peer.address}) has {digest[:16]}"
            for digest, peers in holders.items()
            if files.content is not None and digest != files.content
            for peer in peers
        ]
        self.fingerprint = self._fingerprint(self.server.version)
        twins = self._twins(node)
        loaded = [node.holders(artifact) for artifact in set(self._loaded_ids(node))]
        self._peers = len({peer.node for found in (holders, *loaded) for peers in found.values() for peer in peers})
        return dataclasses.replace(
            known,
            content=files.content,
            twins=len(twins),
            holders=len(holders.get(files.content or Digest(""), [])),
            others=[] if twins or self.fingerprint is None else await self._others(node, self.fingerprint),
            strangers=strangers,
            unread=unseen,
        )

    async def _settle(self, node: Node) -> None:
        """Returns once twins are known, SETTLE_S after a peer with this model is, or `look_s` after the node opened."""
        look_s = LOOK_BESIDE_FILES_S if self.files.local == "whole" else LOOK_S
        deadline = self.node.opened_at_s + (look_s if self.options.look_s is None else self.options.look_s)
        while node.now() < deadline and not self._twins(node):
            if self._first_s is None and (any(node.holders(self.model_id).values()) or self._loaded_ids(node)):
                self._first_s = node.now()
            if self._first_s is not None and node.now() - self._first_s > SETTLE_S:
                return
            await node.changed(POLL_S)

    async def _resolve(
        self, node: Node, artifact: ModelId, revision: str | None = None, digest: Digest | None = None
    ) -> Manifest:
        """The manifest that peers agree on. Raises as `resolve` does."""
        manifest, _ = await resolve(
            node,
            artifact,
            digest=digest,
            find_timeout_s=OTHER_TIMEOUT_S,
            trusted=self.settings.trusted,
            revision=revision,
        )
        return manifest

    def _twins(self, node: Node) -> list[Holder]:
        fingerprint = self._fingerprint(self.server.version)
        if fingerprint is None:
            return []
        return [peer for peers in node.holders(fingerprint.model_id(self.model_id)).values() for peer in peers]

    def _loaded_ids(self, node: Node) -> list[ModelId]:
        """Artifact ids of the layouts of this model that peers announce."""
        linked = [artifact.model_id for peer in node.peers.values() for artifact in peer.artifacts.values()]
        known = [artifact.model_id for member in node.members() for artifact in member.profile.artifacts]
        return [artifact for artifact in linked + known if is_loaded(artifact, self.model_id)]

    async def _others(self, node: Node, ours: Fingerprint) -> list[OtherLayout]:
        """Other layouts of this model, for the log; an engine does not wait longer than OTHERS_S for them."""

        async def compare(artifact: ModelId) -> OtherLayout:
            names = [peer.name for peers in node.holders(artifact).values() for peer in peers]
            manifest = await self._resolve(node, artifact)
            return OtherLayout(names[0], ours.differences(Fingerprint.read(manifest.fingerprint)))

        asked = [asyncio.create_task(compare(one)) for one in sorted(set(self._loaded_ids(node)))[:OTHERS_ASKED_MAX]]
        if not asked:
            return []
        done, late = await asyncio.wait(asked, timeout=OTHERS_S)
        for task in late:
            task.cancel()
        return [task.result() for task in asked if task in done and task.exception() is None]

    def _fingerprint(self, version: str | None) -> Fingerprint | None:
        content, named = self.files.content, {WEIGHT_VERSION: version} if version else {}
        return None if content is None else Fingerprint({**self.fields, CONTENT: content, **named})

    # The tiers

    def fetch_loaded(self, targets: Mapping[str, torch.Tensor]) -> Fetched:
        """Fills the tensors from twins, and serves them from then on.

        After an error their contents are undefined. Raises StoreConflict for another layout, and the errors of
        `swarm.fetch`.
        """
        if self.fingerprint is None:
            raise SettingsError("content", "is not known, so no peer can be a twin")
        return runtime().run(self._fetch_loaded(targets, self.fingerprint))

    async def _fetch_loaded(self, targets: Mapping[str, torch.Tensor], ours: Fingerprint) -> Fetched:
        node, artifact = await self.node.open(), ours.model_id(self.model_id)
        manifest = self._ahead.get(artifact)
        if manifest is None or set(node.holders(artifact)) != {manifest.digest}:
            manifest = await self._resolve(node, artifact)
        await asyncio.to_thread(_demand_twin, artifact, manifest, ours, targets)
        store = await asyncio.to_thread(IntoStore, manifest, targets)
        log.info("%s: fetches loaded tensors, %d bytes as %s", self, manifest.size, ours.digest)
        fetched = await node.fetch(artifact, store, timeout_s=self.settings.timeout_s, abandon_s=self._abandon_s)
        self.node.log_fetch(fetched)
        if self.options.serve:
            self.server.adopt(manifest.digest)
        else:
            node.withdraw(manifest.digest, "serving is turned off")
        return fetched

    def fetch_checkpoint(self) -> Path:
        """The directory with the checkpoint's files. Raises as `CheckpointFiles.fetch` does."""
        return self.files.fetch(abandon_s=self._abandon_s)

    # After warm-up

    def ready(self, then: Callable[[], object] | None = None) -> None:
        """Serves files, metadata and tensors, and calls `then`, on a thread. `server.serving` is done at its end."""
        if self.options.serve and self.server.serving is None:
            steps: dict[str, Callable[[], object]] = {
                "the checkpoint": self.files.serve,
                "metadata": self.files.serve_metadata,
                TENSORS: self.server.publish,
            }
            self.server.begin(steps if then is None else {**steps, "the compile cache": then})

    def _describe(self, version: str | None) -> tuple[ModelId, Fingerprint] | None:
        ours = self.fingerprint = self._fingerprint(version)
        return (ours.model_id(self.model_id), ours) if ours else None

    def __repr__(self) -> str:
        return repr(self.node)


def _demand_twin(artifact: str, manifest: Manifest, ours: Fingerprint, targets: Mapping[str, torch.Tensor]) -> None:
    """Raises StoreConflict unless fingerprint and tensor layout are ours."""
    if manifest.tier != "loaded":
        raise StoreConflict(artifact, f"is a {manifest.tier}, not loaded tensors")
    differing = [str(difference) for difference in ours.differences(Fingerprint.read(manifest.fingerprint))]
    source = TensorSource(targets)
    here = TensorLayout.of_files([FileEntry(VIRTUAL_PATH, source.size, source.header, ())])
    differing += here.differences(TensorLayout.of_files(manifest.files))
    if differing:
        raise StoreConflict(artifact, f"is no twin: {'; '.join(differing)}")
