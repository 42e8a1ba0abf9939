"""The identity of a node: certificates and TLS from the cluster key alone.

    cluster key ──HKDF──> the cluster's authority (Ed25519; every member derives it, its private half is never sent)
                               │ signs
                               v
                          a leaf: a fresh key pair, this node's id, valid for a day

Every member can issue certificates, so there is no server for it. Both ends of a connection present and verify a leaf:
TLS 1.3 only, no host names, no system-wide authorities, no resumption (tickets would outlive a removed key). The leaf
contains the node id, so a link identifies its peer before the first message.

`refusal` finds the reason of a failed handshake, in this side's verification or in the alert of the other side. With
TLS 1.3 a refused client may learn of it only at its first read.

Must not know: sockets, links. Nodes pass the time of day; OpenSSL compares certificates with its own clock.
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

LEAF_LIFE_S = 24 * 3600.0  # bounds the use of a stolen leaf
LEAF_RENEW_S = LEAF_LIFE_S / 2  # a node that slept for hours still has a valid leaf
CLOCK_BACK_S = 60.0  # a clock that goes back by more was set; synchronisation corrects less
CLOCK_SKEW_S = 3600.0  # leaves are valid from this long before their issue, for members with slow clocks

_NODE_URI = "swarm:node:"
_NODE = re.compile(re.escape(_NODE_URI) + r"([0-9a-f]{16})")
_EPOCH = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_FOREVER = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)


class Refusal(Enum):
    """The reason that two nodes did not connect. The value ends the sentence 'the other node ...'."""

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
    2: Refusal.OTHER_KEY,  # unknown issuer, as 18 to 21, depending on the chain
    7: Refusal.FORGED,  # the issuer's name without its signature
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
# OpenSSL's names of received alerts and of bytes that are not TLS.
_REASONS = {
    "TLSV1_ALERT_UNKNOWN_CA": Refusal.REFUSES_KEY,
    "TLSV1_ALERT_DECRYPT_ERROR": Refusal.REFUSES_KEY,
    "SSLV3_ALERT_BAD_CERTIFICATE": Refusal.REFUSES_CLOCK,  # OpenSSL's alert for a leaf that is not yet valid
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
    """The certificates of a node. `server` and `client` are contexts for `ssl`, also after the leaf is renewed."""

    def __init__(self, keyring: Keyring, node: str, *, now_s: float) -> None:
        self.node = node
        self.take(keyring, now_s)

    def is_due(self, now_s: float) -> bool:
        """Whether to call `renew`: the leaf is old, or from a later time than now: the clock was wrong and was set."""
        return not self._issued_at - CLOCK_BACK_S <= now_s < self._issued_at + LEAF_RENEW_S

    def take(self, keyring: Keyring, now_s: float) -> None:
        """Takes other keys for new connections; open connections go on."""
        self.keyring = keyring
        self.server = _context(ssl.PROTOCOL_TLS_SERVER, keyring)
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, keyring)
        self.renew(now_s)

    def renew(self, now_s: float) -> None:
        """Issues a new leaf for new connections; open connections go on."""
        with _in_memory(_issue(self.keyring.first, self.node, now_s)) as path:
            self.server.load_cert_chain(path)
            self.client.load_cert_chain(path)
        self._issued_at = now_s

    def __repr__(self) -> str:
        return f"<Identity {self.node} of {self.keyring}>"


def visitor(keyring: Keyring) -> ssl.SSLContext:
    """A client context for a program that is no node, such as `swarm status`."""
    return Identity(keyring, secrets.token_hex(8), now_s=time.time()).client


def node_of(connection: ssl.SSLObject) -> str | None:
    """The node id in the peer's certificate after the handshake; None when it names no node, or several."""
    names = (connection.getpeercert() or {}).get("subjectAltName", ())
    uris = [str(name[1]) for name in names if name[0] == "URI"]
    found = [match[1] for uri in uris if (match := _NODE.fullmatch(uri))]
    return found[0] if len(uris) == len(found) == 1 else None


def refusal(error: BaseException) -> Refusal | None:
    """The reason that a handshake, or the first read after it, failed; None when the error does not concern TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY.get(error.verify_code, Refusal.BROKEN)
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None)  # absent in errors of Python's own
        return _REASONS.get(reason or "", Refusal.HUNG_UP if isinstance(error, ssl.SSLEOFError) else Refusal.BROKEN)
    return None


def alert(error: BaseException) -> bytes:
    """The alert to send after a handshake in memory failed with this error; may be empty."""
    return getattr(error, "alert", b"")


class _Connection(ssl.SSLObject):
    """Keeps the alert of a failed handshake, which asyncio would drop, in the error."""

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
    context.check_hostname = False  # the signature decides: a member may be reached by any name
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    context.load_verify_locations(cadata=b"".join(_authority(key)[1] for key in keyring.keys))
    return context


def _authority(key: ClusterKey) -> tuple[Ed25519PrivateKey, bytes]:
    """The private key of a cluster's authority and its certificate in DER. Deterministic."""
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
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign")
    unused = dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
    return x509.KeyUsage(digital_signature=not signs_certificates, key_cert_sign=signs_certificates, **unused)


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A path of these bytes in memory, since OpenSSL reads only files and a key must not touch a disk."""
    with os.fdopen(os.memfd_create("swarm-leaf"), "wb", buffering=0) as file:
        file.write(data)
        yield f"/proc/self/fd/{file.fileno()}"
