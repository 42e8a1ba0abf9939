"""Which files of a checkpoint hold its tensors, and whether all of them are there.

`NAME.index.json` maps tensor names to files (transformers, 'Sharded checkpoints'); numbered files
(`NAME-00001-of-00003.EXT`) say their own count. A loader reads the files of the index and no others, so a safetensors
file beside them is a plain file of the artifact, and a tensor in two of them belongs to the file of the index.

A config of a model without any weights is what a tokenizer's download leaves behind.

Must not know: hashes, sources.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from swarm.checkpoint.files import CheckpointFile
from swarm.checkpoint.weight_files import WEIGHTS, is_weights, refuse_pointer
from swarm.content import bounded_json
from swarm.errors import CheckpointIncomplete, ManifestInvalid
from swarm.store.own_files import read_regular

INDEX_BYTES_MAX = 100 << 20  # an index of 100,000 tensors is about 10 MB
CONFIG_BYTES_MAX = 10 << 20
NAMES_SHOWN = 3

_INDEX = re.compile(r".+\.(?P<kind>safetensors|bin|h5|msgpack)\.index(?P<variant>\.[\w-]+)?\.json")
_NUMBERED = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})"
    r"(?P<ending>(\.[\w-]+)?\.(?P<kind>safetensors|bin|gguf|h5|msgpack|pt|pth))"
)
_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Configs of models and adapters, and the field of each that only a model with weights has.
_CONFIGS = {"config.json": "architectures", "adapter_config.json": "peft_type"}
_CONTROL = (".aria2", ".part", ".partial", ".crdownload", ".download")  # beside or in place of an unfinished download
# Loaders read these indexes; others are of a variant (`.fp16`) or of another library (`consolidated`).
_PREFERRED = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")


def indexes(found: Sequence[CheckpointFile]) -> dict[str, dict[str, str]]:
    """Tensor name -> path of its file, by path of the index that loaders read; safetensors only.

    Raises CheckpointIncomplete, with what to do, if a file of an index, a numbered file or all weights are missing, and
    ManifestInvalid if an index is broken. An index that loaders do not read first may lack all its files if other
    weights lie beside it: `pytorch_model*.bin` is often left out of a download.
    """
    here = {file.path for file in found}
    weights = {_folder(path) for path in here if path.endswith(WEIGHTS)}
    maps: dict[str, dict[str, str]] = {}
    named: set[tuple[str, str]] = set()  # folders with a whole index, and the kind of its files
    for file in found:
        if match := _INDEX.fullmatch(file.path):
            table = _read(file)
            shards = set(table.values())
            missing = sorted(shards - here)
            others = _folder(file.path) in weights and PurePosixPath(file.path).name not in _PREFERRED
            if missing and (len(missing) < len(shards) or not others):
                raise _incomplete(file.path, "of the files it names", missing)
            if not missing:
                maps[file.path] = table
                named.add((_folder(file.path), match["kind"]))
    _check_numbers(here, named=named)
    _check_unfinished(here)
    _check_configs(found, weights=[path for path in here if is_weights(path)])
    return _preferred({path: table for path, table in maps.items() if ".safetensors.index." in path})


def would_be_whole(paths: Iterable[str], found: Sequence[CheckpointFile]) -> bool:
    """Whether the model would lack nothing with files at all these paths, as far as the files in `found` say."""
    there = set(paths)
    named = set()
    for file in found:
        if match := _INDEX.fullmatch(file.path):
            if not there >= set(_read(file).values()):
                return False
            named.add((_folder(file.path), match["kind"]))
    try:
        _check_numbers(there, named=named)
        _check_unfinished(there)
        _check_configs(found, weights=[path for path in there if is_weights(path)])
    except CheckpointIncomplete:
        return False
    return True


def no_tensors(found: Sequence[CheckpointFile], maps: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Paths of the safetensors files that hold no tensors of the model, as loaders see it.

    Those beside or below an index that does not name them, unless they have an index of their own; and
    `consolidated*.safetensors` beside `model.safetensors` or its shards: the same weights for another library.
    """
    folders = {_folder(path) for path in maps}
    named = {shard for table in maps.values() for shard in table.values()}
    paths = [file.path for file in found if file.path.endswith(".safetensors")]
    indexed = {path for path in paths if folders & _above(path)} - named
    whole = {_folder(path) for path in paths if _MODEL.fullmatch(PurePosixPath(path).name)}
    others = {path for path in paths if PurePosixPath(path).name.startswith("consolidated") and _folder(path) in whole}
    return indexed | (others - named)


def unused(headers: Mapping[str, set[str]], maps: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """For each file with tensor names, those whose index names another file that has them too."""
    owner = {(_folder(index), name): shard for index, table in maps.items() for name, shard in table.items()}
    found = {}
    for path, names in headers.items():
        folder = _folder(path)
        others = {name: owner.get((folder, name), path) for name in names}
        found[path] = tuple(sorted(n for n, other in others.items() if other != path and n in headers.get(other, ())))
    return found


def _preferred(maps: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in maps:
        by_folder[_folder(path)].append(path)
    kept = {}
    for paths in by_folder.values():
        first = [path for name in _PREFERRED for path in paths if PurePosixPath(path).name == name]
        kept.update({path: maps[path] for path in first[:1] or paths})
    return kept


def _check_numbers(here: set[str], *, named: set[tuple[str, str]]) -> None:
    """Raises ManifestInvalid if numbers are missing, except where an index names files of the same ending."""
    numbers: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for path in here:
        match = _NUMBERED.fullmatch(PurePosixPath(path).name)
        if match and (_folder(path), match["kind"]) not in named:
            stem = str(PurePosixPath(path).with_name(match["stem"]))
            numbers[stem, match["count"], match["ending"]].add(int(match["number"]))
    for (stem, count, ending), have in sorted(numbers.items()):
        first = 0 if 0 in have else 1  # some writers count from 0
        missing = [n for n in range(first, first + int(count)) if n not in have]
        if missing:
            names = [f"{stem}-{number:05}-of-{count}{ending}" for number in missing]
            raise _incomplete(f"{stem}-*-of-{count}{ending}", "of the numbered files", names)


def _check_unfinished(here: set[str]) -> None:
    """Raises ManifestInvalid for weights that a downloader has not finished, as its own file beside them says."""
    for path in sorted(here):
        name, dot, ending = path.rpartition(".")
        if dot + ending in _CONTROL and is_weights(name):
            raise CheckpointIncomplete(
                path, f"belongs to an unfinished download of {name}; finish or remove it, serve again"
            )


def _check_configs(found: Sequence[CheckpointFile], *, weights: Sequence[str]) -> None:
    """Raises ManifestInvalid for the config of a model or an adapter without any weights in or below its folder."""
    for file in found:
        path = PurePosixPath(file.path)
        field = _CONFIGS.get(path.name)
        below = any(path.parent in PurePosixPath(other).parents for other in weights)
        if field and not below and (kind := _kind(file, field)):
            raise CheckpointIncomplete(
                file.path, f"is of {kind}, and no weights lie beside it; finish the download, then serve it again"
            )


def _kind(config: CheckpointFile, field: str) -> str:
    """The field of a config as text, empty without one."""
    if config.stamp.size > CONFIG_BYTES_MAX:
        return ""
    try:
        table = bounded_json.loads(read_regular(config.real, bytes_max=CONFIG_BYTES_MAX))
    except ValueError:
        return ""  # not the JSON of a loader
    value = table.get(field) if isinstance(table, dict) else None
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _incomplete(subject: str, of: str, missing: Sequence[str]) -> CheckpointIncomplete:
    shown = ", ".join(missing[:NAMES_SHOWN]) + (", …" if len(missing) > NAMES_SHOWN else "")
    why = f"{len(missing)} {of} are missing: {shown}; finish the download, then serve its directory again"
    return CheckpointIncomplete(subject, why)


def _read(index: CheckpointFile) -> dict[str, str]:
    if index.stamp.size > INDEX_BYTES_MAX:
        raise ManifestInvalid(index.path, f"{index.stamp.size} bytes; an index has at most {INDEX_BYTES_MAX}")
    refuse_pointer(index)
    try:
        table = bounded_json.loads(read_regular(index.real, bytes_max=INDEX_BYTES_MAX))
    except ValueError as error:
        raise ManifestInvalid(index.path, f"is not JSON ({error})") from error
    shards = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ManifestInvalid(index.path, "holds no weight_map from tensor names to file names")
    folder = PurePosixPath(index.path).parent
    return {tensor: str(folder / name) for tensor, name in shards.items()}


def _above(path: str) -> set[str]:
    """The folder of a path, and those that it is in."""
    return {str(parent) for parent in PurePosixPath(path).parents}


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)
