"""Do all origins keep the contract, that of a plugin as well?"""

from __future__ import annotations

import functools
import http.server
import random
import threading
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, Model

from swarm.content.promise import ListedFile, Listing
from swarm.errors import OriginChanged, OriginError, OriginNotFound, SettingsError
from swarm.origin import registry
from swarm.origin.files import FileOrigin
from swarm.origin.hf import HubOrigin
from swarm.origin.web import WebOrigin
from swarm.testing import check_origin

FILES = {
    "config.json": b"{}",
    "empty.txt": b"",
    "model.safetensors": random.Random(1).randbytes(200_000),
    "sub dir/a b.bin": random.Random(2).randbytes(3_000),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    for path, data in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


class Ranged(http.server.SimpleHTTPRequestHandler):
    """Files of a directory, with ranges and ETags."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), path.stat()
        first, last = 0, len(data) - 1
        if ranged := self.headers.get("Range"):
            first, last = (int(text) for text in ranged.removeprefix("bytes=").split("-"))
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("ETag", f'"{status.st_mtime_ns}-{len(data)}"')
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if not head:
            self.wfile.write(data[first : last + 1])


@pytest.fixture
def site(root: Path) -> Iterator[str]:
    handler = functools.partial(Ranged, directory=str(root.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def sums(root: Path) -> None:
    import hashlib

    lines = [f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in FILES.items()]
    (root / "SHA256SUMS").write_text("".join(lines))


def test_the_hub() -> None:
    with Hub({"org/model": Model(dict(FILES))}) as hub:
        check_origin(lambda: HubOrigin({"HF_ENDPOINT": hub.endpoint}), "org/model", FILES, missing="org/none")


def test_a_directory(root: Path) -> None:
    def change() -> None:
        (root / "model.safetensors").write_bytes(b"other")

    check_origin(FileOrigin, f"file://{root}", FILES, missing=f"file://{root}-none", change=change)


def test_a_snapshot_of_the_hubs_cache_has_hashes(root: Path) -> None:
    import hashlib

    data = FILES["model.safetensors"]
    blob = root.parent / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir()
    place = root.parent / "models--a--b" / "snapshots" / ("c" * 40)
    place.mkdir(parents=True)
    (place.parent.parent / "blobs").mkdir()
    (place.parent.parent / "blobs" / blob.name).write_bytes(data)
    (place / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (file,) = FileOrigin().listing(str(place), None).files
    assert file.content == f"sha256:{blob.name}"
    check_origin(FileOrigin, str(place), {"model.safetensors": data})


def test_a_web_server_with_sums(site: str, root: Path) -> None:
    sums(root)
    check_origin(WebOrigin, f"{site}/model/", FILES, missing=f"{site}/none/")


def test_a_web_server_with_an_index(site: str, root: Path) -> None:
    (root / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    index = (root / "model.safetensors.index.json").read_bytes()
    listed = {path: FILES[path] for path in ("config.json", "model.safetensors")} | {
        "model.safetensors.index.json": index
    }

    def change() -> None:
        (root / "model.safetensors").write_bytes(bytes(200_000))

    check_origin(WebOrigin, f"{site}/model/", listed, change=change)


def test_a_file_of_a_web_server(site: str) -> None:
    check_origin(WebOrigin, f"{site}/model/model.safetensors", {"model.safetensors": FILES["model.safetensors"]})


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of an S3 server, through boto3's client."""
    pytest.importorskip("obstore")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = pytest.importorskip("boto3").client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


@pytest.mark.usefixtures("bucket")
def test_is_a_bucket_that_does_not_exist_one_line() -> None:
    with pytest.raises(OriginNotFound, match="s3://nowhere/model: there is no such bucket"):
        registry.make_origin("s3").listing("s3://nowhere/model", None)


@pytest.mark.parametrize("summed", [False, True])
def test_an_object_store(bucket: Any, root: Path, summed: bool) -> None:
    sums(root)
    for path, data in FILES.items():
        bucket.put_object(Bucket="bucket", Key=f"models/one/{path}", Body=data)
    if summed:
        bucket.put_object(Bucket="bucket", Key="models/one/SHA256SUMS", Body=(root / "SHA256SUMS").read_bytes())

    def change() -> None:
        bucket.put_object(Bucket="bucket", Key="models/one/model.safetensors", Body=bytes(200_000))

    make = functools.partial(registry.make_origin, "s3")
    missing, changing = "s3://bucket/models/none", None if summed else change
    check_origin(make, "s3://bucket/models/one", FILES, missing=missing, change=changing)


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", ".swarm/x"])
def test_are_paths_refused_that_leave_the_directory(site: str, root: Path, path: str) -> None:
    (root / "SHA256SUMS").write_text(f"{'a' * 64}  {path}\n")
    with pytest.raises(OriginNotFound, match="the path"):
        WebOrigin().listing(f"{site}/model/", None)


def test_is_a_directory_without_a_list_of_files_refused(site: str) -> None:
    with pytest.raises(OriginNotFound, match="neither SHA256SUMS nor"):
        WebOrigin().listing(f"{site}/model/", None)


class Mirror(FileOrigin):
    """What a package offers."""

    scheme = "mirror"
    root = Path()

    def listing(self, model: str, revision: str | None) -> Listing:
        return super().listing(f"file://{self.root}/{model.rpartition('/')[2]}", revision)


def test_a_plugin(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mirror", f"{__name__}:Mirror", registry.GROUP)
    monkeypatch.setattr(Mirror, "root", root.parent)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.GROUP else [])
    address = registry.parse("mirror://place/model")
    assert address is not None
    check_origin(lambda: registry.make_origin(address.scheme), address.model, FILES)


def test_is_a_scheme_without_an_origin_named() -> None:
    with pytest.raises(SettingsError, match="'ftp' is not one of hf, https, http, file, s3"):
        registry.make_origin("ftp")


@pytest.mark.parametrize(
    ("text", "scheme", "model_id"),
    [
        ("hf://org/model", "hf", "org/model"),
        ("https://host/model/", "https", "https://host/model"),
        ("file:///mnt/model", "file", "file:///mnt/model"),
    ],
)
def test_is_an_address_read(text: str, scheme: str, model_id: str) -> None:
    address = registry.parse(text)
    assert address is not None
    assert (address.scheme, address.model_id) == (scheme, model_id)


@pytest.mark.parametrize("text", ["org/model", "model", "://x", "C:/x", "./file"])
def test_is_a_plain_id_no_address(text: str) -> None:
    assert registry.parse(text) is None


class Lying(FileOrigin):
    """Breaks the contract in one way."""

    def __init__(self, how: str) -> None:
        self._how = how

    def listing(self, model: str, revision: str | None) -> Listing:
        found = super().listing(model, revision)
        files = [ListedFile(f.path, f.size + (self._how == "size"), f.content) for f in found.files]
        return Listing(found.source, "", tuple(files[: len(files) - (self._how == "paths")]))

    def read(self, listing: Listing, file: ListedFile, offset: int, size: int):  # type: ignore[no-untyped-def]
        if self._how == "offset" and offset:
            offset -= 1
        return super().read(listing, file, offset, size)


@pytest.mark.parametrize("how", ["size", "paths", "offset"])
def test_is_a_broken_origin_found(root: Path, how: str) -> None:
    with pytest.raises((AssertionError, OriginError)):
        check_origin(lambda: Lying(how), f"file://{root}", FILES)


def test_is_a_changed_file_noticed_at_its_end(root: Path) -> None:
    origin = FileOrigin()
    listing = origin.listing(f"file://{root}", None)
    file = next(f for f in listing.files if f.path == "model.safetensors")
    stream = origin.read(listing, file, 0, file.size)
    stream.readinto(memoryview(bytearray(1000)))
    (root / file.path).write_bytes(bytes(file.size))
    with pytest.raises(OriginChanged):
        stream.readinto(memoryview(bytearray(file.size)))
    stream.close()
