"""Compile caches as artifacts: the output of torch.compile, Triton, FlashInfer and vLLM, for equal machines.

    before_compiling(fields, settings)   fetches, verifies and installs a cache; a failure is only logged
    after_warm_up(fields, settings)      serves a copy of the caches until it is closed; a failure is only logged

`install` and `offer` do the same and raise. A cache is code, pickles and shared libraries that a compiler loads
without a check. Therefore:

- Caches are off unless `compile_caches` is set, and `trusted` must name the machines that may introduce them. A digest
  counts only if such a machine announces it over its own link.
- The manifest of the introduction carries the sha256 of all files. Files with another sha256 are not installed: chunks
  come from any member, and xxh3 digests do not detect tampering.
- The key is a fingerprint of versions, processor, GPU and driver.
- Paths stay within the known caches, links are not followed, and no file is overwritten. Files appear complete.

Two machines compile the same input into different bytes. So, unlike a model, a key may have several contents; the
content that most members hold is fetched.

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
CACHE_BYTES_MAX = 16 << 30  # far above real caches; keeps a member from filling the disk
PACKAGES = ("torch", "triton", "flashinfer-python", "vllm", "sglang")  # their versions decide the compiled output
PASSING = (".lock", ".tmp", ".pid")  # suffixes of files that only the writing process can use
PASSING_DIRECTORIES = {"locks"}
STAGING, OWN = "compiled", "compiled-own"  # below the cache directory: fetched files by digest, and served copies
SETTLE_S = 0.5  # wait for more holders after the first
POLL_S = 0.05

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class InstalledCache:
    """The result of a fetch: new files, files that existed already, bytes, and bytes by source.

    `served` serves the cache to peers until it is closed.
    """

    new: int
    kept: int
    bytes: int
    sources: Mapping[str, int]
    served: Served


def directories(environment: Mapping[str, str] | None = None) -> dict[str, Path]:
    """The cache directory of each known compiler by name, as that compiler finds it."""
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
    """The fields of the key that this machine and its packages decide."""
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
    if "torch" in sys.modules:  # a process that compiles has imported it
        import torch

        if torch.cuda.is_available():
            capability = ".".join(map(str, torch.cuda.get_device_capability()))
            fields["gpu"] = f"{torch.cuda.get_device_name()} {capability}, CUDA {torch.version.cuda}"
    return fields


def key(fields: Mapping[str, str]) -> Fingerprint:
    """The key of a cache: the machine, and the caller's fields (model, dtype, layout, flags)."""
    return Fingerprint({**machine(), **fields})


def artifact_id(wanted: Fingerprint) -> ModelId:
    """The artifact id of the cache with this key."""
    return ModelId(f"#cache-{wanted.digest}")


def offer(fields: Mapping[str, str], settings: Settings, *, places: Mapping[str, Path] | None = None) -> Served | None:
    """Serves a copy of the caches as they are now; None if they are empty.

    Raises SettingsError unless `compile_caches` and `trusted` are set, StoreError, ManifestInvalid.
    """
    _demand_allowed(settings)
    wanted = key(fields)
    own = settings.cache / OWN
    _remove_abandoned(own)
    copy = own / f"{local_nodes.process()}-{secrets.token_hex(4)}"
    try:
        with store_errors(copy):
            found = _copy(copy / "files", directories() if places is None else places)
        if not found:
            return None
        source = manifest_builder.files(copy / "files", cache_dir=copy)
        source.close()
        text = Fingerprint({**wanted.fields, CONTENT: _content(copy / "files", source.manifest)}).text
        manifest = msgspec.structs.replace(source.manifest, tier="cache", fingerprint=text)
        return serve_source(artifact_id(wanted), _CopySource(copy, manifest), None, settings=settings)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def install(
    fields: Mapping[str, str],
    settings: Settings,
    *,
    places: Mapping[str, Path] | None = None,
    timeout_s: float | None = None,
) -> InstalledCache:
    """Fetches a cache of this key and adds its files to the caches of this machine.

    Raises SettingsError unless `compile_caches` and `trusted` are set, ManifestNotFound if no trusted machine announces
    it within `find_timeout_s`, ManifestInvalid if the manifest is no such cache or the files do not match it, and the
    errors of `swarm.fetch` into a directory.
    """
    _demand_allowed(settings)
    return runtime().run(_install(key(fields), settings, directories() if places is None else places, timeout_s))


def before_compiling(fields: Mapping[str, str], settings: Settings) -> InstalledCache | None:
    """`install` for engines: None if caches are off or on an error, which is logged."""
    if not settings.compile_caches:
        return None
    try:
        installed = install(fields, settings)
    except (SwarmError, OSError) as error:
        log.info("compile cache: compiling here (%s)", error)
        return None
    sources = ", ".join(installed.sources)
    log.info("compile cache: %d files from %s, %d were here", installed.new, sources, installed.kept)
    return installed


def after_warm_up(fields: Mapping[str, str], settings: Settings) -> Served | None:
    """`offer` for engines: None if caches are off or on an error, which is logged."""
    if not settings.compile_caches:
        return None
    try:
        return offer(fields, settings)
    except (SwarmError, OSError) as error:
        log.info("compile cache: not served (%s)", error)
        return None


async def _install(
    wanted: Fingerprint, settings: Settings, places: Mapping[str, Path], timeout_s: float | None
) -> InstalledCache:
    async with contextlib.AsyncExitStack() as undo:
        node = await runtime().acquire(settings)
        undo.push_async_callback(runtime().release, settings)
        digest = await _choose(node, artifact_id(wanted), settings)
        manifest, _ = await resolve(node, artifact_id(wanted), digest=digest, find_timeout_s=settings.find_timeout_s)
        content = _check(manifest, wanted)
        path = settings.cache / STAGING / digest[:32]
        cache_gc.hold(path)
        limit_bytes = settings.cache_limit_bytes
        await asyncio.to_thread(lambda: cache_gc.prune(settings.cache, limit_bytes, need_bytes=manifest.size))
        # No fsync: a file torn by a power cut has another sha256.
        store = await asyncio.to_thread(lambda: DirectoryStore(path, manifest, fsync=False))
        fetched = await node.fetch(artifact_id(wanted), store, timeout_s=timeout_s)
        undo.callback(node.release, digest)
        if await asyncio.to_thread(_content, path, manifest) != content:
            shutil.rmtree(path, ignore_errors=True)
            why = "the files are not those that were introduced: a member or a disk altered them; nothing is installed"
            raise ManifestInvalid(artifact_id(wanted), why)
        new, kept = await asyncio.to_thread(_merge, path, manifest, places)
        undo.pop_all()
    served = Served(artifact_id(wanted), digest, node.address, settings)
    return InstalledCache(new, kept, fetched.bytes, fetched.sources, served)


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
    """The sha256 of all files. Raises ManifestInvalid unless the manifest is of a cache with this key."""
    if manifest.tier != "cache":
        raise ManifestInvalid("manifest", f"it is of the {manifest.tier} tier, and no compile cache")
    if manifest.size > CACHE_BYTES_MAX:
        raise ManifestInvalid("manifest", f"{manifest.size} bytes; a compile cache has at most {CACHE_BYTES_MAX}")
    fields = dict(Fingerprint.read(manifest.fingerprint).fields)
    content = fields.pop(CONTENT, "")
    if differences := wanted.differences(Fingerprint(fields)):
        raise ManifestInvalid("manifest", f"it is of other machines: {'; '.join(map(str, differences))}")
    return content


class _CopySource(DirectorySource):
    """A copy of the caches, which change while they are used; removed when it is not served any more."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        super().__init__(root, manifest, paths=[root / "files" / entry.path for entry in manifest.files])

    def close(self) -> None:
        """Also removes the copy."""
        super().close()
        shutil.rmtree(self.root, ignore_errors=True)


def _remove_abandoned(own: Path) -> None:
    """Removes the copies of processes that were killed."""
    for left in own.glob("*-*"):
        if local_nodes.dead(left.name.partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)


def _copy(target: Path, places: Mapping[str, Path]) -> int:
    """Copies the files of each cache to `target/NAME/`; returns their number."""
    copied = 0
    for name, place in places.items():
        for path in _servable(place):
            goal = target / name / path.relative_to(place)
            goal.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # a compiler may remove files at any time
                shutil.copyfile(path, goal)
                copied += 1
    return copied


def _servable(place: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(place):
        folders[:] = sorted(folder for folder in folders if folder not in PASSING_DIRECTORIES and folder[0] != ".")
        for file in sorted(files):
            path = Path(parent, file)
            if not file.endswith(PASSING) and file[0] != "." and path.is_file() and not path.is_symlink():
                yield path


def _content(root: Path, manifest: Manifest) -> str:
    """The sha256 over the paths and contents of a manifest's files below `root`."""
    whole = hashlib.sha256()
    with store_errors(root):
        for entry in manifest.files:
            with (root / entry.path).open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").digest()
            whole.update(hashlib.sha256(entry.path.encode()).digest() + contents)
    return whole.hexdigest()


def _merge(staged: Path, manifest: Manifest, places: Mapping[str, Path]) -> tuple[int, int]:
    """Adds staged files to the caches of this machine; returns the numbers of new and existing files."""
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
        incoming.move(path, target)  # never overwrites, and follows no links
    except FileExistsError:
        return False
    return True


def _demand_allowed(settings: Settings) -> None:
    if not settings.compile_caches:
        raise SettingsError("compile_caches", "is off; a compile cache is code, so switch it on for machines you trust")
    if not settings.trusted:
        why = "names no machine, and compile caches are code that runs here; name the machines that may introduce it"
        raise SettingsError("trusted", why)


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()
