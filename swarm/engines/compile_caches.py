"""Compile caches as artifacts: what torch.compile, Triton, FlashInfer and vLLM compiled once, for machines alike.

    install(fields, settings)   before an engine compiles: fetched, verified, and put beside what is there
    offer(fields, settings)     once it is warm: a copy of what it compiled, served until it is closed

`before_compiling` and `after_warm_up` are the same for engines: a start never fails because of a cache.

A cache is code: pickles and shared libraries that whoever compiles loads without a question. So:

- It is off unless `compile_caches` is set, and then `trusted` has to name the machines whose code may run here. Only
  what one of those announces over its own link is taken.
- The manifest of such an introduction carries the sha256 of all its files, and nothing is installed that has another
  one: chunks come from any member, and their digests find accidents, not lies.
- It is for machines and programs alike: versions, processor, GPU and driver are in the fingerprint that it is keyed by.
- Paths stay within the caches that are known by name here; no link is followed. What is there is never overwritten,
  newer or not, and a file appears whole or not at all.

Two machines compile one thing into different bytes, so several contents under one key are no conflict here, unlike
those of a model: the one that most members hold is taken.

Must not know: engines, tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import hashlib
import importlib.metadata
import logging
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from swarm.api import Served, serve_source
from swarm.checkpoint import manifest_builder
from swarm.content.manifest import Digest, Manifest, ModelId
from swarm.engines import cache_gc
from swarm.engines.layout import Fingerprint, short_digest
from swarm.errors import ManifestInvalid, ManifestNotFound, SettingsError, SwarmError
from swarm.node import local_nodes
from swarm.node.node import Node
from swarm.node.resolve import introduced, networks, resolve
from swarm.runtime import runtime
from swarm.settings import Settings
from swarm.store.directory import DirectorySource, DirectoryStore
from swarm.store.disk import ConfinedDirectory, store_errors

CONTENT = "sha256"  # the field that binds a manifest to the bytes of its files
CACHE_BYTES_MAX = 16 << 30  # far above what engines compile; a member must not fill the disk with one
PACKAGES = ("torch", "triton", "flashinfer-python", "vllm", "sglang")  # whose versions decide what is compiled, and how
PASSING = (".lock", ".tmp", ".pid")  # ends of names that mean nothing to another process
PASSING_DIRECTORIES = {"locks"}
STAGING, OWN = "compiled", "compiled-own"  # below the cache directory: what was fetched by digest, and copies to serve
SETTLE_S = 0.5  # for others that hold it, counted from the first
POLL_S = 0.05

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class Installed:
    """What came of a fetch: files that are new here, files that were here already, bytes fetched, and from whom.

    `served` serves it on until it is closed.
    """

    new: int
    kept: int
    bytes: int
    sources: Mapping[str, int]
    served: Served


def directories(environment: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Where the compilers that are known here keep their caches, by name, as each of them would find it."""
    env = os.environ if environment is None else environment
    home = Path(env.get("HOME") or Path.home())
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    inductor = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    triton = Path(env.get("TRITON_HOME") or home) / ".triton" / "cache"
    return {
        "inductor": Path(env.get("TORCHINDUCTOR_CACHE_DIR") or inductor),
        "triton": Path(env.get("TRITON_CACHE_DIR") or triton),
        "flashinfer": Path(env.get("FLASHINFER_WORKSPACE_BASE") or home) / ".cache" / "flashinfer",
        "vllm": Path(env.get("VLLM_CACHE_ROOT") or cache / "vllm") / "torch_compile_cache",
    }


def machine() -> dict[str, str]:
    """The fields of a fingerprint that this machine and its programs decide."""
    fields = {
        "python": sys.implementation.cache_tag or "",
        "machine": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "cpu": short_digest(_cpu_flags()),
        "gpu": "",
    }
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            fields[package] = importlib.metadata.version(package)
    if "torch" in sys.modules:  # who compiles has imported it
        import torch

        if torch.cuda.is_available():
            capability = ".".join(map(str, torch.cuda.get_device_capability()))
            fields["gpu"] = f"{torch.cuda.get_device_name()} {capability}, CUDA {torch.version.cuda}"
    return fields


def key(fields: Mapping[str, str]) -> Fingerprint:
    """What a cache is keyed by: the machine, and what else decides what is compiled (model, dtype, layout, flags)."""
    return Fingerprint({**machine(), **fields})


def artifact_id(wanted: Fingerprint) -> ModelId:
    """What a cache is served by."""
    return ModelId(f"#cache-{wanted.digest}")


def offer(fields: Mapping[str, str], settings: Settings, *, places: Mapping[str, Path] | None = None) -> Served | None:
    """Serves a copy of the caches as they are now; None where there is nothing in them.

    Raises SettingsError unless `compile_caches` and `trusted` are set, StoreError, ManifestInvalid.
    """
    _demand_allowed(settings)
    wanted = key(fields)
    room = settings.cache / OWN
    _clean(room)
    copy = room / f"{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with store_errors(copy):
            found = _copy(copy / "files", directories() if places is None else places)
        if not found:
            return None
        source = manifest_builder.files(copy / "files", cache_dir=copy)
        source.close()
        text = Fingerprint({**wanted.fields, CONTENT: _content(copy / "files", source.manifest)}).text
        manifest = msgspec.structs.replace(source.manifest, tier="cache", fingerprint=text)
        return serve_source(artifact_id(wanted), _Copy(copy, manifest), None, settings=settings)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def install(
    fields: Mapping[str, str],
    settings: Settings,
    *,
    places: Mapping[str, Path] | None = None,
    timeout_s: float | None = None,
) -> Installed:
    """Fetches a cache of this key and puts it beside what is there.

    Raises SettingsError unless `compile_caches` and `trusted` are set, ManifestNotFound when no trusted machine has one
    in `find_timeout_s`, ManifestInvalid when what it introduces is none, or is not what arrived; and what `swarm.fetch`
    into a directory raises.
    """
    _demand_allowed(settings)
    return runtime().run(_install(key(fields), settings, directories() if places is None else places, timeout_s))


def before_compiling(fields: Mapping[str, str], settings: Settings) -> Installed | None:
    """`install` for engines: nothing where it is off, and a line in the log instead of an error."""
    if not settings.compile_caches:
        return None
    try:
        installed = install(fields, settings)
    except (SwarmError, OSError) as error:
        log.info("compile cache: compiling here (%s)", error)
        return None
    log.info(
        "compile cache: %d files from %s, %d were here", installed.new, ", ".join(installed.sources), installed.kept
    )
    return installed


def after_warm_up(fields: Mapping[str, str], settings: Settings) -> Served | None:
    """`offer` for engines: nothing where it is off, and a line in the log instead of an error."""
    if not settings.compile_caches:
        return None
    try:
        return offer(fields, settings)
    except (SwarmError, OSError) as error:
        log.info("compile cache: not served (%s)", error)
        return None


async def _install(
    wanted: Fingerprint, settings: Settings, places: Mapping[str, Path], timeout_s: float | None
) -> Installed:
    node = await runtime().acquire(settings)
    try:
        digest = await _choose(node, artifact_id(wanted), settings)
        manifest, _ = await resolve(node, artifact_id(wanted), digest=digest, find_timeout_s=settings.find_timeout_s)
        content = _check(manifest, wanted)
        path = settings.cache / STAGING / digest[:32]
        cache_gc.hold(path)
        await asyncio.to_thread(
            lambda: cache_gc.prune(settings.cache, settings.cache_limit_bytes, need_bytes=manifest.size)
        )
        # No power cut matters here: what is torn has another sha256.
        store = await asyncio.to_thread(lambda: DirectoryStore(path, manifest, fsync=False))
        fetched = await node.fetch(artifact_id(wanted), store, timeout_s=timeout_s)
        try:
            if await asyncio.to_thread(lambda: _content(path, manifest)) != content:
                shutil.rmtree(path, ignore_errors=True)
                why = (
                    "what arrived is not what was introduced: a member altered it, or a disk did; nothing is installed"
                )
                raise ManifestInvalid(artifact_id(wanted), why)
            new, kept = await asyncio.to_thread(lambda: _merge(path, manifest, places))
        except BaseException:
            node.release(digest)
            raise
    except BaseException:
        await runtime().release(settings)
        raise
    served = Served(artifact_id(wanted), digest, node.address, settings)
    return Installed(new, kept, fetched.bytes, fetched.sources, served)


async def _choose(node: Node, wanted_id: ModelId, settings: Settings) -> Digest:
    """The digest that most nodes hold, of those that a trusted machine announces. Raises ManifestNotFound."""
    deadline = node.now() + settings.find_timeout_s
    first: float | None = None
    trusted = networks(settings.trusted)
    with node.seeking(None):
        while True:
            holders = introduced(node.holders(wanted_id), trusted)
            if holders:
                first = node.now() if first is None else first
                if node.now() - first >= SETTLE_S:
                    return min(holders, key=lambda digest: (-len(holders[digest]), digest))
            elif node.now() >= deadline:
                raise ManifestNotFound(wanted_id, tried=node.tried(), waited_s=settings.find_timeout_s)
            await node.changed(POLL_S)


def _check(manifest: Manifest, wanted: Fingerprint) -> str:
    """The sha256 of all files. Raises ManifestInvalid unless the manifest is one of a cache of this key."""
    if manifest.tier != "cache":
        raise ManifestInvalid("manifest", f"it is of the {manifest.tier} tier, and no compile cache")
    if manifest.size > CACHE_BYTES_MAX:
        raise ManifestInvalid("manifest", f"{manifest.size} bytes; a compile cache has at most {CACHE_BYTES_MAX}")
    fields = Fingerprint.read(manifest.fingerprint).fields
    content = fields.pop(CONTENT, "")
    if differences := wanted.differences(Fingerprint(fields)):
        raise ManifestInvalid("manifest", f"it is of other machines: {'; '.join(map(str, differences))}")
    return content


class _Copy(DirectorySource):
    """A copy of this process's own, which goes when it is not served any more: caches change while they are used."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        super().__init__(root, manifest, paths=[root / "files" / entry.path for entry in manifest.files])

    def close(self) -> None:
        """Removes the copy, too."""
        super().close()
        shutil.rmtree(self.root, ignore_errors=True)


def _clean(room: Path) -> None:
    """Removes copies that processes have left which were killed."""
    for left in room.glob("*-*"):
        pid = left.name.partition("-")[0]
        if pid.isdigit() and not local_nodes.alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _copy(target: Path, places: Mapping[str, Path]) -> int:
    """Copies what is worth serving of each cache to `target/<its name>/`; how many files."""
    copied = 0
    for name, place in places.items():
        for path in _worthy(place):
            goal = target / name / path.relative_to(place)
            goal.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # whoever compiles may throw away, too
                shutil.copyfile(path, goal)
                copied += 1
    return copied


def _worthy(place: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(place):
        folders[:] = sorted(folder for folder in folders if folder not in PASSING_DIRECTORIES and folder[0] != ".")
        for file in sorted(files):
            path = Path(parent, file)
            if not file.endswith(PASSING) and file[0] != "." and path.is_file() and not path.is_symlink():
                yield path


def _content(root: Path, manifest: Manifest) -> str:
    """The sha256 of all files below `root` that a manifest names: of their paths and of their contents' sha256."""
    whole = hashlib.sha256()
    with store_errors(root):
        for entry in manifest.files:
            with (root / entry.path).open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").digest()
            whole.update(hashlib.sha256(entry.path.encode()).digest() + contents)
    return whole.hexdigest()


def _merge(staged: Path, manifest: Manifest, places: Mapping[str, Path]) -> tuple[int, int]:
    """Puts staged files into the caches of this machine; how many are new, and how many were there."""
    new, kept = 0, 0
    for name, place in places.items():
        paths = [entry.path for entry in manifest.files if entry.path.startswith(f"{name}/")]
        if not paths:
            continue
        with store_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(ConfinedDirectory.open(place)) as target:
                incoming = f".swarm-{secrets.token_hex(8)}"
                target.make(incoming)
                try:
                    with contextlib.closing(target.enter(incoming)) as here:
                        for path in paths:
                            new += _put(staged / path, path.removeprefix(f"{name}/"), here, target)
                finally:
                    target.remove_tree(incoming)
        kept += len(paths)
    return new, kept - new


def _put(staged: Path, path: str, incoming: ConfinedDirectory, target: ConfinedDirectory) -> bool:
    """Whether the file is new there."""
    with staged.open("rb") as source:
        fd = incoming.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, make_parents=True)
        with os.fdopen(fd, "wb") as copy:
            shutil.copyfileobj(source, copy)
    try:
        incoming.move(path, target)  # which never overwrites, and follows no links
    except FileExistsError:
        return False
    return True


def _demand_allowed(settings: Settings) -> None:
    if not settings.compile_caches:
        raise SettingsError("compile_caches", "is off; a compile cache is code, so switch it on for machines you trust")
    if not settings.trusted:
        why = "names nobody, and compile caches are code that would run here; name the machines that may introduce it"
        raise SettingsError("trusted", why)


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()
