"""`swarm verify`: a model id of the Hugging Face cache, a fetched directory, or any directory of a model.

Must not know: how files are compared.
"""

from __future__ import annotations

from pathlib import Path

from swarm.checkpoint import check, digest_cache, hf_cache, kept, manifest_builder
from swarm.content.manifest import Digest
from swarm.errors import LINE_CHARS_MAX, SettingsError, StoreError, clean
from swarm.observe.units import size_text
from swarm.settings import Settings
from swarm.store.file_errors import store_errors
from swarm.store.partial_directory import PARTIAL

PROBLEMS_FOUND = 1


def verify(what: str, *, revision: str | None, digest: str | None, settings: Settings) -> int:
    """Prints problems, or what was compared; 1 if there are problems. Raises SettingsError, StoreError."""
    with store_errors(Path(what)):
        return _verify(what, revision=revision, digest=digest, settings=settings)


def _verify(what: str, *, revision: str | None, digest: str | None, settings: Settings) -> int:
    path = _locate(what, revision, settings.cache)
    if digest is not None and not is_digest(digest):
        raise SettingsError("digest", f"{digest!r} is neither a digest nor the first 6 or more of its digits")
    if (path / PARTIAL).exists():
        raise StoreError(f"{path}: a fetch into it is unfinished; run that fetch again")
    fetched, part_of = digest_cache.recall_files(settings.cache, path) or (None, None)
    is_snapshot = hf_cache.model_id_of(path) is not None
    if fetched is not None and not is_snapshot:
        whole = part_of.digest if part_of else fetched.digest
        if digest is not None and not whole.startswith(digest):
            raise StoreError(f"{path}: fetched as {whole}, which is not the digest asked for")
        problems = manifest_builder.verify(path, fetched)
        files = f"a part, {len(fetched.files)} of {part_of.files} files" if part_of else f"{len(fetched.files)} files"
        said = f"{files}, {size_text(fetched.size)}, as fetched ({whole[:16]})"
    else:
        checked = check.model(path, cache_dir=settings.cache)
        problems = list(checked.problems)
        compared = ", ".join(f"{count} by {by}" for by, count in checked.compared.items())
        notes = "; ".join(note for note in (compared and f"{compared}: right", checked.note) if note)
        said = f"{checked.files} files, {size_text(checked.size)}; {notes}"
        if not problems and (digest is not None or not checked.compared):
            found = part_of.digest if part_of else _digest(path, settings)
            said += f"; digest {found}"
            if digest is not None and not found.startswith(digest):
                problems.append(f"{path}: has the digest {found}, not {digest}")
    for problem in problems:
        print(clean(problem, chars_max=LINE_CHARS_MAX))
    if not problems:
        print(clean(f"{what}: {said}", chars_max=LINE_CHARS_MAX))
    return PROBLEMS_FOUND if problems else 0


def is_digest(text: str) -> bool:
    """Whether a text is a digest, or its first 6 or more digits."""
    return 6 <= len(text) <= 64 and not set(text) - set("0123456789abcdef")


def _digest(path: Path, settings: Settings) -> Digest:
    manifest, source, _ = manifest_builder.checkpoint(
        path, cache_dir=settings.cache, chunk_bytes=settings.chunk_bytes, leaf_bytes=settings.leaf_bytes
    )
    source.close()
    return manifest.digest


def _locate(what: str, revision: str | None, cache: Path) -> Path:
    path = Path(what)
    if path.is_dir():
        return path
    if path.exists():
        raise StoreError(f"{path}: is no directory; name a directory, or a model id of the Hugging Face cache")
    name, revision = hf_cache.with_revision(what, revision)
    if is_digest(name) and (found := {k.place for k in kept.chosen(kept.all_kept(cache), name, revision)}):
        if len(found) > 1:
            shown = ", ".join(str(place) for place in sorted(found))
            raise SettingsError("digest", f"{name!r} begins the digests of {shown}; say more digits, or the directory")
        return found.pop()
    if not hf_cache.is_model_id(name) or not (known := hf_cache.revisions(name)):
        raise StoreError(
            f"{what}: does not exist; name a directory that `swarm fetch --out DIR` filled, or a model id of the "
            "Hugging Face cache"
        )
    if revision is None and len(known) == 1:
        revision = next(iter(known))
    snapshot = hf_cache.snapshot(name, revision=revision or "main")
    if snapshot is None:
        shown = "; ".join(" = ".join([*names, commit]) for commit, names in known.items())
        raise SettingsError("revision", f"the cache has no revision {revision or 'main'!r} of {name}; there is {shown}")
    return snapshot
