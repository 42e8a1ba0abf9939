"""Peer-to-peer distribution of model weights: replicas feed each other, every chunk verified.

    weights = swarm.fetch("org/model")                   # mapping: tensor name -> torch.Tensor
    path = swarm.fetch("org/model", out="dir").path      # a model directory
    with swarm.serve("dir", model_id="org/model"): ...   # or a state_dict
    model = swarm.transformers.load("org/model")         # a model of the transformers library

Importing this imports nothing: the names below load on first use.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` would be imported for it
if TYPE_CHECKING:
    from swarm.api import HUB_CACHE, Progress, Served, Weights, fetch, fetch_async, serve
    from swarm.engines import transformers
    from swarm.errors import (
        CheckpointIncomplete,
        FetchError,
        FetchTimeout,
        ManifestConflict,
        ManifestError,
        ManifestInvalid,
        ManifestNotFound,
        OriginError,
        RevisionNotFound,
        SettingsError,
        SourceChanged,
        Stalled,
        StoreConflict,
        StoreError,
        StoreFull,
        SwarmError,
        Unpinnable,
        Unsigned,
    )
    from swarm.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "HUB_CACHE",
    "CheckpointIncomplete",
    "FetchError",
    "FetchTimeout",
    "ManifestConflict",
    "ManifestError",
    "ManifestInvalid",
    "ManifestNotFound",
    "OriginError",
    "Progress",
    "RevisionNotFound",
    "Served",
    "Settings",
    "SettingsError",
    "SourceChanged",
    "Stalled",
    "StoreConflict",
    "StoreError",
    "StoreFull",
    "SwarmError",
    "Unpinnable",
    "Unsigned",
    "Weights",
    "__version__",
    "fetch",
    "fetch_async",
    "serve",
    "transformers",
]


def __getattr__(name: str) -> object:
    if name == "transformers":
        from swarm.engines import transformers

        return transformers
    if name == "Settings":
        from swarm.settings import Settings

        return Settings
    if name in __all__:
        import swarm.errors as errors

        if hasattr(errors, name):
            return getattr(errors, name)
        from swarm import api

        return getattr(api, name)
    raise AttributeError(f"module 'swarm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, those that load on first use included."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
