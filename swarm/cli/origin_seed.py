"""`swarm serve --origin ADDRESS [DIR]`: a seed that reads a model from its origin, and serves it as it arrives.

    DIR       the directory that it fills; without it the Hugging Face cache, for models of a hub
    restart   what is there is hashed, and not read again
    change    files that another program changes are withdrawn, and read again

Must not know: how origins are read, how a fetch lands.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from swarm.cli.next_step import fetch_command, listening
from swarm.errors import LocalProtocolError, SettingsError
from swarm.settings import CHOICES, Settings

if TYPE_CHECKING:
    from swarm.api.handles import HubCache
    from swarm.node.node import Node

log = logging.getLogger("swarm")


async def serve_origin(options: argparse.Namespace, settings: Settings, *, serves: Callable[[Node], object]) -> int:
    """Reads and serves until it is cancelled; `serves(node)` is called when it serves. Raises as a fetch does."""
    from swarm.api import HUB_CACHE, fetch_on
    from swarm.checkpoint import hf_cache
    from swarm.cli.progress import progress
    from swarm.content.manifest import ModelId
    from swarm.node import local_nodes
    from swarm.observe.trace import tracing
    from swarm.observe.units import size_text
    from swarm.origin import registry
    from swarm.protocol.messages import unsayable
    from swarm.runtime import new_node

    if options.source in CHOICES["origin"]:
        text = f"{options.source!r} is a value for a fetch; a seed of a directory reads no origin: leave --origin out"
        raise SettingsError("origin", f"{text}, or name a model or an address as in --origin hf://org/model")
    address = options.source if registry.parse(options.source) else f"hf://{options.source}"
    where = registry.parse(hf_cache.with_revision(address)[0])
    if where is None or (where.scheme == "hf" and not hf_cache.is_model_id(where.model)):
        raise SettingsError("origin", f"{options.source!r} is neither the id of a model nor the address of an origin")
    name = options.model_id or where.model_id
    if why := unsayable(name):
        raise SettingsError("model_id", why)
    out: Path | HubCache = HUB_CACHE if options.model is None else Path(options.model)
    if options.model is None and (where.scheme != "hf" or name != where.model_id):
        do = f"say swarm serve DIR --origin {options.source}"
        raise SettingsError("path", f"is missing; the Hugging Face cache holds models of a hub under their ids: {do}")
    node, status = new_node(settings)
    async with contextlib.AsyncExitStack() as open_:
        open_.enter_context(tracing(node.journal, options.trace))
        unready = open_.enter_context(contextlib.ExitStack())
        unready.enter_context(node.asked_for(name, "is being read from its origin"))
        await open_.enter_async_context(node)
        open_.enter_context(local_nodes.note(settings.cache, node.local_address))
        log.info("reads %s, and serves it as it arrives", address)
        log.info("fetch it with: %s", fetch_command(name, node.address, settings))
        if node.on_loopback:
            log.info("only from this machine; for others serve it with %s", listening(settings))
        with contextlib.suppress(asyncio.CancelledError):  # to stop a seed is no failure
            while True:
                serves(node)
                async with progress(status.fetches, node.now):
                    fetched, store, _ = await fetch_on(
                        node,
                        address,
                        revision=options.revision,
                        out=out,
                        settings=settings,
                        served_as=ModelId(name),
                    )
                if store is None:
                    raise LocalProtocolError("the agent has the files of an address; please report this")
                unready.close()
                size = f"{len(store.manifest.files)} files, {size_text(store.manifest.size)}"
                print(f"{node.address} ready: {name}, {size}, digest {fetched.digest}", flush=True)
                lost = await node.until_lost(fetched.digest)
                log.info("%s: %s; it is read again", name, lost.why)
    return 0
