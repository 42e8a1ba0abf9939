"""The node of a rank: opened when first needed, on the runtime's loop, and open until the process ends.

Called from an engine's threads. Must not know: engines, tensors, files.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from swarm.content.manifest import Digest, ModelId
from swarm.engines.options import Rank
from swarm.node import local_nodes
from swarm.node.node import Fetched, Node
from swarm.observe.units import count, size_text
from swarm.runtime import runtime
from swarm.settings import Settings
from swarm.store import Source

WITHDRAW_TIMEOUT_S = 30.0  # for transfers that are under way

log = logging.getLogger("swarm")


class RankNode:
    """The node that a rank of the model serves and fetches by; its repr starts each of the rank's log lines."""

    def __init__(self, model_id: ModelId, rank: Rank, settings: Settings) -> None:
        self.model_id = model_id
        self.rank = rank
        self.settings = rank.settings(settings)
        self.opened: Node | None = None
        self._noted = contextlib.ExitStack()  # for `swarm status` on this machine

    async def open(self) -> Node:
        """The node. Raises SettingsError."""
        if self.opened is None:
            self.opened = await runtime().acquire(self.settings)
            self._noted.enter_context(local_nodes.note(self.settings.cache, self.opened.address))
            log.info("%s: node %s at %s", self, self.opened.name, self.opened.address)
        return self.opened

    def serve(self, artifact: ModelId, source: Source) -> None:
        """Serves a source from now on; closes it on an error."""

        async def serve() -> None:
            (await self.open()).serve(artifact, source)

        try:
            runtime().run(serve())
        except BaseException:
            source.close()
            raise

    def withdraw(self, digests: set[Digest], why: str) -> None:
        """Returns when no transfer reads these artifacts any more: the caller may release their memory."""

        async def withdraw() -> None:
            node = await self.open()
            closing = [task for digest in digests if (task := node.withdraw(digest, why))]
            if closing:
                await asyncio.wait(closing, timeout=WITHDRAW_TIMEOUT_S)

        runtime().run(withdraw())

    def log_fetch(self, fetched: Fetched) -> None:
        """Logs bytes, transports, seconds, rate and sources."""
        over = f" over {' and '.join(fetched.transports)}" if fetched.transports else ""
        log.info(
            "%s: fetched %s%s in %.2f s (%s/s) from %s (%s)",
            self, size_text(fetched.bytes - fetched.resumed_bytes), over, fetched.seconds,
            size_text(fetched.rate_bytes_per_s), count(len(fetched.sources), "source"),
            ", ".join(f"{name} {size} bytes" for name, size in fetched.sources.items()),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"{self.model_id} rank {self.rank.label}"
