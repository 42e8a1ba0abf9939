"""Sealed datagrams: only members can read, write or replay gossip.

    0       4             8          16         24                       size - 16
    | "SWS" | fingerprint | stream   | number   | encrypted packet       | tag        |
    | u8: 1 | of the key  | 8 bytes  | u64      | ChaCha20-Poly1305 (RFC 8439); the header is authenticated too |

A stream is the datagrams of a sealer since its start, under a random name. The key of a stream is derived from the
cluster key and this name, so two processes never share a key and a nonce, whichever node ids and clocks they have.
`number` is nonce, time and order at once: microseconds since 1970, increased beyond the last number.

An opener accepts each number once. Each stream has an anti-replay window (RFC 6479) of WINDOW_MAX numbers, so datagrams
may overtake each other; numbers below the window, and numbers further from the own clock than AGE_MAX_S, are refused.
A stream that is forgotten has only numbers beyond AGE_MAX_S, so no number is accepted twice. Memory is bounded by
STREAMS_MAX streams, which only members can open. The clocks of members must agree to AGE_MAX_S.

With two keys the first seals and both open. Pure: told the time of day and given random bytes; never sees a socket.
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

AGE_MAX_S = 120.0  # synchronized clocks differ by less, and a datagram travels for less
WINDOW_MAX = 128  # numbers: the largest burst of a stream is about 10 datagrams
STREAMS_MAX = 4096  # members that send within 2 * AGE_MAX_S, restarts included; about 30 MB when all are busy
CLOCK_BACK_S = 1.0  # a sealer whose clock goes back by more begins a new stream; its old numbers are in the future


class Unopened(Enum):
    """The reason to refuse a datagram. The value ends the sentence 'a datagram that ...'."""

    PLAINTEXT = "is not sealed: its sender has no cluster key"
    OTHER_KEY = "is sealed with another cluster key"
    FORGED = "was altered or forged"
    REPLAYED = "was here before"
    CLOCK = f"is older than {AGE_MAX_S:.0f} s or from the future: the clocks of both machines differ, or it is replayed"
    CROWDED = f"is from one sender too many: {STREAMS_MAX} are remembered"


class SealKey(NamedTuple):
    """Derived from the cluster key: the secret that stream keys are derived from, and the hint that names it."""

    hint: bytes
    secret: bytes


class Sealer:
    """Seals the datagrams of one process. `random_bytes(n)` returns n unpredictable bytes."""

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
    """Opens datagrams that members sealed with any of these keys, each datagram once."""

    def __init__(self, keys: Sequence[SealKey]) -> None:
        self._keys = {key.hint: key for key in keys}
        self._streams: dict[bytes, _Stream] = {}  # by hint and name; the latest is last

    def take(self, keys: Sequence[SealKey]) -> None:
        """Opens with these keys from now on. Streams of keys that stay are remembered."""
        self._keys = {key.hint: key for key in keys}
        self._streams = {name: stream for name, stream in self._streams.items() if name[:HINT_BYTES] in self._keys}

    def open(self, datagram: bytes, now_s: float) -> bytes | Unopened:
        """The packet in a datagram, or the reason to refuse it; `now_s` in seconds since 1970. Never raises."""
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
        if not stream.is_new(sent):  # before decryption, which costs more
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
        """Forgets streams whose latest number is older than twice AGE_MAX_S: it would not be accepted again.

        Streams of the future, from before this node's clock was set back, stay: their time will come.
        """
        before = (now_s - 2 * AGE_MAX_S) * 1e6
        for name in [name for name, stream in self._streams.items() if stream.latest < before]:
            del self._streams[name]
        return len(self._streams) < STREAMS_MAX

    def check(self) -> None:
        """Asserts the invariants that hold between two datagrams."""
        remembered = len(self._streams)
        assert remembered <= STREAMS_MAX
        for stream in self._streams.values():
            stream.check()

    def __repr__(self) -> str:
        return f"<Opener of {len(self._streams)} streams with {' or '.join(hint.hex() for hint in self._keys)}>"


class _Stream:
    """Anti-replay window of a stream. Numbers up to `_floor` count as taken; those above are in `_taken`, ascending."""

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
    """The cipher of one stream: HKDF-Expand (RFC 5869) of one block, with the stream's name as info."""
    return ChaCha20Poly1305(hmac.digest(key.secret, stream + b"\1", "sha256"))


def _nonce(number: bytes) -> bytes:
    return bytes(12 - NUMBER_BYTES) + number
