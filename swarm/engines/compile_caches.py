"""Compile caches as artifacts: the output of torch.compile, Triton, FlashInfer and vLLM, for equal machines.

    before_compiling(fields, settings)   fetches, verifies and installs a cache; a failure is only logged
    after_warm_up(fields, settings)      serves a copy of the caches until it is closed; a failure is only logged

`install` and `offer` do the same and raise; `fetch` is the coroutine. A cache is code, pickles and shared libraries
that a compiler loads without a check. Therefore:

- With a cluster key, the members of the cluster may introduce caches; where `trusted` names machines, those alone.
  Without a key, caches are off unless `compile_caches` is set and `trusted` names machines. A digest counts only if
  such a machine announces it over its own link.
- The manifest of the introduction carries the sha256 of all files. Files with another sha256 are not installed: chunks
  come from any member, and xxh3 digests do not detect tampering.
- The key is a fingerprint of versions, processor, GPU and driver.
- Paths, links and existing files are `cache_files`' business.

Two machines compile the same input into different bytes. So, unlike a model, a key may have several contents; the
content that most members hold is fetched.

A key holds no path of a model: a cache fits wherever the model lies.

Must not know: engines, tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import importlib.metadata
import logging
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from swarm.api import Served, serve_source
from swarm.checkpoint import manifest_builder
from swarm.content.manifest import Digest, Manifest, ModelId
from swarm.engines import cache_files, cache_gc
from swarm.engines.layout import Fingerprint, short_digest
from swarm.errors import ManifestInvalid, ManifestNotFound, SettingsError, SwarmError
from swarm.node import local_nodes
from swarm.node.agreement import FIND_TIMEOUT_S
from swarm.node.node import Node
from swarm.node.resolve import resolve
from swarm.node.trust import introduced, networks
from swarm.observe.units import size_text
from swarm.runtime import runtime
from swarm.settings import Settings
from swarm.store.directory import DirectoryStore
from swarm.store.file_errors import store_errors

CONTENT = "sha256"  # the field that binds a manifest to the bytes of its files
CACHE_BYTES_MAX = 16 << 30  # far above real caches; keeps a member from filling the disk
EVERY_MACHINE = ("0.0.0.0/0", "::/0")
FIND_S = 2.0  # for a node to hear of caches; compiling takes tens of seconds, and mostly there are none
PACKAGES = ("torch", "triton", "flashinfer-python", "vllm", "sglang")  # their versions decide the compiled output
MODELINFOS = "modelinfos"  # vLLM's descriptions of model classes, which take 20 s to make
STAGING, OWN = "compiled", "compiled-own"  # below the cache directory: fetched files by digest, and served copies
SETTLE_S, SETTLE_LEAST_S = 0.3, 0.05  # wait for more holders after the first: while the node searches, and at least
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

    def __str__(self) -> str:
        names = ", ".join(self.sources)
        return f"{self.new} files ({size_text(self.bytes)}) from {names}, {self.kept} were here"


def directories(environment: Mapping[str, str] | None = None) -> dict[str, Path]:
    """The cache directory of each known compiler by name, as that compiler finds it; none is inside another."""
    env = os.environ if environment is None else environment
    home = Path(env.get("HOME") or Path.home())
    inductor = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    triton = Path(env.get("TRITON_HOME") or home) / ".triton" / "cache"
    vllm = vllm_root(env)
    found = {
        "vllm": vllm / "torch_compile_cache",
        "vllm-modelinfos": vllm / MODELINFOS,
        "vllm-deep_gemm": Path(env.get("DG_JIT_CACHE_DIR") or vllm / "deep_gemm"),
        "vllm-flashinfer": Path(env.get("VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR") or vllm / "flashinfer_autotune_cache"),
        "inductor": Path(env.get("TORCHINDUCTOR_CACHE_DIR") or inductor),
        "triton": Path(env.get("TRITON_CACHE_DIR") or triton),
        "flashinfer": Path(env.get("FLASHINFER_WORKSPACE_BASE") or home) / ".cache" / "flashinfer",
    }
    # vLLM points inductor to a directory inside its own.
    return {
        name: path
        for name, path in found.items()
        if not any(path != other and path.is_relative_to(other) for other in found.values())
    }


def vllm_root(environment: Mapping[str, str]) -> Path:
    """The directory of all caches of vLLM."""
    home = Path(environment.get("HOME") or Path.home())
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    return Path(environment.get("VLLM_CACHE_ROOT") or cache / "vllm").expanduser()


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


def refusal(settings: Settings) -> str:
    """Why these settings allow no exchange of caches; '' if they do."""
    if settings.compile_caches is False:
        return "is off"
    if settings.key_file is not None or (settings.compile_caches and settings.trusted):
        return ""
    if settings.compile_caches:
        return (
            "needs a cluster key, whose members are trusted, or `trusted`, which names the machines that may introduce "
            "caches: they are code that runs here"
        )
    return "is off without a cluster key: caches are code that runs here"


def offer(wanted: Fingerprint, settings: Settings, *, places: Mapping[str, Path] | None = None) -> Served | None:
    """Serves a copy of the caches with this key as they are now; None if they are empty.

    Raises SettingsError where the settings do not allow it, StoreError, ManifestInvalid.
    """
    _demand_allowed(settings)
    own = settings.cache / OWN
    cache_files.remove_abandoned(own)
    copy = own / f"{local_nodes.process()}-{secrets.token_hex(4)}"
    try:
        with store_errors(copy):
            found = cache_files.copy(copy / "files", directories() if places is None else places)
        if not found:
            return None
        source = manifest_builder.files(copy / "files", cache_dir=copy)
        source.close()
        text = Fingerprint({**wanted.fields, CONTENT: cache_files.content(copy / "files", source.manifest)}).text
        manifest = msgspec.structs.replace(source.manifest, tier="cache", fingerprint=text)
        return serve_source(artifact_id(wanted), cache_files.CopySource(copy, manifest), None, settings=settings)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise


def install(
    wanted: Fingerprint,
    settings: Settings,
    *,
    places: Mapping[str, Path] | None = None,
    find_timeout_s: float | None = None,
) -> InstalledCache:
    """Fetches a cache of this key and adds its files to the caches of this machine. Raises as `fetch` does."""
    return runtime().run(fetch(wanted, settings, places=places, find_timeout_s=find_timeout_s))


def before_compiling(fields: Mapping[str, str], settings: Settings) -> InstalledCache | None:
    """`install` that waits at most FIND_S for a holder: None if caches are off or on an error, which is logged."""
    if not _asked_for(settings):
        return None
    try:
        installed = install(key(fields), settings, find_timeout_s=FIND_S)
    except (SwarmError, OSError) as error:
        log.info("compile cache: compiling here (%s)", error)
        return None
    log.info("compile cache: %s", installed)
    return installed


def after_warm_up(fields: Mapping[str, str], settings: Settings) -> Served | None:
    """`offer`: None if caches are off or on an error, which is logged."""
    if not _asked_for(settings):
        return None
    try:
        return offer(key(fields), settings)
    except (SwarmError, OSError) as error:
        log.info("compile cache: not served (%s)", error)
        return None


async def fetch(
    wanted: Fingerprint,
    settings: Settings,
    *,
    places: Mapping[str, Path] | None = None,
    find_timeout_s: float | None = None,
    found: Callable[[], object] = bool,
) -> InstalledCache:
    """Fetches a cache of this key and adds its files to the caches of this machine; calls `found` at the first holder.

    Raises SettingsError where the settings do not allow it, ManifestNotFound if no machine that may introduce it
    announces it within `find_timeout_s`, by default that of the settings, ManifestInvalid if the manifest is no such
    cache or the files do not match it, and the errors of `swarm.fetch` into a directory.
    """
    _demand_allowed(settings)
    limits = (find_timeout_s, settings.find_timeout_s, FIND_TIMEOUT_S)
    find_s = next(limit for limit in limits if limit is not None)
    places = directories() if places is None else places
    async with contextlib.AsyncExitStack() as undo:
        node = await runtime().acquire(settings)
        undo.push_async_callback(runtime().release, settings)
        digest = await _choose(node, artifact_id(wanted), settings.trusted, find_s, found)
        manifest, _ = await resolve(node, artifact_id(wanted), digest=digest, find_timeout_s=find_s)
        content = _check(manifest, wanted)
        path = settings.cache / STAGING / digest[:32]
        cache_gc.hold(path)
        limit_bytes = settings.cache_limit_bytes
        await asyncio.to_thread(lambda: cache_gc.prune(settings.cache, limit_bytes, need_bytes=manifest.size))
        # No fsync: a file torn by a power cut has another sha256.
        store = await asyncio.to_thread(lambda: DirectoryStore(path, manifest, fsync=False))
        fetched = await node.fetch(artifact_id(wanted), store, timeout_s=settings.timeout_s)
        undo.callback(node.release, digest)
        if await asyncio.to_thread(cache_files.content, path, manifest) != content:
            shutil.rmtree(path, ignore_errors=True)
            why = "the files are not those that were introduced: a member or a disk altered them; nothing is installed"
            raise ManifestInvalid(artifact_id(wanted), why)
        new, kept = await asyncio.to_thread(cache_files.merge, path, manifest, places)
        undo.pop_all()
    served = Served(artifact_id(wanted), digest, node.address, settings)
    return InstalledCache(new, kept, fetched.bytes, fetched.sources, served)


async def _choose(
    node: Node, wanted_id: ModelId, trusted_names: tuple[str, ...], find_s: float, found: Callable[[], object]
) -> Digest:
    """The digest that most nodes hold, of those that a linked machine announces which may. Raises ManifestNotFound."""
    deadline = node.now() + find_s
    first: float | None = None
    trusted = networks(trusted_names or EVERY_MACHINE)
    with node.seeking(None):
        while True:
            holders = introduced(node.holders(wanted_id), trusted)
            if holders:
                found()
                first = node.now() if first is None else first
                if node.now() - first >= (SETTLE_S if node.searching else SETTLE_LEAST_S):
                    return min(holders, key=lambda digest: (-len(holders[digest]), digest))
            elif node.now() >= deadline:
                raise ManifestNotFound(wanted_id, tried=node.tried(), waited_s=find_s)
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


def _demand_allowed(settings: Settings) -> None:
    if why := refusal(settings):
        raise SettingsError("compile_caches", why)


def _asked_for(settings: Settings) -> bool:
    return bool(settings.compile_caches) or not refusal(settings)


def _cpu_flags() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line.partition(":")[2].strip()
    return platform.processor()
