"""What an engine's start pins: a digest (`SWARM_DIGEST`), or the whole commit of the engine's own `--revision`.

    digest   the checkpoint with this digest and no other, from wherever it comes: peers, disk, metadata
    commit   the files of this commit, by the hub's listing where it can be asked (`swarm.api.CommitOf`)

Either makes every fetch of the start check BLAKE3: checkpoint, loaded tensors, metadata, compile caches. What tensors a
checkpoint has when it is loaded, and what compiled code does, only the members say that serve them.

Must not know: nodes, tiers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swarm.api import CommitOf, is_commit
from swarm.content.manifest import Digest
from swarm.errors import SettingsError, StoreConflict
from swarm.settings import Settings

VARIABLE = "SWARM_DIGEST"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class EnginePin:
    """The pin of a start; nothing is pinned if both are None."""

    model_id: str
    digest: Digest | None = None
    commit: str | None = None

    @classmethod
    def of(cls, model_id: str, *, digest: str | None, revision: str | None) -> EnginePin:
        """Raises SettingsError for a text that is no whole digest."""
        if digest and not _DIGEST.fullmatch(digest):
            raise SettingsError("digest", f"{digest!r} is not a digest: 64 digits from 0 to 9 and a to f")
        return cls(model_id, Digest(digest) if digest else None, revision if is_commit(revision) else None)

    def settings(self, shared: Settings) -> Settings:
        """The settings of a node that keeps the pin."""
        return dataclasses.replace(shared, chunk_hash="blake3") if self.digest or self.commit else shared

    def commit_of(self, *beside: str) -> CommitOf | None:
        """What fetched files are proven to be, beside their digest. `beside`: those that are no files of the commit."""
        if self.commit is None or self.digest is not None:
            return None
        return CommitOf(self.model_id, self.commit, frozenset(beside))

    def demand(self, content: str, where: Path | str) -> None:
        """Raises StoreConflict for another checkpoint than the one of the digest."""
        if self.digest not in (None, content):
            raise StoreConflict(where, f"is {content[:16]}…, and {VARIABLE} pins {str(self.digest)[:16]}…")


def digest_of(environment: Mapping[str, str]) -> str | None:
    """The digest that the environment pins."""
    return environment.get(VARIABLE) or None
