"""Two sources of one artifact as one: a node that fetches another part goes on serving the part that it has.

Must not know: peers, hash functions.
"""

from __future__ import annotations

from collections.abc import Iterator

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Chunk
from swarm.store import AnySpan, DeviceSource, IsRight, Source, Span, WatchedSource


class JoinedSource:
    """Reads the chunks `of_first` from `first`, and all others from `second`. It owns both."""

    def __init__(self, first: Source, second: Source, *, of_first: Bitfield) -> None:
        self.manifest = second.manifest
        self._first = first
        self._second = second
        self._of_first = of_first

    def spans(self, chunk: Chunk) -> Iterator[Span]:
        """See Source."""
        return self._of(chunk).spans(chunk)

    def device_spans(self, chunk: Chunk) -> Iterator[AnySpan]:
        """See DeviceSource."""
        source = self._of(chunk)
        return source.device_spans(chunk) if isinstance(source, DeviceSource) else source.spans(chunk)

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        """See WatchedSource."""
        source = self._of(chunk)
        if isinstance(source, WatchedSource):
            yield from source.read(chunk)
        else:
            yield from (span for span in source.spans(chunk) if isinstance(span, memoryview))

    def demand_unchanged(self, is_right: IsRight) -> None:
        """See WatchedSource."""
        for source in (self._first, self._second):
            if isinstance(source, WatchedSource):
                source.demand_unchanged(is_right)

    def close(self) -> None:
        """Closes both."""
        self._first.close()
        self._second.close()

    def _of(self, chunk: Chunk) -> Source:
        return self._first if chunk.index in self._of_first else self._second

    def __repr__(self) -> str:
        return f"<JoinedSource {len(self._of_first)} chunks of {self._first!r}, the others of {self._second!r}>"
