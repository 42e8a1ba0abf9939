"""Does the hub's origin list and read as the hub means it, and end each of the hub's faults in one clear error?"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Asked, Fault, Hub, Model, git_sha1

from swarm.content.promise import ListedFile, Listing
from swarm.errors import OriginChanged, OriginDenied, OriginError, OriginNotFound, OriginUnreachable, SettingsError
from swarm.origin import http
from swarm.origin.hf import HubOrigin

FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": random.Random(1).randbytes(300_000),
    "sub dir/more +%.bin": random.Random(2).randbytes(5_000),
}
ID = "org/model"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({ID: Model(dict(FILES))}) as made:
        yield made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stalled answer is cut soon."""
    monkeypatch.setattr(http, "SILENCE_S", 0.3)


def origin(hub: Hub, **environment: str) -> HubOrigin:
    return HubOrigin({"HF_ENDPOINT": hub.endpoint + "/", "HF_HOME": "/nonexistent", **environment})


def read(origin: HubOrigin, listing: Listing, file: ListedFile, offset: int = 0, size: int | None = None) -> bytes:
    data = bytearray()
    with contextlib.closing(origin.read(listing, file, offset, file.size if size is None else size)) as stream:
        view = memoryview(bytearray(1000))
        while count := stream.readinto(view):
            data += view[:count]
    return bytes(data)


def weights(listing: Listing) -> ListedFile:
    return next(file for file in listing.files if file.path == "model.safetensors")


@pytest.mark.parametrize("bare", [False, True])
def test_does_a_listing_have_commit_sizes_and_hashes(hub: Hub, bare: bool) -> None:
    hub.bare = bare  # then they come from the tree
    listing = origin(hub).listing(ID, None)
    assert listing.commit == hub.models[ID].commit
    assert listing.revisions == ("main",)
    assert {file.path: (file.size, file.content) for file in listing.files} == {
        path: (
            len(data),
            "git-sha1:" + git_sha1(data) if len(data) < 1024 else "sha256:" + hashlib.sha256(data).hexdigest(),
        )
        for path, data in FILES.items()
    }


def test_are_all_pages_of_a_tree_read(hub: Hub) -> None:
    hub.bare = True
    hub.models[ID].files |= {f"f{n:03}": bytes([n]) for n in range(120)}
    assert len(origin(hub).listing(ID, None).files) == 123


def test_is_every_range_read_as_it_is(hub: Hub) -> None:
    at = origin(hub)
    listing = at.listing(ID, None)
    for file in listing.files:
        assert read(at, listing, file) == FILES[file.path]
        assert read(at, listing, file, 3, 4) == FILES[file.path][3:7]
        assert read(at, listing, file, file.size - 1, 1) == FILES[file.path][-1:]


def test_is_a_server_that_ignores_ranges_read_all_the_same(hub: Hub) -> None:
    hub.fault = lambda asked: "whole" if asked.where == "store" else ""
    at = origin(hub)
    listing = at.listing(ID, None)
    assert read(at, listing, weights(listing), 1234, 777) == FILES["model.safetensors"][1234:2011]


def test_does_the_token_stay_with_the_endpoint(hub: Hub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    hub.models[ID].gated = "all"
    (tmp_path / "token").write_text("hf_secret\n")
    for environment in (
        {"HF_TOKEN": " hf_secret\r\n"},
        {"HF_HOME": str(tmp_path)},
        {"HF_TOKEN_PATH": str(tmp_path / "token")},
    ):
        at = origin(hub, **environment)
        listing = at.listing(ID, None)
        assert read(at, listing, weights(listing), 0, 10) == FILES["model.safetensors"][:10]
    assert {asked.authorization for asked in hub.asked("resolve")} == {"Bearer hf_secret"}
    assert {asked.authorization for asked in hub.asked("store")} == {None}


def test_is_the_token_file_left_alone_where_the_user_says_so(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_secret")
    origin(hub, HF_HOME=str(tmp_path), HF_HUB_DISABLE_IMPLICIT_TOKEN="1").listing(ID, None)
    assert {asked.authorization for asked in hub.requests} == {None}


@pytest.mark.parametrize("token", [None, "other"])
def test_does_a_gated_model_say_what_to_do(hub: Hub, token: str | None) -> None:
    hub.token = "hf_secret"
    hub.models[ID].gated = "all"
    with pytest.raises(OriginDenied, match="gated: accept its terms") as raised:
        origin(hub, **({"HF_TOKEN": token} if token else {})).listing(ID, None)
    assert ("set HF_TOKEN" in str(raised.value)) == (token is None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [(ID, "nope", "org/model has no revision 'nope'"), ("org/none", None, "there is no model org/none")],
)
def test_is_a_model_or_revision_that_does_not_exist_named(
    hub: Hub, model: str, revision: str | None, words: str
) -> None:
    with pytest.raises(OriginNotFound, match=words) as raised:
        origin(hub).listing(model, revision)
    assert raised.value.lasting


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_is_the_hub_not_asked_offline(hub: Hub, name: str) -> None:
    with pytest.raises(OriginUnreachable, match=name):
        origin(hub, **{name: "1"}).listing(ID, None)
    assert hub.requests == []


@pytest.mark.parametrize("where", ["api", "resolve", "store"])
@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "nonsense"])
def test_is_a_fault_that_passes_no_lasting_error(hub: Hub, where: str, fault: Fault) -> None:
    at = origin(hub)
    listing = at.listing(ID, None)
    hub.fault = lambda asked: fault if asked.where == where else ""
    with pytest.raises(OriginUnreachable) as raised:
        read(at, at.listing(ID, None) if where == "api" else listing, weights(listing))
    assert not raised.value.lasting
    assert raised.value.retry_s == (1.0 if fault == "429" else 0.0)
    hub.fault = lambda _: ""
    assert read(at, listing, weights(listing)) == FILES["model.safetensors"]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0), ({"Retry-After": "nan"}, 0.0), ({"Retry-After": "-3"}, 0.0), ({}, 0.0),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0), ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "soon"}, 0.0), ({"Retry-After": "1e400"}, 0.0),
    ],
)  # fmt: skip
def test_is_the_time_to_wait_read_in_every_form(headers: dict[str, str], seconds: float) -> None:
    assert http.retry_after_s(headers) == seconds


def test_is_an_expired_signature_renewed(hub: Hub) -> None:
    refused: list[Asked] = []

    def fault(asked: Asked) -> Fault:
        if asked.where == "store" and len(refused) < 2:
            refused.append(asked)
            return "403"
        return ""

    hub.fault = fault
    at = origin(hub)
    listing = at.listing(ID, None)
    assert read(at, listing, weights(listing)) == FILES["model.safetensors"]
    assert len(hub.asked("resolve")) == 3


def test_is_a_store_that_refuses_every_signature_given_up(hub: Hub) -> None:
    hub.fault = lambda asked: "403" if asked.where == "store" else ""
    at = origin(hub)
    listing = at.listing(ID, None)
    with pytest.raises(OriginUnreachable, match="refuses the addresses"):
        read(at, listing, weights(listing))
    assert len(hub.asked("resolve")) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("truncate", "too early"), ("length", "for a range of"), ("stall", "sent nothing"),
        ("other range", "another range"), ("loop", "redirects more than"),
    ],
)  # fmt: skip
def test_is_a_broken_answer_an_error_that_says_so(hub: Hub, fault: Fault, words: str) -> None:
    where = "resolve" if fault == "loop" else "store"
    hub.fault = lambda asked: fault if asked.where == where else ""
    at = origin(hub)
    listing = at.listing(ID, None)
    with pytest.raises(OriginError, match=words) as raised:
        read(at, listing, weights(listing), 10, 100_000)
    assert not raised.value.lasting


def test_is_a_file_of_another_length_or_commit_a_change(hub: Hub) -> None:
    at = origin(hub)
    listing = at.listing(ID, None)
    hub.models[ID].names[listing.commit] = ""  # the old address answers with new content
    hub.models[ID].files["model.safetensors"] += b"more"
    with pytest.raises(OriginChanged, match="is of commit"):
        read(at, listing, weights(listing))


def test_is_a_stream_that_another_thread_closes_an_error_and_no_hang(hub: Hub) -> None:
    hub.fault = lambda asked: "stall" if asked.where == "store" else ""
    at = origin(hub)
    listing = at.listing(ID, None)
    stream = at.read(listing, weights(listing), 0, 300_000)
    stream.close()
    with pytest.raises(OriginError):
        stream.readinto(memoryview(bytearray(1 << 20)))


def test_is_a_name_that_cannot_be_resolved_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OriginUnreachable, match=r"hub\.invalid: its name cannot be resolved"):
        HubOrigin({"HF_ENDPOINT": "https://hub.invalid"}).listing(ID, None)


@pytest.mark.parametrize(
    "answer", [b"[]", b"{}", b'{"sha": 3}', b'{"sha": "' + b"a" * 40 + b'", "siblings": 7}', b"\xff", b"[" * 100_000]
)
def test_is_an_answer_of_another_shape_an_error(monkeypatch: pytest.MonkeyPatch, hub: Hub, answer: bytes) -> None:
    monkeypatch.setattr(http.Response, "read", lambda *_: answer)
    with pytest.raises(OriginError):
        origin(hub).listing(ID, None)


def test_is_a_response_that_another_thread_closes_a_broken_one(hub: Hub) -> None:
    response = http.request(f"{hub.endpoint}/{ID}/resolve/main/model.safetensors")

    class Closing(io.RawIOBase):
        """The body, closed under the read that waits in it."""

        def readinto(self, _: object) -> int:
            response.close()
            return 0

    response._answer.fp.close()
    response._answer.fp = Closing()  # type: ignore[assignment]
    with pytest.raises(OriginUnreachable, match="the connection failed"):
        response.readinto(memoryview(bytearray(1000)))


@pytest.mark.parametrize("endpoint", ["foo", "huggingface.co", "https://", "ftp://hub.example"])
def test_is_an_endpoint_that_is_no_address_named(endpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"HF_ENDPOINT: .* is no address such as "):
        HubOrigin({"HF_ENDPOINT": endpoint})
