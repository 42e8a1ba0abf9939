"""Signatures of publishers: proof that a digest is a model's, from whichever node its bytes come.

    statement = "swarm signature 1" 0x00 model id 0x00 revision 0x00 digest           UTF-8; the revision may be empty
    signature = Ed25519 (RFC 8032) of the statement

The id is part of the statement: otherwise a member could offer another model of the same publisher. So is the revision:
otherwise it could offer an old one. Signatures travel with the origin of an artifact (`protocol.messages.Origin`).

Must not know: links, nodes, the files beside a model. Private keys are never printed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from swarm.content.manifest import Digest, ModelId
from swarm.errors import SettingsError
from swarm.protocol.messages import Signature

KEY_FILE_BYTES_MAX = 4096


def create(path: Path) -> str:
    """Writes a new private key (PEM, mode 0600) and returns the public key. Raises SettingsError."""
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError("key", f"{path} cannot be created: {error.strerror}; a key is never overwritten") from error
    with open(fd, "wb") as file:
        file.write(pem)
    return public(key)


def read_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file, as `create` or `openssl genpkey -algorithm ed25519` writes it.

    Raises SettingsError.
    """
    try:
        with path.open("rb") as file:
            pem = file.read(KEY_FILE_BYTES_MAX)
        key = serialization.load_pem_private_key(pem, password=None)
    except FileNotFoundError:
        raise SettingsError("key", f"{path} does not exist; make one with: swarm keygen {path} --publisher") from None
    except OSError as error:
        raise SettingsError("key", f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise SettingsError("key", f"{path} is not a private key in PEM without a password: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError("key", f"{path} is not an Ed25519 key; `swarm keygen PATH --publisher` makes one")
    return key


def public(key: Ed25519PrivateKey) -> str:
    """The public key as 64 hexadecimal digits, the publisher's name everywhere."""
    return key.public_key().public_bytes_raw().hex()


def sign(key: Ed25519PrivateKey, model_id: ModelId, digest: Digest, *, revision: str = "") -> Signature:
    """Says that this artifact is this model, in this revision if there is one."""
    return Signature(model_id, revision, public(key), key.sign(_statement(model_id, revision, digest)).hex())


def valid(
    found: Iterable[Signature], publishers: Iterable[str], model_id: ModelId, digest: Digest, *, revision: str | None
) -> tuple[Signature, ...]:
    """The signatures of these publishers that say that the digest is the model, in the revision if one is asked for."""
    wanted = set(publishers)
    return tuple(
        each
        for each in found
        if each.publisher in wanted
        and each.model_id == model_id
        and revision in (None, each.revision)
        and _holds(each, digest)
    )


def _statement(model_id: str, revision: str, digest: str) -> bytes:
    return f"swarm signature 1\0{model_id}\0{revision}\0{digest}".encode()


def _holds(signature: Signature, digest: Digest) -> bool:
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.publisher))
        key.verify(bytes.fromhex(signature.signature), _statement(signature.model_id, signature.revision, digest))
    except (InvalidSignature, ValueError):
        return False
    return True
