"""Ranges out of xet: the real hf_xet, and a real storage of its own kind in a directory, behind the stand-in hub."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hub import Hub, Model

from swarm.content.promise import Listing
from swarm.errors import OriginUnreachable
from swarm.origin import OriginStream
from swarm.origin.hf import HubOrigin
from swarm.origin.xet import PIECE_FIRST_BYTES, RANGE_BYTES_MIN, XetStorage

hf_xet: Any = pytest.importorskip("hf_xet", reason="hf_xet is not installed")

MODEL = "org/model"
DATA = np.random.default_rng(3).bytes(3 * PIECE_FIRST_BYTES + 12345)
FILES = {"model.safetensors": DATA, "config.json": b"{}" * 2000}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """With its large file in a storage of xet, and in its other store."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    storage = f"local://{tmp_path}/storage"
    (tmp_path / "storage").mkdir()
    commit = hf_xet.XetSession().new_upload_commit(endpoint=storage)
    upload = commit.start_upload_bytes(DATA, name="model")
    commit.wait_to_finish()
    names = {"model.safetensors": upload.result().xet_info.hash}
    with Hub({MODEL: Model(FILES, xet=True, xet_names=names)}, token="hf_secret") as made:
        made.xet_storage = storage
        yield made


def origin_of(hub: Hub, **more: str) -> tuple[HubOrigin, Listing]:
    origin = HubOrigin({"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_secret", **more})
    return origin, origin.listing(MODEL, None)


def read(origin: HubOrigin, listing: Listing, offset: int, size: int, path: str = "model.safetensors") -> bytes:
    file = next(file for file in listing.files if file.path == path)
    with contextlib.closing(origin.read(listing, file, offset, size)) as stream:
        return drained(stream, size)


def drained(stream: OriginStream, size: int) -> bytes:
    found = memoryview(bytearray(size + 10))
    at = 0
    while count := stream.readinto(found[at : at + 777_777]):
        at += count
    return bytes(found[:at])


def test_is_every_range_read_and_the_hub_asked_once_for_each_file(hub: Hub) -> None:
    origin, listing = origin_of(hub)
    for offset, size in ((0, len(DATA)), (1, RANGE_BYTES_MIN), (len(DATA) - RANGE_BYTES_MIN, RANGE_BYTES_MIN)):
        assert read(origin, listing, offset, size) == DATA[offset : offset + size]
    assert [len(hub.asked(where)) for where in ("resolve", "xet token", "store")] == [1, 1, 0]
    assert {asked.authorization for asked in hub.requests} == {"Bearer hf_secret"}


def test_are_small_ranges_and_small_files_read_over_http(hub: Hub) -> None:
    origin, listing = origin_of(hub)
    assert read(origin, listing, 5, 100) == DATA[5:105]
    assert read(origin, listing, 0, 4000, "config.json") == FILES["config.json"]
    assert hub.asked("xet token") == []


@pytest.mark.parametrize("reason", ["turned off", "not in xet", "tokens elsewhere"])
def test_is_all_read_over_http_where_xet_is_not_to_be_used(hub: Hub, reason: str) -> None:
    if reason == "not in xet":
        hub.models[MODEL].xet = False
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        if reason == "tokens elsewhere":  # where the user's token must not go
            hub.xet_tokens = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/api/xet-token"
        origin, listing = origin_of(hub, **({"HF_HUB_DISABLE_XET": "1"} if reason == "turned off" else {}))
        assert read(origin, listing, 0, len(DATA)) == DATA
        assert hub.asked("xet token") == []
        elsewhere.settimeout(0.1)
        with pytest.raises(TimeoutError):
            elsewhere.accept()


@pytest.mark.parametrize("broken", ["no storage", "another file", "no token"])
def test_is_the_rest_read_over_http_after_a_failure(hub: Hub, broken: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "swarm")
    if broken == "no storage":
        hub.xet_storage = "http://127.0.0.1:9"
    elif broken == "another file":
        hub.models[MODEL].xet_names = {"model.safetensors": "ab" * 32}
    else:
        hub.fault = lambda asked: "500" if asked.where == "xet token" else ""
    origin, listing = origin_of(hub)
    if broken != "no token":  # which is known before a stream is open
        with pytest.raises(OriginUnreachable, match=r"model.safetensors: hf_xet: "):
            read(origin, listing, 0, len(DATA))
    assert read(origin, listing, 0, len(DATA)) == DATA
    assert len(hub.asked("store")) == 1
    assert caplog.text.count("the rest is read over HTTP") == 1


def test_does_closing_end_a_read_of_a_silent_storage(hub: Hub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub.xet_storage = f"http://127.0.0.1:{silent.getsockname()[1]}"
        origin, listing = origin_of(hub)
        file = next(file for file in listing.files if file.path == "model.safetensors")
        stream = origin.read(listing, file, 0, len(DATA))

        def close() -> None:
            with silent.accept()[0]:
                stream.close()

        closing = threading.Thread(target=close)
        closing.start()
        began_s = time.monotonic()
        with pytest.raises(OriginUnreachable):
            drained(stream, len(DATA))
        assert time.monotonic() - began_s < 10
        closing.join(10)


@pytest.mark.parametrize("exp", ["Infinity", "1e999", "NaN", '"soon"', "null"])
def test_is_a_token_that_expires_at_no_time_no_token(exp: str) -> None:
    body = f'{{"casUrl": "https://cas", "accessToken": "x", "exp": {exp}}}'.encode()
    answer: Any = SimpleNamespace(status=200, read=lambda _: body, close=lambda: None)
    assert XetStorage("https://hub", lambda *_, **__: answer)._token("https://hub/token") is None
