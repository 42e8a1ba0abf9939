"""From where a rank takes its weights: which tiers are worth trying, in which order, and why not the others.

    loaded       twins only: the tensors of another rank of the same layout, memory to memory
    checkpoint   any layout: the files, into a directory that a host shares; the engine's own loader reads them
    disk         what the engine would have done without: local files, or the hub

`choose` is a pure function of a `Situation`; whoever loads tries what it wants in that order, and every failure moves
on to the next. A `Layout` is what a rank's tensors are, compared exactly: an engine that takes a tensor of another
shape, or unties what was tied, may answer differently and say nothing.

Must not know: engines, nodes, torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from swarm.content.manifest import FileEntry, Manifest
from swarm.engines.layout import Difference

TierName: TypeAlias = Literal["loaded", "checkpoint", "disk"]
Local: TypeAlias = Literal["whole", "headers", "config"]  # what there is on this machine already

NAMES_SHOWN = 3


@dataclass(frozen=True)
class Other:
    """Somebody who has the model loaded in another layout."""

    name: str
    differences: Sequence[Difference]


@dataclass(frozen=True)
class Situation:
    """What is known before weights are loaded.

    `content` is the digest of the checkpoint that this engine was configured for; None when it is not known which one.
    `unsafe` says why tensors of this engine cannot be handed from rank to rank; `unread` says what the engine decided
    without the headers of the files, so that it may build another model than the files are for; `barred` names tiers
    that the user turned off; `version` is the weight version that is asked for, which no files hold. `strangers` are
    names of those that serve other contents under the same model id.
    """

    content: str | None
    local: Local
    twins: int = 0
    holders: int = 0  # of the checkpoint with this content, here on disk included
    others: Sequence[Other] = ()
    strangers: Sequence[str] = ()
    unsafe: str = ""
    unread: str = ""
    barred: frozenset[str] = field(default_factory=frozenset)
    version: str = ""


@dataclass(frozen=True)
class Choice:
    """One tier, whether to try it, and the reason."""

    tier: TierName
    wanted: bool
    why: str


def choose(situation: Situation) -> list[Choice]:
    """Every tier in the order in which to try them."""
    loaded, checkpoint = _loaded(situation), _checkpoint(situation)
    return [
        Choice("loaded", not loaded, loaded or f"{_many(situation.twins, 'twin')} of this very layout"),
        Choice("checkpoint", not checkpoint, checkpoint or f"{_many(situation.holders, 'node')} with these files"),
        Choice("disk", not situation.version, _versioned(situation) or _disk(situation)),
    ]


def _loaded(at: Situation) -> str:
    """Why not; '' when it is worth trying."""
    if "loaded" in at.barred:
        return "turned off"
    if at.unsafe:
        return at.unsafe
    if at.content is None:
        return _unknown_content(at)
    if not at.twins:
        return "; ".join(["no twin", *map(_differs, at.others), *_strange(at)])
    return ""


def _checkpoint(at: Situation) -> str:
    if "checkpoint" in at.barred:
        return "turned off"
    if at.version:
        return _versioned(at)
    if at.local == "whole":
        return "the files are on this machine already"
    if at.content is None:
        return _unknown_content(at)
    if at.unread:
        return at.unread
    if not at.holders:
        return "; ".join(["nobody serves the files", *_strange(at)])
    return ""


def _disk(at: Situation) -> str:
    return "files of this machine" if at.local == "whole" else "hub or disk, as without swarm"


def _versioned(at: Situation) -> str:
    return f"no files hold weight version {at.version!r}" if at.version else ""


def _unknown_content(at: Situation) -> str:
    if at.local == "whole":
        return "the files here were never hashed, so it is not known whether the others' are the same"
    return "; ".join(["it is not known which content is wanted", *_strange(at)])


def _differs(other: Other) -> str:
    shown = "; ".join(map(str, other.differences[:NAMES_SHOWN]))
    more = len(other.differences) - NAMES_SHOWN
    return f"{other.name} differs: {shown}" + (f"; and {more} more" if more > 0 else "")


def _strange(at: Situation) -> list[str]:
    return [f"other content under the same name is refused: {', '.join(at.strangers)}"] if at.strangers else []


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Layout:
    """What the tensors of one rank are: (dtype, shape) by name in safetensors' words, and alias -> name."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def described(cls, manifest: Manifest) -> Layout:
        """What a manifest describes. Raises ManifestInvalid."""
        return cls.of_files(manifest.files)

    @classmethod
    def of_files(cls, files: Sequence[FileEntry]) -> Layout:
        """What the headers of files describe. Raises ManifestInvalid."""
        tensors = {one.name: (one.dtype, one.shape) for file in files for one in file.tensors()}
        return cls(tensors, {alias: name for file in files for alias, name in file.aliases().items()})

    def differences(self, theirs: Layout) -> list[str]:
        """Everything in which they differ, a line for each kind; none when they are exactly the same."""
        both = self.tensors.keys() & theirs.tensors.keys()
        found = {
            "missing there": sorted(self.tensors.keys() - theirs.tensors.keys()),
            "missing here": sorted(theirs.tensors.keys() - self.tensors.keys()),
            "different": [
                f"{name} ({_shown(self.tensors[name])} here, {_shown(theirs.tensors[name])} there)"
                for name in sorted(both)
                if self.tensors[name] != theirs.tensors[name]
            ],
            "tied differently": sorted(
                name
                for name in self.aliases.keys() | theirs.aliases.keys()
                if self.aliases.get(name) != theirs.aliases.get(name)
            ),
        }
        return [f"{len(names)} {kind}: {_some(names)}" for kind, names in found.items() if names]


def _shown(kind: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind[0]} {list(kind[1])}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
