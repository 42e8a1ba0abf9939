"""Sealed datagrams: gossip that only members can read, write, or play again.

    0       4             8          16         24                       size - 16
    | "SWS" | fingerprint | stream   | number   | encrypted packet       | tag        |
    | u8: 1 | of the key  | 8 bytes  | u64      | ChaCha20-Poly1305 under the stream's key; what is before is bound |

A stream is one sealer from its start on, under a random name. The key of a stream is derived from the cluster's key and
that name; so two processes never share a key and a nonce, whatever their node ids and clocks are. `number` is all of
nonce, time and order: microseconds since 1970, made greater than the number before.

An opener takes every number once. It remembers WINDOW_MAX numbers of each stream, so that datagrams may overtake each
other; what is below all of these, or further from its own clock than AGE_MAX_S, is refused. So what it may forget was
too old anyway: nothing is accepted twice, and memory is bounded by STREAMS_MAX streams, which only members can open.
Members' clocks must agree to AGE_MAX_S.

With two keys the first seals and both open. Pure: told the time of day and handed dice; never sees a socket.
"""

from __future__ import annotations

import bisect
import hmac
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from swarm.errors import LocalProtocolError
from swarm.protocol.packets import DATAGRAM_BYTES_MAX as PACKET_BYTES_MAX

MAGIC = b"SWS\x01"
HINT_BYTES, STREAM_BYTES, NUMBER_BYTES, TAG_BYTES = 4, 8, 8, 16
HEAD_BYTES = len(MAGIC) + HINT_BYTES + STREAM_BYTES + NUMBER_BYTES
OVERHEAD_BYTES = HEAD_BYTES + TAG_BYTES  # 40
SEALED_BYTES_MAX = PACKET_BYTES_MAX + OVERHEAD_BYTES

AGE_MAX_S = 120.0  # clocks that are kept at all differ by less; a datagram is under way for far less
WINDOW_MAX = 128  # numbers of one stream: the largest burst is some 10 datagrams, and few overtake each other
STREAMS_MAX = 4096  # members that send within 2 * AGE_MAX_S, restarts included; about 30 MB when all are busy
CLOCK_BACK_S = 1.0  # a sealer whose clock goes back by more begins a new stream; its old numbers are in the future


class Unopened(Enum):
    """Why a datagram was not opened. The value ends the sentence 'a datagram that ...'."""

    PLAINTEXT = "is not sealed: its sender has no cluster key"
    OTHER_KEY = "is sealed with another cluster key"
    FORGED = "was altered or forged"
    REPLAYED = "was here before"
    CLOCK = f"is older than {AGE_MAX_S:.0f} s or from the future: the clocks of both machines differ, or it is replayed"
    CROWDED = f"is from one sender too many: {STREAMS_MAX} are remembered"


class SealKey(NamedTuple):
    """What the cluster key gives to gossip: the secret that stream keys are derived from, and what names it."""

    hint: bytes
    secret: bytes


class Sealer:
    """Seals what one process sends. `random_bytes(n)` gives n unpredictable bytes."""

    def __init__(self, key: SealKey, random_bytes: Callable[[int], bytes]) -> None:
        self._key = key
        self._random_bytes = random_bytes
        self._number = 0
        self._begin()

    def seal(self, packet: bytes, now_s: float) -> bytes:
        """The datagram that carries this packet; `now_s` in seconds since 1970.

        Raises LocalProtocolError when it is too long.
        """
        if len(packet) > PACKET_BYTES_MAX:
            raise LocalProtocolError(f"a packet of {len(packet)} bytes cannot be sealed; at most {PACKET_BYTES_MAX}")
        now = int(now_s * 1e6)
        if now < self._number - CLOCK_BACK_S * 1e6:
            self._begin()
        self._number = max(now, self._number + 1)
        number = self._number.to_bytes(NUMBER_BYTES, "big")
        head = self._head + number
        return head + self._cipher.encrypt(_nonce(number), packet, head)

    def _begin(self) -> None:
        stream = self._random_bytes(STREAM_BYTES)
        self._head = MAGIC + self._key.hint + stream
        self._cipher = _cipher(self._key, stream)
        self._number = 0

    def __repr__(self) -> str:
        return f"<Sealer {self._head[-STREAM_BYTES:].hex()} with {self._key.hint.hex()}>"


class Opener:
    """Opens what others sealed with one of these keys, each datagram once."""

    def __init__(self, keys: Sequence[SealKey]) -> None:
        self._keys = {key.hint: key for key in keys}
        self._streams: dict[bytes, _Stream] = {}  # by hint and name; the one that was heard of last is last

    def open(self, datagram: bytes, now_s: float) -> bytes | Unopened:
        """The packet in a datagram, or why there is none; `now_s` in seconds since 1970. Never raises."""
        if not datagram.startswith(MAGIC):
            return Unopened.PLAINTEXT
        if not OVERHEAD_BYTES <= len(datagram) <= SEALED_BYTES_MAX:
            return Unopened.FORGED
        name = datagram[len(MAGIC) : len(MAGIC) + HINT_BYTES + STREAM_BYTES]
        number = datagram[HEAD_BYTES - NUMBER_BYTES : HEAD_BYTES]
        key = self._keys.get(name[:HINT_BYTES])
        if key is None:
            return Unopened.OTHER_KEY
        sent = int.from_bytes(number, "big")
        if abs(now_s - sent / 1e6) > AGE_MAX_S:
            return Unopened.CLOCK
        known = self._streams.get(name)
        stream = known or _Stream(_cipher(key, name[HINT_BYTES:]))
        if not stream.is_new(sent):  # before it is decrypted: the cheaper question first
            return Unopened.REPLAYED
        try:
            packet = stream.cipher.decrypt(_nonce(number), datagram[HEAD_BYTES:], datagram[:HEAD_BYTES])
        except InvalidTag:
            return Unopened.FORGED
        if known is None and not self._make_room(now_s):
            return Unopened.CROWDED
        stream.take(sent)
        self._streams.pop(name, None)
        self._streams[name] = stream
        return packet

    def _make_room(self, now_s: float) -> bool:
        """Forgets streams of which everything that was accepted is too old to be accepted again, with a margin."""
        old = []
        for name, stream in self._streams.items():
            if stream.latest / 1e6 + 2 * AGE_MAX_S >= now_s:
                break
            old.append(name)
        for name in old:
            del self._streams[name]
        return len(self._streams) < STREAMS_MAX

    def check(self) -> None:
        """Asserts what must hold between any two datagrams."""
        remembered = len(self._streams)
        assert remembered <= STREAMS_MAX
        for stream in self._streams.values():
            stream.check()

    def __repr__(self) -> str:
        return f"<Opener of {len(self._streams)} streams with {' or '.join(hint.hex() for hint in self._keys)}>"


class _Stream:
    """Which numbers of one stream were taken: all up to `_floor` count as such, and those in `_taken`, ascending."""

    def __init__(self, cipher: ChaCha20Poly1305) -> None:
        self.cipher = cipher
        self._floor = -1
        self._taken: list[int] = []

    @property
    def latest(self) -> int:
        return self._taken[-1]

    def is_new(self, number: int) -> bool:
        if number <= self._floor:
            return False
        place = bisect.bisect_left(self._taken, number)
        return place == len(self._taken) or self._taken[place] != number

    def take(self, number: int) -> None:
        bisect.insort(self._taken, number)
        if len(self._taken) > WINDOW_MAX:
            self._floor = self._taken.pop(0)

    def check(self) -> None:
        known = [self._floor, *self._taken]
        count, ascending = len(self._taken), sorted(set(known))
        assert 0 < count <= WINDOW_MAX
        assert known == ascending


def _cipher(key: SealKey, stream: bytes) -> ChaCha20Poly1305:
    """The cipher of one stream: HKDF-Expand of one block, with the stream's name as its info."""
    return ChaCha20Poly1305(hmac.digest(key.secret, stream + b"\1", "sha256"))


def _nonce(number: bytes) -> bytes:
    return bytes(12 - NUMBER_BYTES) + number
