"""Does what a start decided stay readable, and out of the way?"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from swarm.engines import start_log
from swarm.engines.start_log import EngineStart, TierAttempt


def start(model_id: str = "org/model", *attempts: TierAttempt) -> EngineStart:
    return EngineStart("vllm 0.33.0", model_id, "tp 0 of 1", {"dtype": "bfloat16"}, attempts)


def test_is_a_start_recalled_as_it_was_recorded(tmp_path: Path) -> None:
    left = TierAttempt("loaded", False, "nobody has it", 0.2)
    told = start("org/model", left, TierAttempt("checkpoint", True, "from 2 peers", 1.5))
    start_log.record(tmp_path, told)
    ((_, found),) = start_log.recall(tmp_path)
    assert found == told
    assert found.taken == told.attempts[1]
    assert start("org/model", left).taken is None


def test_come_the_newest_first_and_do_old_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_log, "KEPT", 3)
    for number in range(5):
        start_log.record(tmp_path, start(f"org/{number}"))
    found = start_log.recall(tmp_path)
    assert [each.model_id for _, each in found] == ["org/4", "org/3", "org/2"]
    assert [at for at, _ in found] == sorted((at for at, _ in found), reverse=True)


def test_is_what_cannot_be_read_ignored_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start_log.record(tmp_path, start())
    (tmp_path / "starts" / "1-bad.json").write_text('{"engine": 1}')
    assert len(start_log.recall(tmp_path)) == 1
    assert "1-bad.json is ignored" in caplog.text
    assert start_log.recall(tmp_path / "nowhere") == []


def test_does_a_start_go_on_where_nothing_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "swarm"):
        start_log.record(tmp_path / "file", start())
    assert "is not kept" in caplog.text
