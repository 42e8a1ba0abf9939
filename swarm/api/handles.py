"""What the public calls return: leases of artifacts that a node of this process serves.

Must not know: how an artifact is fetched or opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from swarm.content.manifest import Digest, ModelId
from swarm.node.fetch import Fetched
from swarm.protocol.messages import Address
from swarm.runtime import runtime
from swarm.settings import Settings

if TYPE_CHECKING:
    import torch


class HubCache:
    """The type of HUB_CACHE."""

    def __repr__(self) -> str:
        return "swarm.HUB_CACHE"


HUB_CACHE: Final = HubCache()  # `fetch(..., out=HUB_CACHE)`: libraries that load by model id look there


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


async def _withdraw(settings: Settings, digest: Digest) -> None:
    node = await runtime().acquire(settings)
    try:
        node.release(digest)
        await runtime().release(settings)  # the acquisition of `serve` or `fetch`
    finally:
        await runtime().release(settings)
