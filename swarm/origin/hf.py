"""The Hugging Face hub, or a server with its API, as an origin.

    GET {endpoint}/api/models/{model}/revision/{revision}?blobs=true     commit, and files with sizes and hashes
    GET {endpoint}/api/models/{model}/tree/{commit}?recursive=true       the same, where the first answer lacks them
    GET {endpoint}/{model}/resolve/{commit}/{path}                       with Range; redirects to a store
    hf_xet, where it is installed                                        ranges of large files instead: see `xet`

Endpoint, token, token file and offline mode are those of huggingface_hub, from the same environment variables. The
redirect of `resolve` is signed, maybe for that very range, so each range is resolved anew; a refused signature is
renewed. The token stays with the endpoint.

Must not know: peers, what is done with the bytes. Does not import huggingface_hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from swarm.content import bounded_json
from swarm.content.manifest import FILES_MAX
from swarm.content.promise import GIT_SHA1, SHA256, ListedFile, Listing
from swarm.errors import (
    OriginChanged,
    OriginDenied,
    OriginError,
    OriginNotFound,
    OriginUnreachable,
    OriginUnusable,
    SettingsError,
)
from swarm.origin import OriginStream, http, xet

ENDPOINT = "https://huggingface.co"
ANSWER_BYTES_MAX = 64 << 20
PAGES_MAX = 1000
SIGNATURES_MAX = 3  # refused in a row, for one range
_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")


class HubOrigin:
    """The hub that the environment names. Raises SettingsError for an HF_ENDPOINT that is no address."""

    scheme = "hf"

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = os.environ if environment is None else environment
        self.address = (self._environment.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise SettingsError("HF_ENDPOINT", f"{self.address!r} is no address such as {ENDPOINT}")
        self._name = parts.netloc
        self._xet = xet.XetStorage(self.address, self._ask) if xet.usable(self._environment) else None

    def listing(self, model: str, revision: str | None) -> Listing:
        """As `OriginReader`."""
        if any(_is_true(self._environment.get(name)) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
            why = "is not asked, as HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
            raise OriginUnreachable(self._name, why, lasting=True)
        asked = revision or "main"
        answer: Any = self._json(
            f"/api/models/{quote(model)}/revision/{quote(asked, safe='')}?blobs=true", model, asked
        )
        commit = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise OriginUnusable(self._name, f"{model}: names no commit for {asked}")
        siblings = answer.get("siblings")
        files = [_sibling(entry) for entry in siblings] if isinstance(siblings, list) else [None]
        if None in files:
            files = [_leaf(entry) for entry in self._tree(model, commit) if _is_file(entry)]
        if None in files:
            raise OriginUnusable(self._name, f"{model}: lists a file without size or hash")
        listed = tuple(sorted((file for file in files if file), key=lambda file: file.path))
        names = (asked,) if asked != commit else ()
        return Listing(f"{self.address}/{model}", commit, listed, names, bool(answer.get("gated")))

    def demand_access(self, listing: Listing) -> None:
        """Raises OriginDenied if the token does not open the files of a listing, as each OriginError."""
        if listing.gated and listing.files:
            path = listing.files[0].path
            url = f"{listing.source}/resolve/{listing.commit}/{quote(path)}"
            response = self._ask(url, method="HEAD", follow=False)
            self._check(response, listing, listing.files[0])
            response.close()

    def read(self, listing: Listing, file: ListedFile, offset: int, size: int) -> OriginStream:
        """As `OriginReader`."""
        if self._xet and (stream := self._xet.open(listing, file, offset, size)):
            return stream
        url = f"{listing.source}/resolve/{listing.commit}/{quote(file.path)}"
        headers = {"Range": f"bytes={offset}-{offset + size - 1}"}
        for _ in range(SIGNATURES_MAX):
            response = self._ask(url, headers=headers)
            signed = urlsplit(response.url).netloc != urlsplit(url).netloc
            if response.status not in (400, 401, 403) or not signed:
                break
            response.close()  # an expired signature, or one for another range
        else:
            raise OriginUnreachable(self._name, f"{file.path}: the store refuses the addresses that the hub signs")
        self._check(response, listing, file)
        return http.ranged(response, file.path, offset=offset, size=size, total=file.size)

    def _check(self, response: http.Response, listing: Listing, file: ListedFile) -> None:
        self._demand(response, urlsplit(listing.source).path.strip("/"), listing.commit, file.path)
        for headers in (*response.hops, response.headers):
            commit = headers.get("X-Repo-Commit")
            if commit and _COMMIT.fullmatch(commit) and commit != listing.commit:
                response.close()
                raise OriginChanged(self._name, f"{file.path}: is of commit {commit[:12]}, not {listing.commit[:12]}")

    def _tree(self, model: str, commit: str) -> Iterator[Any]:
        path: str | None = f"/api/models/{quote(model)}/tree/{commit}?recursive=true"
        count = 0
        for _ in range(PAGES_MAX):
            response = self._get(path or "", model, commit)
            entries = self._decoded(response, model)
            if not isinstance(entries, list):
                raise OriginUnusable(self._name, f"{model}: its files are no list")
            count += len(entries)
            if count > FILES_MAX * 2:
                raise OriginUnusable(self._name, f"{model}: lists more than {FILES_MAX} files")
            yield from entries
            following = re.search(r'<([^>]+)>;\s*rel="next"', response.headers.get("Link") or "")
            if following is None:
                return
            target = urljoin(f"{self.address}/", following[1])
            if urlsplit(target).netloc != urlsplit(self.address).netloc:
                raise OriginUnusable(self._name, f"{model}: its next page is on another host")
            path = target
        raise OriginUnusable(self._name, f"{model}: lists more than {PAGES_MAX} pages")

    def _json(self, path: str, model: str, revision: str) -> Any:
        return self._decoded(self._get(path, model, revision), model)

    def _get(self, path: str, model: str, revision: str) -> http.Response:
        url = path if path.startswith(("http://", "https://")) else f"{self.address}{path}"
        response = self._ask(url)
        self._demand(response, model, revision, "")
        return response

    def _decoded(self, response: http.Response, model: str) -> Any:
        try:
            return bounded_json.loads(response.read(ANSWER_BYTES_MAX))
        except ValueError as error:
            raise OriginUnusable(self._name, f"{model}: its answer is not JSON ({error})") from error
        finally:
            response.close()

    def _demand(self, response: http.Response, model: str, revision: str, path: str) -> None:
        """Raises the error of a status that is no success, in the hub's words where it has some."""
        code = response.headers.get("X-Error-Code")
        what = f"{model}: {path}" if path else model
        if response.status in (401, 403, 404):
            response.close()
            if code == "RevisionNotFound":
                raise OriginNotFound(self._name, f"{model} has no revision {revision!r}")
            if code == "EntryNotFound":
                raise OriginNotFound(self._name, f"{what} does not exist at revision {revision}")
            token = self._authorization() is not None
            if code == "GatedRepo":
                do = "the token has no access to it" if token else "set HF_TOKEN, or run `hf auth login`"
                raise OriginDenied(self._name, f"{model} is gated: accept its terms at {self.address}/{model}; {do}")
            if code == "RepoNotFound" or response.status == 404:
                do = "" if token else ", or it is private and there is no token (HF_TOKEN)"
                raise OriginNotFound(self._name, f"there is no model {model}{do}")
            if response.status == 401:
                why = "does not accept the token" if token else "demands a token: set HF_TOKEN, or run `hf auth login`"
                raise OriginDenied(self._name, f"{model}: {why}")
        try:
            http.demand(response, what)
        except OriginError as error:
            raise type(error)(self._name, error.why, retry_s=error.retry_s) from None

    def _ask(self, url: str, **how: Any) -> http.Response:
        return http.request(url, authorization=self._authorization(), **how)

    def _authorization(self) -> str | None:
        token = self._token()
        return f"Bearer {token}" if token else None

    def _token(self) -> str | None:
        """The token as huggingface_hub finds it: the environment first, then the token file."""
        environment = self._environment
        if _is_true(environment.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
            return None
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            if token := _clean(environment.get(name, "")):
                return token
        base = environment.get("XDG_CACHE_HOME") or "~/.cache"
        home = environment.get("HF_HOME") or os.path.join(base, "huggingface")
        try:
            path = Path(environment.get("HF_TOKEN_PATH") or os.path.join(home, "token")).expanduser()
            return _clean(path.read_text()) or None
        except (OSError, RuntimeError, UnicodeDecodeError):
            return None


def _clean(token: str) -> str:
    token = token.replace("\r", "").replace("\n", "").strip()
    return token if token.isascii() and token.isprintable() else ""


def _sibling(entry: object) -> ListedFile | None:
    """A file of `siblings`, None if its size or hash is missing."""
    if not isinstance(entry, dict):
        return None
    lfs = entry.get("lfs")
    sha256 = lfs.get("sha256") or lfs.get("oid") if isinstance(lfs, dict) else None
    size = lfs.get("size", entry.get("size")) if isinstance(lfs, dict) else entry.get("size")
    return _listed(entry.get("rfilename"), size, sha256, None if lfs else entry.get("blobId"))


def _leaf(entry: Mapping[str, Any]) -> ListedFile | None:
    """A file of `tree`, None if its size or hash is missing."""
    lfs = entry.get("lfs")
    sha256 = lfs.get("oid") or lfs.get("sha256") if isinstance(lfs, dict) else None
    size = lfs.get("size", entry.get("size")) if isinstance(lfs, dict) else entry.get("size")
    return _listed(entry.get("path"), size, sha256, None if lfs else entry.get("oid"))


def _is_file(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("type", "file") == "file"


def _listed(path: object, size: object, sha256: object, sha1: object) -> ListedFile | None:
    if not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
        return None
    if isinstance(sha256, str) and _SHA256.fullmatch(sha256.removeprefix("sha256:")):
        return ListedFile(path, size, SHA256 + sha256.removeprefix("sha256:"))
    if isinstance(sha1, str) and _COMMIT.fullmatch(sha1):
        return ListedFile(path, size, GIT_SHA1 + sha1)
    return None


def _is_true(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")
