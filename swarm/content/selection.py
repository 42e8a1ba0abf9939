"""Parts of an artifact: the files and tensors that a fetch asks for, and the chunks that hold them.

    Selection   the patterns of a user: `include` and `exclude` for paths, `tensors` for names
    Part        a selection applied to a manifest: files, tensor names, chunks

Path patterns are those of huggingface_hub's `allow_patterns` and `ignore_patterns`: fnmatch on the whole path, and a
pattern that ends with `/` stands for all below it. `tensors` narrows the files that hold tensors of the model. Of the
other files, weights in another form (`.bin`, a second safetensors copy) come only if `include` asks for files.

On a disk a file is whole or absent, so a part of files has every chunk of a file that holds a wanted tensor. In memory
a part has only the chunks that the wanted tensors lie in.

Must not know: stores, peers. Pure.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TypeAlias

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import FileEntry, Manifest
from swarm.content.safetensors_header import Tensor
from swarm.errors import SettingsError

Patterns: TypeAlias = str | Iterable[str] | None
TensorChoice: TypeAlias = str | Iterable[str] | Callable[[str], bool] | None

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite")
NAMES_SHOWN = 8
PART_ID_DIGITS = 16
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Part:
    """The wanted part of an artifact.

    `files`: numbers of the files of which something is wanted. `names`: the wanted tensors and tied names, None for all
    tensors of these files. `chunks`: the chunks that hold them.
    """

    manifest: Manifest
    files: tuple[int, ...]
    names: frozenset[str] | None
    chunks: Bitfield

    @cached_property
    def size(self) -> int:
        """Bytes of its chunks."""
        return sum(self.manifest.chunks[index].size for index in self.chunks)

    def covered(self, number: int) -> list[tuple[int, int]]:
        """The ranges of a file's bytes, start and end, that its chunks cover, in order and apart."""
        found = list[tuple[int, int]]()
        for chunk in self.manifest.chunks_of(number):
            if chunk.index in self.chunks:
                if found and found[-1][1] == chunk.offset:
                    found[-1] = found[-1][0], chunk.offset + chunk.size
                else:
                    found.append((chunk.offset, chunk.offset + chunk.size))
        return found

    def wants(self, name: str) -> bool:
        """Whether a tensor of its files is wanted."""
        return self.names is None or name in self.names


def part_id(chunks: Bitfield) -> str:
    """The id by which nodes that want the same chunks of an artifact know each other; empty for all chunks."""
    return "" if chunks.complete else hashlib.sha256(chunks.pack()).hexdigest()[:PART_ID_DIGITS]


@dataclass(frozen=True)
class Selection:
    """What a user asks for. None, as `include` or `tensors`: everything."""

    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    tensors: tuple[str, ...] | Callable[[str], bool] | None = None

    @classmethod
    def read(
        cls, *, include: Patterns = None, exclude: Patterns = None, tensors: TensorChoice = None
    ) -> Selection | None:
        """The selection of a user's arguments, None without any. Raises SettingsError for other types."""
        if include is None and exclude is None and tensors is None:
            return None
        return cls(
            None if include is None else _patterns("include", include),
            () if exclude is None else _patterns("exclude", exclude),
            tensors if tensors is None or callable(tensors) else _patterns("tensors", tensors),
        )

    def files(self, paths: Iterable[str]) -> list[str]:
        """Those of the paths that it takes, if they hold what it wants."""
        return [path for path in paths if self._takes(path)]

    def with_names(self, names: Mapping[str, set[str]], paths: Iterable[str]) -> Selection:
        """The files of these `paths` that hold wanted tensors, and files beside them; `names` are those in each file.

        For an artifact whose tensors are not described yet. Raises SettingsError as `part` does.
        """
        wanted = self._matching(dict.fromkeys(name for held in names.values() for name in held))
        kept = [
            path
            for path in self.files(paths)
            if (not wanted.isdisjoint(names[path]) if path in names else self._takes_beside(path))
        ]
        return Selection(include=tuple(map(glob.escape, kept)))

    def part(self, manifest: Manifest, *, whole_files: bool) -> Part | None:
        """The part of an artifact, None if it is everything. `whole_files`: for a disk, where no file has gaps.

        Raises SettingsError, with the names that there are, for a selection without any match.
        """
        numbers = [n for n, file in enumerate(manifest.files) if self._takes(file.path)]
        if not numbers:
            raise SettingsError("include", f"matches no file: {_shown('file', [f.path for f in manifest.files])}")
        if self.tensors is None:
            if len(numbers) == len(manifest.files):
                return None
            return Part(manifest, tuple(numbers), None, _of_files(manifest, numbers))
        return self._tensor_part(manifest, numbers, whole_files=whole_files)

    def _tensor_part(self, manifest: Manifest, numbers: Sequence[int], *, whole_files: bool) -> Part | None:
        layouts = {n: _Layout(manifest.files[n]) for n in numbers if manifest.files[n].header}
        known = dict.fromkeys(name for layout in layouts.values() for name in layout.names)
        names = self._matching(known)
        wanted = {n: tensors for n, layout in layouts.items() if (tensors := layout.wanted(names))}
        beside = [n for n in numbers if n not in layouts and self._takes_beside(manifest.files[n].path)]
        files = tuple(sorted([*wanted, *beside]))
        if len(names) == len(known) and len(files) == len(manifest.files):
            return None
        chunks = _of_files(manifest, files if whole_files else beside)
        if not whole_files:
            for number, tensors in wanted.items():
                chunks = chunks.union(chunks_of(manifest, number, tensors))
        return Part(manifest, files, None if whole_files else names, chunks)

    def _takes(self, path: str) -> bool:
        if self.include is not None and not any(fnmatchcase(path, pattern) for pattern in map(_below, self.include)):
            return False
        return not any(fnmatchcase(path, pattern) for pattern in map(_below, self.exclude))

    def _takes_beside(self, path: str) -> bool:
        """Whether a file without tensors of the model comes with chosen tensors."""
        return self.include is not None or not path.endswith(WEIGHTS)

    def _matching(self, known: Iterable[str]) -> frozenset[str]:
        names = list(known)
        if callable(self.tensors):
            found = frozenset(name for name in names if self.tensors(name))
        else:
            exact, wild = _split(self.tensors or ())
            there = set(names)
            if absent := sorted(exact - there):
                near = difflib.get_close_matches(absent[0], names, n=3)
                hint = f"near it: {', '.join(near)}" if near else _shown("tensor", names)
                raise SettingsError("tensors", f"the model has no tensor {absent[0]!r}: {hint}")
            found = frozenset(n for n in names if n in exact or any(fnmatchcase(n, pattern) for pattern in wild))
        if not found:
            raise SettingsError("tensors", f"match no tensor: {_shown('tensor', names)}")
        return found


class _Layout:
    """The tensors of a safetensors file that the model takes from it, and their tied names."""

    def __init__(self, file: FileEntry) -> None:
        unused = set(file.unused)
        self._tensors = [tensor for tensor in file.tensors() if tensor.name not in unused]
        self._aliases = file.aliases()

    @property
    def names(self) -> Iterator[str]:
        yield from (tensor.name for tensor in self._tensors)
        yield from self._aliases

    def wanted(self, names: frozenset[str]) -> list[Tensor]:
        """The tensors that are wanted under one of their names, in order of offset."""
        stored = {name for alias, name in self._aliases.items() if alias in names}
        return [tensor for tensor in self._tensors if tensor.name in names or tensor.name in stored]


def _patterns(setting: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if wrong := [item for item in items if not isinstance(item, str)]:
        raise SettingsError(setting, f"{wrong[0]!r} is not a text; give a pattern, or a list of patterns")
    return items


def _split(patterns: Iterable[str]) -> tuple[set[str], list[str]]:
    exact = {pattern for pattern in patterns if not _WILD & set(pattern)}
    return exact, [pattern for pattern in patterns if pattern not in exact]


def _below(pattern: str) -> str:
    return f"{pattern}*" if pattern.endswith("/") else pattern


def _shown(kind: str, names: Sequence[str]) -> str:
    if not names:
        return f"there is no {kind} to choose from"
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"there {'is' if len(names) == 1 else 'are'} {', '.join(names[:NAMES_SHOWN])}{more}"


def _of_files(manifest: Manifest, numbers: Iterable[int]) -> Bitfield:
    firsts = manifest.first_chunks
    return Bitfield(firsts[-1], (index for n in numbers for index in range(firsts[n], firsts[n + 1])))


def chunks_of(manifest: Manifest, number: int, tensors: Iterable[Tensor]) -> Bitfield:
    """The chunks that these tensors of a file lie in."""
    chunks = Bitfield(len(manifest.chunks))
    first = manifest.first_chunks[number]
    starts = [0]
    for entry in manifest.files[number].chunks:
        starts.append(starts[-1] + entry.size)
    for tensor in tensors:
        if tensor.size:
            begin = bisect_right(starts, tensor.offset) - 1
            end = bisect_right(starts, tensor.offset + tensor.size - 1)
            for index in range(begin, end):
                chunks.add(first + index)
    return chunks
