"""Does every datagram open once, for members alone, and does nothing else ever open?"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import LocalProtocolError
from swarm.protocol import packets
from swarm.protocol.messages import NodeId
from swarm.protocol.packets import DATAGRAM_BYTES_MAX as PACKET_BYTES_MAX
from swarm.security import datagram_seal
from swarm.security.datagram_seal import (
    AGE_MAX_S,
    HEAD_BYTES,
    MAGIC,
    OVERHEAD_BYTES,
    SEALED_BYTES_MAX,
    STREAMS_MAX,
    WINDOW_MAX,
    Opener,
    Sealer,
    SealKey,
    Unopened,
)

NOW = 1_800_000_000.0
ONE, TWO, THREE = (SealKey(bytes([n]) * 4, bytes([n]) * 32) for n in (1, 2, 3))


def random_bytes(seed: int = 0) -> Callable[[int], bytes]:
    return random.Random(seed).randbytes


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(ONE, random_bytes())


@pytest.fixture
def opener() -> Iterator[Opener]:
    opener = Opener([ONE])
    yield opener
    opener.check()


@given(st.binary(max_size=PACKET_BYTES_MAX))
def test_what_was_sealed_opens_once(packet: bytes) -> None:
    datagram, opener = Sealer(ONE, random_bytes()).seal(packet, NOW), Opener([ONE])
    assert len(datagram) == len(packet) + OVERHEAD_BYTES <= SEALED_BYTES_MAX == 1400
    assert opener.open(datagram, NOW) == packet
    assert opener.open(datagram, NOW) is Unopened.REPLAYED
    assert opener.open(datagram, NOW + AGE_MAX_S - 1) is Unopened.REPLAYED
    opener.check()


def test_does_every_packet_of_gossip_fit() -> None:
    most = packets.PACKET_HEAD_BYTES + packets.RECORD_BYTES_MAX
    assert max(most, packets.SYNC_BYTES) <= PACKET_BYTES_MAX


def test_a_packet_too_long_is_a_bug_here(sealer: Sealer) -> None:
    with pytest.raises(LocalProtocolError):
        sealer.seal(bytes(PACKET_BYTES_MAX + 1), NOW)


def test_is_nothing_readable_and_nothing_the_same_twice(sealer: Sealer) -> None:
    first, second = (sealer.seal(b"org/secret-model", NOW) for _ in range(2))
    assert b"secret" not in first
    assert first[HEAD_BYTES:] != second[HEAD_BYTES:]


def test_do_two_processes_never_share_a_key_and_a_nonce() -> None:
    one, two = (Sealer(ONE, random_bytes(seed)).seal(b"same", NOW) for seed in (1, 2))
    assert one[HEAD_BYTES - 8 : HEAD_BYTES] == two[HEAD_BYTES - 8 : HEAD_BYTES]
    assert one[HEAD_BYTES:] != two[HEAD_BYTES:]


@given(st.binary(max_size=40), st.integers(0, 8 * (40 + OVERHEAD_BYTES) - 1))
def test_does_a_flipped_bit_anywhere_close_it(packet: bytes, bit: int) -> None:
    datagram = bytearray(Sealer(ONE, random_bytes()).seal(packet, NOW))
    datagram[bit // 8 % len(datagram)] ^= 1 << bit % 8
    opener = Opener([ONE])
    assert isinstance(opener.open(bytes(datagram), NOW), Unopened)
    assert len(opener._streams) == 0  # strangers take no memory


@given(st.data())
def test_is_what_is_cut_or_padded_refused(data: st.DataObject) -> None:
    datagram = Sealer(ONE, random_bytes()).seal(b"packet", NOW)
    opener = Opener([ONE])
    for other in (
        datagram[: data.draw(st.integers(0, len(datagram) - 1))],
        datagram + data.draw(st.binary(min_size=1)),
    ):
        assert isinstance(opener.open(other, NOW), Unopened)
    assert opener.open(datagram, NOW) == b"packet"


@given(st.binary(max_size=1500))
def test_does_garbage_never_open_and_never_raise(garbage: bytes) -> None:
    for datagram in (garbage, MAGIC + garbage, MAGIC + ONE.hint + garbage):
        assert isinstance(Opener([ONE]).open(datagram, NOW), Unopened)


def test_is_a_datagram_without_a_seal_named_as_such(opener: Opener) -> None:
    plain = packets.encode(packets.Ack(1, NodeId("0" * 16), ()))
    assert opener.open(plain, NOW) is Unopened.PLAINTEXT
    with pytest.raises(ValueError, match="not gossip"):
        packets.decode(Sealer(ONE, random_bytes()).seal(plain, NOW))


@given(st.permutations(range(WINDOW_MAX)))
def test_may_datagrams_overtake_each_other_within_the_window(order: list[int]) -> None:
    sealer, opener = Sealer(ONE, random_bytes()), Opener([ONE])
    datagrams = [sealer.seal(bytes([n]), NOW) for n in range(WINDOW_MAX)]
    assert [opener.open(datagrams[n], NOW) for n in order] == [bytes([n]) for n in order]
    assert {opener.open(datagram, NOW) for datagram in datagrams} == {Unopened.REPLAYED}
    opener.check()


def test_is_what_comes_after_a_whole_window_refused(sealer: Sealer, opener: Opener) -> None:
    late, *others = [sealer.seal(b"", NOW) for _ in range(WINDOW_MAX + 2)]
    assert all(opener.open(datagram, NOW) == b"" for datagram in others)
    assert opener.open(late, NOW) is Unopened.REPLAYED


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400), st.floats(0, 60)), max_size=60))
def test_is_nothing_ever_opened_twice(events: list[tuple[int, int, float]]) -> None:
    """Four processes send, and everything ever sent is played again at any time."""
    sealers, opener = [Sealer(ONE, random_bytes(n)) for n in range(4)], Opener([ONE])
    sent: list[bytes] = []
    opened: list[bytes] = []
    now = NOW
    for who, which, wait_s in events:
        now += wait_s
        sent.append(sealers[who].seal(len(sent).to_bytes(2, "big"), now))
        for datagram in (sent[which % len(sent)], sent[-1]):
            packet = opener.open(datagram, now)
            if isinstance(packet, bytes):
                opened.append(packet)
        opener.check()
    assert len(opened) == len(set(opened)) == len(sent)


@pytest.mark.parametrize("off_s", [-AGE_MAX_S - 1, AGE_MAX_S + 1])
def test_must_clocks_agree(sealer: Sealer, opener: Opener, off_s: float) -> None:
    assert opener.open(sealer.seal(b"", NOW + off_s), NOW) is Unopened.CLOCK
    assert opener.open(sealer.seal(b"", NOW + off_s * 0.9), NOW) == b""


@given(st.lists(st.floats(-3600, 3600), max_size=20))
def test_does_a_sealer_whose_clock_jumps_stay_heard(jumps: list[float]) -> None:
    """Both clocks jump alike; the numbers of one stream ascend, and a jump back begins another one."""
    sealer, opener, now = Sealer(ONE, random_bytes()), Opener([ONE]), NOW
    numbers: dict[bytes, list[bytes]] = {}
    for jump_s in (0.0, *jumps):
        now += jump_s
        for _ in range(3):
            datagram = sealer.seal(b"", now)
            numbers.setdefault(datagram[8:16], []).append(datagram[16:24])
            assert opener.open(datagram, now) == b""
    for those in numbers.values():
        assert all(a < b for a, b in itertools.pairwise(those))


def test_rotation_keeps_members_in_touch_and_ends_with_the_old_key_shut_out() -> None:
    old, both, swapped, new = [ONE], [ONE, TWO], [TWO, ONE], [TWO]
    for ours, theirs in itertools.pairwise([old, both, swapped, new]):
        for keys, others in ((ours, theirs), (theirs, ours)):
            assert Opener(others).open(Sealer(keys[0], random_bytes()).seal(b"x", NOW), NOW) == b"x"
    assert Opener(new).open(Sealer(ONE, random_bytes()).seal(b"x", NOW), NOW) is Unopened.OTHER_KEY
    assert Opener(both).open(Sealer(THREE, random_bytes()).seal(b"x", NOW), NOW) is Unopened.OTHER_KEY


def test_is_another_key_that_looks_the_same_no_key(opener: Opener) -> None:
    twin = SealKey(ONE.hint, TWO.secret)
    assert opener.open(Sealer(twin, random_bytes()).seal(b"x", NOW), NOW) is Unopened.FORGED


def test_is_memory_bounded_and_the_silent_forgotten(monkeypatch: pytest.MonkeyPatch, opener: Opener) -> None:
    monkeypatch.setattr(datagram_seal, "STREAMS_MAX", 8)
    many = [Sealer(ONE, random_bytes(n)) for n in range(9)]
    first = [sealer.seal(b"", NOW) for sealer in many]
    results = [opener.open(datagram, NOW) for datagram in first]
    assert results == [b""] * 8 + [Unopened.CROWDED]
    assert opener.open(many[0].seal(b"", NOW), NOW) == b""  # whoever is known goes on
    assert opener.open(many[0].seal(b"", NOW + AGE_MAX_S), NOW + AGE_MAX_S) == b""
    later = NOW + 2 * AGE_MAX_S + 1
    assert opener.open(many[8].seal(b"", later), later) == b""
    assert len(opener._streams) == 2  # the others are forgotten; what they sent is too old now
    assert {opener.open(datagram, later) for datagram in first} == {Unopened.CLOCK}


def test_streams_of_the_future_do_not_keep_old_ones_in_memory(monkeypatch: pytest.MonkeyPatch, opener: Opener) -> None:
    monkeypatch.setattr(datagram_seal, "STREAMS_MAX", 4)
    ahead = NOW + 30 * 3600.0  # the clocks of this node and of a member were wrong
    early = Sealer(ONE, random_bytes(0)).seal(b"x", ahead)
    assert opener.open(early, ahead) == b"x"
    for number in range(1, 4):
        assert opener.open(Sealer(ONE, random_bytes(number)).seal(b"x", NOW), NOW) == b"x"
    later = NOW + 2 * AGE_MAX_S + 1
    assert opener.open(Sealer(ONE, random_bytes(4)).seal(b"x", later), later) == b"x"
    assert opener.open(early, ahead) is Unopened.REPLAYED


def test_does_a_forger_take_no_place(monkeypatch: pytest.MonkeyPatch, sealer: Sealer, opener: Opener) -> None:
    monkeypatch.setattr(datagram_seal, "STREAMS_MAX", 1)
    forged = [Sealer(SealKey(ONE.hint, TWO.secret), random_bytes(n)).seal(b"", NOW) for n in range(STREAMS_MAX)]
    assert {opener.open(datagram, NOW) for datagram in forged} == {Unopened.FORGED}
    assert opener.open(sealer.seal(b"", NOW), NOW) == b""


def test_do_reprs_show_no_secret() -> None:
    sealer, opener = Sealer(ONE, random_bytes()), Opener([ONE, TWO])
    assert repr(opener) == "<Opener of 0 streams with 01010101 or 02020202>"
    assert ONE.secret.hex() not in repr(sealer)
