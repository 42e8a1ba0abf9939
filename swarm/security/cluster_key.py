"""The cluster key: the secret of a cluster, its file, and the keys derived from it.

    # fingerprint 5d0c1a77
    swarm-key-1:q83vASNFZ4mrze8BI0VniavN7wEjRWeJq83vASNFZ4k          32 random bytes, base64url without padding

A file has a key, or two during a rotation: the first signs and seals, both are accepted. Blank lines and lines that
begin with # are ignored. Each use has a secret of its own, derived by HKDF-SHA256 (RFC 5869) under its name, so a
derived secret reveals neither the key nor another secret. The fingerprint is derived too and may be shown.

Must not know: TLS, datagrams, nodes. Keys are never printed: the reprs show fingerprints.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from swarm.errors import SettingsError
from swarm.security.datagram_seal import SealKey

PREFIX = "swarm-key-1:"
KEY_BYTES = 32
KEYS_MAX = 2  # two during a rotation
FILE_BYTES_MAX = 4096  # two keys and comments; a wrong path may name a huge file
FINGERPRINT_BYTES = 4  # two clusters have the same fingerprint with a probability of 2**-32

_SALT = b"swarm cluster key 1"
_LINE = re.compile(re.escape(PREFIX) + r"([A-Za-z0-9_-]{43})")


@dataclass(frozen=True)
class ClusterKey:
    """A secret of KEY_BYTES bytes. Every holder of it is a member."""

    secret: bytes = field(repr=False)

    def derive(self, purpose: str, size: int = KEY_BYTES) -> bytes:
        """`size` bytes for this purpose alone."""
        return HKDF(SHA256(), size, _SALT, purpose.encode()).derive(self.secret)

    @cached_property
    def fingerprint(self) -> bytes:
        """FINGERPRINT_BYTES bytes that identify the key and may be shown."""
        return self.derive("fingerprint", FINGERPRINT_BYTES)

    def __str__(self) -> str:
        return self.fingerprint.hex()


@dataclass(frozen=True)
class Keyring:
    """The keys that this node accepts; it signs and seals with the first."""

    keys: tuple[ClusterKey, ...]

    @property
    def first(self) -> ClusterKey:
        """The key that signs and seals."""
        return self.keys[0]

    @property
    def seal_keys(self) -> tuple[SealKey, ...]:
        """The keys of gossip, in the same order."""
        return tuple(SealKey(key.fingerprint, key.derive("gossip")) for key in self.keys)

    def __str__(self) -> str:
        return " and ".join(map(str, self.keys))


def generate() -> ClusterKey:
    """A new key of the system's random bytes."""
    return ClusterKey(secrets.token_bytes(KEY_BYTES))


def create(path: Path) -> ClusterKey:
    """Writes a new key to a new file with mode 0600. Raises SettingsError ('keygen')."""
    key = generate()
    line = PREFIX + base64.urlsafe_b64encode(key.secret).rstrip(b"=").decode()
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            os.fchmod(file.fileno(), 0o600)  # the umask may have removed bits
            file.write(f"# fingerprint {key}\n{line}\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise SettingsError("keygen", f"{path} exists, and no key is ever overwritten; name another file") from None
    except OSError as error:
        raise SettingsError("keygen", f"{path} cannot be written: {error.strerror or error}") from error
    return key


def load(path: Path) -> Keyring:
    """The keys of a file. Raises SettingsError ('key_file') for an unusable file, or when other users can read it."""
    return parse(read_private(path, setting="key_file", make=f"swarm keygen {path}"), path)


def read_private(path: Path, *, setting: str, make: str) -> bytes:
    """The bytes of a file with a secret, at most FILE_BYTES_MAX. `make`: the command that makes such a file.

    Raises SettingsError (`setting`) for an unusable file, or when other users can read it.
    """
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _check_private(path, os.fstat(file.fileno()), setting)
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise SettingsError(setting, f"{path} does not exist; make one with: {make}") from None
    except OSError as error:
        raise SettingsError(setting, f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > FILE_BYTES_MAX:
        raise SettingsError(setting, f"{path} has more than {FILE_BYTES_MAX} bytes; a secret has one line")
    return data


def parse(data: bytes, path: Path) -> Keyring:
    """The keys in a file's bytes. Raises SettingsError ('key_file'), which never contains these bytes."""
    lines = data.decode("ascii", "replace").splitlines()
    meant = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
    keys = [_parse_line(line, f"{path}, line {number}") for number, line in meant]
    if not keys:
        raise _unusable(f"{path} holds no key; make one with: swarm keygen")
    if len(keys) > KEYS_MAX:
        raise _unusable(f"{path} holds {len(keys)} keys; at most {KEYS_MAX} are accepted, remove the oldest")
    if len(set(keys)) < len(keys):
        raise _unusable(f"{path} holds the same key twice; remove one of the lines")
    return Keyring(tuple(keys))


def _parse_line(line: str, where: str) -> ClusterKey:
    match = _LINE.fullmatch(line)
    if match is None:
        raise _unusable(f"{where} is no key ({PREFIX} and 43 letters, digits, - or _); copy the line whole")
    try:
        secret = base64.b64decode(match[1] + "=", altchars=b"-_", validate=True)
    except binascii.Error:  # the pattern excludes it
        raise _unusable(f"{where} is no base64") from None
    return ClusterKey(secret)


def _check_private(path: Path, found: os.stat_result, setting: str) -> None:
    why = ""
    # Orchestrators mount secrets as files of root that the group of the process can read.
    allowed = 0o740 if found.st_uid == 0 and os.geteuid() != 0 else 0o700
    if not stat.S_ISREG(found.st_mode):
        why = "is not a file"
    elif found.st_uid not in (0, os.geteuid()):
        why = f"belongs to another user (uid {found.st_uid}); run: chown {os.geteuid()} {path}"
    elif found.st_mode & 0o777 & ~allowed:
        why = f"can be used by others (mode {found.st_mode & 0o777:04o}); run: chmod 600 {path}"
    if why:
        raise SettingsError(setting, f"{path} {why}")


def _unusable(why: str) -> SettingsError:
    return SettingsError("key_file", why)
