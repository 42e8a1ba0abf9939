"""Small models of the engine tests."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from swarm.checkpoint import digest_cache, manifest_builder
from swarm.content.manifest import Manifest


def hashed(model: Path, cache: Path) -> Manifest:
    """Hashes a model, as a machine that has served it before."""
    with mock.patch.object(digest_cache, "RACY_NS", 0):  # the files are younger than a cache trusts
        manifest, source, _ = manifest_builder.checkpoint(model, cache_dir=cache)
    source.close()
    return manifest
