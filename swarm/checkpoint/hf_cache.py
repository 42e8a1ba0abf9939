"""The local Hugging Face cache: its layout, and the snapshots in it.

    <root>/models--org--name/
        blobs/<etag>                   contents, named by the hub: sha256, or git's sha1 for small files
        blobs/swarm-<hash>             contents without a known hub name (see `hf_publish`)
        snapshots/<commit>/<path>      relative links to blobs, or plain files where links are not possible
        refs/main                      the commit of the plain model id
        trees/<commit>.json            the listing of a commit (huggingface_hub 2, see `hub_tree`)
        .swarm-incoming/<digest>       incomplete fetches; a later fetch of this digest resumes them; locked by
                                       `.swarm/lock` in it from the fetch to the end of `publish`
    <root>/blobs/<2 digits>/<hash>     contents that several models share; their blobs link to it (huggingface_hub 2)

`hf_publish` fills the cache. Names of contents are the hub's claim: `blob_check` compares them.

Must not know: peers, manifests, `huggingface_hub` (a heavy import; the tests compare with it).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from swarm.checkpoint import hub_tree
from swarm.checkpoint.blob_check import content_name, is_hub_name
from swarm.checkpoint.files import of_commit, real_inside
from swarm.content.manifest import unsafe_path
from swarm.errors import SettingsError, SourceChanged
from swarm.protocol.messages import (
    BESIDE_BYTES_MAX,
    BESIDE_MAX,
    REVISION_CHARS_MAX,
    REVISIONS_MAX,
    SHORT_COMMIT_MIN,
    Origin,
)
from swarm.store.own_files import demand_there, open_regular, read_regular

MODEL_ID_CHARS_MAX = 96  # of organisation and of name; the hub's limit

REF_BYTES_MAX = 256  # a commit takes 40

INCOMING = ".swarm-incoming"  # in the folder of a model: incomplete fetches

_PART = rf"\w(?:[\w.\-]{{0,{MODEL_ID_CHARS_MAX - 2}}}\w)?"
_MODEL_ID = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

# Of file systems without symbolic links (exFAT, some SMB and FUSE mounts).
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_INCOMING = ".swarm-incoming"
_LOCK = "lock"


def cache_root() -> Path:
    """The cache directory of the hub's tools in this process's environment. Raises SettingsError without a home."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    legacy = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    path = os.path.expandvars(os.path.expanduser(os.environ.get("HF_HUB_CACHE", legacy)))
    if path.startswith("~"):
        raise SettingsError("HF_HOME", "this user has no home directory; set HF_HOME, or fetch with --out DIR")
    return Path(path)


def with_revision(model_id: str, revision: str | None = None) -> tuple[str, str | None]:
    """Id and revision of `ID` or `ID@REVISION`; "@" has no meaning in addresses other than `hf://`.

    Raises SettingsError for two different revisions.
    """
    if "://" in model_id and not model_id.startswith("hf://"):
        return model_id, revision
    name, _, tail = model_id.partition("@")
    if not name or not tail:
        return model_id, revision
    if revision not in (None, tail):
        raise SettingsError("revision", f"{revision!r} is not the one of {model_id!r}; say one of them")
    return name, tail


def is_model_id(text: str) -> bool:
    """Whether the text is a valid hub id, `name` or `org/name`; it may be a local path as well."""
    forbidden = "--" in text or ".." in text or text.endswith(".git")
    return _MODEL_ID.fullmatch(text) is not None and not forbidden


def snapshot(model_id: str, *, root: Path | None = None, revision: str = "main") -> Path | None:
    """The cached snapshot of a branch, tag or commit, or None. It may lack files."""
    if not is_model_id(model_id) or unsafe_path(revision):
        return None
    try:
        folder = model_folder(model_id, root=root)
    except SettingsError:  # no home directory, no cache
        return None
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = _ref(folder / "refs" / revision)
        except (OSError, UnicodeDecodeError):
            commits = [known for known in revisions(model_id, root=root) if known.startswith(revision)]
            if len(revision) < SHORT_COMMIT_MIN or len(commits) != 1:
                return None
            commit = commits[0]
    found = folder / "snapshots" / commit
    return found if _COMMIT.fullmatch(commit) and found.is_dir() else None


def revisions(model_id: str, *, root: Path | None = None) -> dict[str, list[str]]:
    """Commits of the cached snapshots of a model, each with the branches and tags that name it here."""
    if not is_model_id(model_id):
        return {}
    folder = model_folder(model_id, root=root)
    found: dict[str, list[str]] = {
        entry.name: [] for entry in sorted(folder.glob("snapshots/*")) if _COMMIT.fullmatch(entry.name)
    }
    for ref in sorted((folder / "refs").rglob("*")):
        name = ref.relative_to(folder / "refs").as_posix()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            # A fetch of a short commit leaves a ref of that name, as huggingface_hub does: it is no branch.
            if ref.is_file() and is_revision(name) and not (commit := _ref(ref)).startswith(name):
                found.get(commit, []).append(name)
    return found


def named_origin(snapshot_dir: Path) -> Origin | None:
    """`origin` with the branches and tags that name the commit here; of a snapshot of plain files too."""
    path = Path(os.path.abspath(snapshot_dir))
    model_id, found = model_id_of(path), origin(path)
    if model_id is None or not _COMMIT.fullmatch(path.name):
        return None
    if found is None and any(True for _ in _links(path)):
        return None  # a fetch of swarm, named by its digest
    names = revisions(model_id, root=path.parent.parent.parent).get(path.name, [])[:REVISIONS_MAX]
    return Origin(path.name, found.etags if found else {}, tuple(names), beside(path, hub_names(path)))


def model_id_of(snapshot_dir: Path) -> str | None:
    """The model id of a snapshot directory; None for other directories."""
    path = Path(os.path.abspath(snapshot_dir))  # not resolve(): a link must keep its name in the layout
    kind, _, name = path.parent.parent.name.partition("--")
    model_id = name.replace("--", "/")
    if path.parent.name != "snapshots" or kind != "models" or not is_model_id(model_id):
        return None
    return model_id


def origin(snapshot_dir: Path) -> Origin | None:
    """Commit and etags of a snapshot; None if no file of it has a hub name."""
    path = Path(os.path.abspath(snapshot_dir))
    if model_id_of(path) is None or not _COMMIT.fullmatch(path.name):
        return None
    etags = hub_names(path)
    return Origin(commit=path.name, etags=etags) if etags else None


def hub_names(snapshot_dir: Path) -> dict[str, str]:
    """The hub's names of the files of a snapshot, by path: those of their blobs, else of the commit's listing.

    Empty for a directory that is no snapshot. A file without a hub name is left out.
    """
    path = Path(os.path.abspath(snapshot_dir))
    if path.is_file() or model_id_of(path) is None:
        blob = Path(os.readlink(path)) if path.is_symlink() else path
        in_cache = blob.parent.name == "blobs" and model_id_of(path.parent) is not None
        return {path.name: blob.name} if in_cache and is_hub_name(blob.name) else {}
    names = {name: blob for name, blob in _links(path) if is_hub_name(blob) and not unsafe_path(name)}
    for name, listed in (hub_tree.read(path.parent.parent, path.name) or {}).items():
        with contextlib.suppress(OSError):
            if name not in names and not unsafe_path(name) and (path / name).stat().st_size == listed.size:
                names[name] = listed.name
    return names


def beside(path: Path, names: Mapping[str, str]) -> dict[str, bytes]:
    """The small bystanders of a snapshot or a download that belong to its commit, the smallest first.

    `names`: the hub's names of its files. A file with another content than its name says is left out, and so is a link
    to a file elsewhere: it may be of the user, and not for others.
    """
    found: dict[str, bytes] = {}
    sized = []
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        with contextlib.suppress(OSError):
            if of_commit(name) and not unsafe_path(name) and (real := real_inside(path, name)) and real.is_file():
                sized.append((real.stat().st_size, name, real))
    left_bytes = BESIDE_BYTES_MAX
    for size, name, real in sorted(sized)[:BESIDE_MAX]:
        if size > left_bytes:
            break
        with contextlib.suppress(OSError, SourceChanged):
            if name not in names or content_name(real, like=names[name], size=size) == names[name]:
                with open_regular(real) as read:
                    demand_there(real, read.fileno())
                    found[name] = read.read(size)
                left_bytes -= size
    return found


def model_folder(model_id: str, *, root: Path | None = None) -> Path:
    """The folder of a model in the cache. Raises SettingsError without a home directory."""
    return (cache_root() if root is None else root) / f"models--{model_id.replace('/', '--')}"


def is_revision(text: str) -> bool:
    """Whether a text may name a revision in messages: others would not be read there."""
    return 0 < len(text) <= REVISION_CHARS_MAX and text.isprintable()


def _ref(place: Path) -> str:
    """The commit of a name. Raises OSError for no file with a commit, and UnicodeDecodeError."""
    return read_regular(place, bytes_max=REF_BYTES_MAX).decode()


def _links(directory: Path) -> Iterator[tuple[str, str]]:
    """Path in the snapshot and blob name of each link to a blob."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if not path.is_symlink():
                continue
            # Not resolved further: a blob may be a link into a store that several models share.
            target = Path(os.readlink(path))
            if target.parent.name == "blobs":
                yield path.relative_to(directory).as_posix(), target.name
