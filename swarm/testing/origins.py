"""The contract of origins as a program: `check_origin` raises AssertionError where an origin breaks it.

    check_origin(MyOrigin, "my://place/model", {"config.json": b"{}", "model.safetensors": data})

Blocks, and reads every file several times: give it a model of some MB.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from swarm.content.promise import ETAG, GIT_SHA1, SHA256, ListedFile, Listing, promise
from swarm.errors import OriginChanged, OriginError
from swarm.origin import OriginReader
from swarm.testing.require import require

VIEW_BYTES = 10_007  # no divisor of anything
READERS = 4


def check_origin(
    make: Callable[[], OriginReader],
    model: str,
    files: Mapping[str, bytes],
    *,
    revision: str | None = None,
    missing: str | None = None,
    change: Callable[[], object] | None = None,
) -> None:
    """Checks an origin that has a `model` with these files, at least one of which is not empty.

    `missing`: a model that it does not have. `change()` changes the content of a file without a hash: then reads of it
    must fail. Raises AssertionError.
    """
    origin = make()
    listing = origin.listing(model, revision)
    _check_listing(listing, files)
    again = make().listing(model, revision)
    require(again.files == listing.files, "two listings of one content differ")
    require(promise(again).digest == promise(listing).digest, "two listings of one content make two promises")
    for file in listing.files:
        if file.size:
            _check_ranges(origin, listing, file, files[file.path])
    full = [file for file in listing.files if file.size]
    with ThreadPoolExecutor(READERS) as pool:
        for file, data in zip(
            full * READERS, pool.map(lambda f: _read(origin, listing, f), full * READERS), strict=True
        ):
            require(data == files[file.path], f"{file.path} has other bytes when it is read by several threads")
    _check_closing(origin, listing, full[0])
    if missing is not None:
        _demand_error(lambda: origin.listing(missing, revision), OriginError, "a model that does not exist is listed")
    if change is not None:
        change()
        weak = [file for file in full if file.content.startswith(ETAG)]
        require(bool(weak), "there is no file without a hash to change")
        for file in weak:
            with contextlib.suppress(OriginChanged):
                require(_read(origin, listing, file) == files[file.path], f"{file.path} changed, and is read on")


def _check_listing(listing: Listing, files: Mapping[str, bytes]) -> None:
    require({file.path for file in listing.files} == set(files), "other paths are listed than there are")
    for file in listing.files:
        data = files[file.path]
        require(file.size == len(data), f"{file.path} is listed with {file.size} bytes and has {len(data)}")
        kind, _, value = file.content.partition(":")
        if kind + ":" == SHA256:
            require(value == hashlib.sha256(data).hexdigest(), f"{file.path} is listed with another sha256")
        elif kind + ":" == GIT_SHA1:
            named = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            require(value == named, f"{file.path} is listed with another sha1 of git")
        else:
            require(file.content.startswith(ETAG) and bool(value), f"{file.path} has the content {file.content!r}")


def _check_ranges(origin: OriginReader, listing: Listing, file: ListedFile, data: bytes) -> None:
    size = file.size
    for offset, count in {
        (0, size),
        (0, 1),
        (size - 1, 1),
        (size // 3, size - size // 3),
        (size // 2, max(1, size // 5)),
    }:
        found = _read(origin, listing, file, offset, count)
        require(found == data[offset : offset + count], f"{file.path} has other bytes at {offset}, {count} of them")


def _check_closing(origin: OriginReader, listing: Listing, file: ListedFile) -> None:
    stream = origin.read(listing, file, 0, file.size)
    stream.close()
    stream.close()
    _demand_error(lambda: stream.readinto(memoryview(bytearray(1))), OriginError, "a closed stream is read on")


def _read(origin: OriginReader, listing: Listing, file: ListedFile, offset: int = 0, size: int | None = None) -> bytes:
    data, scratch = bytearray(), memoryview(bytearray(VIEW_BYTES))
    with contextlib.closing(origin.read(listing, file, offset, file.size if size is None else size)) as stream:
        while count := stream.readinto(scratch):
            require(0 < count <= len(scratch), f"{file.path}: {count} bytes were read into a view of {len(scratch)}")
            data += scratch[:count]
        require(stream.readinto(scratch) == 0, f"{file.path}: there are bytes after the end of a range")
    return bytes(data)


def _demand_error(call: Callable[[], object], kind: type[Exception], why: str) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(why)
