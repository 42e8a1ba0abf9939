"""What a worker process of any engine does with the swarm: looks around, takes weights, and serves them on.

    join = Join(...)                 what is known before weights are loaded
    join.load(ways)                  tries tiers in the order of `tiers.choose`; each decision is one line of the log
    join.offer                       what to serve of a loaded layout, and what becomes of it
    join.ready()                     after warm-up: hashes and serves in the background

One node for each process, on the runtime's loop, opened when it is first needed and open until the process ends. Every
wait has a deadline, and every failure is one more reason to move on to the next tier; only the last one is raised.

Must not know: engines. Knows tensors only as what stores take.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from swarm.api import fetch_on
from swarm.checkpoint import manifest_builder
from swarm.content.manifest import Digest, FileEntry, Manifest, ModelId
from swarm.engines import cache_gc, metadata
from swarm.engines.layout import CONTENT, WEIGHT_VERSION, Fingerprint, is_loaded, metadata_id
from swarm.engines.serve_loaded import TENSORS, Offer
from swarm.engines.start_log import Start, Step, record
from swarm.engines.tiers import Choice, Layout, Local, Other, Situation, TierName, choose
from swarm.errors import ManifestInvalid, SettingsError, StoreConflict, StoreError, SwarmError
from swarm.node import local_nodes
from swarm.node.node import Fetched, Holder, Node
from swarm.node.resolve import resolve
from swarm.runtime import runtime
from swarm.settings import Settings, join_address, split_address
from swarm.store import Source
from swarm.store.directory import DirectorySource
from swarm.store.disk import Stamp, store_errors
from swarm.store.tensors import VIRTUAL_PATH, IntoStore, TensorSource

if TYPE_CHECKING:
    import torch

LOOK_S = 3.0  # for others, before an engine goes its own way
SETTLE_S = 0.4  # for those whose announcements arrive a little later than the first one's
POLL_S = 0.05
OTHERS_ASKED_MAX = 3  # whose layout is compared, so that the log can say what differs
OTHER_TIMEOUT_S = 2.0
WITHDRAW_TIMEOUT_S = 30.0  # for transfers that are under way
LOCK_TIMEOUT_S = 3600.0  # another rank of this host fetches the same files
TIERS = ("loaded", "checkpoint")

Unread: TypeAlias = "Callable[[metadata.Description], str]"

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class Options:
    """How an engine joins: what concerns engines alone, beside the node's `settings`.

    Read from the mapping that the engine hands its loader, and from SWARM_MODEL_ID, SWARM_LOOK_S, SWARM_TIERS,
    SWARM_SERVE and SWARM_WEIGHT_VERSION where that says nothing. With a weight version, exactly that is loaded, from
    those that serve it, or nothing is.
    """

    settings: Settings
    model_id: str | None = None
    look_s: float = LOOK_S
    tiers: tuple[str, ...] = TIERS
    serve: bool = True
    weight_version: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Options:
        """Raises SettingsError, also for keys that neither this nor `Settings` has."""
        environment = os.environ if environment is None else environment
        own = {one.name for one in dataclasses.fields(cls)} - {"settings"}
        values: dict[str, Any] = {
            name: environment[key] for name in own if (key := f"SWARM_{name.upper()}") in environment
        }
        values |= {name: value for name, value in given.items() if name in own}
        settings = Settings.load({k: v for k, v in given.items() if k not in own}, environment=environment)
        said = values.get("tiers", TIERS)
        tiers = tuple(part.strip() for part in said.split(",")) if isinstance(said, str) else tuple(said)
        if unknown := set(tiers) - {*TIERS, ""}:
            raise SettingsError("tiers", f"{sorted(unknown)} are none of {', '.join(TIERS)}")
        try:
            look_s = float(values.get("look_s", LOOK_S))
        except (TypeError, ValueError):
            raise SettingsError("look_s", f"{values['look_s']!r} is not a number of seconds") from None
        serve = str(values.get("serve", True)).lower() not in ("0", "false", "no", "off")
        model_id, version = values.get("model_id"), values.get("weight_version")
        return cls(
            settings, None if model_id is None else str(model_id), look_s, tiers, serve, str(version or "") or None
        )


@dataclass(frozen=True)
class Rank:
    """Which rank of an engine this is: a `label` for people, and its number on this host."""

    label: str
    local: int


class Join:
    """One rank's load: what it knew, what it took, and what it serves of it.

    `directory` is where the engine reads the model, None for a model id whose files are not here; `fields` are those of
    the fingerprint, without the content. Raises SettingsError, ManifestInvalid, StoreError.
    """

    def __init__(
        self,
        engine: str,
        model_id: str,
        rank: Rank,
        *,
        directory: Path | None,
        fields: Mapping[str, str],
        options: Options,
    ) -> None:
        self.model_id = ModelId(options.model_id or model_id)
        self.directory = directory
        self._fields = dict(fields)
        self._engine = engine
        self._rank = rank
        self._options = options
        self.settings = _of_rank(options.settings, rank)
        self._cache = self.settings.cache
        self._steps: list[Step] = []
        self.fingerprint: Fingerprint | None = None
        self._node: Node | None = None
        self._files: Path | None = None  # of the checkpoint, if they are on this machine
        self._stamps: dict[str, Stamp] = {}  # of its weights, before they were loaded
        self._hashed: Manifest | None = None  # of these files, once they are served
        self.offer = Offer(
            repr(self),
            version=options.weight_version,
            chunk_hash=self._grid["chunk_hash"],
            describe=self._loaded_as,
            serve=self._serve,
            withdraw=lambda digests, why: runtime().run(self._withdraw(digests, why)),
        )
        self._noted = contextlib.ExitStack()  # for `swarm status` on this machine
        self.described, self.local, self.content = self._look_here()

    @property
    def _grid(self) -> dict[str, Any]:
        """How files are cut and hashed."""
        return {name: getattr(self.settings, name) for name in ("chunk_bytes", "leaf_bytes", "chunk_hash")}

    @property
    def first_of_host(self) -> bool:
        """Whether this rank is the one that serves what its host has once."""
        return self._rank.local == 0

    # Before loading

    def _look_here(self) -> tuple[metadata.Description | None, Local, str | None]:
        """What is on this machine: a description, how much of the files, and which content they are."""
        if self.directory is None or not self.directory.is_dir():
            return None, "config", None
        if cache_gc.is_kept(self.directory, self._cache):
            cache_gc.hold(self.directory)
        if (self.directory / metadata.DESCRIPTION).is_file() and not metadata.is_whole(self.directory):
            described = metadata.read(self.directory)
            return described, "headers", described.content
        if not metadata.is_whole(self.directory):
            return None, "config", None
        self._files, self._stamps = self.directory, _stamps(self.directory)
        known = manifest_builder.known(self.directory, cache_dir=self._cache, **self._grid)
        if known is None and self._options.weight_version:
            with contextlib.closing(self._hash_files(self.directory)) as source:
                known = source.manifest  # those that have the version are told by what it was made of
        return None, "whole", known.digest if known else None

    def load(
        self, ways: Mapping[TierName, Callable[[], object]], *, unsafe: str = "", unread: Unread | None = None
    ) -> TierName:
        """Loads weights by the first of `ways` that works; returns which one.

        `unsafe` says why tensors cannot be handed from rank to rank; `unread(description)` what the engine decided
        without the headers that are described. Raises what the way of the last tier raises.
        """
        try:
            choices = choose(self._situation(unsafe, unread))
        except Exception as error:  # whatever the network does, the engine starts
            self._decide("swarm", False, f"failed: {error}")
            choices = [Choice("disk", not self.offer.version, "the swarm cannot be used")]
        try:
            return self._try(choices, ways)
        finally:
            fields = self.fingerprint.fields if self.fingerprint else self._fields
            record(self._cache, Start(self._engine, self.model_id, self._rank.label, fields, tuple(self._steps)))

    def _try(self, choices: list[Choice], ways: Mapping[TierName, Callable[[], object]]) -> TierName:
        for choice in choices:
            if not choice.wanted:
                self._decide(choice.tier, False, choice.why)
                continue
            began = time.monotonic()
            try:
                ways[choice.tier]()
            except Exception as error:
                self._decide(choice.tier, False, f"failed: {error}", time.monotonic() - began)
                if choice is choices[-1]:
                    raise
            else:
                self._decide(choice.tier, True, choice.why, time.monotonic() - began)
                return choice.tier
        raise SwarmError(
            f"{self.model_id}: no tier is left to load weight version {self.offer.version!r} from: {self._steps[0].why}"
        )

    def _decide(self, tier: str, taken: bool, why: str, seconds: float = 0.0) -> None:
        self._steps.append(Step(tier, taken, why[:4096], seconds))
        level = logging.INFO if taken or not why.startswith("failed") else logging.WARNING
        verb = f"taken in {seconds:.2f} s" if taken else "left"
        log.log(level, "%s: %s tier %s: %s", self, tier, verb, why)

    def _situation(self, unsafe: str, unread: Unread | None) -> Situation:
        barred = frozenset(TIERS) - set(self._options.tiers)
        known = Situation(self.content, self.local, unsafe=unsafe, barred=barred, version=self.offer.version or "")
        if barred == frozenset(TIERS) or (self.local == "whole" and self.content is None):
            return known  # nobody could help
        return runtime().run(self._survey(known, unread))

    async def _survey(self, known: Situation, unread: Unread | None) -> Situation:
        """Adds what the others serve to what is known."""
        node = await self._open()
        await self._settle(node)
        holders, unseen = node.holders(self.model_id), ""
        if self.content is None and self.local == "config" and unread is not None and holders:
            manifest, _ = await resolve(
                node, self.model_id, digest=None, find_timeout_s=OTHER_TIMEOUT_S, trusted=self.settings.trusted
            )
            self.described, self.content = metadata.describe(manifest), manifest.digest
            unseen = unread(self.described)
            await self._settle(node)
        strangers = [
            f"{holder.name} ({holder.address}) has {digest[:16]}"
            for digest, who in holders.items()
            if self.content is not None and digest != self.content
            for holder in who
        ]
        self.fingerprint = self._fingerprint_of(self.content, self.offer.version)
        twins = len(self._twins(node))
        return dataclasses.replace(
            known,
            content=self.content,
            twins=twins,
            holders=len(holders.get(Digest(self.content or ""), [])),
            others=[] if twins or self.fingerprint is None else await self._others(node, self.fingerprint),
            strangers=strangers,
            unread=unseen,
        )

    def _twins(self, node: Node) -> list[Holder]:
        fingerprint = self._fingerprint_of(self.content, self.offer.version)
        if fingerprint is None:
            return []
        return [holder for who in node.holders(fingerprint.model_id(self.model_id)).values() for holder in who]

    def _fingerprint_of(self, content: str | None, version: str | None) -> Fingerprint | None:
        named = {WEIGHT_VERSION: version} if version else {}
        return None if content is None else Fingerprint({**self._fields, CONTENT: content, **named})

    async def _settle(self, node: Node) -> None:
        """Returns when twins are known, a moment after anybody with this model is, or when nobody is in time."""
        deadline = node.now() + self._options.look_s
        seen: float | None = None
        while node.now() < deadline and not self._twins(node):
            if seen is None and any(one == self.model_id or is_loaded(one, self.model_id) for one in _ids(node)):
                seen = node.now()
            if seen is not None and node.now() - seen > SETTLE_S:
                return
            await node.changed(POLL_S)

    async def _others(self, node: Node, ours: Fingerprint) -> list[Other]:
        """In what others that have this model loaded differ."""
        found = []
        ids = sorted(one for one in set(_ids(node)) if is_loaded(one, self.model_id))
        for one in ids[:OTHERS_ASKED_MAX]:
            names = [holder.name for who in node.holders(one).values() for holder in who]
            with contextlib.suppress(SwarmError):  # it is only for people to read
                manifest, _ = await resolve(node, one, digest=None, find_timeout_s=OTHER_TIMEOUT_S)
                found.append(Other(names[0], ours.differences(Fingerprint.read(manifest.fingerprint))))
        return found

    # Taking

    def fetch_loaded(self, targets: Mapping[str, torch.Tensor]) -> Fetched:
        """Fills the tensors from twins, and serves them on from then on. Exactly theirs, or an error.

        After an error their contents are undefined. Raises StoreConflict when their layout is another one, and what
        `swarm.fetch` raises.
        """
        if self.fingerprint is None:
            raise SettingsError("content", "is not known, so nothing can be a twin")
        return runtime().run(self._fetch_loaded(targets, self.fingerprint))

    async def _fetch_loaded(self, targets: Mapping[str, torch.Tensor], ours: Fingerprint) -> Fetched:
        node, artifact = await self._open(), ours.model_id(self.model_id)
        loop = asyncio.get_running_loop()
        manifest, _ = await resolve(
            node, artifact, digest=None, find_timeout_s=OTHER_TIMEOUT_S, trusted=self.settings.trusted
        )
        await loop.run_in_executor(None, _demand_twin, artifact, manifest, ours, targets)
        store = await loop.run_in_executor(None, IntoStore, manifest, targets)
        log.info("%s: fetches loaded tensors, %d bytes as %s", self, manifest.size, ours.digest)
        fetched = await node.fetch(artifact, store, timeout_s=self.settings.timeout_s)
        sources = ", ".join(f"{name} {size} bytes" for name, size in fetched.sources.items())
        log.info("%s: fetched in %.2f s from %s", self, fetched.seconds, sources)
        if not self._options.serve:
            node.withdraw(manifest.digest, "serving is turned off")
            return fetched
        self.offer.adopt(manifest.digest)
        return fetched

    def fetch_checkpoint(self) -> Path:
        """The directory with the files of the checkpoint, which the ranks of this host share: the first one fetches.

        Raises StoreError when the others take too long, ManifestInvalid when the files are not those that this engine
        was configured by, and what `swarm.fetch` raises.
        """
        if self.content is None:
            raise SettingsError("content", "is not known, so no files can be the right ones")
        place = self._cache / "checkpoints" / self.content[:16]
        cache_gc.hold(place)
        size = sum(header.size for header in self.described.headers.values()) if self.described else 0
        missing_bytes = max(0, size - cache_gc.size_bytes(place))
        cache_gc.prune(self._cache, self.settings.cache_limit_bytes, need_bytes=missing_bytes)
        with _turn(place):
            if not self._complete(place):
                runtime().run(self._fetch_checkpoint(place, self.content))
            manifest = manifest_builder.recall(self._cache, place)
            if manifest is None:
                raise StoreError(f"{place}: it is not known what was fetched here; is {self._cache} writable?")
        if self.described and metadata.describe(manifest).headers != self.described.headers:
            raise ManifestInvalid(self.model_id, "its headers are not those that this engine was configured by")
        self._files = place
        return place

    def _complete(self, place: Path) -> bool:
        manifest = manifest_builder.recall(self._cache, place)
        return (
            manifest is not None
            and manifest.digest == self.content
            and all((place / f.path).is_file() and (place / f.path).stat().st_size == f.size for f in manifest.files)
        )

    async def _fetch_checkpoint(self, place: Path, content: str) -> None:
        node = await self._open()
        await fetch_on(
            node,
            self.model_id,
            out=place,
            into=None,
            digest=content,
            timeout_s=self.settings.timeout_s,
            settings=self.settings,
        )

    # UploadDriver

    def ready(self, then: Callable[[], object] | None = None) -> None:
        """The engine answers: serves what it has, from a thread of its own, and does `then`. See `serving`."""
        if self._options.serve and self.serving is None:
            steps: dict[str, Callable[[], object]] = {
                "the checkpoint": self._serve_checkpoint,
                "metadata": self._serve_metadata,
                TENSORS: self.offer.publish,
            }
            self.offer.begin(steps if then is None else {**steps, "what was compiled": then})

    @property
    def serving(self) -> Future[None] | None:
        """Done when what was last begun in the background has come to its end; None before `ready`."""
        return self.offer.serving

    def _hash_files(self, directory: Path) -> DirectorySource:
        with _turn(self._cache / "checkpoints" / f"hash-{directory.name}"):
            return manifest_builder.checkpoint(directory, cache_dir=self._cache, **self._grid)[1]

    def _serve_checkpoint(self) -> None:
        """Serves the files of the checkpoint where they are here: one rank of each host does."""
        if self._files is None:
            return
        try:
            source = self._hash_files(self._files)
        except Exception:
            self._demand_loaded(self._files)
            raise
        try:
            self._demand_loaded(self._files, source.manifest)
            self.content, self._hashed = source.manifest.digest, source.manifest
        except BaseException:
            source.close()
            raise
        if not self.first_of_host:
            source.close()
            return
        self._serve(self.model_id, source)
        log.info("%s: serves the files at %s, digest %s", self, self._files, self.content)

    def _demand_loaded(self, files: Path, manifest: Manifest | None = None) -> None:
        """Raises StoreConflict if the files were changed since the weights were loaded from them.

        Then either may have been loaded, so that the content is unknown and nothing is served by its name.
        """
        if self.content in (None, manifest.digest if manifest else self.content) and self._unchanged(files):
            return
        self.content = None
        raise StoreConflict(files, "holds other files than were loaded from it; restart to serve them")

    def _unchanged(self, files: Path) -> bool:
        try:
            return not self._stamps or self._stamps == _stamps(files)
        except OSError:
            return False

    def _serve_metadata(self) -> None:
        """Serves what engines read before the weights: one rank of each host does."""
        if not self.first_of_host or self.content is None:
            return
        if self._files is not None and self._hashed is not None:
            metadata.stage(self._cache, self._files, self._hashed)
        if place := metadata.staged(self._cache, self.content):
            self._serve(metadata_id(self.model_id), metadata.source(self._cache, place))

    def _loaded_as(self, version: str | None) -> tuple[ModelId, Fingerprint] | None:
        ours = self.fingerprint = self._fingerprint_of(self.content, version)
        return (ours.model_id(self.model_id), ours) if ours else None

    def _serve(self, artifact: ModelId, source: Source) -> None:
        async def serve() -> None:
            (await self._open()).serve(artifact, source)

        try:
            runtime().run(serve())
        except BaseException:
            source.close()
            raise

    async def _withdraw(self, digests: set[Digest], why: str) -> None:
        """Returns when nothing reads these tensors any more: their memory may be given away next."""
        node = await self._open()
        closing = [task for digest in digests if (task := node.withdraw(digest, why))]
        if closing:
            await asyncio.wait(closing, timeout=WITHDRAW_TIMEOUT_S)

    async def _open(self) -> Node:
        if self._node is None:
            self._node = await runtime().acquire(self.settings)
            self._noted.enter_context(local_nodes.note(self._cache, self._node.address))
            log.info("%s: node %s at %s", self, self._node.name, self._node.address)
        return self._node

    def __repr__(self) -> str:
        return f"{self.model_id} rank {self._rank.label}"


def _stamps(directory: Path) -> dict[str, Stamp]:
    return {str(path): Stamp.at(path) for path in directory.rglob("*") if metadata.is_weights(path.name)}


def _ids(node: Node) -> list[ModelId]:
    """Model ids of everything that others announce."""
    linked = [one.model_id for peer in node.peers.values() for one in peer.artifacts.values()]
    return linked + [one.model_id for member in node.members() for one in member.profile.artifacts]


def _demand_twin(artifact: str, manifest: Manifest, ours: Fingerprint, targets: Mapping[str, torch.Tensor]) -> None:
    """Raises StoreConflict unless the tensors described are ours by fingerprint, name, dtype, shape and ties."""
    if manifest.tier != "loaded":
        raise StoreConflict(artifact, f"is a {manifest.tier}, not loaded tensors")
    differing = [str(one) for one in ours.differences(Fingerprint.read(manifest.fingerprint))]
    here = TensorSource(targets)
    differing += Layout.of_files([FileEntry(VIRTUAL_PATH, here.size, here.header, ())]).differences(
        Layout.described(manifest)
    )
    if differing:
        raise StoreConflict(artifact, f"is no twin: {'; '.join(differing)}")


def _of_rank(settings: Settings, rank: Rank) -> Settings:
    """Settings of one of several ranks that read the same ones: each has a port and a name of its own."""
    host, port = split_address("listen", settings.listen, default_port=0)
    name = settings.name and f"{settings.name}-{rank.label}"
    return dataclasses.replace(settings, listen=join_address(host, port + rank.local if port else 0), name=name)


@contextlib.contextmanager
def _turn(place: Path) -> Iterator[None]:
    """While the block runs no other process of this host is in one for the same place. Raises StoreError."""
    lock = place.with_name(f".lock-{place.name}")
    with store_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it when its process dies
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(f"{place}: another process has been at it for {LOCK_TIMEOUT_S:.0f} s") from None
                time.sleep(POLL_S)
        yield
    finally:
        os.close(fd)
