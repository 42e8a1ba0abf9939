"""Promises: manifests made from the listing of an origin, before any byte is read.

Owns the function from a listing to a manifest. Every node computes the same bytes from the same listing, so a promise
has an identity (its digest) that late joiners, resumes and caches share:

    promise  = files with path, size and content (sha256, git's sha1 or an ETag), cut into chunks by their sizes alone
    identity = sha256(canonical bytes)

If every content is a hash, origin and commit are no part of the identity: the same files under two names are the same
artifact. Otherwise the origin's address is (`fingerprint`), because an ETag means nothing elsewhere.

Chunk digests are no part of a promise. Nodes exchange them as claims (`transfer.claims`), and a file counts when its
content is the promised one. `proven` turns a promise with all digests into a manifest like any other.

Must not know: which origin, how it is read, hash functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarm.content.manifest import (
    CHUNKS_MAX,
    FILES_MAX,
    ChunkEntry,
    Digests,
    FileEntry,
    HashScheme,
    Manifest,
    decode,
    default_chunk_bytes,
    unsafe_path,
)
from swarm.errors import ManifestInvalid

SHA256, GIT_SHA1, ETAG = "sha256:", "git-sha1:", "etag:"


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file of a listing: path, size in bytes and content, as in `FileEntry`."""

    path: str
    size: int
    content: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one revision of a model at an origin.

    `source` is the address of the model there, without revision; `commit` is 40 hexadecimal digits, or '' where the
    origin has none. `revisions`: branch or tag that was asked for. `gated`: the origin lists the files to all that ask,
    and gives them to some.
    """

    source: str
    commit: str
    files: tuple[ListedFile, ...]
    revisions: tuple[str, ...] = ()
    gated: bool = False


def promise(listing: Listing) -> Manifest:
    """The promise of a listing. Raises ManifestInvalid for files that cannot be an artifact."""
    if not 0 < len(listing.files) <= FILES_MAX:
        raise ManifestInvalid(listing.source, f"lists {len(listing.files)} files; 1 to {FILES_MAX} are allowed")
    total = sum(file.size for file in listing.files)
    chunk_bytes = default_chunk_bytes(total)
    chunks = sum(-(-file.size // chunk_bytes) for file in listing.files)
    if chunks > CHUNKS_MAX:
        raise ManifestInvalid(listing.source, f"makes {chunks} chunks; at most {CHUNKS_MAX} are allowed")
    for file in listing.files:
        if why := unsafe_path(file.path):
            raise ManifestInvalid(listing.source, f"lists {file.path!r}, which {why}")
    files = sorted(listing.files, key=lambda file: file.path)
    entries = tuple(FileEntry(file.path, file.size, "", (), content=file.content) for file in files)
    weak = any(file.content.startswith(ETAG) for file in files)
    made = Manifest(1, "promised", listing.source if weak else "", HashScheme(), chunk_bytes, entries)
    return decode(made.encoded, digest=made.digest)


def etags(manifest: Manifest) -> dict[str, str]:
    """The hub's etags of a promise: sha256 or git's sha1 by path; empty if a file has neither."""
    found = {file.path: file.content.partition(":")[2] for file in manifest.files}
    return {} if any(file.content.startswith(ETAG) for file in manifest.files) else found


def proven(
    manifest: Manifest,
    digests: Sequence[Digests],
    *,
    headers: Mapping[str, str],
    unused: Mapping[str, tuple[str, ...]],
) -> Manifest:
    """The manifest of a promise whose files are proven: `digests` by chunk, `headers` of safetensors files by path.

    Its chunks have the indices and sizes of those of the promise.
    """
    entries = []
    for number, file in enumerate(manifest.files):
        of_file = manifest.chunks_of(number)
        chunks = tuple(ChunkEntry(chunk.size, digests[chunk.index].xxh3.hex()) for chunk in of_file)
        strong = tuple(digests[chunk.index].blake3.hex() for chunk in of_file)
        header, names = headers.get(file.path, ""), unused.get(file.path, ())
        entries.append(FileEntry(file.path, file.size, header, chunks, names, strong))
    made = Manifest(1, "checkpoint", "", manifest.scheme, manifest.chunk_bytes, tuple(entries))
    made.check()
    return made
