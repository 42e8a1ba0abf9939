"""`swarm serve` of invalid checkpoints, and of files that change later."""

import json
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .processes import QUICK, Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration


def safetensors(header: str | dict[str, Any], data: bytes = bytes(8), *, length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(first: int, end: int, *, dtype: str = "U8", count: int | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - first if count is None else count], "data_offsets": [first, end]}


BROKEN = {
    "too_short": (b"\x08\0\0", "not even a header length"),
    "truncated": (safetensors({"a": tensor(0, 8)})[:20], "truncated"),
    "giant_length": (safetensors({"a": tensor(0, 8)}, length=1 << 60), f"claims {1 << 60} bytes"),
    "overlap": (safetensors({"a": tensor(0, 8), "b": tensor(4, 8)}), "'b' overlaps its neighbour"),
    "unknown_dtype": (safetensors({"a": tensor(0, 8, dtype="F7")}), "unknown dtype 'F7'"),
    "past_the_end": (safetensors({"a": tensor(0, 80)}), "end at byte"),
    "gap": (safetensors({"a": tensor(0, 2), "b": tensor(4, 8)}), "leaves a gap"),
    "wrong_shape": (safetensors({"a": tensor(0, 8, count=1 << 50)}), "'a' of U8"),
    "name_twice": (
        safetensors(f'{{"a": {json.dumps(tensor(0, 4))}, "a": {json.dumps(tensor(4, 8))}}}'),
        "name given twice: 'a'",
    ),
    "not_json": (safetensors("{"), "not JSON"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_is_a_broken_safetensors_file_refused_by_name(machine: Machine, model: Path, kind: str) -> None:
    data, why = BROKEN[kind]
    (model / "broken.safetensors").write_bytes(data)
    line = machine.run("serve", model, "--no-mdns").error(3)
    assert "broken.safetensors" in line
    assert why in line


def test_is_an_unreadable_file_named(machine: Machine, model: Path) -> None:
    wrapper: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and there is no setpriv to give that up")
        wrapper = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    (model / "b.safetensors").chmod(0)
    line = machine.start("serve", model, "--no-mdns", wrapper=wrapper).end().error(5)
    assert "b.safetensors: Permission denied" in line


def test_is_a_path_that_does_not_exist_named(machine: Machine) -> None:
    assert "org/nowhere" in machine.run("serve", "org/nowhere", "--no-mdns").error(2)


def test_is_a_port_in_use_named(machine: Machine, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = machine.run("serve", model, "--no-mdns", "--listen", f"127.0.0.1:{port}").error(2)
    assert f"port {port} on 127.0.0.1 is in use" in line


def change_content(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    change_content(new)
    new.rename(path)


def change_and_restore_mtime(path: Path) -> None:
    before = path.stat()
    change_content(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def ready(node: Process) -> bool:
    try:
        with urllib.request.urlopen(f"http://{node.address}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 503:
            raise
        return False


@pytest.mark.parametrize("change", [change_content, change_and_restore_mtime, replace])
def test_a_seed_whose_files_changed_serves_the_new_ones(
    machine: Machine, model: Path, out: Path, change: Callable[[Path], None]
) -> None:
    seed = machine.serve(model)
    assert ready(seed)
    change(model / "b.safetensors")
    wait_until(lambda: not ready(seed), "the seed to notice")
    assert f"{model / 'b.safetensors'} changed while it was served" in seed.err
    wait_until(lambda: seed.out.count(" ready: ") == 2, "the seed to serve again")
    assert ready(seed)
    assert machine.run("status", "--peer", seed.address).code == 0
    assert machine.fetch(out, peers=[seed.address]).end().code == 0
    assert contents(out) == contents(model)


def test_a_seed_whose_files_are_incomplete_is_unhealthy_until_they_are_whole(
    machine: Machine, model: Path, out: Path
) -> None:
    seed = machine.serve(model)
    whole = (model / "b.safetensors").read_bytes()
    truncate(model / "b.safetensors")
    newcomer = machine.fetch(out, peers=[seed.address])
    wait_until(lambda: not ready(seed), "the seed to notice")
    assert newcomer.end().code in (3, 4)
    assert contents(out) == {}
    assert seed.running
    assert not ready(seed)
    assert machine.run("status", "--peer", seed.address).code == 1
    (model / "b.safetensors").write_bytes(whole)
    wait_until(lambda: ready(seed), "the seed to serve again")
    assert machine.fetch(out, peers=[seed.address]).end().code == 0
    assert contents(out) == contents(model)


@pytest.mark.timeout(120)
def test_a_seed_whose_directory_is_gone_ends_with_an_error(machine: Machine, model: Path) -> None:
    seed = machine.serve(model)
    shutil.rmtree(model)
    wait_until(lambda: not ready(seed), "the seed to notice")
    assert seed.wait_to_end(60)
    assert str(model) in seed.end().err.splitlines()[-1]
    assert seed.end().code != 0


def test_a_newcomer_that_serves_on_ends_when_its_files_changed(machine: Machine, model: Path, out: Path) -> None:
    seed = machine.serve(model)
    newcomer = machine.start("fetch", "org/model", "--out", out, "--no-mdns", "--peer", seed.address)
    newcomer.wait_for("serving it on at")
    change_content(out / "b.safetensors")
    assert "b.safetensors changed while it was served" in newcomer.end().error(5)


@pytest.mark.parametrize("change", [change_content, truncate])
def test_does_a_fetch_complete_from_another_seed_when_one_source_changes_midway(
    machine: Machine, tmp_path: Path, out: Path, change: Any
) -> None:
    model = write_model(tmp_path / "model", size=16_000_000)
    expected = contents(model)
    shutil.copytree(model, tmp_path / "copy")
    changing = machine.serve(model, "--upload-limit", "8MB/s")
    steady = machine.serve(tmp_path / "copy", "--upload-limit", "8MB/s")
    newcomer = machine.fetch(out, peers=[changing.address, steady.address])
    wait_until(lambda: list(out.glob(".swarm/*/b.safetensors")), "the fetch to begin")
    change(model / "b.safetensors")
    report = newcomer.end().report
    assert "changed while it was served" in changing.err
    assert contents(out) == expected
    assert report["rejected_chunks"] <= 3


def test_does_a_seed_name_a_changed_file_before_it_hashes_again(machine: Machine, model: Path, out: Path) -> None:
    first = machine.serve(model)
    machine.fetch(out, peers=[first.address]).end()
    change_content(model / "a.safetensors")
    second = machine.serve(model)
    assert second.digest != first.digest
    line = machine.fetch(out, peers=[second.address], environment=QUICK).end().error(5)
    assert "a.safetensors: exists with other content" in line
