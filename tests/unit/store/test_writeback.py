"""A flush that fails is told."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from swarm.store.writeback import Writeback


def test_is_a_failed_writeback_raised_at_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("swarm.store.writeback.WRITEBACK_BYTES", 4)
    with closing(Writeback(lost)) as writeback, (tmp_path / "file").open("w+b") as file:
        writeback.wrote(file.fileno(), 3)
        assert not writeback._flushes
        writeback.wrote(file.fileno(), 3)
        with pytest.raises(OSError, match="Input/output"):
            writeback.flush([])
