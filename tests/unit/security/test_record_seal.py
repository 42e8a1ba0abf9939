"""Does a sealed stream open as it was sealed, in order and whole, and no other way?"""

from __future__ import annotations

import ctypes
import functools
import hmac
import itertools
import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swarm.security import record_seal
from swarm.security.record_seal import (
    CANNOT,
    HEADER_BYTES,
    OVERHEAD_BYTES,
    RECORD_BYTES_MAX,
    SHARE_BYTES,
    RecordOpener,
    RecordSealer,
    SealBroken,
    new_share,
    secret_of,
    size_of,
)

SECRET = secret_of(b"a" * SHARE_BYTES, b"b" * SHARE_BYTES)
SIZES = (1, 15, 16, 17, 4096, 4097, 100_003)
CLEAR = [os.urandom(size) for size in SIZES]


def sealed(sealer: RecordSealer, clear: bytes) -> bytes:
    room = memoryview(bytearray(len(clear) + OVERHEAD_BYTES))
    assert sealer.seal(memoryview(clear), room) == len(room)
    return bytes(room)


def opened(opener: RecordOpener, record: bytes) -> bytes:
    room = memoryview(bytearray(size_of(record[:HEADER_BYTES])))
    opener.open(record[:HEADER_BYTES], memoryview(record[HEADER_BYTES:]), room)
    return bytes(room)


def test_is_libcrypto_here() -> None:
    assert record_seal.available()


def test_does_a_stream_open_as_it_was_sealed() -> None:
    sealer, opener = RecordSealer(SECRET), RecordOpener(SECRET)
    for clear in CLEAR:
        record = sealed(sealer, clear)
        assert len(clear) < 16 or clear not in record
        assert opened(opener, record) == clear


def test_is_a_record_sealed_within_its_own_room() -> None:
    room = memoryview(bytearray(100 + OVERHEAD_BYTES))
    room[HEADER_BYTES : HEADER_BYTES + 100] = b"x" * 100
    RecordSealer(SECRET).seal(room[HEADER_BYTES : HEADER_BYTES + 100], room)
    assert bytes(room) == sealed(RecordSealer(SECRET), b"x" * 100)


def test_does_another_implementation_open_the_records() -> None:
    """The construction, by the words of docs/protocol.md."""

    def expand(secret: bytes, purpose: bytes) -> bytes:
        return hmac.digest(secret, b"swarm sealed records 1 " + purpose + b"\1", "sha256")

    shares = os.urandom(SHARE_BYTES), os.urandom(SHARE_BYTES)
    secret = hmac.digest(b"swarm sealed records 1 ", b"".join(shares), "sha256")
    made = expand(secret, b"key")
    sealer = RecordSealer(secret_of(*shares))
    for number, clear in enumerate(CLEAR):
        nonce = (int.from_bytes(made[16:28]) ^ number).to_bytes(12)
        record = sealed(sealer, clear)
        assert AESGCM(made[:16]).decrypt(nonce, record[4:], record[:4]) == clear


@pytest.mark.parametrize("number", [0, 1])
def test_does_no_altered_byte_pass(number: int) -> None:
    sealer = RecordSealer(SECRET)
    records = [sealed(sealer, b"weights" * 5) for _ in range(2)]
    for at in range(len(records[number])):
        altered = bytearray(records[number])
        altered[at] ^= 0x40
        opener = RecordOpener(SECRET)
        for before in records[:number]:
            opened(opener, before)
        with pytest.raises(SealBroken):
            opener.open(
                bytes(altered[:HEADER_BYTES]), memoryview(altered)[HEADER_BYTES:], memoryview(bytearray(1 << 10))
            )


def test_do_records_open_in_their_order_only() -> None:
    """Left out, repeated, exchanged: whatever differs from the order in which they were sealed ends the stream."""
    sealer = RecordSealer(SECRET)
    records = [sealed(sealer, bytes([number]) * 20) for number in range(3)]
    for order in itertools.product(range(3), repeat=3):
        opener, heard = RecordOpener(SECRET), list[int]()
        try:
            for number in order:
                heard.append(opened(opener, records[number])[0])
        except SealBroken:
            assert order != (0, 1, 2)
        assert heard == list(range(len(heard)))


@pytest.mark.parametrize("cut", [1, 16, 17, 40])
def test_does_no_shortened_record_pass(cut: int) -> None:
    record = sealed(RecordSealer(SECRET), b"weights" * 10)
    kept = record[HEADER_BYTES:-cut]
    for head in (record[:HEADER_BYTES], (len(kept) - 16).to_bytes(HEADER_BYTES)):
        with pytest.raises(SealBroken):
            RecordOpener(SECRET).open(head, memoryview(kept), memoryview(bytearray(100)))


def test_is_a_stream_of_other_ends_refused() -> None:
    record = sealed(RecordSealer(SECRET), b"weights")
    others = [(b"b", b"a"), (b"a", b"c"), (b"c", b"b")]
    for one, other in others:
        with pytest.raises(SealBroken):
            opened(RecordOpener(secret_of(one * SHARE_BYTES, other * SHARE_BYTES)), record)


def test_are_keys_renewed_before_they_have_sealed_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_max = 2**34.5  # of one key: RFC 8446, section 5.5
    assert blocks_max >= record_seal.RECORDS_PER_KEY * RECORD_BYTES_MAX / 16

    monkeypatch.setattr(record_seal, "RECORDS_PER_KEY", 3)
    sealer, opener = RecordSealer(SECRET), RecordOpener(SECRET)
    records = [sealed(sealer, b"weights") for _ in range(10)]
    assert [opened(opener, record) for record in records] == [b"weights"] * 10
    keys = record_seal._Keys(SECRET)
    made = [keys.next() for _ in range(10)]
    assert [number for number, (_, key) in enumerate(made) if key] == [0, 3, 6, 9]
    assert len({key for _, key in made if key}) == 4
    assert len({nonce for nonce, _ in made}) == 10


def test_is_a_size_of_a_peer_checked_before_it_is_used() -> None:
    assert size_of(RECORD_BYTES_MAX.to_bytes(4)) == RECORD_BYTES_MAX
    for size in (0, RECORD_BYTES_MAX + 1, 2**32 - 1):
        with pytest.raises(SealBroken, match=f"a record of {size} bytes"):
            size_of(size.to_bytes(4))


def test_are_shares_fresh_and_never_zero() -> None:
    assert len({new_share() for _ in range(100)} | {CANNOT}) == 101


def missing(name: str | None) -> ctypes.CDLL:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize("how", ["no library", "a library without the calls", "wrong results"])
def test_does_an_end_without_libcrypto_say_so(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "wrong results":
        monkeypatch.setattr(record_seal, "_PROOF", (*record_seal._PROOF[:4], bytes(16)))
    else:
        library = ctypes.CDLL(None)
        monkeypatch.setattr(ctypes, "CDLL", missing if how == "no library" else lambda _: library)
        if how == "a library without the calls":
            monkeypatch.setitem(record_seal._CALLS, "EVP_of_another_time", (None, []))
    for cached in (record_seal.available, record_seal._load):
        monkeypatch.setattr(record_seal, cached.__name__, functools.cache(cached.__wrapped__))
    assert not record_seal.available()
    assert new_share() == CANNOT
