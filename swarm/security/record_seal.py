"""Seals a stream of bytes in large records: AES-128-GCM by the libcrypto that Python's `ssl` has loaded.

    share of one end, share of the other ──> secret ──"key"──> key, base IV    record n: nonce = IV xor n
                                               │                                its header is authenticated with it
                                               └──"next"──> secret of the next RECORDS_PER_KEY records ...

A TLS record has at most 16 KiB, and each is a call of Python's `ssl` that gives up the interpreter's lock and takes it
back: many threads then wait for the lock more than they encrypt. A call here seals a record of up to RECORD_BYTES_MAX.
`cryptography` has no call that releases the lock, so libcrypto is called by ctypes.

Keys are HKDF-SHA256 of both shares. Both ends must have exchanged them over an encrypted channel, for this stream
alone; the nonce is the construction of RFC 8446, section 5.3. A sealer and an opener process records in order, so a
record that is altered, left out, repeated, moved or cut short does not open.

Must not know: sockets, how shares travel.
"""

from __future__ import annotations

import _ssl
import contextlib
import ctypes
import functools
import hmac
import secrets
from typing import Any

import numpy as np

SHARE_BYTES = 32
HEADER_BYTES, TAG_BYTES = 4, 16
OVERHEAD_BYTES = HEADER_BYTES + TAG_BYTES
RECORD_BYTES_MAX = 2 << 20  # of clear bytes; an opener allocates this much
RECORDS_PER_KEY = 1 << 17  # 2^34 blocks of 16 bytes, half of what TLS 1.3 allows (RFC 8446, section 5.5)
CANNOT = bytes(SHARE_BYTES)  # the share of an end without libcrypto

_LABEL = b"swarm sealed records 1 "
_KEY_BYTES, _IV_BYTES = 16, 12
_SMALL_BYTES = 4096  # sealed within a microsecond: releasing the interpreter's lock costs more
_GET_TAG, _SET_TAG = 0x10, 0x11  # EVP_CTRL_AEAD_GET_TAG, EVP_CTRL_AEAD_SET_TAG
_LIBRARIES = ("libcrypto.so.3", "libcrypto.so.1.1")
_CALLS: dict[str, tuple[Any, list[Any]]] = {
    "EVP_CIPHER_CTX_new": (ctypes.c_void_p, []),
    "EVP_CIPHER_CTX_free": (None, [ctypes.c_void_p]),
    "EVP_aes_128_gcm": (ctypes.c_void_p, []),
    "EVP_CipherInit_ex": (ctypes.c_int, [ctypes.c_void_p] * 3 + [ctypes.c_char_p] * 2 + [ctypes.c_int]),
    "EVP_CipherUpdate": (ctypes.c_int, [ctypes.c_void_p] * 4 + [ctypes.c_int]),
    "EVP_CipherFinal_ex": (ctypes.c_int, [ctypes.c_void_p] * 3),
    "EVP_CIPHER_CTX_ctrl": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]),
}
# NIST's GCM test case 3: key, IV, clear bytes, sealed bytes, tag.
_PROOF = tuple(
    bytes.fromhex(text)
    for text in (
        "feffe9928665731c6d6a8f9467308308",
        "cafebabefacedbaddecaf888",
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525"
        "b16aedf5aa0de657ba637b391aafd255",
        "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e21d514b25466931c7d8f6a5aac84aa05"
        "1ba30b396a0aac973d58e091473f5985",
        "4d5c2af327cd64a62cf35abd2ba6fab4",
    )
)


class SealBroken(Exception):
    """A record was not sealed by the other end, or is not the next one."""


def new_share() -> bytes:
    """A fresh random share; CANNOT where records cannot be sealed."""
    return secrets.token_bytes(SHARE_BYTES) if available() else CANNOT


def secret_of(*shares: bytes) -> bytes:
    """The secret of a stream, from the shares of both ends in the same order. HKDF-Extract."""
    return hmac.digest(_LABEL, b"".join(shares), "sha256")


@functools.cache
def available() -> bool:
    """Whether libcrypto is there and computes what NIST publishes."""
    key, iv, clear, sealed, tag = _PROOF
    try:
        cipher = _Gcm(seals=True)
    except (OSError, AttributeError):
        return False
    room = bytearray(len(sealed) + TAG_BYTES)
    cipher.begin(iv, key)
    cipher.seal(_address(memoryview(room)), _address(memoryview(clear)), len(clear))
    return bytes(room) == sealed + tag


class RecordSealer:
    """Seals the records of a stream, in order. Not for several threads at once."""

    def __init__(self, secret: bytes) -> None:
        self._cipher = _Gcm(seals=True)
        self._keys = _Keys(secret)

    def seal(self, clear: memoryview, room: memoryview) -> int:
        """Writes a record of 1 to RECORD_BYTES_MAX bytes into `room`, which may overlap `clear` from HEADER_BYTES on;
        returns its size."""
        size, head = len(clear), len(clear).to_bytes(HEADER_BYTES)
        room[:HEADER_BYTES] = head
        self._cipher.begin(*self._keys.next())
        self._cipher.add(head)
        self._cipher.seal(_address(room) + HEADER_BYTES, _address(clear), size)
        return size + OVERHEAD_BYTES


class RecordOpener:
    """Opens the records of a stream, in order. Not for several threads at once."""

    def __init__(self, secret: bytes) -> None:
        self._cipher = _Gcm(seals=False)
        self._keys = _Keys(secret)

    def open(self, head: bytes, sealed: memoryview, room: memoryview) -> None:
        """Writes the clear bytes of a record, given its header and the rest with the tag. Raises SealBroken: then
        `room` may hold any bytes, and no later record opens."""
        self._cipher.begin(*self._keys.next())
        self._cipher.add(head)
        self._cipher.open(_address(room), _address(sealed), len(sealed) - TAG_BYTES)


def size_of(head: bytes) -> int:
    """The clear bytes of a record with this header. Raises SealBroken for more than RECORD_BYTES_MAX, or none."""
    size = int.from_bytes(head)
    if not 0 < size <= RECORD_BYTES_MAX:
        raise SealBroken(f"it sent a record of {size} bytes")
    return size


class _Keys:
    """The key, when it is new, and the nonce of each record of a stream."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._iv = 0
        self._count = 0

    def next(self) -> tuple[bytes, bytes | None]:
        key = None
        if self._count % RECORDS_PER_KEY == 0:
            if self._count:
                self._secret = _expand(self._secret, b"next")
            made = _expand(self._secret, b"key")
            key, self._iv = made[:_KEY_BYTES], int.from_bytes(made[_KEY_BYTES : _KEY_BYTES + _IV_BYTES])
        nonce = (self._iv ^ self._count).to_bytes(_IV_BYTES)
        self._count += 1
        return nonce, key


def _expand(secret: bytes, purpose: bytes) -> bytes:
    """HKDF-Expand, its first block of 32 bytes."""
    return hmac.digest(secret, _LABEL + purpose + b"\1", "sha256")


class _Gcm:
    """AES-128-GCM of libcrypto. Raises OSError or AttributeError where it is missing."""

    def __init__(self, *, seals: bool) -> None:
        self._free, self._context = None, None
        self._prompt, self._library = _load(ctypes.PyDLL), _load(ctypes.CDLL)
        self._free = self._prompt.EVP_CIPHER_CTX_free
        self._context = self._prompt.EVP_CIPHER_CTX_new()
        self._seals = int(seals)
        self._tag = (ctypes.c_ubyte * TAG_BYTES)()
        self._written = ctypes.c_int()
        self._count = ctypes.byref(self._written)
        self._check(self._init(self._prompt.EVP_aes_128_gcm(), None, None))

    def begin(self, nonce: bytes, key: bytes | None) -> None:
        self._check(self._init(None, key, nonce))

    def add(self, head: bytes) -> None:
        """Authenticates `head` too."""
        self._check(self._prompt.EVP_CipherUpdate(self._context, None, self._count, head, len(head)))

    def seal(self, room: int, clear: int, size: int) -> None:
        self._update(room, clear, size)
        self._check(self._prompt.EVP_CipherFinal_ex(self._context, self._tag, self._count))
        self._check(self._prompt.EVP_CIPHER_CTX_ctrl(self._context, _GET_TAG, TAG_BYTES, self._tag))
        ctypes.memmove(room + size, self._tag, TAG_BYTES)

    def open(self, room: int, sealed: int, size: int) -> None:
        self._check(self._prompt.EVP_CIPHER_CTX_ctrl(self._context, _SET_TAG, TAG_BYTES, sealed + size))
        self._update(room, sealed, size)
        if self._prompt.EVP_CipherFinal_ex(self._context, self._tag, self._count) != 1:
            raise SealBroken("a record was altered on its way")

    def _update(self, target: int, source: int, size: int) -> None:
        library = self._prompt if size <= _SMALL_BYTES else self._library
        self._check(library.EVP_CipherUpdate(self._context, target, self._count, source, size))

    def _init(self, cipher: int | None, key: bytes | None, nonce: bytes | None) -> int:
        return int(self._prompt.EVP_CipherInit_ex(self._context, cipher, None, key, nonce, self._seals))

    def _check(self, status: int) -> None:
        if status != 1:
            raise SealBroken("libcrypto refuses AES-128-GCM")

    def __del__(self) -> None:
        if self._free is not None and self._context:
            self._free(self._context)


def _address(view: memoryview) -> int:
    """The address of a view's first byte; the caller keeps the view."""
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


@functools.cache
def _load(kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    """libcrypto: through the extension module that is linked with it, else by its name. Raises OSError."""
    for name in (getattr(_ssl, "__file__", None), *_LIBRARIES):
        with contextlib.suppress(OSError, AttributeError):
            library = kind(name) if name else kind(None)
            for call, (result, arguments) in _CALLS.items():
                function = getattr(library, call)
                function.restype, function.argtypes = result, arguments
            return library
    raise OSError("libcrypto is not there")
