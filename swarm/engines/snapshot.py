"""The loaded tensors of a model, between loading and processing: filled, copied, compared, and served after warm-up.

    load_weights     a model by the first tier that works; a snapshot of its loaded tensors
    Snapshot         after processing: live tensors whose bytes are unchanged, copies of the others
    LoadedModels     the models of this process, for the engine's hooks

The code that vLLM and SGLang share. Must not know: the engines' own modules, nodes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from swarm.checkpoint import hf_cache
from swarm.content.manifest import HashScheme
from swarm.engines.layout import short_digest
from swarm.engines.load import RankLoader, Unread
from swarm.engines.serve_loaded import RESTART
from swarm.errors import SettingsError, SourceChanged, SwarmError
from swarm.hashing.cuda import GPU_LEAF_BYTES, chunk_digests, prepare
from swarm.store import DeviceView

# Quantisation methods that leave the weights of CUDA modules as they were loaded, by the prefix of their class names.
KEEPS_WEIGHTS = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")
COPIES_PART = 0.5  # of a GPU's free memory that copies may take; further copies lie in host memory

UNSHARED = ("_name_or_path", "transformers_version")  # keys of a model's config that differ between machines

log = logging.getLogger("swarm")


def load_weights(
    loader: RankLoader,
    model: nn.Module,
    *,
    own: Callable[[], object],
    own_from: Callable[[Path | str], object],
    unsafe: str,
    unread: Unread,
    spared: Callable[[], Mapping[str, torch.Tensor]],
    unsafe_after: Callable[[], str] = str,
) -> Snapshot | None:
    """Loads by the first tier that works; returns a snapshot of the loaded tensors, None if they are not to be served.

    `own()` is the engine's loader on the model that it was given, `own_from(place)` on another directory or hub id.
    `spared()`: tensors that a loader of files need not write. `unsafe` and `unsafe_after()`: why ranks cannot exchange
    tensors. Raises as the engine's loader does if no tier works.
    """
    copies: dict[str, torch.Tensor] = {}

    def loaded() -> None:
        copies.update(take(loader, named_tensors(model), spared=spared()))

    def disk() -> None:
        if loader.files.local == "whole" or not loader.files.is_directory:
            own()
        elif loader.files.description and hf_cache.is_model_id(loader.model_id):
            own_from(loader.model_id)
        else:
            raise SettingsError("model", f"{loader.model_id}: its directory holds no weights, and no peer had them")

    ways = {"loaded": loaded, "checkpoint": lambda: own_from(loader.fetch_checkpoint()), "disk": disk}
    loader.load(ways, unsafe=unsafe, unread=unread)  # type: ignore[arg-type]
    if not unsafe and (unsafe := unsafe_after()):
        log.info("%s: loaded tensors are not served: %s", loader, unsafe)
    if unsafe or not loader.options.serve:
        return None
    try:
        return Snapshot(model, copies)
    except (SwarmError, RuntimeError) as error:  # a GPU without room, or without a driver that loads the kernels
        log.warning("%s: loaded tensors are not served: %s", loader, error)
        return None


def keep_loaded(loader: RankLoader, snapshot: Snapshot | None, model: nn.Module) -> str:
    """After processing: has the loaded tensors served. Returns why updated tensors cannot be served, '' if they can."""
    if snapshot is None:
        return "they are not to be served"
    try:
        served = snapshot.servable(named_tensors(model))
    except SwarmError as error:
        log.warning("%s: loaded tensors are not served: %s", loader, error)
        return str(error)
    loader.server.keep(lambda: served)
    if snapshot.changed:
        return f"processing changed {snapshot.changed} of them, so that the updated ones are not known"
    return ""


def prepare_gpu() -> None:
    """Loads the hash kernels of this thread's GPU in the background; loading tensors or a snapshot needs them soon."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        device = torch.cuda.current_device()

        def load() -> None:
            with contextlib.suppress(SwarmError):  # the first batch of hashes reports it
                prepare(device)

        threading.Thread(target=load, name="swarm-kernels", daemon=True).start()


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names; tied tensors are the same object."""
    found: dict[str, torch.Tensor] = {}
    for tensors in (model.named_parameters, model.named_buffers):
        found.update(tensors(remove_duplicate=False))
    return found


def take(
    loader: RankLoader, live: Mapping[str, torch.Tensor], *, spared: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Fills these tensors from twins; returns copies of them, tied alike, or {} if a snapshot is yet to be taken.

    After an error `spared` are unchanged. Raises as `RankLoader.fetch_loaded` does.
    """
    if all(tensor.device.type == "cpu" for tensor in live.values()):
        copies = _like(live)
        loader.fetch_loaded(copies)
        _copy_into(live, copies)
        return copies
    kept = clone(spared)
    try:
        loader.fetch_loaded(live)
    except BaseException:
        _copy_into({name: live[name] for name in kept}, kept)
        raise
    loader.server.release_twin("the engine processes its weights")  # it writes to these very tensors
    return {}


def clone(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory, tied alike."""
    copies = _like(tensors)
    for name, tensor in tensors.items():
        copies[name].copy_(tensor.detach())
    return copies


@dataclass
class _Loaded:
    """A tensor as it was loaded: under all names that share its memory, with a copy or a digest of its bytes."""

    names: list[str]
    tensor: torch.Tensor | None  # until its digest is known
    copy: torch.Tensor | None = None
    digest: bytes = b""


class Snapshot:
    """The loaded tensors of a model, taken before the engine processes its weights.

    A tensor in host memory is copied. A tensor of a GPU is hashed there, which reads 15 GB in some 10 ms; it is copied
    too where its module's quantisation method may change it: to the same GPU, while there is room. `copies` are host
    copies that exist already.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, torch.Tensor] | None = None) -> None:
        self._loaded = list(_by_memory(copies or named_tensors(model)))
        self.changed = 0  # tensors that processing changed; known after `servable`
        room = {device: int(torch.cuda.mem_get_info(device)[0] * COPIES_PART) for device in _gpus(self._loaded)}
        changeable = _changeable(model)
        for loaded in self._loaded:
            tensor = loaded.tensor
            assert tensor is not None
            if copies:
                loaded.copy, loaded.tensor = tensor, None
            elif tensor.device.type == "cpu" or not tensor.is_contiguous() or changeable.intersection(loaded.names):
                fits = tensor.device.type != "cpu" and tensor.nbytes <= room[tensor.device]
                room[tensor.device] = room.get(tensor.device, 0) - (tensor.nbytes if fits else 0)
                loaded.copy, loaded.tensor = tensor.detach().to(tensor.device if fits else "cpu", copy=True), None
        hashed = [loaded for loaded in self._loaded if loaded.tensor is not None]
        digests = _digests([loaded.tensor for loaded in hashed if loaded.tensor is not None])
        for loaded, digest in zip(hashed, digests, strict=True):
            loaded.digest, loaded.tensor = digest, None

    def servable(self, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """After processing: the live tensor if its bytes are unchanged, else its copy, by name.

        Raises SourceChanged when processing changed a tensor of which there is no copy.
        """
        served: dict[str, torch.Tensor] = {}
        taken: set[int] = set()  # addresses: processing may tie two tensors
        candidates = [next((live[name] for name in loaded.names if name in live), None) for loaded in self._loaded]
        hashed = [now for loaded, now in zip(self._loaded, candidates, strict=True) if loaded.digest and _is_plain(now)]
        digests = dict(zip((now.data_ptr() for now in hashed), _digests(hashed), strict=True))
        for loaded, now in zip(self._loaded, candidates, strict=True):
            if now is not None and now.data_ptr() not in taken and _is_same(loaded, now, digests):
                tensor = now.detach()
                taken.add(now.data_ptr())
            elif loaded.copy is not None:
                tensor = loaded.copy = loaded.copy.to("cpu")
                self.changed += len(loaded.names)
            else:
                raise SourceChanged(loaded.names[0], "processing changed it, which its module was not known to do")
            served |= dict.fromkeys(loaded.names, tensor)
        log.info("%d of %d tensors are served where the engine uses them", len(taken), len(self._loaded))
        return served


@dataclass(frozen=True)
class LoadedModel:
    """A model and its rank's loader.

    `lost`: why its tensors, once updated, could not be served as a weight version; '' if they could. `then` is called
    after warm-up.
    """

    loader: RankLoader
    model: nn.Module
    lost: str
    then: Callable[[], object] | None = None


@dataclass
class LoadedModels:
    """The models that this process of an engine has loaded. The engine's hooks call these methods."""

    engine: str
    entries: list[LoadedModel] = field(default_factory=list)

    def ready(self, unhooked: Sequence[str] = ()) -> None:
        """After warm-up: serves. `unhooked`: functions that change weights and have no hook in this version."""
        for entry in self.entries:
            if unhooked:
                why = f"this {self.engine} has no {unhooked[0]}, so that changed weights would go unnoticed"
                entry.loader.server.begin_change(why)
            entry.loader.ready(entry.then)

    def pause(self, method: str) -> None:
        """Before the engine releases its weights' memory, perhaps to restore it."""
        for entry in self.entries:
            entry.loader.server.pause(f"the engine was told to {method}")

    def resume(self) -> None:
        """After the engine has restored its weights' memory."""
        for entry in self.entries:
            entry.loader.server.resume()

    def begin_change(self, method: str) -> None:
        """Before the engine changes its weights, or releases them for good."""
        for entry in self.entries:
            until = RESTART if entry.lost else "an update of them is finished and has a weight version"
            entry.loader.server.begin_change(f"the engine was told to {method.replace('_', ' ')}", until)

    def end_change(self) -> None:
        """After the engine has changed all weights."""
        for entry in self.entries:
            entry.loader.server.end_change()

    def set_version(self, version: str) -> None:
        """The engine names its current weights."""
        for entry in self.entries:
            if entry.lost:
                log.info("%s: weight version %r is not served: %s", entry.loader, version, entry.lost)
            else:
                entry.loader.server.set_version(version, functools.partial(_live, entry.model))


def model_fields(engine: str, version: str, model_config: Any) -> dict[str, str]:
    """The fingerprint's fields that both engines have."""
    hf = model_config.hf_config
    config = {key: value for key, value in hf.to_dict().items() if key not in UNSHARED}
    return {
        "engine": engine,
        "engine_version": version,
        "architectures": ",".join(getattr(hf, "architectures", None) or []),
        "model_impl": str(model_config.model_impl),
        "dtype": str(model_config.dtype),
        "quantization": str(model_config.quantization),
        "hf_config": short_digest(config),
    }


def _live(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in named_tensors(model).items()}


def _like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New host memory for each tensor; tensors that share memory share the new memory."""
    made: dict[object, torch.Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        memory = (tensor.data_ptr(), tensor.dtype, shape, tensor.stride()) if tensor.numel() else name
        if memory not in made:
            made[memory] = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        found[name] = made[memory]
    return found


def _copy_into(live: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.data.copy_(tensors[name])


def _by_memory(tensors: Mapping[str, torch.Tensor]) -> Iterator[_Loaded]:
    """The tensors, tied names together."""
    found: dict[object, _Loaded] = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        found.setdefault(memory, _Loaded([], tensor)).names.append(name)
    yield from found.values()


def _changeable(model: nn.Module) -> set[str]:
    """Names of the tensors of modules whose quantisation method may change them."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not type(method).__name__.startswith(KEEPS_WEIGHTS):
            names.update(f"{prefix}.{name}" if prefix else name for name in named_tensors(module))
    return names


def _gpus(loaded: Iterable[_Loaded]) -> set[torch.device]:
    return {one.tensor.device for one in loaded if one.tensor is not None and one.tensor.device.type == "cuda"}


def _is_plain(tensor: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    return tensor is not None and tensor.device.type == "cuda" and tensor.is_contiguous()


def _is_same(loaded: _Loaded, now: torch.Tensor, digests: Mapping[int, bytes]) -> bool:
    if loaded.digest:
        return loaded.digest == digests.get(now.data_ptr())
    kept = loaded.copy
    if kept is None or (kept.dtype, kept.shape) != (now.dtype, now.shape) or not now.is_contiguous():
        return False
    there = now.detach().to(kept.device)
    return torch.equal(kept.reshape(-1).view(torch.uint8), there.reshape(-1).view(torch.uint8))


def _digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """A digest of the dtype, the shape and the bytes of each tensor, all contiguous on GPUs."""
    by_device: dict[int, list[int]] = {}
    for number, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device.index, []).append(number)
    digests: dict[int, bytes] = {}
    for device, numbers in by_device.items():
        views = [DeviceView(device, tensors[n].data_ptr(), tensors[n].nbytes, tensors[n]) for n in numbers]
        filled = [(n, view) for n, view in zip(numbers, views, strict=True) if view.nbytes]
        hashes = chunk_digests(HashScheme(leaf_bytes=GPU_LEAF_BYTES), [[view] for _, view in filled])
        digests |= dict.fromkeys(numbers, b"") | dict(
            zip((n for n, _ in filled), (found.xxh3 for found in hashes), strict=True)
        )
    return [
        f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + digests[number] for number, tensor in enumerate(tensors)
    ]
