"""The arguments of `fetch`, checked before anything is done.

Must not know: nodes, stores beyond the names of devices and targets.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swarm.api.fetching import CommitOf
from swarm.api.handles import HUB_CACHE, HubCache
from swarm.checkpoint import hf_cache
from swarm.content.selection import Selection
from swarm.errors import SettingsError
from swarm.settings import Settings
from swarm.store.casting import cast_dtype
from swarm.store.targets import targets

_DEVICE = re.compile("cpu|cuda(:[0-9]{1,3})?")


@dataclass(frozen=True)
class Want:
    """What `fetch` was asked for. Raises SettingsError for arguments that do not go together."""

    model_id: str
    out: str | Path | HubCache | None
    into: Any
    device: str
    digest: str | None
    timeout_s: float | None
    settings: Settings
    revision: str | None = None
    selection: Selection | None = None
    dtype: Any = None
    commit: CommitOf | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model_id, str):
            raise SettingsError("model_id", f"{self.model_id!r} is no text such as 'org/model'")
        if not _DEVICE.fullmatch(self.device):
            raise SettingsError("device", f"{self.device!r} is not 'cpu', 'cuda' or 'cuda:NUMBER'")
        if self.device != "cpu" and (self.out is not None or self.into is not None):
            raise SettingsError("device", "cannot be combined with out or into, which say where to already")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise SettingsError("timeout_s", f"{self.timeout_s:g} is not above zero")
        if self.out == "":
            raise SettingsError("out", "is empty; say '.' for the working directory")
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
