"""The signatures of publishers that lie beside a model: `swarm-signatures.json`, which is no part of the artifact.

A single file `M` has them in `M.swarm-signatures.json`. What lies here is passed on as it is;
`security.signatures` says whether a signature holds. Must not know: keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from swarm.content.manifest import Digest
from swarm.protocol.messages import SIGNATURES_MAX, Signature
from swarm.store.file_errors import store_errors
from swarm.store.own_files import open_regular, replacing

FILE_NAME = "swarm-signatures.json"
FILE_BYTES_MAX = 1 << 20


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """The content of a file: signatures by the digest of the artifact."""

    signatures: dict[Digest, list[Signature]]
    version: Literal[1] = 1


_decoder = msgspec.json.Decoder(_Record)


def beside(model: Path) -> Path:
    """The file with the signatures of a model directory, or of a single file."""
    return model / FILE_NAME if model.is_dir() else model.with_name(f"{model.name}.{FILE_NAME}")


def read(model: Path, digest: Digest) -> tuple[Signature, ...]:
    """The signatures of an artifact that lie beside it; none without a readable file."""
    return tuple(_read(beside(model)).get(digest, ()))[:SIGNATURES_MAX]


def add(model: Path, digest: Digest, found: Iterable[Signature]) -> Path | None:
    """Adds signatures of an artifact to those beside it; returns the file if that changed it. Raises StoreError."""
    place = beside(model)
    by_digest = _read(place)
    known = by_digest.get(digest, [])
    more = [signature for signature in found if signature not in known]
    if not more:
        return None
    record = _Record(by_digest | {digest: [*known, *more][-SIGNATURES_MAX:]})
    with store_errors(place), replacing(place) as draft:
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    return place


def _read(place: Path) -> dict[Digest, list[Signature]]:
    try:
        with open_regular(place) as file:
            data = file.read(FILE_BYTES_MAX + 1)
        return _decoder.decode(data).signatures if len(data) <= FILE_BYTES_MAX else {}
    except (OSError, ValueError, RecursionError):
        return {}
