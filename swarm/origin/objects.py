"""Object stores as origins: `s3://bucket/model`, `gs://bucket/model`, `az://container/model`; needs obstore.

Credentials, region and endpoint come from the environment, as the tools of each store read them. A file is identified
by its ETag, or by its sha256 if an object `SHA256SUMS` beside it lists that.

Must not know: peers, how other origins work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from swarm.content.promise import ETAG, SHA256, ListedFile, Listing
from swarm.errors import OriginChanged, OriginDenied, OriginError, OriginNotFound, OriginUnreachable, SettingsError
from swarm.origin.web import LIST_BYTES_MAX, SUMS, sums

PART_BYTES = 1 << 20
NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")  # S3, Azure, GCS
RETRIES, RETRY_S = 1, 10  # of the library; `transfer.origin_driver` retries in the swarm's way


class ObjectOrigin:
    """Models in buckets, by URL. Raises SettingsError without obstore."""

    address = "objects"

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        try:
            import obstore
            import obstore.exceptions
            import obstore.store
        except ImportError as error:
            raise SettingsError(
                "origin", f"{scheme}:// needs obstore: pip install 'swarm-weights[objects]' ({error})"
            ) from error
        self._library: Any = obstore

    def listing(self, model: str, revision: str | None) -> Listing:
        """As `OriginReader`; a bucket has no revisions."""
        if revision is not None:
            raise OriginNotFound(model, f"has no revisions, so not {revision!r}")
        with self.errors(model):
            store = self._store(model)
            found = {entry["path"]: entry for batch in self._library.list(store) for entry in batch}
            if not found:
                raise OriginNotFound(model, "holds no objects")
            hashes = {}
            if SUMS in found and found[SUMS]["size"] <= LIST_BYTES_MAX:
                text = bytes(self._library.get(store, SUMS).bytes()).decode("utf-8", "replace")
                hashes = dict(sums(text))
        files = [
            ListedFile(path, entry["size"], SHA256 + hashes[path] if path in hashes else _identity(entry))
            for path, entry in sorted(found.items())
            if path != SUMS and not path.endswith("/")
        ]
        return Listing(model.rstrip("/"), "", tuple(files))

    def read(self, listing: Listing, file: ListedFile, offset: int, size: int) -> ObjectStream:
        """As `OriginReader`."""
        with self.errors(f"{listing.source}/{file.path}"):
            options = {"range": (offset, offset + size)}
            result = self._library.get(self._store(listing.source), file.path, options=options)
            meta = result.meta
            if meta["size"] != file.size or (file.content.startswith(ETAG) and _identity(meta) != file.content):
                raise OriginChanged(listing.source, f"{file.path} changed since it was listed")
            return ObjectStream(
                self, f"{listing.source}/{file.path}", iter(result.stream(min_chunk_size=PART_BYTES)), size
            )

    def _store(self, model: str) -> Any:
        client = {"allow_http": True} if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") else {}
        retry = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=RETRY_S)}
        return self._library.store.from_url(model.rstrip("/"), client_options=client, retry_config=retry)

    @contextlib.contextmanager
    def errors(self, where: str) -> Iterator[None]:
        """Raises the library's errors as errors of origins."""
        kinds = self._library.exceptions
        try:
            yield
        except OriginError:
            raise
        except (kinds.PermissionDeniedError, kinds.UnauthenticatedError) as error:
            raise OriginDenied(where, "the object store does not accept the credentials") from error
        except (kinds.NotFoundError, FileNotFoundError) as error:
            raise OriginNotFound(where, "does not exist") from error
        except kinds.PreconditionError as error:
            raise OriginChanged(where, "changed since it was listed") from error
        except (kinds.BaseError, ValueError, OSError) as error:
            if any(code in str(error) for code in NO_BUCKET):
                raise OriginNotFound(where, "there is no such bucket") from error
            raise OriginUnreachable(where, f"cannot be read ({str(error).splitlines()[0][:200]})") from error


class ObjectStream:
    """The parts of a range, as the store sends them."""

    def __init__(self, origin: ObjectOrigin, where: str, parts: Iterator[Any], size: int) -> None:
        self._origin = origin
        self._where = where
        self._parts: Iterator[Any] | None = parts
        self._left = size
        self._rest = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int:
        """As `OriginStream`."""
        if self._parts is None:
            raise OriginUnreachable(self._where, "was closed")
        if not self._left:
            return 0
        if not self._rest:
            with self._origin.errors(self._where):
                part = next(self._parts, None)
            if part is None:
                raise OriginUnreachable(self._where, f"ended {self._left} bytes too early")
            self._rest = memoryview(part).cast("B")
        count = min(len(view), len(self._rest), self._left)
        view[:count] = self._rest[:count]
        self._rest, self._left = self._rest[count:], self._left - count
        return count

    def close(self) -> None:
        """As `OriginStream`."""
        self._parts = None


def _identity(entry: Any) -> str:
    text = entry.get("e_tag") or f"{entry['size']} {entry['last_modified'].isoformat()}"
    return ETAG + "".join(c for c in str(text) if c.isprintable())[:512]
