"""Are claims of many peers kept once, and is what they can fill bounded?"""

from __future__ import annotations

from swarm.content.manifest import Digests
from swarm.protocol.messages import NodeId
from swarm.transfer.offers import ALTERNATIVES_MAX, Claim, Offers

CHUNKS = 4
A, B = NodeId("a" * 16), NodeId("b" * 16)


def claim(number: int, reader: NodeId = A) -> Claim:
    return Claim(Digests(bytes([number]) * 16, bytes([number]) * 32), reader)


def peers(count: int) -> list[NodeId]:
    return [NodeId(f"{number:016x}") for number in range(count)]


def test_equal_claims_are_kept_once() -> None:
    offers = Offers(CHUNKS)
    for peer in peers(64):
        assert all(offers.put(peer, chunk, claim(chunk)) for chunk in range(CHUNKS))
    assert len(offers) == CHUNKS
    assert all(offers.get(peer, 3) == claim(3) for peer in peers(64))
    assert offers.get(A, 3) is None
    assert repr(offers) == "<Offers 4 claims of 4 chunks by 64 peers>"


def test_a_later_claim_replaces_an_earlier_one() -> None:
    offers = Offers(CHUNKS)
    offers.put(A, 0, claim(1))
    offers.put(A, 0, claim(2))
    assert offers.get(A, 0) == claim(2)
    assert list(offers.of(0)) == [(A, claim(2))]


def test_claims_that_differ_have_a_bound_for_each_chunk() -> None:
    offers = Offers(CHUNKS)
    crowd = peers(ALTERNATIVES_MAX + 3)
    room = [offers.put(peer, 0, claim(number)) for number, peer in enumerate(crowd)]
    assert room == [True] * ALTERNATIVES_MAX + [False] * 3
    assert len(offers) == ALTERNATIVES_MAX
    assert offers.get(crowd[-1], 0) is None
    assert offers.put(crowd[-1], 0, claim(0)), "it agrees with another peer"


def test_peers_that_come_and_go_keep_no_place() -> None:
    offers = Offers(CHUNKS)
    for number, peer in enumerate(peers(200)):
        offers.put(peer, 0, claim(number))
        offers.left(peer)
    assert len(offers) == ALTERNATIVES_MAX
    assert offers.put(B, 0, claim(255))
    assert list(offers.of(0)) == [(B, claim(255))]


def test_a_peer_that_changes_its_claim_again_and_again_keeps_no_more_than_all() -> None:
    offers = Offers(CHUNKS)
    offers.put(B, 0, claim(7))
    for number in range(200):
        assert offers.put(A, 0, claim(number))
    assert len(offers) == ALTERNATIVES_MAX
    assert offers.get(B, 0) == claim(7)
    assert offers.get(A, 0) == claim(199)


def test_claims_of_settled_chunks_are_forgotten() -> None:
    offers = Offers(CHUNKS)
    for chunk in range(CHUNKS):
        offers.put(A, chunk, claim(chunk))
    offers.drop(A, 3)
    offers.settle(range(2))
    assert [offers.get(A, chunk) for chunk in range(CHUNKS)] == [None, None, claim(2), None]
    assert offers.put(A, 0, claim(9))
