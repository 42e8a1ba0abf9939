"""The layout of a rank: a fingerprint of all that decides its bytes after loading, and its tensors' names and shapes.

Two ranks with the same fingerprint are twins: their loaded tensors are equal, and can be copied from memory to memory.
Any differing field gives another fingerprint, and with it another artifact.

    model id + fingerprint  ->  'org/model#loaded-5f0c...'    the artifact id of a rank's tensors
    model id                ->  'org/model#metadata'          the artifact id of config, tokenizer and headers

Owns the canonical form and the comparison. Must not know: which fields an engine puts into it, except `content`, the
digest of the checkpoint, and `weight_version`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from swarm.content.manifest import FileEntry, ModelId
from swarm.errors import ManifestInvalid, SettingsError

TEXT_MAX = 4096  # characters of a fingerprint: the limit of a manifest
CONTENT = "content"
WEIGHT_VERSION = "weight_version"  # only weights that were updated after loading have this field
LOADED, METADATA = "#loaded-", "#metadata"
ABSENT = "(not said)"
SHOWN_MAX = 48  # characters of a value in a difference
NAMES_SHOWN = 3


@dataclass(frozen=True)
class FieldDifference:
    """A field in which two fingerprints differ."""

    field: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.field} is {self.ours[:SHOWN_MAX]} here and {self.theirs[:SHOWN_MAX]} there"


@dataclass(frozen=True)
class Fingerprint:
    """Text fields by name. Raises SettingsError above TEXT_MAX characters.

    Give long values, such as a quantisation config, as `short_digest`.
    """

    fields: Mapping[str, str]

    def __post_init__(self) -> None:
        if len(self.text) > TEXT_MAX:
            raise SettingsError("fingerprint", f"has {len(self.text)} characters; at most {TEXT_MAX} are allowed")

    @cached_property
    def text(self) -> str:
        """The canonical JSON that manifests carry."""
        return json.dumps(self.fields, separators=(",", ":"), sort_keys=True)

    @cached_property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the canonical form's sha256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, text: str) -> Fingerprint:
        """The fingerprint of a manifest, which is untrusted input. Raises ManifestInvalid."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestInvalid("fingerprint", f"is not JSON ({error})") from error
        if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
            raise ManifestInvalid("fingerprint", "does not map names to texts")
        found = cls(fields)
        if found.text != text:
            raise ManifestInvalid("fingerprint", "is not in canonical form")
        return found

    def model_id(self, model_id: str) -> ModelId:
        """The artifact id of this layout's tensors."""
        return ModelId(f"{model_id}{LOADED}{self.digest}")

    def differences(self, theirs: Fingerprint) -> list[FieldDifference]:
        """Every differing field, by name; none between twins."""
        names = sorted(self.fields.keys() | theirs.fields.keys())
        pairs = [(name, self.fields.get(name, ABSENT), theirs.fields.get(name, ABSENT)) for name in names]
        return [FieldDifference(*pair) for pair in pairs if pair[1] != pair[2]]

    def __repr__(self) -> str:
        return f"<Fingerprint {self.digest} {len(self.fields)} fields>"


@dataclass(frozen=True)
class TensorLayout:
    """The tensors of a rank: (safetensors dtype, shape) by name, and alias -> name of tied tensors.

    Twins must match exactly: an engine may accept a tensor of another shape, or untie tied tensors, without an error,
    and then generate different tokens.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_files(cls, files: Sequence[FileEntry]) -> TensorLayout:
        """The layout that safetensors headers describe. Raises ManifestInvalid."""
        tensors = {tensor.name: (tensor.dtype, tensor.shape) for file in files for tensor in file.tensors()}
        return cls(tensors, {alias: name for file in files for alias, name in file.aliases().items()})

    def differences(self, theirs: TensorLayout) -> list[str]:
        """A line for each kind of difference; none for equal layouts."""
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
        return [
            f"{len(names)} {kind}: {', '.join(names[:NAMES_SHOWN])}{', …' if len(names) > NAMES_SHOWN else ''}"
            for kind, names in found.items()
            if names
        ]


def _shown(kind: tuple[str, tuple[int, ...]]) -> str:
    return f"{kind[0]} {list(kind[1])}"


def short_digest(value: object) -> str:
    """The first 16 digits of the sha256 of a value's JSON, with `str` for other types. Empty for None."""
    if value is None:
        return ""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def metadata_id(model_id: str) -> ModelId:
    """The artifact id of config, tokenizer and safetensors headers."""
    return ModelId(model_id + METADATA)


def is_loaded(artifact_id: str, model_id: str) -> bool:
    """Whether an artifact is loaded tensors of this model, in any layout."""
    return artifact_id.startswith(model_id + LOADED)
