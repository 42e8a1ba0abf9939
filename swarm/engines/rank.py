"""How a rank of an engine joins the swarm: its options, and its node.

The node is opened when first needed, on the runtime's loop, and stays open until the process ends. Called from an
engine's threads. Must not know: engines, tensors, files.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swarm.content.manifest import Digest, ModelId
from swarm.errors import SettingsError
from swarm.node import local_nodes
from swarm.node.fetch import Fetched
from swarm.node.node import Node
from swarm.observe.units import count, size_text
from swarm.protocol.messages import Origin
from swarm.runtime import runtime
from swarm.settings import Settings, join_address, split_address
from swarm.store import Source

LOOK_S = 3.0  # for peers, from the opening of the node on
LOOK_BESIDE_FILES_S = 0.5  # where the files are on this machine: to read them takes a second or two
TIERS = ("loaded", "checkpoint")
WITHDRAW_TIMEOUT_S = 30.0  # for transfers that are under way

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class Rank:
    """A rank of an engine: its `label` for people, and its number on this host."""

    label: str
    local: int

    @classmethod
    def of(cls, local: int, **kinds: tuple[int, int]) -> Rank:
        """The rank with a (rank, size) of each kind: `Rank.of(0, tp=(1, 2))` has the label 'tp1'."""
        return cls(",".join(f"{kind}{rank}" for kind, (rank, size) in kinds.items() if size > 1) or "0", local)

    @property
    def first_of_host(self) -> bool:
        """Whether this rank serves the artifacts that its host serves once."""
        return self.local == 0

    def settings(self, shared: Settings) -> Settings:
        """The settings of this rank's node: each rank has its own port and name.

        Without a port in the settings the first rank that comes gets the known one, as every node does.
        """
        host, port = split_address("listen", shared.listen, default_port=0)
        name = shared.name and f"{shared.name}-{self.label}"
        listen = join_address(host, port + self.local) if port else shared.listen
        return dataclasses.replace(shared, listen=listen, name=name)


@dataclass(frozen=True)
class LoadOptions:
    """Options of engines, beside the node's `settings`; docs/engines.md describes each.

    Read from the mapping that the engine gives its loader, else from SWARM_MODEL_ID, SWARM_LOOK_S, SWARM_TIERS,
    SWARM_SERVE, SWARM_WEIGHT_VERSION and SWARM_DIGEST (`pin.EnginePin`). `look_s`: seconds to look for peers, None for
    LOOK_S or LOOK_BESIDE_FILES_S. A `weight_version` is loaded from a peer that serves exactly this version, or loading
    fails.
    """

    settings: Settings
    model_id: str | None = None
    look_s: float | None = None
    tiers: tuple[str, ...] = TIERS
    serve: bool = True
    weight_version: str | None = None
    digest: str | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> LoadOptions:
        """Raises SettingsError, also for keys that neither this class nor `Settings` has."""
        environment = os.environ if environment is None else environment
        own = {field.name for field in dataclasses.fields(cls)} - {"settings"}
        values: dict[str, Any] = {
            name: environment[key] for name in own if (key := f"SWARM_{name.upper()}") in environment
        }
        values |= {name: value for name, value in given.items() if name in own}
        settings = Settings.load({k: v for k, v in given.items() if k not in own}, environment=environment)
        tiers = values.get("tiers", TIERS)
        tiers = tuple(part.strip() for part in tiers.split(",")) if isinstance(tiers, str) else tuple(tiers)
        if unknown := set(tiers) - {*TIERS, ""}:
            raise SettingsError("tiers", f"{sorted(unknown)} are none of {', '.join(TIERS)}")
        try:
            look_s = None if (given_s := values.get("look_s")) is None else float(given_s)
        except (TypeError, ValueError):
            raise SettingsError("look_s", f"{values['look_s']!r} is not a number of seconds") from None
        serve = str(values.get("serve", True)).lower() not in ("0", "false", "no", "off")
        model_id, version = values.get("model_id"), values.get("weight_version")
        return cls(
            settings,
            None if model_id is None else str(model_id),
            look_s,
            tiers,
            serve,
            str(version or "") or None,
            str(values.get("digest") or "") or None,
        )


class RankNode:
    """The node that a rank of the model serves and fetches by; its repr starts each of the rank's log lines."""

    def __init__(self, model_id: ModelId, rank: Rank, settings: Settings) -> None:
        self.model_id = model_id
        self.rank = rank
        self.settings = rank.settings(settings)
        self.opened: Node | None = None
        self.opened_at_s = 0.0  # on the node's clock
        self._opening: asyncio.Task[Node] | None = None
        self._noted = contextlib.ExitStack()  # for `swarm status` on this machine

    async def open(self) -> Node:
        """The node. Raises SettingsError."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(self._open())
        try:
            return await asyncio.shield(self._opening)
        except BaseException:
            if self._opening is not None and self._opening.done() and self.opened is None:
                self._opening = None  # the next call tries again
            raise

    async def _open(self) -> Node:
        node = await runtime().acquire(self.settings)
        self._noted.enter_context(local_nodes.note(self.settings.cache, node.local_address))
        log.info("%s: node %s at %s", self, node.name, node.address)
        self.opened, self.opened_at_s = node, node.now()
        return node

    def serve(self, artifact: ModelId, source: Source, origin: Origin | None = None) -> None:
        """Serves a source from now on; closes it on an error."""

        async def serve() -> None:
            (await self.open()).serve(artifact, source, origin=origin)

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
