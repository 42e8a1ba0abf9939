"""Does a compile cache get from node to node, from those alone who may introduce code, and harm nothing there?"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import swarm
from swarm import Settings
from swarm.api import serve_source
from swarm.checkpoint import manifest_builder
from swarm.content.manifest import Manifest
from swarm.engines import cache_files, compile_caches
from swarm.engines.cache_start import CacheStart
from swarm.engines.layout import Fingerprint
from swarm.errors import ManifestInvalid, ManifestNotFound, SettingsError, StoreConflict, SwarmError
from swarm.node import local_nodes
from swarm.runtime import runtime
from swarm.security import cluster_key

pytestmark = pytest.mark.usefixtures("brief")

FIELDS = {"model": "org/model", "dtype": "bfloat16"}
KEY = compile_caches.key(FIELDS)
COMPILED = {
    "inductor/ab/cab.so": b"\x7fELF" * 1000,
    "inductor/fxgraph/x/y": b"pickle",
    "triton/K7/kernel.cubin": b"cubin",
}

Start = Callable[..., Settings]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    runtime()._close_all()


@pytest.fixture
def node(tmp_path: Path) -> Start:
    def settings(name: str, *peers: str, trusted: tuple[str, ...] = ("127.0.0.0/8",)) -> Settings:
        return Settings(
            name=name, mdns=False, peers=peers, cache=tmp_path / name, trusted=trusted, compile_caches=True,
            find_timeout_s=2, stall_timeout_s=5,
        )  # fmt: skip

    return settings


def places(root: Path) -> dict[str, Path]:
    return {name: root / name for name in ("inductor", "triton", "flashinfer")}


def write(root: Path, files: dict[str, bytes]) -> dict[str, Path]:
    for path, contents in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(contents)
    return places(root)


def read(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_ends_a_search_with_the_nodes_of_the_process(tmp_path: Path, node: Start) -> None:
    """An engine that never comes to `join` searches on its thread's loop for minutes otherwise."""
    start = CacheStart(FIELDS, node("seeker"), places=places(tmp_path / "here"))
    start.begin()
    assert start._work
    assert runtime().run(runtime().acquire(node("seeker")))
    runtime()._close_all()
    with pytest.raises(SwarmError, match="the node was closed"):
        start._work.result(10)


@pytest.fixture
def source(tmp_path: Path, node: Start) -> Iterator[swarm.Served]:
    offered = compile_caches.offer(KEY, node("source"), places=write(tmp_path / "there", COMPILED))
    assert offered is not None
    with offered:
        yield offered


def test_is_what_one_compiled_there_for_the_other(tmp_path: Path, node: Start, source: swarm.Served) -> None:
    installed = compile_caches.install(KEY, node("other", source.address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == COMPILED
    assert (installed.new, installed.kept) == (3, 0)
    assert installed.bytes == sum(map(len, COMPILED.values()))
    assert list(installed.sources) == ["source"]
    assert not list((tmp_path / "here").rglob(".swarm*"))
    installed.served.close()


def test_is_it_served_on(tmp_path: Path, node: Start, source: swarm.Served) -> None:
    first = compile_caches.install(KEY, node("first", source.address), places=places(tmp_path / "1"))
    source.close()
    second = compile_caches.install(KEY, node("second", first.served.address), places=places(tmp_path / "2"))
    assert read(tmp_path / "2") == COMPILED
    assert list(second.sources) == ["first"]


@pytest.mark.parametrize("age_s", [-1_000_000, 1_000_000])
def test_is_what_is_there_kept_whatever_its_age(tmp_path: Path, node: Start, source: swarm.Served, age_s: int) -> None:
    mine = {"inductor/ab/cab.so": b"compiled here", "triton/mine": b"mine"}
    write(tmp_path / "here", mine)
    at = (tmp_path / "there/inductor/ab/cab.so").stat().st_mtime + age_s
    os.utime(tmp_path / "here/inductor/ab/cab.so", (at, at))
    installed = compile_caches.install(KEY, node("other", source.address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == COMPILED | mine
    assert (installed.new, installed.kept) == (2, 1)


def test_stays_behind_what_means_nothing_elsewhere(tmp_path: Path, node: Start) -> None:
    passing = {"inductor/locks/a.lock": b"", "triton/x.tmp": b"half", "triton/.hidden/k": b"", "triton/a.pid": b"1"}
    where = write(tmp_path / "there", COMPILED | passing)
    (tmp_path / "there/triton/link").symlink_to("/etc/passwd")
    offered = compile_caches.offer(KEY, node("source"), places=where)
    assert offered is not None
    compile_caches.install(KEY, node("other", offered.address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == COMPILED


def test_may_a_cache_change_while_it_is_served(tmp_path: Path, node: Start, source: swarm.Served) -> None:
    write(tmp_path / "there", {"inductor/ab/cab.so": b"compiled anew", "inductor/new": b"later"})
    compile_caches.install(KEY, node("other", source.address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == COMPILED


def test_is_it_off_unless_members_or_machines_are_trusted(tmp_path: Path, node: Start) -> None:
    unset = dataclasses.replace(node("unset"), compile_caches=None)
    off = dataclasses.replace(node("off"), compile_caches=False)
    told = {
        unset: "compile_caches: is off without a cluster key",
        off: "compile_caches: is off",
        node("nobody", trusted=()): "compile_caches: needs a cluster key",
    }
    assert Settings().compile_caches is None
    for settings, why in told.items():
        with pytest.raises(SettingsError, match=why):
            compile_caches.install(KEY, settings, places=places(tmp_path))
        with pytest.raises(SettingsError, match=why):
            compile_caches.offer(KEY, settings, places=places(tmp_path))
    for settings in (unset, off):
        assert compile_caches.before_compiling(FIELDS, settings) is None
        assert compile_caches.after_warm_up(FIELDS, settings) is None


@pytest.fixture
def member(tmp_path: Path) -> Start:
    """A member of a cluster with a key, with the settings of caches as they are by default."""
    key = tmp_path / "key"
    cluster_key.create(key)

    def settings(name: str, *peers: str, **more: Any) -> Settings:
        own: dict[str, Any] = {"mdns": False, "cache": tmp_path / name, "key_file": key, "stall_timeout_s": 5}
        return Settings(name=name, peers=peers, **own | more)

    return settings


def test_is_it_on_within_a_cluster_that_shares_a_key(tmp_path: Path, member: Start) -> None:
    offered = compile_caches.offer(KEY, member("source"), places=write(tmp_path / "there", COMPILED))
    assert offered is not None
    compile_caches.install(KEY, member("other", offered.address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == COMPILED


@pytest.mark.parametrize("more", [{"trusted": ("10.1.0.0/16",)}, {"compile_caches": False}])
def test_may_a_member_trust_fewer_machines_or_none(tmp_path: Path, member: Start, more: dict[str, Any]) -> None:
    offered = compile_caches.offer(KEY, member("source"), places=write(tmp_path / "there", COMPILED))
    assert offered is not None
    wary = member("wary", offered.address, find_timeout_s=1, **more)
    with pytest.raises((ManifestNotFound, SettingsError)):
        compile_caches.install(KEY, wary, places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == {}


def test_is_code_of_other_machines_left_alone(tmp_path: Path, node: Start, source: swarm.Served) -> None:
    wary = node("wary", source.address, trusted=("10.1.0.0/16",))
    with pytest.raises(ManifestNotFound):
        compile_caches.install(KEY, wary, places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == {}


def test_is_a_cache_of_other_programs_another_one(tmp_path: Path, node: Start, source: swarm.Served) -> None:
    with pytest.raises(ManifestNotFound):
        compile_caches.install(
            compile_caches.key({**FIELDS, "dtype": "float16"}),
            node("other", source.address),
            places=places(tmp_path / "here"),
        )
    assert "torch" in compile_caches.machine()
    assert compile_caches.machine() == compile_caches.machine()


def offered_as(
    tmp_path: Path, settings: Settings, change: Callable[[Manifest], Manifest], files: dict[str, bytes]
) -> str:
    """A member that serves what it likes under the id of a cache; its address."""
    root = tmp_path / "lie"
    write(root, files)
    _, source, _ = manifest_builder.checkpoint(root, cache_dir=tmp_path / "lie-cache")
    wanted = compile_caches.key(FIELDS)
    content = cache_files.content(root, source.manifest)
    text = Fingerprint({**wanted.fields, compile_caches.CONTENT: content}).text
    source.manifest = change(msgspec.structs.replace(source.manifest, tier="cache", fingerprint=text))
    return serve_source(compile_caches.artifact_id(wanted), source, None, settings=settings).address


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tier": "checkpoint"}, "no compile cache"),
        ({"fingerprint": ""}, "is not JSON"),
        (
            {"fingerprint": Fingerprint({**FIELDS, "sha256": "0"}).text},
            r"other machines: cpu is .* here and \(not said\)",
        ),
        ({"fingerprint": None}, "the files are not those that were introduced"),
    ],
)
def test_is_what_is_no_such_cache_refused(
    tmp_path: Path, node: Start, changes: dict[str, str | None], told: str
) -> None:
    if "fingerprint" in changes and changes["fingerprint"] is None:
        changes = {"fingerprint": Fingerprint({**compile_caches.key(FIELDS).fields, "sha256": "ab" * 32}).text}
    address = offered_as(tmp_path, node("liar"), lambda m: msgspec.structs.replace(m, **changes), COMPILED)
    with pytest.raises(ManifestInvalid, match=told):
        compile_caches.install(KEY, node("other", address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == {}
    kept = (tmp_path / "other" / compile_caches.STAGING).glob("[!.]*")
    assert not list(kept), "nor is it kept"


def test_does_nothing_land_beside_the_caches(tmp_path: Path, node: Start) -> None:
    files = {**COMPILED, "bin/sh": b"elsewhere", "top": b"elsewhere"}
    address = offered_as(tmp_path, node("liar"), lambda m: m, files)
    compile_caches.install(KEY, node("other", address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == COMPILED


def test_is_no_link_followed(tmp_path: Path, node: Start, source: swarm.Served) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "here" / "inductor").mkdir(parents=True)
    (tmp_path / "here" / "inductor" / "ab").symlink_to(tmp_path / "outside")
    with pytest.raises(StoreConflict, match="is a link or no directory"):
        compile_caches.install(KEY, node("other", source.address), places=places(tmp_path / "here"))
    assert read(tmp_path / "outside") == {}


def test_are_two_contents_of_one_key_no_conflict(tmp_path: Path, node: Start, source: swarm.Served) -> None:
    other = {"inductor/zz": b"compiled by another one"}
    second = compile_caches.offer(KEY, node("source-2"), places=write(tmp_path / "there-2", other))
    assert second is not None
    compile_caches.install(KEY, node("other", source.address, second.address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") in (COMPILED, other)


def test_goes_the_copy_when_it_is_not_served(tmp_path: Path, node: Start, source: swarm.Served) -> None:
    room = tmp_path / "source" / compile_caches.OWN
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    dead = f"{local_nodes.process().partition('.')[0]}.{killed.pid}-aa"
    (room / dead).mkdir()
    assert len(list(room.iterdir())) == 2
    again = compile_caches.offer(
        compile_caches.key({**FIELDS, "again": "1"}), node("source"), places=places(tmp_path / "there")
    )
    assert again is not None
    assert dead not in {path.name for path in room.iterdir()}
    again.close()
    source.close()
    runtime()._close_all()
    assert list(room.iterdir()) == []


def test_is_an_empty_cache_not_offered(tmp_path: Path, node: Start) -> None:
    assert compile_caches.offer(KEY, node("source"), places=places(tmp_path / "none")) is None


def test_does_a_start_go_on_without(
    tmp_path: Path, node: Start, source: swarm.Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compile_caches, "directories", lambda: places(tmp_path / "here"))
    caplog.set_level("INFO", "swarm")
    assert compile_caches.before_compiling({"model": "other"}, node("other", source.address)) is None
    assert "compiling here (no peer serves" in caplog.text
    assert compile_caches.after_warm_up(FIELDS, node("nobody", trusted=())) is None
    assert "not served (compile_caches: needs a cluster key" in caplog.text
    installed = compile_caches.before_compiling(FIELDS, node("other", source.address))
    assert installed is not None
    assert "3 files (4.01 kB) from source, 0 were here" in caplog.text
    again = compile_caches.after_warm_up(FIELDS, node("other", source.address))
    assert again is not None


def test_where_are_caches_looked_for() -> None:
    plain = compile_caches.directories({"HOME": "/h"})
    assert plain["inductor"].name.startswith("torchinductor_")
    assert {name: str(path) for name, path in plain.items() if name != "inductor"} == {
        "vllm": "/h/.cache/vllm/torch_compile_cache",
        "vllm-modelinfos": "/h/.cache/vllm/modelinfos",
        "vllm-deep_gemm": "/h/.cache/vllm/deep_gemm",
        "vllm-flashinfer": "/h/.cache/vllm/flashinfer_autotune_cache",
        "triton": "/h/.triton/cache",
        "flashinfer": "/h/.cache/flashinfer",
    }
    named = {
        "TORCHINDUCTOR_CACHE_DIR": "/a",
        "TRITON_CACHE_DIR": "/b",
        "FLASHINFER_WORKSPACE_BASE": "/c",
        "VLLM_CACHE_ROOT": "/d",
        "DG_JIT_CACHE_DIR": "/e",
        "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR": "/f",
    }
    assert list(map(str, compile_caches.directories(named).values())) == [
        "/d/torch_compile_cache",
        "/d/modelinfos",
        "/e",
        "/f",
        "/a",
        "/b",
        "/c/.cache/flashinfer",
    ]


def test_is_a_cache_inside_another_copied_once() -> None:
    inside = {"HOME": "/h", "TORCHINDUCTOR_CACHE_DIR": "/h/.cache/vllm/torch_compile_cache/ab/inductor_cache"}
    assert "inductor" not in compile_caches.directories(inside)


def test_are_the_newest_files_offered(tmp_path: Path, node: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    where = write(tmp_path / "there", COMPILED | {"inductor/old": bytes(1000)})
    os.utime(tmp_path / "there/inductor/old", (1, 1))
    monkeypatch.setattr(cache_files, "COPY_BYTES_MAX", sum(map(len, COMPILED.values())))
    offered = compile_caches.offer(KEY, node("source"), places=where)
    assert offered is not None
    compile_caches.install(KEY, node("other", offered.address), places=places(tmp_path / "here"))
    assert read(tmp_path / "here") == COMPILED
