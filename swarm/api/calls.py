"""`fetch`, `fetch_async` and `serve`, as users call them.

They work in plain scripts, in threads and inside a running event loop, which `fetch_async` does not block: the work is
done on the loop of `runtime`.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.api.fetching import fetch_on
from swarm.api.handles import HubCache, Served, Weights
from swarm.api.serving import open_source, serve_source
from swarm.api.want import Want
from swarm.content.selection import Patterns, Selection, TensorChoice
from swarm.observe.progress import LOOK_EVERY_S, ProgressWatch, ShowProgress, in_notebook, watch
from swarm.runtime import runtime
from swarm.settings import Settings
from swarm.store.memory_store import MemoryStore
from swarm.store.tensors import CastStore, GpuStore, IntoStore

if TYPE_CHECKING:
    import torch


def fetch(
    model_id: str,
    *,
    out: str | Path | HubCache | None = None,
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
    want = Want(model_id, out, into, device, digest, timeout_s, settings or Settings.load(), revision, selection, dtype)
    if _in_event_loop() and not in_notebook():
        said = "swarm.fetch blocks the event loop that runs in this thread; there, use `await swarm.fetch_async(...)`"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    if (seen := watch(model_id, progress)) is None:
        return runtime().run(fetch_wanted(want))
    try:
        weights = runtime().run(fetch_wanted(want, seen), look=seen.look, look_every_s=LOOK_EVERY_S)
        seen.look(done=True)
    finally:
        seen.end()
    return weights


async def fetch_async(
    model_id: str,
    *,
    out: str | Path | HubCache | None = None,
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
    want = Want(model_id, out, into, device, digest, timeout_s, settings or Settings.load(), revision, selection, dtype)
    if (seen := watch(model_id, progress)) is None:
        return await asyncio.wrap_future(runtime().submit(fetch_wanted(want)))
    future = asyncio.wrap_future(runtime().submit(fetch_wanted(want, seen)))
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


async def fetch_wanted(want: Want, seen: ProgressWatch | None = None) -> Weights:
    """A fetch by a node of this process, on the loop of `runtime`. Raises as `fetch` does."""
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
                commit=want.commit,
            )
        made = store.tensors() if isinstance(store, MemoryStore | GpuStore | CastStore) else {}
        tensors = dict(want.into) if want.into is not None else made
        files = store.files() if isinstance(store, MemoryStore | IntoStore | CastStore) else {}
        return Weights(fetched, tensors, files, path, want.settings)
    except BaseException:
        await runtime().release(want.settings)
        raise
