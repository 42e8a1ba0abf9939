"""Which claims are believed, who is banned for a wrong one, and what is read again?"""

from __future__ import annotations

import random

import pytest

from swarm.content.manifest import Digests, Manifest
from swarm.content.promise import ListedFile, Listing, promise
from swarm.protocol.messages import NodeId
from swarm.transfer import claims
from swarm.transfer.claims import RELAYED_MAX, BanClaimant, ClaimRun, Claims

OWN, A, B, C = (NodeId(letter * 16) for letter in "0abc")
CHUNKS = 16  # of file 0; file 1 has two


def manifest(content: str, second: str) -> Manifest:
    return promise(Listing("o", "", (ListedFile("a", CHUNKS << 18, content), ListedFile("b", 2 << 18, second))))


def right(chunk: int) -> Digests:
    return Digests(bytes([chunk]) * 16, bytes([chunk]) * 32)


def wrong(chunk: int) -> Digests:
    """A second preimage of XXH3: only BLAKE3 tells the difference."""
    return Digests(bytes([chunk]) * 16, bytes([chunk, 255]) * 16)


def run(reader: NodeId, *chunks: int, lies: tuple[int, ...] = ()) -> list[ClaimRun]:
    return [ClaimRun(chunk, reader, (wrong(chunk) if chunk in lies else right(chunk),)) for chunk in chunks]


class Fetch:
    """Claims of one node; every step is checked."""

    def __init__(self, content: str = "sha256:" + "a" * 64, second: str = "sha256:" + "b" * 64) -> None:
        self.claims = Claims(manifest(content, second), node=OWN, rng=random.Random(0))

    def takes(self, peer: NodeId, runs: list[ClaimRun]) -> list[BanClaimant]:
        """A peer claims chunks, and sends them as it claims them."""
        usable, bans = self.claims.told(peer, runs)
        for chunk in usable:
            digests = self.claims.expected(peer, chunk)
            assert digests is not None
            self.claims.landed(chunk, digests, peer)
        self.claims.check()
        return bans

    def reads(self, *chunks: int) -> None:
        for chunk in chunks:
            self.claims.read(chunk, right(chunk))
        self.claims.check()

    def is_right(self, file: int = 0) -> bool:
        first, end = self.claims.manifest.first_chunks[file : file + 2]
        return all(self.claims.claim(chunk).digests == right(chunk) for chunk in range(first, end))

    def settles(self, file: int = 0) -> tuple[int, list[BanClaimant]]:
        """Reads again until the file is right; returns the chunks read, and the bans."""
        count = 0
        while not self.is_right(file):
            again = self.claims.disproved(file)
            assert again, "nothing is left to read, and the file is still wrong"
            assert self.claims.must_read >= set(again)
            self.reads(*again)
            count += len(again)
        assert not self.claims.must_read
        return count, self.claims.proved(file)


def test_is_a_chunk_believed_as_its_sender_claims_it() -> None:
    fetch = Fetch()
    fetch.takes(A, run(A, 3))
    assert fetch.claims.expected(A, 3) == right(3)
    assert fetch.claims.expected(A, 4) is None
    assert fetch.claims.expected(B, 3) is None


def test_do_claims_pass_on_with_the_name_of_their_reader() -> None:
    fetch = Fetch()
    fetch.takes(A, run(B, 0, 1))
    fetch.takes(A, run(A, 2))
    fetch.reads(3, 5)
    expected = [
        ClaimRun(0, B, (right(0), right(1))), ClaimRun(2, A, (right(2),)), ClaimRun(3, OWN, (right(3),)),
        ClaimRun(5, OWN, (right(5),)),
    ]  # fmt: skip
    assert list(fetch.claims.runs(range(CHUNKS))) == expected


def test_is_no_peer_banned_for_right_claims() -> None:
    fetch = Fetch()
    assert fetch.takes(A, run(A, *range(8))) == []
    assert fetch.takes(B, run(C, *range(8, 16))) == []
    assert fetch.claims.proved(0) == []
    assert fetch.takes(C, run(C, *range(8, 16))) == []


@pytest.mark.parametrize("lies", [(3,), tuple(range(8)), (0, 7)])
def test_is_a_liar_banned_and_its_chunks_read_again(lies: tuple[int, ...]) -> None:
    fetch = Fetch()
    fetch.takes(A, run(A, *range(8), lies=lies))
    fetch.takes(B, run(B, *range(8, 16)))
    read, bans = fetch.settles()
    assert [ban.peer for ban in bans] == [A]
    assert read <= CHUNKS
    assert fetch.claims.told(A, run(A, 16)) == ([], []), "nothing more is taken from it"


def test_are_few_chunks_read_again_for_a_liar_that_always_lies() -> None:
    fetch = Fetch()
    fetch.takes(A, run(A, 0, 1, lies=(0, 1)))
    fetch.takes(B, run(B, *range(2, 9)))
    fetch.takes(C, run(C, *range(9, 16)))
    read, _ = fetch.settles()
    assert read <= 4, "one of each reader, and the other one of the liar"


def test_are_disputed_chunks_read_again_first() -> None:
    fetch = Fetch()
    fetch.takes(A, run(A, *range(16), lies=(9,)))
    fetch.claims.told(B, run(B, 9))
    assert 9 in fetch.claims.disproved(0)


def test_is_an_honest_relay_not_banned_and_the_reader_distrusted() -> None:
    fetch = Fetch()
    fetch.takes(A, run(B, *range(8), lies=(0, 1, 2)))
    fetch.reads(*range(8, 16))
    _, bans = fetch.settles()
    assert bans == []
    assert fetch.claims.told(A, run(B, 16))[0] == [], "what the reader claims is not believed any more"
    assert fetch.claims.told(A, run(A, 17))[0] == [17]


def test_is_a_relay_banned_that_names_a_new_reader_for_each_lie() -> None:
    fetch = Fetch()
    fetch.reads(*range(16))
    fetch.claims.proved(0)
    bans = [
        ban for n in range(RELAYED_MAX) for ban in fetch.takes(A, run(NodeId(f"{n + 1:016x}"), n, lies=(n,)))
    ]  # fmt: skip
    assert [ban.peer for ban in bans] == [A]


def test_is_a_late_lie_about_a_proven_file_seen_at_once() -> None:
    fetch = Fetch()
    fetch.reads(*range(16))
    fetch.claims.proved(0)
    assert [ban.peer for ban in fetch.takes(A, run(A, 3, lies=(3,)))] == [A]


def test_is_a_correction_in_time_no_lie() -> None:
    fetch = Fetch()
    fetch.claims.told(A, run(A, 3, lies=(3,)))
    fetch.claims.told(A, run(A, 3))
    fetch.reads(*range(16))
    assert fetch.claims.proved(0) == []


def test_are_own_chunks_read_again_last_and_then_nothing() -> None:
    fetch = Fetch()
    for chunk in range(16):
        fetch.claims.read(chunk, wrong(chunk))  # the origin itself sent other bytes
    assert fetch.settles() == (16, [])
    stubborn = Fetch()
    for chunk in range(16):
        stubborn.claims.read(chunk, wrong(chunk))
    again = stubborn.claims.disproved(0)
    for chunk in again:
        stubborn.claims.read(chunk, wrong(chunk))
    assert stubborn.claims.disproved(0) == [], "the origin does not have what it lists"


def test_is_a_sample_read_again_without_a_hash() -> None:
    fetch = Fetch('etag:"1"')
    assert fetch.claims.is_weak(0)
    fetch.takes(A, run(A, *range(8)))
    fetch.takes(B, run(B, *range(8, 16)))
    sample = fetch.claims.sample(0)
    assert {chunk // 8 for chunk in sample} == {0, 1}, "one of each reader at least"
    fetch.reads(*sample)
    assert fetch.claims.sample(0) == []
    assert fetch.claims.proved(0) == []


def test_is_a_liar_found_by_the_sample() -> None:
    fetch = Fetch('etag:"1"')
    fetch.takes(A, run(A, *range(8), lies=tuple(range(8))))
    fetch.takes(B, run(B, *range(8, 16)))
    while again := fetch.claims.sample(0):
        fetch.reads(*again)
    assert fetch.is_right()
    assert [ban.peer for ban in fetch.claims.proved(0)] == [A]


@pytest.mark.parametrize("relay", [A, B], ids=["reader", "relay"])
@pytest.mark.parametrize("second", ['etag:"2"', "sha256:" + "b" * 64], ids=["sampled", "hashed"])
def test_does_a_sampled_file_count_no_more_when_its_reader_lied_elsewhere(second: str, relay: NodeId) -> None:
    fetch = Fetch('etag:"1"', second)
    fetch.takes(relay, run(A, *range(8), lies=(3,)))
    fetch.takes(C, run(C, *range(8, 16)))
    while again := fetch.claims.sample(0):
        fetch.reads(*(chunk for chunk in again if chunk != 3))
        fetch.claims.must_read.discard(3)  # the sample has missed it
    fetch.claims.proved(0)
    assert fetch.claims.reopen() == []
    fetch.takes(relay, run(A, 16, 17, lies=(16, 17)))
    if fetch.claims.is_weak(1):
        while again := fetch.claims.sample(1):
            fetch.reads(*again)
        fetch.claims.proved(1)
    else:
        fetch.settles(1)
    assert 3 in fetch.claims.reopen()
    assert fetch.claims.proven == {1}
    fetch.reads(*fetch.claims.must_read)
    while again := fetch.claims.sample(0):
        fetch.reads(*again)
    fetch.claims.proved(0)
    assert fetch.is_right()
    assert fetch.claims.reopen() == []
    assert fetch.claims.proven == {0, 1}


def test_are_chunks_of_a_known_liar_part_of_the_sample() -> None:
    fetch = Fetch('etag:"1"')
    fetch.takes(A, run(A, 16, 17, lies=(16,)))
    fetch.takes(A, run(A, *range(8), lies=(3,)))
    fetch.takes(B, run(B, *range(8, 16)))
    fetch.settles(1)
    assert set(range(8)) <= set(fetch.claims.sample(0))


@pytest.mark.parametrize("seed", range(200))
def test_does_every_file_get_right_whoever_lies(seed: int) -> None:
    dice = random.Random(seed)
    fetch = Fetch()
    nodes = [NodeId(f"{n:016x}") for n in range(1, 6)]
    liars = set(dice.sample(nodes, dice.randrange(4)))
    for chunk in range(CHUNKS):
        reader, via = dice.choice(nodes), dice.choice(nodes)
        if dice.random() < 0.2:
            fetch.reads(chunk)
            continue
        lies = (chunk,) if reader in liars and dice.random() < 0.5 else ()
        fetch.takes(via, run(reader, chunk, lies=lies))
        if chunk not in fetch.claims.offered(via, [chunk]):
            fetch.reads(chunk)
    _, bans = fetch.settles()
    assert {ban.peer for ban in bans} <= liars | {
        node for node in nodes if len(fetch.claims._relayed.get(node, ())) >= RELAYED_MAX
    }
    assert fetch.is_right()


def test_are_claims_of_proven_files_judged_and_not_kept() -> None:
    fetch = Fetch()
    fetch.takes(A, run(A, *range(CHUNKS + 2)))
    fetch.reads(*range(CHUNKS))
    assert fetch.claims.proved(0) == []
    assert len(fetch.claims._offers) == 2, "of the other file"
    assert fetch.takes(B, run(B, *range(CHUNKS))) == []
    assert len(fetch.claims._offers) == 2
    assert fetch.claims.expected(C, 3) == right(3), "what is proven needs no claim"
    assert fetch.claims.offered(C, [3, CHUNKS]) == [3]


def test_are_liars_under_ever_new_ids_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "CULPRITS_MAX", 8)
    fetch = Fetch()
    fetch.reads(*range(CHUNKS))
    fetch.claims.proved(0)
    for number in range(100):
        peer, reader = (NodeId(f"{digit}{number:015x}") for digit in "de")
        fetch.takes(peer, run(reader, 1, lies=(1,)))
        [ban] = fetch.takes(peer, run(peer, 1, lies=(1,)))
        assert ban.peer == peer
        fetch.claims.left(peer)
    known = fetch.claims.banned, fetch.claims._relayed, fetch.claims._distrusted
    assert [len(each) for each in known] == [8, 8, 8]
    assert len(fetch.claims._offers) == 0
