"""What the chunks of a simulated origin are, and what newcomers that lie say of them.

A chunk's digests stand for its bytes: a newcomer that lies hands on other bytes, which have the digests that it claims.
Only the content of the whole model tells, and only after the last chunk.

Must not know: how the machines decide.
"""

from __future__ import annotations

import hashlib

from swarm.content.manifest import Digests, FileEntry, HashScheme, Manifest
from swarm.content.promise import SHA256
from swarm.protocol.messages import NodeId
from swarm.simulation.setup import Burst


def promised(burst: Burst) -> Manifest:
    """The promise of the model: a single file, whose claims are believed until its last chunk."""
    file = FileEntry("model", burst.copy_bytes, "", (), content=SHA256 + "0" * 64)
    return Manifest(1, "promised", "", HashScheme(), burst.chunk_bytes, (file,))


def true_digests(chunk: int) -> Digests:
    """The digests of a chunk of the origin."""
    return Digests(chunk.to_bytes(16, "big"), chunk.to_bytes(32, "big"))


def false_digests(chunk: int, liar: NodeId) -> Digests:
    """What a liar says instead: its own for each liar."""
    made = hashlib.sha256(f"{chunk} {liar}".encode()).digest()
    return Digests(made[:16], made)
