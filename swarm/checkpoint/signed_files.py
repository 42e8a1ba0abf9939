"""Compares the files of a model with those that a signer of OpenSSF Model Signing names.

Bystanders (`checkpoint.files`) may be missing, because copies that swarm makes need not have them. Every other signed
file must be there with its sha256, and no file that is not signed. Must not know: keys, signatures.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from swarm.checkpoint.files import bystander, walk
from swarm.store.file_errors import store_errors


def problems(path: Path, signed: Mapping[str, str], *, signature: str) -> list[str]:
    """What differs, a line for each file; empty if the files are as signed. `signed`: sha256 by path.

    `signature`: the path of the signature itself. Raises ManifestInvalid and StoreError.
    """
    with store_errors(path):
        there = {file.path: file.real for file in walk(path)[0] if file.path != signature}
        with ThreadPoolExecutor(thread_name_prefix="swarm-hash") as pool:
            found = dict(zip(there, pool.map(_sha256, there.values()), strict=True))
    differ = [f"{name}: is not as signed" for name in found if name in signed and signed[name] != found[name]]
    extra = [f"{name}: is not signed" for name in found if name not in signed]
    missing = [f"{name}: is signed, and missing" for name in signed if name not in found and not bystander(name)]
    return sorted(differ + extra + missing)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        for part in iter(partial(file.read, 1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()
