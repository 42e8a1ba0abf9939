"""Decoders of what does not come over links: answers of the hub, signatures, records of caches, descriptions.

Another user of the machine, a publisher or a man in the middle may have written them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from swarm.checkpoint import digest_cache, hub_tree, signature_file
from swarm.content.manifest import ChunkEntry, Digest, FileEntry, HashScheme, Manifest, ModelId, unsafe_path
from swarm.content.promise import promise
from swarm.engines import metadata
from swarm.errors import ManifestInvalid, OriginError
from swarm.origin import http
from swarm.origin.hf import HubOrigin
from swarm.protocol.messages import Signature
from swarm.security import model_signature
from swarm.store.stamp import Stamp

from .target import Target

COMMIT, SHA1, SHA256 = "c" * 40, "b" * 40, "a" * 64
_CHUNK = ChunkEntry(4, "01" * 16)
_MANIFEST = Manifest(
    1, "checkpoint", "", HashScheme(), 1 << 10, (FileEntry("config.json", 4, "", (_CHUNK,), blake3=("02" * 32,)),)
)

logging.getLogger("swarm").addHandler(logging.NullHandler())  # ignored records are told, a million times


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder, "file")
        path.write_bytes(data)
        path.chmod(0o600)
        yield path


class _Answer:
    """An answer of the hub, whatever is asked."""

    status = 200
    headers: Mapping[str, str] = {}

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, most: int) -> bytes:
        return self._data[:most]

    def close(self) -> None: ...


def _listings() -> list[bytes]:
    large = {"rfilename": "model.safetensors", "size": 9, "blobId": SHA1, "lfs": {"sha256": SHA256, "size": 9}}
    small = {"rfilename": "config.json", "size": 4, "blobId": SHA1}
    return [
        json.dumps({"sha": COMMIT, "siblings": files}).encode()
        for files in ([small], [large, small], [{"rfilename": "dir/empty", "size": 0, "blobId": SHA1}])
    ]


def feed_listing(data: bytes) -> bool:
    """The hub's listing of a commit, and the promise of it."""
    hub = HubOrigin({"HF_ENDPOINT": "http://hub", "HF_HOME": "/nonexistent"})
    with mock.patch.object(http, "request", return_value=_Answer(data)):
        try:
            listing = hub.listing("org/model", COMMIT)
        except OriginError:
            return False
    try:
        made = promise(listing)
    except ManifestInvalid:
        return False
    assert {file.path for file in made.files} == {file.path for file in listing.files}
    assert not any(unsafe_path(file.path) for file in made.files)
    return True


_STATEMENT: dict[str, Any] = {
    "_type": model_signature.STATEMENT_TYPE,
    "predicateType": model_signature.PREDICATE_TYPE,
    "subject": [{"name": "model", "digest": {"sha256": SHA256}}],
    "predicate": {"resources": [{"name": "config.json", "algorithm": "sha256", "digest": SHA256}]},
}


def _bundles() -> list[bytes]:
    payload = base64.b64encode(json.dumps(_STATEMENT).encode()).decode()
    envelope = {"payload": payload, "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": "AAAA"}]}
    return [json.dumps({"mediaType": "x", "verificationMaterial": {}, "dsseEnvelope": envelope}).encode()]


class _AnyKey:
    """Takes every signature, so that what is signed is decoded."""

    class curve:  # noqa: N801 - as cryptography names it
        key_size = 256

    def verify(self, *_: object) -> None: ...


def feed_bundle(data: bytes) -> bool:
    """A signature of OpenSSF Model Signing."""
    key: Any = _AnyKey()
    try:
        files = model_signature.signed_files(data, key)
    except ManifestInvalid:
        return False
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in files.values())
    return True


def _signatures() -> list[bytes]:
    found = [Signature(ModelId("org/model"), revision, "d" * 64, "e" * 128) for revision in ("", "v1")]
    return [msgspec.json.encode({"signatures": {SHA256: found[:count]}, "version": 1}) for count in (1, 2)]


def feed_signatures(data: bytes) -> bool:
    """The signatures of publishers beside a model."""
    with _file(data) as place, mock.patch.object(signature_file, "beside", return_value=place):
        found = signature_file.read(place.parent, Digest(SHA256))
    assert all(isinstance(each, Signature) and len(each.signature) == 128 for each in found)
    return bool(found)


def _records() -> list[bytes]:
    stamps = {"config.json": Stamp(4, 1, 2, 3)}
    record = digest_cache._Record(_MANIFEST.digest, _MANIFEST.encoded.decode(), stamps)
    part = digest_cache._Record(
        _MANIFEST.digest, _MANIFEST.encoded.decode(), {}, part_of=digest_cache.PartOf(Digest(SHA256), 9)
    )
    return [msgspec.json.encode(record), msgspec.json.encode(part)]


def feed_record(data: bytes) -> bool:
    """A record of SWARM_CACHE: digests of files with their stamps."""
    with _file(data) as place:
        found = digest_cache._read(place)
    if found is None:
        return False
    manifest, record = found
    assert hashlib.sha256(manifest.encoded).hexdigest() == manifest.digest
    assert all(isinstance(stamp, Stamp) for stamp in record.stamps.values())
    return True


def _trees() -> list[bytes]:
    files = {
        "config.json": {"size": 4, "blob_id": SHA1},
        "model.safetensors": {"size": 134, "blob_id": SHA1, "lfs_sha256": SHA256, "lfs_size": 9},
    }
    return [json.dumps({"format_version": 1, "files": files}).encode()]


def feed_tree(data: bytes) -> bool:
    """The listing of a commit that huggingface_hub keeps."""
    with _file(data) as place, mock.patch.object(hub_tree, "place", return_value=place):
        found = hub_tree.read(place.parent, COMMIT)
    if found is None:
        return False
    assert all(len(listed.name) in (40, 64) for listed in found.values())
    return True


def _descriptions() -> list[bytes]:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    files = {"model.safetensors": metadata.FileHeader(8 + len(header) + 4, header)}
    found = metadata.CheckpointDescription(Digest(SHA256), files)
    return [msgspec.json.encode(found), msgspec.json.encode(metadata.CheckpointDescription(Digest(SHA256), {}))]


def feed_description(data: bytes) -> bool:
    """The headers of a checkpoint, among the metadata that `swarm run` fetches."""
    with _file(data) as place:
        place.rename(place.with_name(metadata.DESCRIPTION))
        try:
            found = metadata.read(place.parent)
        except ManifestInvalid:
            return False
    assert not any(unsafe_path(path) for path in found.headers)
    found.tensor_names()
    return True


FILE_TARGETS = [
    Target("listings", _listings(), feed_listing, 0.01),
    Target("bundles", _bundles(), feed_bundle, 0.03),
    Target("signatures", _signatures(), feed_signatures, 0.01),
    Target("cached", _records(), feed_record, 0.01),
    Target("trees", _trees(), feed_tree, 0.01),
    Target("described", _descriptions(), feed_description, 0.01),
]
