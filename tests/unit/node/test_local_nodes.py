"""Notes of running nodes: found while they run, gone afterwards, and never in anybody's way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from swarm.node.local_nodes import addresses, note, process


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    return ended.pid


def test_is_a_running_node_found(tmp_path: Path) -> None:
    assert addresses(tmp_path) == []
    with note(tmp_path, "127.0.0.1:1"):
        assert addresses(tmp_path) == ["127.0.0.1:1"]
    assert addresses(tmp_path) == []


def test_is_the_youngest_last(tmp_path: Path) -> None:
    with note(tmp_path, "127.0.0.1:1"), note(tmp_path, "[::1]:2"):
        os.utime(tmp_path / "running" / f"{process()}-2", (1, 1))
        assert addresses(tmp_path) == ["[::1]:2", "127.0.0.1:1"]


def test_is_the_note_of_a_dead_process_removed(tmp_path: Path) -> None:
    folder = tmp_path / "running"
    folder.mkdir()
    space = process().partition(".")[0]
    (folder / f"{space}.{dead_pid()}-1").write_text("127.0.0.1:1")
    assert addresses(tmp_path) == []
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["0123456789ab.1-7", "0123456789ab.4194305-7", "4194305-7", "x-7"])
def test_a_note_of_another_pid_space_is_kept_and_its_address_tried(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "running"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (folder / name).write_text(address)
        with note(tmp_path, "127.0.0.1:1"):
            assert addresses(tmp_path) == [address, "127.0.0.1:1"]
    assert addresses(tmp_path) == []
    assert [path.name for path in folder.iterdir()] == [name]
    (folder / name).write_text("no address")
    assert addresses(tmp_path) == []


def test_is_a_note_that_is_being_written_passed_over(tmp_path: Path) -> None:
    with note(tmp_path, "127.0.0.1:1"):
        for number, contents in enumerate((b"", b" \n", b"\xff")):
            (tmp_path / "running" / f"{process()}-bad{number}").write_bytes(contents)
        (tmp_path / "running" / f"{process()}-gone").symlink_to("nowhere")
        assert addresses(tmp_path) == ["127.0.0.1:1"]


def test_does_a_removed_note_matter(tmp_path: Path) -> None:
    with note(tmp_path, "127.0.0.1:1"):
        (tmp_path / "running" / f"{process()}-1").unlink()


def test_does_a_cache_that_cannot_be_written_to_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with note(tmp_path / "file", "127.0.0.1:1"):
        assert addresses(tmp_path / "file") == []
