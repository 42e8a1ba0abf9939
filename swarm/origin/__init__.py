"""Origins: where the bytes of a model come from when no member has them. Here: their interface.

An origin lists the files of a revision, and reads ranges of them. It blocks, and is called on threads; several threads
may call it at once. It does not retry, hash or schedule: `transfer.promise_driver` does, alike for all origins.

    listing = origin.listing("org/model", "main")            # OriginError, with one line for the user
    with contextlib.closing(origin.read(listing, file, offset, size)) as stream:
        stream.readinto(view)                                # until it returns 0

`registry` maps schemes to origins. `swarm.testing.check_origin` checks an origin by its contract, docs/origins.md
shows how to write one.

Must not know: peers, stores, manifests.
"""

from __future__ import annotations

from typing import Protocol

from swarm.content.promise import ListedFile, Listing


class OriginStream(Protocol):
    """The bytes of a range, in order."""

    def readinto(self, view: memoryview, /) -> int:
        """Fills the start of a view; returns the number of bytes, 0 after the last. Raises OriginError."""

    def close(self) -> None:
        """Ends the stream; a `readinto` on another thread fails soon. Idempotent."""


class OriginReader(Protocol):
    """A place with models. `scheme` names its kind, `address` itself, for people."""

    scheme: str
    address: str

    def listing(self, model: str, revision: str | None) -> Listing:
        """The files of a model: all paths below it, relative to it, with their contents.

        Two calls for the same content return equal files. Raises OriginNotFound, OriginDenied, OriginUnreachable.
        """

    def read(self, listing: Listing, file: ListedFile, offset: int, size: int) -> OriginStream:
        """Opens the bytes `[offset, offset + size)` of a listed file.

        Raises OriginChanged if the file is not the listed one any more, OriginNotFound, OriginDenied, and
        OriginUnreachable, with `retry_s` where the origin names a time.
        """
