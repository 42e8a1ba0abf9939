"""A trace, shown again: is it the swarm that its node saw, at every moment?"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from swarm.cli.main import main
from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Digest, ModelId
from swarm.dashboard import replay_server
from swarm.dashboard.recording import Recording
from swarm.dashboard.replay_server import ReplayServer
from swarm.errors import StoreError
from swarm.journal import ArtifactsAnnounced, Entry, FetchEnded, FetchStarted, Joined, Opened, Received, Sent
from swarm.membership.swim_events import MemberChanged
from swarm.observe.trace import event
from swarm.protocol.messages import Address, Announcement, NodeId
from swarm.protocol.packets import Holding, Profile, Record, State
from swarm.transfer.download_events import Ban, ChunkCorrupt, PeerHas, PeerJoined

ORG_M = ModelId("org/m")

DIGEST = Digest("d" * 64)
HERE = DIGEST
ME, PAT, LIAR = NodeId("1" * 16), NodeId("a" * 16), NodeId("f" * 16)
HOLDS = Announcement(ORG_M, DIGEST, "checkpoint", 40, 4, 4, True)
PART = Announcement(ORG_M, DIGEST, "checkpoint", 40, 1, 4, False)
PROFILE = Profile((Holding(ORG_M, DIGEST, "checkpoint", 4, 4, True),), host="h", rack="r")
STORY = (
    Entry(100.0, "node", Opened(ME, "me", Address("127.0.0.1:1"), "here", "r")),
    Entry(100.1, PAT, Joined(PAT, "pat", Address("127.0.0.1:2"), "tcp")),
    Entry(100.1, PAT, ArtifactsAnnounced(PAT, (HOLDS,))),
    Entry(100.2, PAT, MemberChanged(Record(PAT, 0, State.ALIVE, 1, "pat", (Address("127.0.0.1:2"),), PROFILE))),
    Entry(100.3, LIAR, Joined(LIAR, "liar", Address("127.0.0.1:3"), "tcp")),
    Entry(100.3, LIAR, ArtifactsAnnounced(LIAR, (PART,))),
    Entry(101.0, "node", FetchStarted(ORG_M, DIGEST, 40, 10, 4, ((3, 1),))),
    Entry(101.0, HERE, PeerJoined(LIAR, Bitfield(4, [0]))),
    Entry(102.0, PAT, Received(PAT, DIGEST, 0, 10)),
    Entry(102.5, HERE, PeerHas(LIAR, (1, 2))),
    Entry(103.0, HERE, ChunkCorrupt(LIAR, 2, 1)),
    Entry(103.1, HERE, Ban(LIAR, "it lies")),
    Entry(104.0, PAT, Received(PAT, DIGEST, 1, 10)),
    Entry(104.1, "upload", Sent(LIAR, DIGEST, 10)),
    Entry(105.0, PAT, Received(PAT, DIGEST, 2, 10)),
    Entry(106.0, "node", FetchEnded(DIGEST, None)),
)


def at(second: float) -> Recording:
    recording = Recording(json.loads(json.dumps(event(entry))) for entry in STORY)
    recording.to(second)
    return recording


def test_is_each_moment_as_it_was() -> None:
    early = at(102.1).view()
    assert early["members"][ME]["holds"][DIGEST] == {"fraction": 0.5, "cells": "9009", "wanted": None}
    assert early["members"][LIAR]["holds"][DIGEST] == {"fraction": 0.25, "cells": "9000", "wanted": None}
    assert early["members"][ME]["fetches"][DIGEST]["running"]
    assert (early["members"][ME]["host"], early["members"][PAT]["rack"]) == ("here", "r")
    assert early["links"][f"{PAT}>{ME}"]["bytes"] == 10
    assert early["warnings"] == {}

    late = at(104.5).view()
    assert late["members"][LIAR]["holds"][DIGEST]["cells"] == "9990"
    assert late["members"][LIAR]["banned_by"] == {ME: "it lies"}
    assert late["links"][f"{ME}>{LIAR}"]["bytes"] == 10
    assert [warning["code"] for warning in late["warnings"].values()] == ["lies"]

    end = at(math.inf).view()
    assert end["members"][ME]["holds"][DIGEST]["cells"] == "9999"
    assert end["members"][ME]["fetches"][DIGEST]["seconds"] == 5.0
    assert end["asked"] == {"members": 3, "answered": 1}


def test_what_is_known_of_a_chunk_and_of_the_fetch() -> None:
    end = at(math.inf)
    assert end.tree(DIGEST, 1) == {
        "digest": DIGEST, "chunk": 1, "edges": {ME: {"source": PAT, "at_s": 3.0}}, "silent": [],
    }  # fmt: skip
    kept = end.tree(DIGEST, 3)
    assert kept is not None
    assert kept["edges"] == {ME: {"source": None, "at_s": None}}
    assert end.tree(DIGEST, 4) is None
    assert end.tree(Digest("e" * 64), 0) is None
    told = end.timeline(DIGEST)
    assert told is not None
    assert [lane["name"] for lane in told["lanes"]] == ["pat", "liar"]
    assert at(100.5).timeline(DIGEST) is None


def written(path: Path) -> Path:
    path.write_text("".join(json.dumps(event(entry)) + "\n" for entry in STORY) + '{"event": "cut')
    return path


def test_are_the_events_those_of_the_dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_server, "UPDATE_EVERY_S", 0.001)
    monkeypatch.setattr(replay_server, "ALIVE_EVERY_S", 0.001)
    shown = ReplayServer(written(tmp_path / "trace"))

    async def look(*where: str) -> list[tuple[str, Any]]:
        seen: list[tuple[str, Any]] = []
        async with asyncio.timeout(20):
            async for said in shown.play(*where):
                if said.startswith(b":"):
                    return seen
                name, data = said.decode().strip().split("\n")
                seen.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        raise AssertionError("it ends by itself")

    async def scenario() -> None:
        ((name, view),) = await look("3000", "0")
        assert (name, view["replay"]) == ("snapshot", {"at_s": 3.0, "seconds": 6.0, "speed": 0.0, "file": "trace"})
        assert view["members"][ME]["holds"][DIGEST]["fraction"] == 0.5
        (first, _), *patches = await look("1000", "100")
        assert first == "snapshot"
        assert {name for name, _ in patches} == {"patch"}
        assert patches[-1][1]["replay"]["at_s"] == 6.0

    asyncio.run(scenario())


def test_is_what_is_no_trace_named(tmp_path: Path) -> None:
    (tmp_path / "no").write_text('{"event": "Opened", "at_s": 1.0, "subject": "node"}\n')
    for path, why in ((tmp_path / "no", "no trace"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(StoreError, match=why):
            ReplayServer(path)
    assert main(["replay", str(tmp_path / "none"), "--web"]) != 0
