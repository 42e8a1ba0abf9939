"""What the disk says, as errors of a store."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from swarm.errors import StoreConflict, StoreError, StoreFull
from swarm.store.file_errors import store_errors


def test_does_each_failure_have_its_error(tmp_path: Path) -> None:
    for number, kind in ((errno.ENOSPC, StoreFull), (errno.ENOTDIR, StoreConflict), (errno.EIO, StoreError)):
        with pytest.raises(kind) as caught, store_errors(tmp_path):
            raise OSError(number, os.strerror(number))
        assert str(tmp_path) in str(caught.value)


def test_does_a_process_without_descriptors_learn_how_to_get_more(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="ulimit -n"), store_errors(tmp_path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
