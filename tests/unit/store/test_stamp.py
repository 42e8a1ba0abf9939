"""The change of a file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.errors import SourceChanged
from swarm.store.stamp import Stamp


def test_does_a_stamp_name_the_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    stamp = Stamp.at(path)
    with path.open("r+") as file:
        stamp.check(path, file.fileno())
        file.truncate(3)
        with pytest.raises(SourceChanged, match="7 bytes became 3"):
            stamp.check(path, file.fileno())
        path.rename(tmp_path / "moved")
        with pytest.raises(SourceChanged, match="it is gone"):
            stamp.check(path, file.fileno())
