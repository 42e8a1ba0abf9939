"""Is a promise a function of its listing alone, and does nothing else pass for one?"""

from __future__ import annotations

import dataclasses
import hashlib
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content.manifest import CHUNKS_MAX, Digest, Digests, Manifest, decode
from swarm.content.promise import ListedFile, Listing, etags, promise, proven
from swarm.errors import ManifestInvalid

SHA = "sha256:" + "a" * 64
SMALL = "git-sha1:" + "b" * 40
FILES = (ListedFile("model.safetensors", 3_000_001, SHA), ListedFile("config.json", 7, SMALL))
LISTING = Listing("https://hub/org/model", "c" * 40, FILES, ("main",))


def changed(**fields: object) -> Listing:
    return dataclasses.replace(LISTING, files=(dataclasses.replace(FILES[0], **fields), FILES[1]))  # type: ignore[arg-type]


def test_does_the_same_listing_give_the_same_bytes_in_any_order() -> None:
    made = promise(LISTING)
    assert promise(dataclasses.replace(LISTING, files=FILES[::-1])).encoded == made.encoded
    assert decode(made.encoded, digest=made.digest) == made


def test_do_name_and_commit_of_hashed_files_not_count() -> None:
    assert promise(dataclasses.replace(LISTING, source="https://mirror/x", commit="d" * 40)).digest == (
        promise(LISTING).digest
    )


@pytest.mark.parametrize("fields", [{"size": 3_000_000}, {"content": "sha256:" + "d" * 64}, {"path": "n.safetensors"}])
def test_is_another_file_another_promise(fields: dict[str, object]) -> None:
    assert promise(changed(**fields)).digest != promise(LISTING).digest


def test_is_an_etag_bound_to_its_origin() -> None:
    weak = changed(content='etag:"1-2"')
    assert promise(dataclasses.replace(weak, source="https://mirror/x")).digest != promise(weak).digest
    assert etags(promise(weak)) == {}
    assert etags(promise(LISTING)) == {"config.json": "b" * 40, "model.safetensors": "a" * 64}


@given(st.lists(st.integers(0, 5_000_000), min_size=1, max_size=20))
def test_do_chunks_cover_every_file(sizes: list[int]) -> None:
    made = promise(Listing("o", "", tuple(ListedFile(f"f{n:02}", size, SHA) for n, size in enumerate(sizes))))
    assert [chunk.index for chunk in made.chunks] == list(range(len(made.chunks)))
    for number, size in enumerate(sizes):
        chunks = made.chunks[slice(*made.first_chunks[number : number + 2])]
        assert sum(chunk.size for chunk in chunks) == size
        assert all(chunk.file == number and 0 < chunk.size <= made.chunk_bytes for chunk in chunks)
        assert [chunk.offset for chunk in chunks] == [sum(c.size for c in chunks[:n]) for n in range(len(chunks))]


@pytest.mark.parametrize(
    "files",
    [
        (),
        (ListedFile("/etc/passwd", 1, SHA),),
        (ListedFile("../x", 1, SHA),),
        (ListedFile("x\ud800", 1, SHA),),
        (ListedFile("x", 1, SHA), ListedFile("x", 1, SHA)),
        (ListedFile("x", 1, SHA), ListedFile("x/y", 1, SHA)),
        (ListedFile("x", 1, "sha256:12"),),
        (ListedFile("x", 1, "etag:a\x1bb"),),
        (ListedFile("x", 1, ""),),
        (ListedFile("x", -1, SHA),),
        (ListedFile("x", 1 << 49, SHA),),
        (ListedFile("x", (CHUNKS_MAX + 1) * (16 << 20), SHA),),
    ],
)
def test_is_a_listing_refused_that_cannot_be_an_artifact(files: tuple[ListedFile, ...]) -> None:
    with pytest.raises(ManifestInvalid):
        promise(Listing("origin", "", files))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"tier":"promised"', b'"tier":"checkpoint"'),
        (b'"header":""', b'"header":"{}"'),
        (b'"chunks":[]', b'"chunks":[[7,"' + b"0" * 32 + b'"]]'),
        (b',"content":"' + SMALL.encode() + b'"', b""),
    ],
)
def test_is_a_promise_refused_that_is_half_a_manifest(old: bytes, new: bytes) -> None:
    data = promise(LISTING).encoded
    assert old in data
    data = data.replace(old, new, 1)
    with pytest.raises(ManifestInvalid):
        decode(data, digest=Digest(hashlib.sha256(data).hexdigest()))


def test_is_content_refused_in_an_ordinary_manifest() -> None:
    manifest = proven(
        promise(LISTING), [Digests(bytes(16), bytes(32))] * len(promise(LISTING).chunks), headers={}, unused={}
    )
    entry = msgspec.structs.replace(manifest.files[0], content=SHA)
    with pytest.raises(ManifestInvalid, match="content"):
        Manifest(1, "checkpoint", "", manifest.scheme, manifest.chunk_bytes, (entry, manifest.files[1])).check()


def test_is_a_proven_promise_a_manifest_with_the_same_chunks() -> None:
    made = promise(LISTING)
    dice = random.Random(1)
    digests = [Digests(dice.randbytes(16), dice.randbytes(32)) for _ in made.chunks]
    manifest = proven(made, digests, headers={}, unused={})
    assert decode(manifest.encoded, digest=manifest.digest) == manifest
    assert [dataclasses.replace(chunk, digest=b"", blake3=b"") for chunk in manifest.chunks] == list(made.chunks)
    assert [chunk.digests for chunk in manifest.chunks] == digests
    assert manifest.has_blake3
