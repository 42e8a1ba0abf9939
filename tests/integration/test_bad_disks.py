"""Fetches into directories with other content, without room, or under attack by another user."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .processes import Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration

TMPFS_BYTES = 4 << 20


@pytest.fixture
def seed(machine: Machine, model: Path) -> Process:
    return machine.serve(model)


@contextlib.contextmanager
def mounted(path: Path, *options: str) -> Iterator[Path]:
    """A disk of its own at `path`, by these options of mount(8)."""
    path.mkdir()
    ran = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True, check=False)
    if ran.returncode:
        pytest.skip(f"a disk of its own needs the right to mount one: {ran.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none") as path:
        yield path


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of ext4 that becomes read-only at its first error."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True, timeout=30)
    with mounted(tmp_path / "disk", "-o", "loop,errors=remount-ro", str(image)) as path:
        yield path


def fail(disk: Path) -> None:
    """Makes the kernel find an error on a `failing_disk`."""
    device = subprocess.run(["findmnt", "-no", "SOURCE", str(disk)], capture_output=True, text=True, check=True)
    (Path("/sys/fs/ext4") / Path(device.stdout.strip()).name / "trigger_fs_error").write_text("1")


def limited(machine: Machine, tmp_path: Path) -> tuple[Path, Process]:
    """A model of 20 MB and a seed that takes 2 s to send it."""
    model = write_model(tmp_path / "model-of-20", size=20_000_000)
    return model, machine.serve(model, "--upload-limit", "10MB/s")


def begun(out: Path) -> bool:
    return any(any(path.read_bytes()) for path in out.glob(".swarm/*/a.safetensors"))


def test_a_disk_without_inodes_says_so_with_numbers(
    machine: Machine, seed: Process, model: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64m,nr_inodes=8", "none") as disk:
        line = machine.fetch(disk / "out", peers=[seed.address]).end().error(5)
        assert "inodes are free" in line
        assert "bytes are needed" not in line
        assert list(disk.iterdir()) == []
        for number in range(7):
            (disk / str(number)).touch()
        assert "no inode is free" in machine.fetch(disk / "out", peers=[seed.address]).end().error(5)
        assert not (disk / "out").exists()


def test_a_disk_that_fills_during_a_fetch_does_not_stop_it(machine: Machine, tmp_path: Path) -> None:
    model, seed = limited(machine, tmp_path)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=32m", "none") as disk:
        newcomer = machine.fetch(disk / "out", peers=[seed.address])
        wait_until(lambda: begun(disk / "out"), "some bytes")
        with contextlib.suppress(OSError), (disk / "ballast").open("wb") as ballast:
            while True:
                ballast.write(bytes(1 << 20))
                ballast.flush()
        assert newcomer.end().code == 0
        assert contents(disk / "out") == contents(model)


def test_a_disk_that_becomes_read_only_ends_a_fetch_with_one_line(
    machine: Machine, tmp_path: Path, failing_disk: Path
) -> None:
    model, seed = limited(machine, tmp_path)
    out = failing_disk / "out"
    newcomer = machine.fetch(out, peers=[seed.address])
    wait_until(lambda: begun(out), "some bytes")
    fail(failing_disk)
    line = newcomer.end().error(5)
    assert "Read-only file system" in line
    assert contents(out) == {}
    assert "Read-only file system" in machine.fetch(failing_disk / "other", peers=[seed.address]).end().error(5)
    elsewhere = tmp_path / "elsewhere"
    assert machine.fetch(elsewhere, peers=[seed.address]).end().code == 0
    assert contents(elsewhere) == contents(model)


def test_new_content_under_the_same_id_in_mid_fetch_ends_in_one_line_and_then_in_the_new_content(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    model, seed = limited(machine, tmp_path)
    newcomer = machine.fetch(out, peers=[seed.address])
    wait_until(lambda: begun(out), "some bytes")
    new = write_model(tmp_path / "new", size=20_000_000, seed=2)
    for path in new.rglob("*.*"):
        path.rename(model / path.relative_to(new))
    line = newcomer.end().error(4)
    assert "does not serve it any more" in line
    assert contents(out) == {}
    wait_until(lambda: seed.out.count(" ready: ") == 2, "the seed to serve the new content")
    assert machine.fetch(out, peers=[seed.address]).end().code == 0
    assert contents(out) == contents(model)


def test_is_a_full_disk_told_with_numbers_and_enough_once_there_is_room(
    machine: Machine, seed: Process, model: Path, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 << 20))
    out = small_disk / "out"
    line = machine.fetch(out, peers=[seed.address]).end().error(5)
    size = sum(map(len, contents(model).values()))
    assert f"{out}: {size} bytes are needed and " in line
    assert "make room" in line
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    ballast.unlink()
    assert machine.fetch(out, peers=[seed.address]).end().code == 0
    assert contents(out) == contents(model)


def test_are_other_files_in_the_directory_left_alone(machine: Machine, seed: Process, model: Path, out: Path) -> None:
    (out / "sub").mkdir(parents=True)
    others = {"notes.txt": b"mine", "sub/more.bin": b"mine too"}
    for name, data in others.items():
        (out / name).write_bytes(data)
    assert machine.fetch(out, peers=[seed.address]).end().code == 0
    assert contents(out) == {**contents(model), **others}


@pytest.mark.parametrize(
    ("same_size", "advice"),
    [
        (True, "move it away and run the same fetch again, the rest is kept"),
        (False, "move it away or fetch to another directory"),
    ],
)
def test_is_a_file_of_the_same_name_with_other_content_named_and_untouched(
    machine: Machine, seed: Process, model: Path, out: Path, same_size: bool, advice: str
) -> None:
    out.mkdir()
    mine = bytes((model / "b.safetensors").stat().st_size if same_size else 5)
    (out / "b.safetensors").write_bytes(mine)
    line = machine.fetch(out, peers=[seed.address]).end().error(5)
    assert f"{out / 'b.safetensors'}: exists with" in line
    assert line.endswith(advice)
    assert contents(out) == {"b.safetensors": mine}


def test_is_a_symlink_under_a_final_name_named_and_not_followed(
    machine: Machine, seed: Process, out: Path, tmp_path: Path
) -> None:
    out.mkdir()
    target = tmp_path / "precious"
    target.write_bytes(b"mine")
    (out / "a.safetensors").symlink_to(target)
    line = machine.fetch(out, peers=[seed.address]).end().error(5)
    assert str(out / "a.safetensors") in line
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("where", ["sub", ".swarm"])
def test_is_a_symlink_in_place_of_a_directory_named_and_not_followed(
    machine: Machine, seed: Process, out: Path, tmp_path: Path, where: str
) -> None:
    out.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (out / where).symlink_to(outside)
    line = machine.fetch(out, peers=[seed.address]).end().error(5)
    assert str(out / where) in line
    assert list(outside.iterdir()) == []
    assert [name for name in contents(out) if name.endswith(".safetensors")] == []


@pytest.mark.parametrize("where", ["sub", ".swarm", "out"])
def test_does_nothing_land_outside_while_directories_are_exchanged_for_symlinks(
    machine: Machine, model: Path, out: Path, tmp_path: Path, where: str
) -> None:
    """Another user with write access to the directory races the fetch repeatedly."""
    seed = machine.serve(model, "--upload-limit", "2MB/s")
    outside = tmp_path / "outside"
    outside.mkdir()
    raced = out if where == "out" else out / where
    newcomer = machine.fetch(out, peers=[seed.address])
    aside = tmp_path / "aside"
    swaps = 0
    while newcomer.running:
        with contextlib.suppress(OSError):
            raced.rename(aside)
            raced.symlink_to(outside)
            swaps += 1
            newcomer.wait_to_end(0.02)
            raced.unlink()
            aside.rename(raced)
        newcomer.wait_to_end(0.02)
    ended = newcomer.end()
    assert swaps
    assert list(outside.iterdir()) == []
    assert ended.code == 0 or ended.error(5)
    expected = contents(model)
    assert all(data == expected[name] for name, data in contents(out).items() if not (out / name).is_symlink())
    assert machine.fetch(tmp_path / "good", peers=[seed.address]).end().code == 0
    assert contents(tmp_path / "good") == expected


@pytest.mark.parametrize("to_hub_cache", [False, True])
def test_bytes_changed_while_they_are_staged_get_no_final_name(
    machine: Machine, tmp_path: Path, out: Path, to_hub_cache: bool
) -> None:
    model = write_model(tmp_path / "model", size=20_000_000)
    seed = machine.serve(model, "--upload-limit", "5MB/s")
    hub = machine.root / "home" / "huggingface"
    command = ("fetch", "org/model", "--no-seed", "--no-mdns", "--peer", seed.address)
    place = () if to_hub_cache else ("--out", str(out))

    def staged() -> list[Path]:
        found = (hub if to_hub_cache else out).rglob("a.safetensors")
        return [path for path in found if ".swarm" in path.parts and any(path.read_bytes())]

    newcomer = machine.start(*command, *place)
    (path,) = wait_until(staged, "bytes under the staging directory")
    with path.open("r+b") as file:
        zeros = file.read()  # but for what has arrived
        written = len(zeros) - len(zeros.lstrip(b"\0"))
        file.seek(written)
        file.write(bytes(64))
    line = newcomer.end().error(5)
    assert "another program changed" in line
    assert "run the same fetch again" in line
    assert "a.safetensors" not in contents(out)
    assert not list(hub.glob("hub/*/snapshots/*/*"))
    again = machine.start(*command, *place).end()
    assert again.code == 0, again.err
    got = contents(out) if not to_hub_cache else contents(next(hub.glob("hub/*/snapshots/*")))
    assert got == contents(model)


def test_is_an_output_path_that_is_a_file_refused(machine: Machine, seed: Process, out: Path) -> None:
    out.write_bytes(b"mine")
    assert f"{out}: is not a directory" in machine.fetch(out, peers=[seed.address]).end().error(5)
    assert out.read_bytes() == b"mine"


def test_is_an_output_path_below_a_file_refused(machine: Machine, seed: Process, out: Path) -> None:
    out.write_bytes(b"mine")
    assert str(out) in machine.fetch(out / "below", peers=[seed.address]).end().error(5)
