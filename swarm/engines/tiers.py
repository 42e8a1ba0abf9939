"""The source of a rank's weights: which tiers to try, in which order, and why not the others.

    loaded       twins only: the tensors of a rank of the same layout, from memory to memory
    checkpoint   any layout: the files, into a directory that the host's ranks share; the engine's own loader reads them
    disk         no swarm: local files, or the hub

`choose` is a pure function of an `Availability`. The loader tries the wanted tiers in order; each failure leads to the
next tier.

Must not know: engines, nodes, torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from swarm.content.manifest import Digest
from swarm.engines.layout import NAMES_SHOWN, FieldDifference
from swarm.observe.units import count

TierName: TypeAlias = Literal["loaded", "checkpoint", "disk"]
Local: TypeAlias = Literal["whole", "headers", "config"]  # the part of the checkpoint that is on this machine


@dataclass(frozen=True)
class OtherLayout:
    """A peer that has the model loaded in another layout."""

    name: str
    differences: Sequence[FieldDifference]


@dataclass(frozen=True)
class Availability:
    """The sources of a rank's weights, as known before loading.

    `content`: digest of the checkpoint that this engine is configured for, None if unknown. `unsafe`: why ranks of this
    engine cannot exchange tensors. `unread`: the decision that the engine took without the files' headers, so that it
    may have built a model that the files do not fit. `barred`: tiers that the user turned off. `version`: the requested
    weight version, which no files hold. `strangers`: names of peers that serve other content under the model id.
    """

    content: Digest | None
    local: Local
    twins: int = 0
    holders: int = 0  # of the checkpoint with this content, a copy on this disk included
    others: Sequence[OtherLayout] = ()
    strangers: Sequence[str] = ()
    unsafe: str = ""
    unread: str = ""
    barred: frozenset[str] = field(default_factory=frozenset)
    version: str = ""


@dataclass(frozen=True)
class TierChoice:
    """A tier, whether to try it, and the reason.

    `alternative`: a later tier is likely to bring the weights, so that this tier should end once it has no source.
    """

    tier: TierName
    wanted: bool
    why: str
    alternative: bool = False


def choose(available: Availability) -> list[TierChoice]:
    """Every tier, in the order of trying."""
    loaded, checkpoint, version = _against_loaded(available), _against_checkpoint(available), _against_files(available)
    disk = "files of this machine" if available.local == "whole" else "hub or disk, as without swarm"
    # With headers alone the engine was told to start from the swarm: its disk has no weights, and the hub may be out
    # of reach.
    from_disk = not version and available.local != "headers"
    return [
        TierChoice("loaded", not loaded, loaded or f"{count(available.twins, 'twin')} of this very layout",
                   alternative=from_disk or not checkpoint),
        TierChoice("checkpoint", not checkpoint, checkpoint or f"{count(available.holders, 'node')} with these files",
                   alternative=from_disk),
        TierChoice("disk", not version, version or disk),
    ]  # fmt: skip


def _against_loaded(at: Availability) -> str:
    """Why not to try the tier; '' to try it."""
    if "loaded" in at.barred:
        return "turned off"
    if at.unsafe:
        return at.unsafe
    if at.content is None:
        return _unknown_content(at)
    if not at.twins:
        return "; ".join(["no twin", *map(_differs, at.others), *_refused(at)])
    return ""


def _against_checkpoint(at: Availability) -> str:
    if "checkpoint" in at.barred:
        return "turned off"
    if at.version:
        return _against_files(at)
    if at.local == "whole":
        return "the files are on this machine already"
    if at.content is None:
        return _unknown_content(at)
    if at.unread:
        return at.unread
    if not at.holders:
        return "; ".join(["no peer serves the files", *_refused(at)])
    return ""


def _against_files(at: Availability) -> str:
    return f"no files hold weight version {at.version!r}" if at.version else ""


def _unknown_content(at: Availability) -> str:
    if at.local == "whole":
        return "the files here were never hashed, so they cannot be compared with those of peers"
    return "no peer serves the model, so its content is not known"


def _differs(other: OtherLayout) -> str:
    shown = "; ".join(map(str, other.differences[:NAMES_SHOWN]))
    more = len(other.differences) - NAMES_SHOWN
    return f"{other.name} differs: {shown}" + (f"; and {more} more" if more > 0 else "")


def _refused(at: Availability) -> list[str]:
    return [f"other content under the same name is refused: {', '.join(at.strangers)}"] if at.strangers else []
