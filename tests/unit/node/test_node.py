"""A node: has every message its handler, does a fetch end whole or with its cause, and what is left when it closes?"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any, get_args

import pytest
from sim import clock
from sim.content import BytesStore, Changed, Content
from sim.network import Fabric

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import ModelId
from swarm.errors import FetchTimeout, LocalProtocolError, SettingsError, SourceChanged, Stalled, SwarmError
from swarm.journal import FetchEnded, FetchStarted
from swarm.node.node import Node
from swarm.protocol import messages
from swarm.protocol.messages import AnyMessage, Bye, Hello

MODEL = ModelId("org/model")
CONTENT = Content.random(0, chunks=16, chunk_bytes=64)
RATE = 64 * 40.0


class Swarm:
    """Nodes on a simulated network; each knows those before it."""

    def __init__(self) -> None:
        self.fabric = Fabric(slice_bytes=64)
        self.nodes: dict[str, Node] = {}

    async def node(self, name: str, **options: Any) -> Node:
        environment = self.fabric.add(
            name, up_bytes_per_s=RATE, down_bytes_per_s=RATE, delay_s=0.001, known=tuple(self.nodes)
        )
        node = self.nodes[name] = Node(environment, name=name, host=name, rng=random.Random(name), **options)
        await node.open()
        return node

    async def until(self, true: Callable[[], object]) -> None:
        while not true():  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.01)


def play(scenario: Callable[[Swarm], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        swarm = Swarm()
        try:
            await scenario(swarm)
        finally:
            for node in swarm.nodes.values():
                await node.close()

    clock.run(main(), limit_s=600.0)


def whole() -> BytesStore:
    return BytesStore(CONTENT.manifest, CONTENT.files)


def test_has_every_message_but_hello_and_bye_a_handler() -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("one")
        handlers = node._connections._handlers
        assert set(handlers) == set(get_args(AnyMessage)) - {Hello, Bye}

    play(scenario)


def test_is_an_artifact_fetched_from_a_peer_and_served_on() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, newcomer = await swarm.node("seed"), await swarm.node("newcomer")
        seed.serve(MODEL, whole())
        store = BytesStore(CONTENT.manifest)
        fetched = await newcomer.fetch(MODEL, store)
        assert [bytes(file) for file in store.files] == list(CONTENT.files)
        assert fetched.sources == {"seed": CONTENT.manifest.size}
        assert fetched.transports == ("inproc",)
        assert newcomer._fetches._transfers == {}, "no transfer is left"
        last = await swarm.node("last")
        seed.release(CONTENT.manifest.digest)
        assert (await last.fetch(MODEL, BytesStore(CONTENT.manifest))).sources == {"newcomer": CONTENT.manifest.size}

    play(scenario)


def test_do_two_fetches_of_one_content_transfer_it_once() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, newcomer = await swarm.node("seed"), await swarm.node("newcomer")
        seed.serve(MODEL, whole())
        stores = [BytesStore(CONTENT.manifest) for _ in range(2)]
        first, second = await asyncio.gather(*(newcomer.fetch(MODEL, store) for store in stores))
        assert {**first.sources, **second.sources} == {
            "seed": CONTENT.manifest.size,
            "newcomer": CONTENT.manifest.size,
        }
        for store in stores:
            assert [bytes(file) for file in store.files] == list(CONTENT.files)

    play(scenario)


def test_does_a_fetch_go_on_with_peers_when_the_own_copy_has_changed() -> None:
    """It is withdrawn at once, and nobody gets it from here any more."""

    async def scenario(swarm: Swarm) -> None:
        seed, node = await swarm.node("seed"), await swarm.node("node")
        seed.serve(MODEL, whole())
        node.serve(MODEL, Changed(whole(), first=5))
        await swarm.until(lambda: node.holders_of(CONTENT.manifest.digest))
        store = BytesStore(CONTENT.manifest)
        fetched = await node.fetch(MODEL, store)
        assert [bytes(file) for file in store.files] == list(CONTENT.files)
        assert fetched.sources == {"node": bytes_of(part(*range(5))), "seed": bytes_of(part(*range(5, 16)))}
        assert node.holdings()[CONTENT.manifest.digest].complete, "what was fetched is served"

    play(scenario)


def test_does_a_fetch_fail_at_once_that_only_a_changed_copy_could_feed() -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("node")
        node.serve(MODEL, Changed(whole(), first=5))
        with pytest.raises(SourceChanged, match="it was written to"):
            await node.fetch(MODEL, BytesStore(CONTENT.manifest))
        assert node.holdings() == {}
        assert [lost.digest for lost in node.lost] == [CONTENT.manifest.digest]

    play(scenario)


def part(*chunks: int) -> Bitfield:
    return Bitfield(len(CONTENT.manifest.chunks), chunks)


def bytes_of(wanted: Bitfield) -> int:
    return sum(CONTENT.manifest.chunks[index].size for index in wanted)


def test_does_a_fetch_of_a_part_transfer_that_part_and_serve_it() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, one, two = [await swarm.node(name) for name in ("seed", "one", "two")]
        seed.serve(MODEL, whole())
        fetched = await one.fetch(MODEL, BytesStore(CONTENT.manifest), wanted=part(2, 3, 9))
        assert fetched.bytes == sum(fetched.sources.values()) == bytes_of(part(2, 3, 9))
        seed.release(CONTENT.manifest.digest)
        again = await two.fetch(MODEL, BytesStore(CONTENT.manifest), wanted=part(3, 9))
        assert again.sources == {"one": bytes_of(part(3, 9))}
        with pytest.raises(Stalled, match="1 of 3 chunks"):
            await two.fetch(MODEL, BytesStore(CONTENT.manifest), wanted=part(2, 3, 4))
        assert list(two.holdings()[CONTENT.manifest.digest]) == [3, 9], "what it had is served on"

    play(scenario)


def test_does_a_second_part_fetch_what_is_missing_and_both_are_served() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, node, last = [await swarm.node(name) for name in ("seed", "node", "last")]
        seed.serve(MODEL, whole())
        await node.fetch(MODEL, BytesStore(CONTENT.manifest), wanted=part(2, 3))
        fetched = await node.fetch(MODEL, BytesStore(CONTENT.manifest), wanted=part(3, 4))
        assert fetched.sources == {"node": bytes_of(part(3)), "seed": bytes_of(part(4))}
        node.release(CONTENT.manifest.digest)
        await swarm.until(lambda: (w := next(iter(last.peers[node.id].artifacts.values())).wanted) and w.chunks == 3)
        seed.release(CONTENT.manifest.digest)
        assert (await last.fetch(MODEL, BytesStore(CONTENT.manifest), wanted=part(2, 3, 4))).sources == {
            "node": bytes_of(part(2, 3, 4))
        }

    play(scenario)


def test_does_a_fetch_of_all_go_on_from_a_part_and_serve_all() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, node, last = [await swarm.node(name) for name in ("seed", "node", "last")]
        seed.serve(MODEL, whole())
        some, all_ = part(0, 5, 6), part(*range(len(CONTENT.manifest.chunks)))
        await node.fetch(MODEL, BytesStore(CONTENT.manifest), wanted=some)
        store = BytesStore(CONTENT.manifest)
        fetched = await node.fetch(MODEL, store)
        assert fetched.sources == {"node": bytes_of(some), "seed": bytes_of(all_.minus(some))}
        assert [bytes(file) for file in store.files] == list(CONTENT.files)
        seed.release(CONTENT.manifest.digest)
        assert (await last.fetch(MODEL, BytesStore(CONTENT.manifest))).sources == {"node": CONTENT.manifest.size}

    play(scenario)


def test_do_two_parts_of_one_content_at_once_both_arrive() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, node = await swarm.node("seed"), await swarm.node("node")
        seed.serve(MODEL, whole())
        parts = part(1, 2, 3), part(3, 4, 5), part(5, 6)
        found = await asyncio.gather(
            *(node.fetch(MODEL, BytesStore(CONTENT.manifest), wanted=wanted) for wanted in parts)
        )
        assert [fetched.bytes for fetched in found] == [bytes_of(wanted) for wanted in parts]
        assert sum(fetched.sources.get("seed", 0) for fetched in found) == bytes_of(part(1, 2, 3, 4, 5, 6))

    play(scenario)


def test_is_a_grant_without_a_transfer_ignored() -> None:
    async def scenario(swarm: Swarm) -> None:
        one, two = await swarm.node("one"), await swarm.node("two")
        await swarm.until(lambda: one.peers and two.peers)
        one.peers[two.id].post(messages.Grant(7, 0, (1,)))
        one.peers[two.id].post(messages.Refuse(7, "busy", 1.0))
        one.peers[two.id].post(messages.Cancel(7))
        await asyncio.sleep(0.1)
        assert one.id in two.peers
        assert one.tried() == ["two at two serves nothing"]

    play(scenario)


def test_does_a_fetch_without_a_source_stall_or_end_in_time() -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("alone", stall_timeout_s=2.0)
        with pytest.raises(Stalled, match="16 of 16 chunks are missing"):
            await node.fetch(MODEL, BytesStore(CONTENT.manifest))
        with pytest.raises(FetchTimeout, match="0% complete"):
            await node.fetch(MODEL, BytesStore(CONTENT.manifest), timeout_s=1.0)
        events = [e.event for e in node.journal if isinstance(e.event, FetchStarted | FetchEnded)]
        assert [type(event) for event in events] == [FetchStarted, FetchEnded] * 2
        assert node.holdings() == {}
        assert not node._wanted

    play(scenario)


def test_is_a_fetch_told_that_its_node_closes() -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("alone")
        fetching = asyncio.create_task(node.fetch(MODEL, BytesStore(CONTENT.manifest)))
        await swarm.until(node.holdings)
        await node.close()
        with pytest.raises(SwarmError, match="the node was closed"):
            await fetching

    play(scenario)


def test_does_a_task_that_fails_fail_the_fetches(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ZeroDivisionError("a bug")

    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("alone")
        fetching = asyncio.create_task(node.fetch(MODEL, BytesStore(CONTENT.manifest)))
        await swarm.until(node.holdings)
        node.spawn(fail(), "what fails")
        with pytest.raises(LocalProtocolError, match=r"what fails failed: .*a bug.*please report this"):
            await fetching

    with caplog.at_level(logging.ERROR):
        play(scenario)
    assert caplog.messages == ["swarm: what fails failed"]


def test_who_holds_what_by_links_and_by_gossip() -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, newcomer = await swarm.node("seed"), await swarm.node("newcomer")
        seed.serve(MODEL, whole())
        digest = CONTENT.manifest.digest
        await swarm.until(lambda: newcomer.holders(MODEL) and newcomer.peers)
        ((found, (holder,)),) = newcomer.holders(MODEL).items()
        assert (found, holder.node, holder.name) == (digest, seed.id, "seed")
        assert holder.peer is newcomer.peers[seed.id]
        assert newcomer.holders_of(digest) == [holder]
        assert newcomer.tried() == [f"seed at seed serves org/model ({digest[:16]})"]
        assert seed.holders(MODEL) == {digest: []}, "only this node"
        assert seed.described(digest) == (CONTENT.manifest, None)
        with pytest.raises(SettingsError, match="is offered as"):
            seed.serve(ModelId("org/other"), whole())

    play(scenario)


def test_are_links_wanted_while_something_is_sought_only() -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("one")
        digest = CONTENT.manifest.digest
        with node.seeking(digest), node.seeking(digest), node.seeking(None):
            assert dict(node._wanted) == {digest: 2, None: 1}
            wanted = node._connections.machine._wanted
            assert (wanted.digests, wanted.unresolved) == (frozenset({digest}), True)
        wanted = node._connections.machine._wanted
        assert (wanted.digests, wanted.unresolved) == (frozenset(), False)

    play(scenario)


def test_is_a_node_ready_once_all_that_was_asked_for_is_there() -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("a")
        assert node.unready == []
        with node.asked_for("org/model", "is being fetched"), node.asked_for("org/model", "is being fetched"):
            assert node.unready == ["org/model: is being fetched"]
        assert node.unready == []
        await node.drain(0.0)
        assert node.unready == ["it is being stopped"]
        assert node.broken == []

    play(scenario)


def test_is_a_node_broken_whose_loop_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("a")
        monkeypatch.setattr(node, "_update_mates", lambda: 1 / 0)
        await swarm.until(lambda: node.broken)
        assert node.broken == node.unready
        assert "ticks failed: ZeroDivisionError" in node.broken[0]

    play(scenario)


def test_does_a_failed_task_of_a_peer_leave_the_node_alive() -> None:
    async def scenario(swarm: Swarm) -> None:
        node = await swarm.node("a")

        async def fail() -> None:
            raise ValueError

        task = node.spawn(fail(), "a test")
        await swarm.until(task.done)
        assert node.broken == []

    play(scenario)
