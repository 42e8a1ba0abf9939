"""Sources for what users serve or sign: directories, models of the Hugging Face cache, tensors.

Chooses the source and its origin, hashes it, and gives it to a node. Must not know: fetches.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swarm.api.handles import Served
from swarm.checkpoint import commit_source, hf_cache, manifest_builder, signature_file
from swarm.content.manifest import Digest, ModelId
from swarm.errors import SettingsError
from swarm.node import commit_parts, promised_seed
from swarm.origin import registry
from swarm.protocol.messages import Origin, Signature, unsayable
from swarm.runtime import runtime
from swarm.security import signatures
from swarm.settings import Settings
from swarm.store import Source
from swarm.store.file_errors import store_errors

if TYPE_CHECKING:
    import torch

log = logging.getLogger("swarm")


def serve_source(name: ModelId, source: Source, origin: Origin | None, *, settings: Settings) -> Served:
    """Serves a source until closed, and closes it on failure. Raises SettingsError."""

    async def start() -> Served:
        try:
            node = await runtime().acquire(settings)
            try:
                commit_parts.serve(node, name, source, origin=origin, trusted=settings.trusted)
                promised_seed.follow(node, name, source)
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
    """Model id, source and provenance of the argument of `serve`, hashed. Raises as `serve` does."""
    with contextlib.nullcontext() if isinstance(what, Mapping) else store_errors(Path(what)):
        return _open_source(what, model_id=model_id, settings=settings, revision=revision)


def _open_source(
    what: str | Path | Mapping[str, torch.Tensor], *, model_id: str | None, settings: Settings, revision: str | None
) -> tuple[ModelId, Source, Origin | None]:
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
    with store_errors(Path(what)):
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
    """The provenance with a revision that the user gives it."""
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
        advice = f", or read it from the hub: swarm serve --origin {what}" if "/" in what else ""
        raise SettingsError(
            "path",
            f"{what!r} is neither a path here nor a model in the local Hugging Face cache, {hf_cache.cache_root()}; "
            f"name a directory{advice}",
        )
    if registry.parse(str(what)):
        raise SettingsError("path", f"{what} is the address of an origin; say swarm serve --origin {what}")
    raise SettingsError("path", f"{path} does not exist")
