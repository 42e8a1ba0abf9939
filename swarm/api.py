"""`swarm.fetch` and `swarm.serve`: the public calls.

They work in plain scripts, in threads and inside a running event loop, which `fetch_async` does not block: the work is
done on the loop of `runtime`. This module alone chooses sources and stores for the arguments of users.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from swarm.checkpoint import commit_source, digest_cache, hf_cache, hf_publish, kept, manifest_builder, signature_file
from swarm.checkpoint.promised import described
from swarm.content import promise
from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Digest, Digests, Manifest, ModelId
from swarm.content.selection import Part, Patterns, Selection, TensorChoice
from swarm.errors import FetchTimeout, SettingsError, StoreConflict, StoreError
from swarm.node import commit_parts
from swarm.node.cold_start import Found, OriginModel, find
from swarm.node.fetch import Fetched
from swarm.node.node import Node
from swarm.node.resolve import full_digest, resolve
from swarm.observe.progress import LOOK_EVERY_S, ProgressWatch, ShowProgress, in_notebook, watch
from swarm.observe.progress import Progress as Progress
from swarm.origin import registry
from swarm.protocol.messages import Address, Origin, Signature, unsayable
from swarm.runtime import runtime
from swarm.security import signatures
from swarm.settings import Settings
from swarm.store import Source, Store
from swarm.store.casting import cast_dtype, casts
from swarm.store.directory import Claimed, DirectoryStore
from swarm.store.memory import PromisedSource
from swarm.store.targets import targets
from swarm.store.tensors import CastStore, GpuStore, IntoStore, MemoryStore
from swarm.transfer.verify import copy, is_right

if TYPE_CHECKING:
    import torch


_DIGEST = re.compile("[0-9a-f]{6,64}")
DIGEST_DIGITS = 64  # fewer choose among what is served, and pin nothing
_COMMIT = re.compile("[0-9a-f]{40}")
_DEVICE = re.compile("cpu|cuda(:[0-9]{1,3})?")

T = TypeVar("T")
BRING_FIND_S, LINGER_S = 3.0, 10.0
TURN_S = 0.1  # between two looks at a place that another fetch fills
RESOLVE_GRACE_S = 1.0  # resolution ends before the timeout: its error names the addresses that were tried

log = logging.getLogger("swarm")


class _HubCache:
    def __repr__(self) -> str:
        return "swarm.HUB_CACHE"


HUB_CACHE: Final = _HubCache()  # `fetch(..., out=HUB_CACHE)`: libraries that load by model id look there


class _Lease:
    """An artifact that a node of this process serves until `close()`."""

    def __init__(self, digest: Digest, settings: Settings) -> None:
        self.digest = digest
        self._settings: Settings | None = settings
        self._process = os.getpid()

    def close(self) -> None:
        """Stops serving. Tensors and files stay valid."""
        settings, self._settings = self._settings, None
        if settings is not None and self._process == os.getpid():  # a forked child has no part in its parent's node
            runtime().run(_withdraw(settings, self.digest))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Weights(_Lease, Mapping[str, "torch.Tensor"]):
    """The result of `fetch`: tensors by name if they are in memory, else the directory at `path`.

    With tensors come `files`: the other fetched files (config.json, tokenizer), read-only, by path. `digest` identifies
    the content, to pin it in later fetches. The node serves it until `close()`, the end of a `with` block, or the end
    of the process.
    """

    def __init__(
        self,
        fetched: Fetched,
        tensors: Mapping[str, torch.Tensor],
        files: Mapping[str, memoryview],
        path: Path | None,
        settings: Settings,
    ) -> None:
        super().__init__(fetched.digest, settings)
        self.fetched = fetched
        self.files = files
        self.path = path
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        if self.path is not None:
            raise KeyError(f"{name}: this fetch went to files, which are at {self.path}")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        where = self.path or f"{len(self._tensors)} tensors"
        return f"<Weights {self.fetched.model_id} {self.digest[:12]} {where}>"


class Served(_Lease):
    """The result of `serve`: an artifact that other nodes can fetch until `close()` or the end of a `with` block."""

    def __init__(self, model_id: ModelId, digest: Digest, address: Address, settings: Settings) -> None:
        super().__init__(digest, settings)
        self.model_id = model_id
        self.address = address

    def __repr__(self) -> str:
        return f"<Served {self.model_id} {self.digest[:12]} at {self.address}>"


def fetch(
    model_id: str,
    *,
    out: str | Path | _HubCache | None = None,
    into: Mapping[str, torch.Tensor] | torch.nn.Module | None = None,
    device: str = "cpu",
    digest: str | None = None,
    timeout_s: float | None = None,
    settings: Settings | None = None,
    revision: str | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    tensors: TensorChoice = None,
    progress: ShowProgress = None,
    dtype: torch.dtype | str | None = None,
) -> Weights:
    """Fetches a model from the nodes that serve it, verified, and serves it.

    The default target are new tensors on the CPU, or on the GPU that `device` names ("cuda", "cuda:1"). `into`:
    existing tensors, or a torch.nn.Module, whose names, shapes and dtypes must match; after an error their contents are
    undefined, and autograd takes them for written to in any case. `out`: a
    directory, or the local Hugging Face cache (`out=swarm.HUB_CACHE`). `digest` pins the content. `settings` default to
    `Settings.load()`.

    A part of the model: `include` and `exclude` are patterns of paths, as huggingface_hub's `allow_patterns` and
    `ignore_patterns`; `tensors` are names, patterns of names, or a predicate. Only that part travels. In memory it is
    the tensors that match, in a directory the files that hold them.

    `dtype`: floating tensors of 16 to 64 bits are cast to it as they arrive, on their device. What was cast is not
    served on.

    `progress` is called with `Progress` objects, about ten times a second in this thread; False for none. By default
    a bar is drawn in terminals and notebooks.

    Raises SettingsError, also for a part that matches nothing, ManifestNotFound, ManifestConflict, Stalled,
    FetchTimeout, and StoreError with its kinds.
    """
    selection = Selection.read(include=include, exclude=exclude, tensors=tensors)
    want = _Want(
        model_id, out, into, device, digest, timeout_s, settings or Settings.load(), revision, selection, dtype
    )
    if _in_event_loop() and not in_notebook():
        said = "swarm.fetch blocks the event loop that runs in this thread; there, use `await swarm.fetch_async(...)`"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    if (seen := watch(model_id, progress)) is None:
        return runtime().run(_fetch(want))
    try:
        weights = runtime().run(_fetch(want, seen), look=seen.look, look_every_s=LOOK_EVERY_S)
        seen.look(done=True)
    finally:
        seen.end()
    return weights


async def fetch_async(
    model_id: str,
    *,
    out: str | Path | _HubCache | None = None,
    into: Mapping[str, torch.Tensor] | torch.nn.Module | None = None,
    device: str = "cpu",
    digest: str | None = None,
    timeout_s: float | None = None,
    settings: Settings | None = None,
    revision: str | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    tensors: TensorChoice = None,
    progress: ShowProgress = None,
    dtype: torch.dtype | str | None = None,
) -> Weights:
    """`fetch` for coroutines: it does not block the caller's event loop, in which `progress` is called."""
    selection = Selection.read(include=include, exclude=exclude, tensors=tensors)
    want = _Want(
        model_id, out, into, device, digest, timeout_s, settings or Settings.load(), revision, selection, dtype
    )
    if (seen := watch(model_id, progress)) is None:
        return await asyncio.wrap_future(runtime().submit(_fetch(want)))
    future = asyncio.wrap_future(runtime().submit(_fetch(want, seen)))
    try:
        while not (await asyncio.wait([future], timeout=LOOK_EVERY_S))[0]:
            seen.look()
        weights = await future
        seen.look(done=True)
    finally:
        future.cancel()
        seen.end()
    return weights


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def serve(
    what: str | Path | Mapping[str, torch.Tensor],
    *,
    model_id: str | None = None,
    settings: Settings | None = None,
    revision: str | None = None,
) -> Served:
    """Serves a model directory, a model id out of the local Hugging Face cache, or tensors, until closed.

    `revision` (also `ID@REVISION`): of the cache (branch, tag, commit), or the label of a directory or of tensors.

    Tensors need a `model_id`; they must not change while they are served. Returns when other nodes can fetch.
    Raises SettingsError, ManifestInvalid and StoreError.
    """
    settings = settings or Settings.load()
    name, source, origin = open_source(what, model_id=model_id, settings=settings, revision=revision)
    return serve_source(name, source, origin, settings=settings)


def serve_source(name: ModelId, source: Source, origin: Origin | None, *, settings: Settings) -> Served:
    """Serves a source until closed, and closes it on failure. Raises SettingsError."""

    async def start() -> Served:
        try:
            node = await runtime().acquire(settings)
            try:
                commit_parts.serve(node, name, source, origin=origin, trusted=settings.trusted)
            except BaseException:
                await runtime().release(settings)
                raise
        except BaseException:
            source.close()
            raise
        return Served(name, source.manifest.digest, node.address, settings)

    return runtime().run(start())


def open_source(
    what: str | Path | Mapping[str, torch.Tensor],
    *,
    model_id: str | None,
    settings: Settings,
    revision: str | None = None,
) -> tuple[ModelId, Source, Origin | None]:
    """Model id, source and origin of the argument of `serve`, hashed. Raises as `serve` does."""
    grid: dict[str, Any] = {name: getattr(settings, name) for name in ("chunk_bytes", "leaf_bytes")}
    if isinstance(what, Mapping):
        if model_id is None:
            raise SettingsError("model_id", "tensors have no name of their own; say model_id='org/model'")
        if not what:
            raise SettingsError("tensors", "there are none")
        return _sayable(model_id), manifest_builder.tensors(what, **grid), _labelled(None, revision)
    if isinstance(what, str) and not Path(what).exists():
        what, revision = hf_cache.with_revision(what, revision)
    path = _locate(what, revision)
    found = _sayable(model_id or hf_cache.model_id_of(path) or path.resolve().name)
    origin = hf_cache.named_origin(path)
    source: Source
    if path.is_dir() and hf_cache.model_id_of(path):
        source, skipped = commit_source.snapshot(path, cache_dir=settings.cache, grid=grid)
    elif path.is_dir() and (local := commit_source.downloaded(path, cache_dir=settings.cache, grid=grid)):
        source, skipped, origin = local
    else:
        _, source, skipped = manifest_builder.checkpoint(path, cache_dir=settings.cache, **grid)
    origin = _labelled(origin, revision)
    for entry in skipped:
        log.info("not served: %s (%s)", entry.path, entry.why)
    if signed := signature_file.read(path, source.manifest.digest):
        origin = (origin or Origin("", {})).signed(signed)
    return found, source, origin


def sign(
    what: str | Path, *, key: Path, model_id: str | None, revision: str | None, settings: Settings
) -> tuple[Digest, Signature, Path | None]:
    """Signs a model and writes the signature beside it: digest, signature, and the file unless it was there before.

    Raises as `serve` does, and SettingsError for a key that cannot be used.
    """
    private = signatures.read_key(key)
    path = Path(what) if Path(what).exists() else _locate(*hf_cache.with_revision(str(what), revision))
    name, source, origin = open_source(path, model_id=model_id, settings=settings, revision=revision)
    source.close()
    digest = source.manifest.digest
    made = signatures.sign(private, name, digest, revision=revision or (origin.commit if origin else ""))
    return digest, made, signature_file.add(path, digest, [made])


def _sayable(model_id: str) -> ModelId:
    """Raises SettingsError before hours of hashing, not after, for an id that no message can carry."""
    if why := unsayable(model_id):
        raise SettingsError("model_id", why)
    return ModelId(model_id)


def _labelled(origin: Origin | None, revision: str | None) -> Origin | None:
    """The origin with a revision that the user gives it."""
    if revision is None or (origin and origin.is_revision(revision)):
        return origin
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f@]{1,256}", revision):
        raise SettingsError("revision", f"{revision!r} is not 1 to 256 printable characters without '@'")
    return (origin or Origin("", {})).labelled(revision)


def _locate(what: str | Path, revision: str | None) -> Path:
    path = Path(what)
    if path.exists():
        return path
    if isinstance(what, str) and hf_cache.is_model_id(what):
        known = hf_cache.revisions(what)
        if revision is None and len(known) == 1 and not hf_cache.snapshot(what):
            revision = next(iter(known))  # the cache has the model under another revision than `main` only
        if found := hf_cache.snapshot(what, revision=revision or "main"):
            return found
        if known:
            shown = "; ".join(" = ".join([*names, commit]) for commit, names in known.items())
            commit, names = next(iter(known.items()))
            raise SettingsError(
                "revision",
                f"the Hugging Face cache has {what!r}, but not revision {revision or 'main'!r}; there is {shown}; "
                f"choose one: swarm serve {what}@{names[0] if names else commit}",
            )
        raise SettingsError("path", f"{what!r} is neither a path here nor a model in the local Hugging Face cache")
    raise SettingsError("path", f"{path} does not exist")


@dataclass(frozen=True)
class _Want:
    model_id: str
    out: str | Path | _HubCache | None
    into: Any
    device: str
    digest: str | None
    timeout_s: float | None
    settings: Settings
    revision: str | None = None
    selection: Selection | None = None
    dtype: Any = None

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(self.device):
            raise SettingsError("device", f"{self.device!r} is not 'cpu', 'cuda' or 'cuda:NUMBER'")
        if self.device != "cpu" and (self.out is not None or self.into is not None):
            raise SettingsError("device", "cannot be combined with out or into, which say where to already")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise SettingsError("timeout_s", f"{self.timeout_s:g} is not above zero")
        if self.out is not None and self.into is not None:
            raise SettingsError("out", "cannot be combined with into: a fetch lands in one place")
        if self.out is None and importlib.util.find_spec("torch") is None:
            raise SettingsError("out", "tensors in memory need torch: pip install torch, or say out=DIR")
        if self.device != "cpu":
            object.__setattr__(self, "device", _gpu(self.device))
        if self.dtype is not None:
            if self.out is not None:
                raise SettingsError("dtype", "cannot be combined with out: files keep the types that they have")
            object.__setattr__(self, "dtype", cast_dtype(self.dtype))
        if self.into is not None:
            object.__setattr__(self, "into", targets(self.into))
        name = hf_cache.with_revision(self.model_id, self.revision)[0].removeprefix("hf://")
        if self.out is HUB_CACHE and not hf_cache.is_model_id(name):
            raise SettingsError("model_id", f"{self.model_id!r} cannot be a Hugging Face model id; say out=DIR")


def _gpu(device: str) -> str:
    """The device with its number, initialised: `cuda` is the current GPU of this thread, the caller's.

    Raises SettingsError.
    """
    import torch

    if not torch.cuda.is_available():
        raise SettingsError("device", f"{device!r} needs a GPU, and torch {torch.__version__} finds none here")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    where = torch.device(device)
    number = torch.cuda.current_device() if where.index is None else where.index
    if number >= torch.cuda.device_count():
        raise SettingsError("device", f"{device!r}: torch finds {torch.cuda.device_count()} GPUs here")
    return f"cuda:{number}"


async def _fetch(want: _Want, seen: ProgressWatch | None = None) -> Weights:
    node = await runtime().acquire(want.settings)
    records = runtime().fetches(want.settings)
    try:
        with node.asked_for(want.model_id, "is being fetched"):
            fetched, store, path = await fetch_on(
                node,
                want.model_id,
                revision=want.revision,
                out=want.out,
                into=want.into,
                device=want.device,
                digest=want.digest,
                timeout_s=want.timeout_s if want.timeout_s is not None else want.settings.timeout_s,
                settings=want.settings,
                selection=want.selection,
                dtype=want.dtype,
                resolved=partial(seen.resolved, records) if seen else None,
            )
        made = store.tensors() if isinstance(store, MemoryStore | GpuStore | CastStore) else {}
        tensors = dict(want.into) if want.into is not None else made
        files = store.files() if isinstance(store, MemoryStore | IntoStore | CastStore) else {}
        return Weights(fetched, tensors, files, path, want.settings)
    except BaseException:
        await runtime().release(want.settings)
        raise


async def fetch_on(
    node: Node,
    model_id: str,
    *,
    out: str | Path | _HubCache | None,
    into: Mapping[str, Any] | None,
    digest: str | None,
    timeout_s: float | None,
    settings: Settings,
    device: str = "cpu",
    abandon_s: float = math.inf,
    revision: str | None = None,
    selection: Selection | None = None,
    dtype: torch.dtype | None = None,
    resolved: Callable[[Digest, int], object] | None = None,
) -> tuple[Fetched, Store, Path | None]:
    """Fetches `ID` or `ID@REVISION`, or a part of it, on an open node.

    Returns result and store, and the directory if there is one. In a directory files are whole. `resolved` is called
    with the digest and the bytes of the part once they are known.
    """
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise SettingsError(
            "digest", f"{digest!r} is not a digest: 64 digits from 0 to 9 and a to f, or the first 6 or more"
        )
    model_id, revision = hf_cache.with_revision(model_id, revision)
    began = node.now()
    name, at = origin_of(model_id, revision, settings)
    limits = [limit for limit in (settings.find_timeout_s, timeout_s) if limit is not None]
    find_timeout_s = min(limits, default=math.inf if settings.wait else None)
    try:
        async with asyncio.timeout(None if timeout_s is None else timeout_s + RESOLVE_GRACE_S):
            whole = digest
            if digest is not None and len(digest) < DIGEST_DIGITS:
                whole = await full_digest(node, name, digest, find_timeout_s=find_timeout_s)
            how: dict[str, Any] = {
                "digest": None if whole is None else Digest(whole),
                "find_timeout_s": find_timeout_s,
                "trusted": settings.trusted,
                "revision": revision,
            }
            found = await find(node, name, at, **how) if at else Found(*await resolve(node, name, **how))
    except TimeoutError:
        raise FetchTimeout(model_id, timeout_s=timeout_s or 0.0, fraction=0.0) from None
    manifest, origin = found.manifest, found.origin
    pinned = (digest is not None and digest == whole) or bool(_COMMIT.fullmatch(revision or ""))
    left = _Deadline(node, name, timeout_s, began)
    part = None if selection is None else _part(selection, manifest, whole_files=out is not None or manifest.promised)
    if resolved:
        resolved(manifest.digest, manifest.size if part is None else part.size)
    if manifest.promised and out is None:
        return await _promised_in_memory(node, left, found, into, device, settings, selection, dtype)
    if not isinstance(out, _HubCache):
        store, path = await _opened(left, lambda: _store(name, manifest, out, into, device, settings, part, dtype))
        fetched = await _filled(node, left, store, found, abandon_s=abandon_s, pinned=pinned, part=part)
        if path is not None and part is None:
            await _finished(node, fetched, lambda: _remember(settings.cache, path, _proven(node, manifest), origin))
        return fetched, store, path
    entry = hf_publish.CacheEntry(name)
    lock = await _claimed(left, entry, manifest)
    try:
        await asyncio.get_running_loop().run_in_executor(None, entry.reuse, manifest, origin, part)
        store, _ = await _opened(left, lambda: _store(name, manifest, out, into, device, settings, part, dtype))
        fetched = await _filled(node, left, store, found, abandon_s=abandon_s, pinned=pinned, part=part)
        stamps = store.stamps() if isinstance(store, DirectoryStore) else {}
        snapshot = await _finished(
            node, fetched, lambda: entry.publish(manifest, origin, revision, stamps=stamps, part=part)
        )
        kept.record(settings.cache, name, manifest.digest, snapshot, wrote=entry.wrote)
        if part is None:
            await _finished(node, fetched, lambda: _remember(settings.cache, snapshot, _proven(node, manifest), origin))
        if isinstance(store, DirectoryStore):
            store.moved(snapshot)
    finally:
        entry.unclaim(manifest, lock)
    return fetched, store, snapshot


@dataclass(frozen=True)
class _Deadline:
    """The time that a fetch has left, from its call on."""

    node: Node
    model_id: str
    timeout_s: float | None
    began: float

    def left_s(self) -> float | None:
        """Seconds; None without a deadline."""
        return None if self.timeout_s is None else max(0.1, self.timeout_s - (self.node.now() - self.began))

    async def turn(self) -> None:
        """Sleeps until the next attempt. Raises FetchTimeout after the deadline."""
        if self.timeout_s is not None and self.node.now() - self.began > self.timeout_s:
            raise FetchTimeout(self.model_id, timeout_s=self.timeout_s, fraction=0.0)
        await asyncio.sleep(TURN_S)


async def _opened(left: _Deadline, make: Callable[[], tuple[Store, Path | None]]) -> tuple[Store, Path | None]:
    """The store. Waits while another fetch writes the same artifact there; its files then count as fetched."""
    waiting = False
    while True:
        try:
            return await asyncio.get_running_loop().run_in_executor(None, make)
        except Claimed as error:
            if not waiting:
                log.info("%s: %s is being filled by another fetch; waiting for it", left.model_id, error.where)
                waiting = True
            await left.turn()


async def _claimed(left: _Deadline, entry: hf_publish.CacheEntry, manifest: Manifest) -> int:
    """The lock of the artifact in the hub cache."""
    waiting = False
    while (lock := entry.claim(manifest)) is None:
        if not waiting:
            log.info("%s: another fetch puts it into the Hugging Face cache; waiting for it", left.model_id)
            waiting = True
        await left.turn()
    return lock


async def _promised_in_memory(
    node: Node,
    left: _Deadline,
    found: Found,
    into: Mapping[str, Any] | None,
    device: str,
    settings: Settings,
    selection: Selection | None,
    dtype: torch.dtype | None,
) -> tuple[Fetched, Store, None]:
    """Fetches a promise into tensors. Host memory holds its bytes until they are proven, and only then they move on.

    New tensors on the CPU share that memory.
    """
    promised = found.manifest
    files = None if selection is None else _part(selection, promised, whole_files=True)
    store = await asyncio.get_running_loop().run_in_executor(None, MemoryStore, promised, files)
    fetched = await _filled(node, left, store, found, abandon_s=math.inf, pinned=True, part=files)

    def place() -> Store:
        numbers = range(len(promised.files)) if files is None else files.files
        manifest = described(store, _digests(node, promised), numbers)
        part = None if selection is None else selection.part(manifest, whole_files=False)
        if into is None and device == "cpu" and not (dtype is not None and casts(manifest, dtype)):
            store.describe(manifest, part)
            return store
        target, _ = _store(left.model_id, manifest, None, into, device, settings, part, dtype)
        length = len(manifest.chunks)
        chunks = Bitfield.full(length) if part is None else part.chunks
        copy(store, target, Bitfield(length), chunks=chunks, blake3=True)
        target.seal(lambda chunk: is_right(target, chunk, blake3=True))
        return target

    target = await _finished(node, fetched, place)
    if target is not store and selection is None and not isinstance(target, CastStore):
        node.replace_source(fetched.digest, PromisedSource(promised, target))
    return fetched, target, None


def _part(selection: Selection, manifest: Manifest, *, whole_files: bool) -> Part | None:
    """The part of an artifact. A promise has no tensors yet: all files come in which they may be."""
    if manifest.promised:
        selection = dataclasses.replace(selection, tensors=None)
    return selection.part(manifest, whole_files=whole_files)


def _digests(node: Node, manifest: Manifest) -> list[Digests]:
    """The digests of a promise's chunks; zeros of chunks that are not here."""
    unknown = Digests(bytes(16), bytes(32))
    return [node.known(chunk, manifest.digest) or unknown for chunk in manifest.chunks]


def _proven(node: Node, manifest: Manifest) -> Manifest:
    """The manifest that a promise has become; any other one is what it is."""
    if not manifest.promised:
        return manifest
    return promise.proven(manifest, _digests(node, manifest), headers={}, unused={})


def origin_of(model_id: str, revision: str | None, settings: Settings) -> tuple[ModelId, OriginModel | None]:
    """The id of a model in the swarm, and where it is read if no peer has it. Raises SettingsError."""
    address = registry.parse(model_id)
    if address is None:
        plain = hf_cache.is_model_id(model_id) and "/" in model_id
        if settings.origin == "none" or settings.signed_by or not plain:  # an origin has no signature of a publisher
            return ModelId(model_id), None
        address = registry.OriginAddress(settings.origin, model_id, model_id)
    reader = registry.make_origin(address.scheme)
    limits = settings.origin_limit, settings.origin_readers
    return ModelId(address.model_id), OriginModel(reader, address.model, revision, *limits)


async def _filled(
    node: Node,
    left: _Deadline,
    store: Store,
    found: Found,
    *,
    abandon_s: float,
    pinned: bool,
    part: Part | None,
) -> Fetched:
    try:
        return await node.fetch(
            ModelId(left.model_id),
            store,
            origin=found.origin,
            timeout_s=left.left_s(),
            abandon_s=abandon_s,
            pinned=pinned,
            wanted=None if part is None else part.chunks,
            source=found.source,
        )
    except FetchTimeout as error:
        timeout_s = left.timeout_s or error.timeout_s
        raise FetchTimeout(left.model_id, timeout_s=timeout_s, fraction=error.fraction) from error


async def _finished(node: Node, fetched: Fetched, work: Callable[[], T]) -> T:
    """The last step of a fetch, on a thread; if it fails, the artifact is not served."""
    try:
        return await asyncio.get_running_loop().run_in_executor(None, work)
    except BaseException:
        node.release(fetched.digest)
        raise


def _store(
    model_id: str,
    manifest: Manifest,
    out: str | Path | _HubCache | None,
    into: Mapping[str, Any] | None,
    device: str,
    settings: Settings,
    part: Part | None,
    dtype: torch.dtype | None,
) -> tuple[Store, Path | None]:
    if dtype is not None and casts(manifest, dtype):
        return CastStore(manifest, dtype, device=device, tensors=into, part=part), None
    if into is not None:
        return IntoStore(manifest, into, part), None
    if out is None:
        return MemoryStore(manifest, part) if device == "cpu" else GpuStore(manifest, device, part), None
    path = hf_publish.CacheEntry(model_id).staging(manifest) if isinstance(out, _HubCache) else Path(out)
    if path.exists() and not path.is_dir():
        raise StoreConflict(path, "is not a directory; fetch to another place")
    return DirectoryStore(path, manifest, fsync=settings.fsync, part=part), path


def _remember(cache: Path, path: Path, manifest: Manifest, origin: Origin | None) -> None:
    try:
        if origin and origin.signatures:
            signature_file.add(path, manifest.digest, origin.signatures)
        digest_cache.remember(cache, path, manifest)
    except StoreError as error:
        log.warning("%s; the fetch is complete, but `swarm verify %s` will know nothing of it", error, path)


def bring(model_id: str, revision: str | None, *, settings: Settings) -> Path:
    """Fetches a model of the hub into the Hugging Face cache for a program that reads it there; returns its snapshot.

    Looks for peers and the hub for at most `BRING_FIND_S`, because that program can download by itself. Then serves the
    model for up to `LINGER_S`, while other nodes still fetch it: they started at the same time. Raises as `fetch` does.
    """
    quick = dataclasses.replace(settings, find_timeout_s=min(settings.find_timeout_s or BRING_FIND_S, BRING_FIND_S))
    with fetch(model_id, out=HUB_CACHE, settings=quick, revision=revision) as weights:
        runtime().run(_linger(quick, weights.digest))
    if weights.path is None:
        raise StoreError(f"{model_id}: the Hugging Face cache has no directory of it")
    return weights.path


async def _linger(settings: Settings, digest: Digest) -> None:
    node = await runtime().acquire(settings)
    try:
        await linger_on(node, digest)
    finally:
        await runtime().release(settings)


async def linger_on(node: Node, digest: Digest) -> None:
    """Serves an artifact for up to `LINGER_S`, while other nodes still fetch it: they started at the same time."""
    deadline = node.now() + LINGER_S
    while node.feeds(digest) and node.now() < deadline:
        await node.changed(TURN_S)


async def _withdraw(settings: Settings, digest: Digest) -> None:
    node = await runtime().acquire(settings)
    try:
        node.release(digest)
        await runtime().release(settings)  # the acquisition of `serve` or `fetch`
    finally:
        await runtime().release(settings)
