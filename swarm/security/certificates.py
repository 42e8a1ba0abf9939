"""Who a node is to the others: certificates and TLS, from the cluster key alone.

    cluster key ──HKDF──> the cluster's authority (Ed25519; every member derives it, none sends its private half)
                               │ signs
                               v
                          a leaf: a fresh key pair, this node's id, good for a day

There is no server that issues certificates, since every member can. Both ends of a connection show theirs and check
the other's: TLS 1.3 only, no host names, no system-wide authorities, no resumption (a key that was removed must not
live on in tickets). A member's id stands in its certificate, so that a link tells whose it is before its first message.

A handshake that fails has a reason, and `refusal` finds it: in the verification of this side, or in the alert that the
other side sent. With TLS 1.3 a client that is turned away may learn so only when it reads for the first time.

Must not know: sockets, links, what a node does. Nodes hand in the time of day; OpenSSL compares it with its own clock.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import secrets
import ssl
import time
from collections.abc import Iterator
from enum import Enum
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from swarm.security.cluster_key import ClusterKey, Keyring

LEAF_LIFE_S = 24 * 3600.0  # a leaf that was stolen without the cluster key is worth nothing a day later
LEAF_RENEW_S = LEAF_LIFE_S / 2  # so that a node asleep for some hours still shows a valid one
CLOCK_SKEW_S = 3600.0  # leaves begin so much earlier, for members whose clocks are behind

_NODE_URI = "swarm:node:"
_NODE = re.compile(re.escape(_NODE_URI) + r"([0-9a-f]{16})")
_EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_FOREVER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)


class Refusal(Enum):
    """Why a connection between two nodes was not made. The value ends the sentence 'the other node ...'."""

    OTHER_KEY = "has another cluster key; give both the same key file"
    FORGED = "claims this cluster's key without having it"
    NO_KEY = "shows no certificate: it has no cluster key; start it with --key-file"
    PLAINTEXT = "does not speak TLS: it has no cluster key; start it with --key-file"
    CLOCK = "has a certificate that is expired or not yet valid; compare the clocks of both machines"
    OLD_TLS = "does not speak TLS 1.3; something between the two may end the encryption"
    NOT_A_NODE = "has a certificate of this cluster that names no node; is it of another version?"
    HUNG_UP = "hung up within the handshake; its own log says why"
    REFUSES_KEY = "does not accept this node's key; give both the same key file"
    REFUSES_CLOCK = "finds this node's certificate expired or not yet valid; compare the clocks of both machines"
    HAS_KEY = "has a cluster key and this node has none; start it with --key-file"
    WANTS_KEY = "wants a cluster key and this node has none; start it with --key-file"
    BROKEN = "broke TLS"


# X509_V_ERR_* of OpenSSL's x509_vfy.h, as in SSLCertVerificationError.verify_code.
_VERIFY = {
    2: Refusal.OTHER_KEY,  # the issuer is not known; with 18 to 21 the same, depending on what was sent along
    7: Refusal.FORGED,  # the issuer's name and not its signature
    9: Refusal.CLOCK,
    10: Refusal.CLOCK,
    18: Refusal.OTHER_KEY,
    19: Refusal.OTHER_KEY,
    20: Refusal.OTHER_KEY,
    21: Refusal.OTHER_KEY,
    24: Refusal.FORGED,  # signed by a member's leaf
    25: Refusal.FORGED,
    79: Refusal.FORGED,
}
# OpenSSL's names of alerts that came from the other side, and of what it could not make sense of.
_REASONS = {
    "TLSV1_ALERT_UNKNOWN_CA": Refusal.REFUSES_KEY,
    "TLSV1_ALERT_DECRYPT_ERROR": Refusal.REFUSES_KEY,
    "SSLV3_ALERT_BAD_CERTIFICATE": Refusal.REFUSES_CLOCK,  # what OpenSSL says of one that is not yet valid
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": Refusal.REFUSES_CLOCK,
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": Refusal.WANTS_KEY,
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": Refusal.NO_KEY,
    "HTTP_REQUEST": Refusal.PLAINTEXT,
    "WRONG_VERSION_NUMBER": Refusal.PLAINTEXT,
    "RECORD_LAYER_FAILURE": Refusal.PLAINTEXT,
    "UNEXPECTED_MESSAGE": Refusal.PLAINTEXT,
    "BAD_RECORD_TYPE": Refusal.PLAINTEXT,
    "NOT_SSL_RECORD_LAYER": Refusal.PLAINTEXT,
    "UNSUPPORTED_PROTOCOL": Refusal.OLD_TLS,
    "TLSV1_ALERT_PROTOCOL_VERSION": Refusal.OLD_TLS,
    "UNEXPECTED_EOF_WHILE_READING": Refusal.HUNG_UP,
}


class Identity:
    """One node's certificates. `server` and `client` are contexts for `ssl`, and follow when the leaf is renewed."""

    def __init__(self, keyring: Keyring, node: str, *, now_s: float) -> None:
        self.node = node
        self.keyring = keyring
        self.server = _context(ssl.PROTOCOL_TLS_SERVER, keyring)
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, keyring)
        self.renew(now_s)

    @property
    def renew_at(self) -> float:
        """When `renew` should be called next, in seconds since 1970."""
        return self._renew_at

    def renew(self, now_s: float) -> None:
        """A new leaf for all connections from now on; those that are open go on."""
        with _in_memory(_issue(self.keyring.first, self.node, now_s)) as path:
            self.server.load_cert_chain(path)
            self.client.load_cert_chain(path)
        self._renew_at = now_s + LEAF_RENEW_S

    def __repr__(self) -> str:
        return f"<Identity {self.node} of {self.keyring}>"


def visitor(keyring: Keyring) -> ssl.SSLContext:
    """For a program that is no node and asks one something."""
    return Identity(keyring, secrets.token_hex(8), now_s=time.time()).client


def node_of(connection: ssl.SSLObject) -> str | None:
    """The node id in the other end's certificate, once the handshake is done; None when it names none."""
    names = (connection.getpeercert() or {}).get("subjectAltName", ())
    uris = [str(name[1]) for name in names if name[0] == "URI"]
    found = [match[1] for uri in uris if (match := _NODE.fullmatch(uri))]
    return found[0] if len(uris) == len(found) == 1 else None


def refusal(error: BaseException) -> Refusal | None:
    """Why a handshake, or the first read after one, failed with this error; None when it does not concern TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY.get(error.verify_code, Refusal.BROKEN)
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None)  # absent where Python itself made the error
        return _REASONS.get(reason or "", Refusal.HUNG_UP if isinstance(error, ssl.SSLEOFError) else Refusal.BROKEN)
    return None


def alert(error: BaseException) -> bytes:
    """What the other end should still be sent when a handshake in memory failed with this error."""
    return getattr(error, "alert", b"")


class _Connection(ssl.SSLObject):
    """Hands out the alert of a handshake that failed: asyncio, which holds it, closes the socket without sending it."""

    outgoing: ssl.MemoryBIO

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            error.alert = self.outgoing.read()  # type: ignore[attr-defined]
            raise


class _Context(ssl.SSLContext):
    sslobject_class = _Connection

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *args: Any, **named: Any) -> ssl.SSLObject:
        connection = super().wrap_bio(incoming, outgoing, *args, **named)
        connection.outgoing = outgoing  # type: ignore[attr-defined]
        return connection


def _context(protocol: int, keyring: Keyring) -> ssl.SSLContext:
    context = _Context(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # who signed is what counts: a member may be reached by any name
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    context.load_verify_locations(cadata=b"".join(_authority(key)[1] for key in keyring.keys))
    return context


def _authority(key: ClusterKey) -> tuple[Ed25519PrivateKey, bytes]:
    """The private key of a cluster's authority and its certificate in DER; the same every time."""
    private = Ed25519PrivateKey.from_private_bytes(key.derive("authority"))
    public = private.public_key()
    name = _authority_name(key)
    builder = (
        x509.CertificateBuilder(name, name, public, 1, _EPOCH, _FOREVER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    return private, builder.sign(private, None).public_bytes(Encoding.DER)


def _issue(key: ClusterKey, node: str, now_s: float) -> bytes:
    """A fresh private key and a leaf for it, in PEM."""
    authority, _ = _authority(key)
    private = Ed25519PrivateKey.generate()
    now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    leaf = (
        x509.CertificateBuilder(
            _authority_name(key),
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"swarm node {node}")]),
            private.public_key(),
            x509.random_serial_number(),
            now - datetime.timedelta(seconds=CLOCK_SKEW_S),
            now + datetime.timedelta(seconds=LEAF_LIFE_S),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(_NODE_URI + node)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, None)
    )
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem + leaf.public_bytes(Encoding.PEM)


def _authority_name(key: ClusterKey) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"swarm cluster {key}")])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A path under which OpenSSL, which reads files alone, finds these bytes; they never touch a disk."""
    with os.fdopen(os.memfd_create("swarm-leaf"), "wb", buffering=0) as file:
        file.write(data)
        yield f"/proc/self/fd/{file.fileno()}"
