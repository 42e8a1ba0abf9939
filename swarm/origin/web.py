"""Files on a web server as an origin: `https://host/model.safetensors`, or `https://host/model/` with a list of files.

    URL/          SHA256SUMS there lists files with hashes; else model.safetensors.index.json names the shards
    URL           one file

Sizes and ETags come from HEAD. A file without a hash is identified by its strong ETag, else by its time of change.

Must not know: peers, how other origins work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from swarm.content import bounded_json
from swarm.content.manifest import FILES_MAX, unsafe_path
from swarm.content.promise import ETAG, SHA256, ListedFile, Listing
from swarm.errors import OriginChanged, OriginNotFound, OriginUnreachable
from swarm.origin import http

SUMS, INDEX = "SHA256SUMS", "model.safetensors.index.json"
LIST_BYTES_MAX = 16 << 20
# Small files that loaders look for beside an index, which does not name them.
BESIDE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
    "preprocessor_config.json",
)  # fmt: skip
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")


class WebOrigin:
    """Web servers by URL, without a user or password in it."""

    scheme = "https"
    address = "https:"

    def listing(self, model: str, revision: str | None) -> Listing:
        """As `OriginReader`; a web server has no revisions."""
        host = urlsplit(model).netloc
        if revision is not None:
            raise OriginNotFound(host, f"{model} has no revisions, so not {revision!r}")
        if not model.endswith("/"):
            name = PurePosixPath(unquote(urlsplit(model).path)).name
            file = self._listed(model, name, None) if name else None
            if file is None:
                raise OriginNotFound(host, f"there is no file {model}")
            return Listing(model, "", (file,))
        text = self._text(model + SUMS)
        if text is not None:
            hashes = dict(sums(text))
            files = [self._demanded(model, path, digest) for path, digest in sorted(hashes.items())]
        else:
            index = self._text(model + INDEX)
            if index is None:
                raise OriginNotFound(host, f"{model} has neither {SUMS} nor {INDEX}, so its files are not known")
            shards = _shards(index, model)
            found = (self._listed(model + quote(path), path, None) for path in BESIDE)
            files = [file for file in found if file]
            files += [self._demanded(model, path, None) for path in [INDEX, *shards]]
        return Listing(model, "", tuple(sorted(files, key=lambda file: file.path)))

    def read(self, listing: Listing, file: ListedFile, offset: int, size: int) -> http.RangeStream:
        """As `OriginReader`."""
        url = listing.source + quote(file.path) if listing.source.endswith("/") else listing.source
        response = http.request(url, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
        http.demand(response, file.path)
        if file.content.startswith(ETAG) and _identity(response, file.size) != file.content:
            response.close()
            raise OriginChanged(urlsplit(url).netloc, f"{file.path} changed since it was listed")
        return http.ranged(response, file.path, offset=offset, size=size, total=file.size)

    def _demanded(self, model: str, path: str, digest: str | None) -> ListedFile:
        host = urlsplit(model).netloc
        if why := unsafe_path(path):
            raise OriginNotFound(host, f"{model}: the path {path!r} {why}")
        file = self._listed(model + quote(path), path, digest)
        if file is None:
            raise OriginNotFound(host, f"{model} names {path}, which does not exist")
        return file

    def _listed(self, url: str, path: str, digest: str | None) -> ListedFile | None:
        response = http.request(url, method="HEAD")
        response.close()
        if response.status in (404, 410):
            return None
        http.demand(response, path)
        length = response.headers.get("Content-Length") or ""
        if not length.isdigit():
            raise OriginUnreachable(urlsplit(url).netloc, f"{path}: its size is not told")
        size = int(length)
        return ListedFile(path, size, SHA256 + digest if digest else _identity(response, size))

    def _text(self, url: str) -> str | None:
        response = http.request(url)
        try:
            if response.status in (403, 404, 410):
                return None
            http.demand(response, url)
            return response.read(LIST_BYTES_MAX).decode("utf-8", "replace")
        finally:
            response.close()


def _identity(response: http.Response, size: int) -> str:
    etag = (response.headers.get("ETag") or "").strip()
    if etag and not etag.startswith("W/"):
        text = etag
    else:
        text = f"{size} {response.headers.get('Last-Modified') or ''}".strip()
    return ETAG + "".join(c for c in text if c.isprintable())[:512]


def sums(text: str) -> Iterable[tuple[str, str]]:
    """Path and sha256 of each line of `sha256sum`."""
    for line in text.splitlines()[:FILES_MAX]:
        if match := _SUM.fullmatch(line.strip()):
            yield match[2].removeprefix("./"), match[1]


def _shards(text: str, model: str) -> list[str]:
    try:
        table = bounded_json.loads(text.encode())
        names = sorted({str(name) for name in table["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OriginNotFound(urlsplit(model).netloc, f"{model}{INDEX} is no index of shards") from error
    if len(names) > FILES_MAX:
        raise OriginNotFound(urlsplit(model).netloc, f"{model}{INDEX} names more than {FILES_MAX} files")
    return names
