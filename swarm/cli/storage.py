"""`swarm storage SRC DEST`: fills a directory before a server starts, as the storage initializer of KServe does.

KServe runs the command of a ClusterStorageContainer as an init container and appends pairs of a source and a directory.
Exit code 0 means that all directories are complete; the last line of the log is the reason otherwise, and KServe shows
it. Variables and forms of sources are those of KServe's own initializer.

The process ends so that the server can start, and replicas that fetch the same model at that time lose a source. So it
drains: it ends as soon as no chunk that others lack is only here, for example when an agent has all, and after
`DRAIN_S` at the latest.

Must not know: how models are found and read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from swarm.api import fetch_on
from swarm.cli.progress import progress
from swarm.content.selection import Selection
from swarm.errors import SettingsError, clean
from swarm.node import local_nodes
from swarm.observe.units import size_text
from swarm.runtime import new_node
from swarm.settings import Settings

DRAIN_S = 10.0
ALLOW, IGNORE = "STORAGE_ALLOW_PATTERNS", "STORAGE_IGNORE_PATTERNS"
_HUB = re.compile(r"((?:hf://)?[^/:@]+/[^/:@]+)(?:[:@](.+))?")

log = logging.getLogger("swarm")


def pairs(words: Sequence[str]) -> list[tuple[str, Path]]:
    """Source and directory of each pair, the sources as `swarm fetch` takes them. Raises SettingsError."""
    if len(words) % 2:
        raise SettingsError("storage", f"{clean(words[-1])} has no directory; say SRC DEST [SRC DEST ...]")
    return [(_source(src), Path(dest)) for src, dest in zip(words[::2], words[1::2], strict=True)]


def _source(text: str) -> str:
    if text.startswith("/"):
        return f"file://{text}"
    if text.startswith("pvc://"):
        raise SettingsError("storage", f"{clean(text)}: a volume claim is mounted by KServe; name the path where it is")
    if match := _HUB.fullmatch(text):
        return f"{match[1]}@{match[2]}" if match[2] else match[1]
    if text.startswith("hf://") or "://" not in text:
        raise SettingsError("storage", f"{clean(repr(text))} is not hf://org/model[:REVISION]")
    return text


def patterns(environment: Mapping[str, str], name: str) -> list[str] | None:
    """The patterns in a variable of KServe: a JSON array, or separated by commas."""
    text = environment.get(name, "").strip()
    try:
        parsed = json.loads(text)
        words = [str(word) for word in parsed] if isinstance(parsed, list) else [str(parsed)]
    except (ValueError, RecursionError):
        words = text.split(",")
    return [stripped for word in words if (stripped := word.strip())] or None


async def storage(
    wanted: Sequence[tuple[str, Path]], settings: Settings, environment: Mapping[str, str], *, quiet: bool = False
) -> int:
    """Fills the directories in turn. Raises as `fetch` does."""
    selection = Selection.read(
        include=patterns(environment, ALLOW), exclude=patterns(environment, IGNORE), tensors=None
    )
    node, status = new_node(settings)
    async with contextlib.AsyncExitStack() as open_:
        await open_.enter_async_context(node)
        open_.enter_context(local_nodes.note(settings.cache, node.local_address))
        await open_.enter_async_context(progress(status.fetches, node.now, quiet=quiet))
        for source, directory in wanted:
            log.info("%s -> %s: looking for peers, then for its origin", clean(source), directory)
            done, _, _ = await fetch_on(
                node,
                source,
                out=directory,
                timeout_s=settings.timeout_s,
                settings=settings,
                selection=selection,
            )
            came = ", ".join(f"{clean(name)} {size_text(size)}" for name, size in done.sources.items())
            log.info(
                "%s -> %s: complete, %s in %.2f s, verified%s",
                clean(source),
                directory,
                size_text(done.bytes),
                done.seconds,
                f", from {came}" if came else "",
            )
        await node.drain(DRAIN_S)
    return 0
