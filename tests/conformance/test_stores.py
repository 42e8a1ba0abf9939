from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.content.manifest import Chunk, Manifest
from swarm.errors import StoreError
from swarm.store import FileSpan
from swarm.store.directory import DirectoryStore
from swarm.testing import check_store


@pytest.mark.parametrize("fsync", [True, False])
def test_does_a_directory_keep_the_contract(tmp_path: Path, fsync: bool) -> None:
    check_store(lambda manifest: DirectoryStore(tmp_path / manifest.digest, manifest, fsync=fsync), persistent=True)


class Forgetful(DirectoryStore):
    """Loses the last view of every landing."""

    def landing(self, chunk: Chunk) -> Iterator[memoryview]:
        views = list(super().landing(chunk))
        yield memoryview(bytearray(sum(map(len, views))))


class Lent(DirectoryStore):
    """Serves a byte range next to the right one."""

    def spans(self, chunk: Chunk) -> Iterator[FileSpan]:
        for span in super().spans(chunk):
            yield FileSpan(span.fd, span.offset + 1, span.size)


@pytest.mark.parametrize("broken", [Forgetful, Lent])
def test_does_the_contract_notice_a_broken_store(tmp_path: Path, broken: type[DirectoryStore]) -> None:
    def make(manifest: Manifest) -> DirectoryStore:
        return broken(tmp_path / manifest.digest, manifest)

    with pytest.raises((AssertionError, StoreError)):
        check_store(make)
