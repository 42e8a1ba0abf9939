"""The hub's API as text: which request is it, and the JSON and headers of its answer.

    /{id}/resolve/{revision}/{path}                     a file
    /api/models/{id}[/revision/{revision}]              commit and files
    /api/models/{id}/refs                               the branch main and its commit, as llama.cpp asks
    /api/models/{id}/tree/{revision}[/{path}]           files and directories with sizes and names, in pages
    /api/models/{id}/paths-info/{revision}              the same for named paths
    /v2/{id}/manifests/{tag}                            the GGUF file of a quantization, as older llama.cpp asks

Pure: the answers are functions of a revision. Names of fields are those that huggingface_hub reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, unquote

from swarm.agent.revisions import HubFile, Revision, is_revision
from swarm.checkpoint.blob_check import is_hub_name
from swarm.checkpoint.hf_cache import is_model_id
from swarm.content.manifest import unsafe_path

PAGE = 1000  # entries of a page of `tree`, as at the hub
POINTER_BYTES = 134  # of a git-lfs pointer; nothing reads it
Kind: TypeAlias = Literal["file", "model", "refs", "tree", "paths", "gguf"]

_RESOLVE = re.compile(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")
_MODEL = re.compile(r"/api/models/([^/]+(?:/[^/]+)?)")
_REFS = re.compile(r"/api/models/([^/]+(?:/[^/]+)?)/refs")
_OF_MODEL = re.compile(r"/api/models/([^/]+(?:/[^/]+)?)/(revision|tree|paths-info)/([^/]+)(?:/(.+))?")
_GGUF = re.compile(r"/v2/([^/]+(?:/[^/]+)?)/manifests/([^/]+)")
_QUANTIZATIONS = ("Q4_K_M", "Q4_0", "Q8_0")  # what llama.cpp takes where none is named


@dataclass(frozen=True)
class HubRequest:
    """A request of the hub's API. `path`: of a file or directory; `tag`: of a GGUF model."""

    kind: Kind
    model_id: str
    revision: str = "main"
    path: str = ""
    tag: str = ""


def parse(raw_path: str) -> HubRequest | None:
    """The request of a path as it stands in the request line; None for anything else."""
    if match := _RESOLVE.fullmatch(raw_path):
        found = HubRequest("file", *map(unquote, match.groups()))
    elif match := _OF_MODEL.fullmatch(raw_path):
        kinds: dict[str, Kind] = {"revision": "model", "tree": "tree", "paths-info": "paths"}
        model_id, kind, revision, path = (unquote(part or "") for part in match.groups())
        found = HubRequest(kinds[kind], model_id, revision, path)
    elif match := _REFS.fullmatch(raw_path):
        found = HubRequest("refs", unquote(match[1]))
    elif match := _MODEL.fullmatch(raw_path):
        found = HubRequest("model", unquote(match[1]))
    elif match := _GGUF.fullmatch(raw_path):
        found = HubRequest("gguf", unquote(match[1]), tag=unquote(match[2]))
    else:
        return None
    right = is_model_id(found.model_id) and is_revision(found.revision)
    return found if right and not (found.path and unsafe_path(found.path)) else None


def file_headers(revision: Revision, file: HubFile) -> dict[str, str]:
    """The headers of a file, of HEAD and GET alike."""
    return {
        "ETag": f'"{file.name}"',
        "X-Repo-Commit": revision.commit,
        "X-Linked-ETag": f'"{file.name}"',
        "X-Linked-Size": str(file.size),
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(file.path.rpartition('/')[2])}",
        "Last-Modified": "Thu, 01 Jan 1970 00:00:00 GMT",  # llama.cpp wants one; contents are named by the ETag
    }


def model_info(revision: Revision, *, blobs: bool) -> dict[str, Any]:
    """`/api/models/{id}/revision/{revision}`."""
    return {
        "_id": revision.commit[:24],
        "id": revision.model_id,
        "modelId": revision.model_id,
        "author": revision.model_id.partition("/")[0] if "/" in revision.model_id else None,
        "sha": revision.commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "lastModified": "1970-01-01T00:00:00.000Z",
        "createdAt": "1970-01-01T00:00:00.000Z",
        "siblings": [_sibling(file, blobs=blobs) for _, file in sorted(revision.files.items())],
    }


def refs(revision: Revision) -> dict[str, Any]:
    """`/api/models/{id}/refs`, of the revision `main`."""
    main = {"name": "main", "ref": "refs/heads/main", "targetCommit": revision.commit}
    return {"branches": [main], "converts": [], "tags": []}


def tree(revision: Revision, path: str, *, recursive: bool, start: int) -> tuple[list[dict[str, Any]], int | None]:
    """A page of `/api/models/{id}/tree/{revision}/{path}`, and where the next one starts; None for the last page."""
    prefix = f"{path.strip('/')}/" if path else ""
    below = {name: file for name, file in sorted(revision.files.items()) if name.startswith(prefix)}
    entries = _directories(below, prefix, recursive=recursive)
    entries += [_leaf(file) for name, file in below.items() if recursive or "/" not in name[len(prefix) :]]
    entries.sort(key=lambda entry: (entry["type"] != "directory", entry["path"]))
    end = start + PAGE
    return entries[start:end], end if end < len(entries) else None


def paths_info(revision: Revision, paths: Iterable[str]) -> list[dict[str, Any]]:
    """`/api/models/{id}/paths-info/{revision}`: files and directories among these paths."""
    found = []
    directories = {entry["path"] for entry in _directories(revision.files, "", recursive=True)}
    for path in dict.fromkeys(paths):
        if file := revision.files.get(path):
            found.append(_leaf(file))
        elif path.strip("/") in directories:
            found.append(_directory(path.strip("/")))
    return found


def gguf(revision: Revision, tag: str) -> dict[str, Any] | None:
    """`/v2/{id}/manifests/{tag}`: the model's GGUF file of this quantization; None without one."""
    models = [name for name in sorted(revision.files) if name.endswith(".gguf") and "mmproj" not in name.lower()]
    wanted = _QUANTIZATIONS if tag.lower() == "latest" else (tag,)
    chosen = next((name for q in wanted for name in models if _is_of(name, q)), None)
    if chosen is None and tag.lower() == "latest":
        chosen = next(iter(models), None)
    if chosen is None:
        return None
    answer: dict[str, Any] = {"schemaVersion": 2, "ggufFile": _sibling(revision.files[chosen], blobs=True)}
    vision = next((name for name in sorted(revision.files) if name.endswith(".gguf") and name not in models), None)
    if vision:
        answer["mmprojFile"] = _sibling(revision.files[vision], blobs=True)
    return answer


def _is_of(name: str, quantization: str) -> bool:
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(quantization)}(?![A-Za-z0-9_])", name, re.IGNORECASE) is not None


def _sibling(file: HubFile, *, blobs: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": file.path}
    if blobs:
        found |= {"size": file.size, "blobId": _git(file)}
        if file.large:
            found["lfs"] = {"sha256": file.name, "size": file.size, "pointerSize": POINTER_BYTES}
    return found


def _leaf(file: HubFile) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": file.path, "size": file.size, "oid": _git(file)}
    if file.large:
        found["lfs"] = {"oid": file.name, "size": file.size, "pointerSize": POINTER_BYTES}
    return found


def _git(file: HubFile) -> str:
    """The name of the file in git; of a large file that is its pointer's, which is not known here.

    Empty for a file without a name of the hub: llama.cpp leaves out files whose name is no hash.
    """
    return file.name[:40] if is_hub_name(file.name) else ""


def _directories(files: Mapping[str, HubFile], prefix: str, *, recursive: bool) -> list[dict[str, Any]]:
    found: set[str] = set()
    for name in files:
        parts = name[len(prefix) :].split("/")[:-1]
        depth = len(parts) if recursive else min(1, len(parts))
        found.update(prefix + "/".join(parts[: n + 1]) for n in range(depth))
    return [_directory(path) for path in sorted(found)]


def _directory(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end of a Range header with one range; (0, size) without one, or with several; None if the file
    ends before it (RFC 9110, section 14)."""
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", header or "", re.ASCII)
    if match is None or not (match[1] or match[2]):
        return 0, size
    if not match[1]:
        return (max(0, size - int(match[2])), size) if int(match[2]) and size else None
    first = int(match[1])
    end = min(size, int(match[2]) + 1) if match[2] else size
    if match[2] and int(match[2]) < first:
        return 0, size  # no valid range: ignored
    return (first, end) if first < size else None
