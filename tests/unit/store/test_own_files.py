"""Files that are replaced as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.store.own_files import replacing


def test_does_a_draft_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path, drafts = tmp_path / "file", tmp_path / "drafts"
    drafts.mkdir()
    for content, draft_dir in (("first", None), ("second", drafts)):
        with replacing(path, draft_dir=draft_dir) as draft:
            assert draft.parent == (draft_dir or tmp_path)
            draft.write_text(content)
        assert path.read_text() == content
    with pytest.raises(TypeError), replacing(path) as draft, draft.open("w") as file:
        file.write(b"half")  # type: ignore[arg-type]
    assert path.read_text() == "second"
    assert sorted(tmp_path.rglob("*")) == [drafts, path], "no draft is left"
