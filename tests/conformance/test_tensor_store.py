from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from swarm.content.manifest import Chunk, Manifest
from swarm.errors import StoreError
from swarm.store import IsRight
from swarm.store.memory_store import MemoryStore
from swarm.store.tensors import IntoStore
from swarm.testing import check_store

from .sample_tensors import KINDS_OF_SAMPLE


def plain(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def strided(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty((*shape, 2), dtype=dtype)[..., 0]


def slices(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """At an odd place of a larger tensor, where its memory is not a multiple of anything."""
    count = torch.Size(shape).numel()
    return torch.empty(count + 1, dtype=dtype)[1:].reshape(shape)


def test_does_memory_keep_the_contract() -> None:
    check_store(MemoryStore)


@pytest.mark.parametrize("make", [plain, strided, slices])
def test_do_given_tensors_keep_the_contract(make: Callable[[torch.dtype, tuple[int, ...]], torch.Tensor]) -> None:
    check_store(lambda manifest: IntoStore(manifest, {name: make(*kind) for name, kind in KINDS_OF_SAMPLE.items()}))


def test_is_memory_still_served_while_its_tensors_are_in_use() -> None:
    class InUse(MemoryStore):
        def seal(self, is_right: IsRight) -> None:
            super().seal(is_right)
            self.in_use = self.tensors()

    check_store(InUse)


def test_does_the_contract_notice_a_store_that_forgets() -> None:
    class Forgetful(MemoryStore):
        def landing(self, chunk: Chunk) -> Iterator[memoryview]:
            for view in super().landing(chunk):
                yield memoryview(bytearray(len(view)))

    def make(manifest: Manifest) -> Forgetful:
        return Forgetful(manifest)

    with pytest.raises((AssertionError, StoreError)):
        check_store(make)
