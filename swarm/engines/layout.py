"""The fingerprint of a loaded layout: everything that decides which bytes a rank of an engine holds after loading.

Two ranks with one fingerprint are twins: the tensors of one are the tensors of the other, so they can go from memory to
memory. Whatever differs, however little, makes another fingerprint, another artifact and another way to load.

    model id + fingerprint  ->  'org/model#loaded-5f0c...'    the id that a rank's tensors are served by
    model id                ->  'org/model#metadata'          the id of what an engine reads before its weights

Owns the canonical form and what differs between two of them, field by field. Must not know: which fields there are,
which is each engine's business, beyond `content`, the digest of the checkpoint, and `weight_version`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from swarm.content.manifest import ModelId
from swarm.errors import ManifestInvalid, SettingsError

TEXT_MAX = 4096  # what a manifest has room for
CONTENT = "content"
WEIGHT_VERSION = "weight_version"  # of weights that were updated since they were loaded; others have no such field
LOADED, METADATA = "#loaded-", "#metadata"
NOWHERE = "(not said)"
SHOWN_MAX = 48  # characters of a value in a difference


@dataclass(frozen=True)
class Difference:
    """One field in which two fingerprints differ."""

    field: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.field} is {self.ours[:SHOWN_MAX]} here and {self.theirs[:SHOWN_MAX]} there"


class Fingerprint:
    """Fields by name, all of them texts: immutable, and equal when all fields are. Raises SettingsError when too long.

    Long values, such as a quantisation config, are best given as `short_digest`.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = dict(sorted(fields.items()))
        if len(self.text) > TEXT_MAX:
            raise SettingsError("fingerprint", f"has {len(self.text)} characters; at most {TEXT_MAX} are allowed")

    @cached_property
    def text(self) -> str:
        """The canonical form, which manifests carry."""
        return json.dumps(self.fields, separators=(",", ":"), ensure_ascii=True)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that stand for it."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, text: str) -> Fingerprint:
        """The one that a manifest carries, which a stranger wrote. Raises ManifestInvalid."""
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
        """What a rank's tensors of this layout are served by."""
        return ModelId(f"{model_id}{LOADED}{self.digest}")

    def differences(self, theirs: Fingerprint) -> list[Difference]:
        """Every field that differs, by name; none between twins."""
        names = sorted(self.fields.keys() | theirs.fields.keys())
        pairs = [(name, self.fields.get(name, NOWHERE), theirs.fields.get(name, NOWHERE)) for name in names]
        return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.fields == other.fields

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"<Fingerprint {self.digest} {len(self.fields)} fields>"


def short_digest(value: object) -> str:
    """16 digits that stand for anything JSON can say; what it cannot is taken by its `str`. Empty for None."""
    if value is None:
        return ""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def metadata_id(model_id: str) -> ModelId:
    """What the files are served by that an engine reads before its weights: config, tokenizer, headers."""
    return ModelId(model_id + METADATA)


def is_loaded(artifact_id: str, model_id: str) -> bool:
    """Whether an artifact is tensors of this model, of whatever layout."""
    return artifact_id.startswith(model_id + LOADED)
