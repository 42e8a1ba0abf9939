"""Who gets in, and does everyone who does not hear why, on both sides?"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from pathlib import Path
from typing import Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from swarm.security import certificates
from swarm.security.certificates import (
    CLOCK_BACK_S,
    CLOCK_SKEW_S,
    LEAF_LIFE_S,
    LEAF_RENEW_S,
    Identity,
    Refusal,
    alert,
    node_of,
    refusal,
)
from swarm.security.cluster_key import KEY_BYTES, ClusterKey, Keyring

ONE, TWO = (ClusterKey(bytes([n]) * KEY_BYTES) for n in (1, 2))
ANN, BEN = "a" * 16, "b" * 16
NOW = time.time()  # OpenSSL compares with the clock, and with no other
LONG = LEAF_LIFE_S + CLOCK_SKEW_S + 1000

Outcome = str | Refusal | None


def member(*keys: ClusterKey, node: str = ANN, now_s: float = NOW) -> Identity:
    return Identity(Keyring(keys), node, now_s=now_s)


def keyless(protocol: int) -> ssl.SSLContext:
    """A TLS program that trusts everybody and has no certificate."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def meet(server: ssl.SSLContext, client: ssl.SSLContext) -> tuple[Outcome, Outcome]:
    """What the server and the client end with: the other's node id, or why not. The client reads once at the end."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up)]
    outcomes: dict[int, Outcome] = {}
    for end in (1, 0, 1, 0, 1):
        try:
            if end not in outcomes:
                ends[end].do_handshake()
                outcomes[end] = node_of(ends[end])
            elif not isinstance(outcomes[end], Refusal):
                ends[end].read(1)
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            outcomes[end] = refusal(error)
            (down, up)[end].write(alert(error))  # as whoever holds the connection has to
    return outcomes[0], outcomes[1]


def test_members_get_in_and_know_each_other() -> None:
    assert meet(member(ONE).server, member(ONE, node=BEN).client) == (BEN, ANN)


def test_is_the_connection_tls_1_3_and_never_resumed() -> None:
    server, client = member(ONE).server, member(ONE).client
    assert {server.minimum_version, client.minimum_version} == {ssl.TLSVersion.TLSv1_3}
    assert server.num_tickets == 0
    assert {server.verify_mode, client.verify_mode} == {ssl.CERT_REQUIRED}


def test_does_no_node_trust_the_authorities_of_the_system() -> None:
    for context in (member(ONE, TWO).server, member(ONE, TWO).client):
        names = {ca["subject"][0][0][1] for ca in context.get_ca_certs()}
        assert names == {f"swarm cluster {ONE}", f"swarm cluster {TWO}"}


def test_is_another_cluster_turned_away_on_both_sides() -> None:
    assert meet(member(ONE).server, member(TWO).client) == (Refusal.REFUSES_KEY, Refusal.OTHER_KEY)


def test_rotation() -> None:
    old, both, swapped, new = [ONE], [ONE, TWO], [TWO, ONE], [TWO]
    for ours, theirs in ((old, both), (both, both), (both, swapped), (swapped, swapped), (swapped, new)):
        assert meet(member(*ours).server, member(*theirs).client) == (ANN, ANN)
        assert meet(member(*theirs).server, member(*ours).client) == (ANN, ANN)
    # Whoever skipped a step is told so from both directions.
    assert meet(member(*old).server, member(*swapped).client) == (Refusal.OTHER_KEY, Refusal.REFUSES_KEY)
    assert meet(member(*swapped).server, member(*old).client) == (Refusal.REFUSES_KEY, Refusal.OTHER_KEY)


@pytest.mark.parametrize("off_s", [-LONG, LONG])
def test_is_an_expired_or_early_certificate_refused(off_s: float) -> None:
    off = member(ONE, now_s=NOW + off_s)
    assert meet(off.server, member(ONE).client) == (Refusal.REFUSES_CLOCK, Refusal.CLOCK)
    assert meet(member(ONE).server, off.client) == (Refusal.CLOCK, Refusal.REFUSES_CLOCK)


def test_is_a_clock_that_is_a_little_off_fine() -> None:
    early = member(ONE, now_s=NOW + CLOCK_SKEW_S - 60)
    assert meet(early.server, member(ONE, now_s=NOW - LEAF_RENEW_S).client) == (ANN, ANN)


def test_is_a_leaf_renewed_in_place() -> None:
    ann = member(ONE, now_s=NOW - LONG)
    assert ann.is_due(NOW)
    ann.renew(NOW)
    assert not ann.is_due(NOW)
    assert meet(ann.server, member(ONE, node=BEN).client) == (BEN, ANN)
    assert meet(member(ONE, node=BEN).server, ann.client) == (ANN, BEN)


@pytest.mark.parametrize("wrong_s", [30 * 3600.0, 2 * CLOCK_SKEW_S, -30 * 3600.0, -20 * 365 * 86400.0])
def test_a_leaf_of_a_wrong_clock_is_due_once_the_clock_is_right(wrong_s: float) -> None:
    ann = member(ONE, now_s=NOW + wrong_s)
    assert not ann.is_due(NOW + wrong_s)
    assert ann.is_due(NOW)
    ann.renew(NOW)
    assert meet(ann.server, member(ONE, node=BEN).client) == (BEN, ANN)


def test_a_leaf_is_due_in_time_and_not_for_a_clock_that_is_corrected_a_little() -> None:
    ann = member(ONE, now_s=NOW)
    assert [ann.is_due(NOW + s) for s in (-CLOCK_BACK_S, 0.0, LEAF_RENEW_S - 1)] == [False] * 3
    assert [ann.is_due(NOW + s) for s in (-CLOCK_BACK_S - 1, LEAF_RENEW_S)] == [True] * 2


def test_is_a_program_without_a_key_turned_away() -> None:
    server, client = meet(member(ONE).server, keyless(ssl.PROTOCOL_TLS_CLIENT))
    assert (server, client) == (Refusal.NO_KEY, Refusal.WANTS_KEY)


def test_is_tls_1_2_refused() -> None:
    old = keyless(ssl.PROTOCOL_TLS_CLIENT)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert meet(member(ONE).server, old) == (Refusal.OLD_TLS, Refusal.OLD_TLS)


def forged(issuer: ClusterKey, signer: ClusterKey, monkeypatch: pytest.MonkeyPatch) -> Identity:
    """A leaf that names one authority and is signed by another: all that can be made without the key."""
    monkeypatch.setattr(certificates, "_authority_name", lambda key: _name(issuer))
    public = certificates._authority(issuer)[0].public_key()
    named = x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
    monkeypatch.setattr(x509.AuthorityKeyIdentifier, "from_issuer_public_key", lambda key: named)
    return member(signer)


_name = certificates._authority_name


def test_is_a_forged_certificate_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    ann = member(ONE)
    mallory = forged(ONE, TWO, monkeypatch)
    mallory.client.verify_mode = ssl.CERT_NONE
    assert meet(ann.server, mallory.client) == (Refusal.FORGED, Refusal.REFUSES_KEY)
    assert meet(mallory.server, ann.client) == (Refusal.REFUSES_KEY, Refusal.FORGED)


def test_may_a_leaf_not_sign_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever steals a leaf is one node for a day, and makes no others."""
    stolen = certificates._issue(ONE, ANN, NOW)
    key = load_pem_private_key(stolen, None)
    assert isinstance(key, Ed25519PrivateKey)
    leaf = x509.load_pem_x509_certificate(stolen)
    monkeypatch.setattr(certificates, "_authority", lambda _: (key, b""))
    monkeypatch.setattr(certificates, "_authority_name", lambda _: leaf.subject)
    (tmp_path / "pem").write_bytes(certificates._issue(ONE, BEN, NOW) + leaf.public_bytes(Encoding.PEM))
    monkeypatch.undo()
    mallory = keyless(ssl.PROTOCOL_TLS_CLIENT)
    mallory.load_cert_chain(tmp_path / "pem")
    assert meet(member(ONE).server, mallory)[0] is Refusal.FORGED


@pytest.mark.parametrize("node", ["", "a" * 15, "A" * 16, "a" * 17])
def test_does_a_certificate_without_a_node_id_name_no_node(node: str) -> None:
    assert meet(member(ONE).server, member(ONE, node=node).client) == (None, ANN)


def feed(side: Literal["server", "client"], data: bytes, *, over: bool = False) -> Refusal | None:
    """How a handshake ends to which a stranger says this."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    ann = member(ONE)
    context = ann.server if side == "server" else ann.client
    connection = context.wrap_bio(incoming, outgoing, server_side=side == "server")
    incoming.write(data)
    if over:
        incoming.write_eof()
    with contextlib.suppress(ssl.SSLWantReadError):
        try:
            connection.do_handshake()
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLWantReadError):
                raise
            return refusal(error)
    return None


@pytest.mark.parametrize(
    ("side", "data"),
    [
        ("server", b"GET /swarm/link HTTP/1.1\r\n\r\n"),
        ("server", b"SWRM\x01" + bytes(16)),
        ("server", b"SSH-2.0-OpenSSH\r\n"),
        ("client", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        ("client", b"SWRM\x02"),
    ],
)
def test_is_plaintext_named_as_such(side: Literal["server", "client"], data: bytes) -> None:
    assert feed(side, data) is Refusal.PLAINTEXT


def test_is_a_handshake_cut_short_named_as_such() -> None:
    hello, incoming = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        member(ONE).client.wrap_bio(incoming, hello).do_handshake()
    said = hello.read()
    for end in (0, 3, 60, len(said)):
        assert feed("server", said[:end], over=True) is Refusal.HUNG_UP


def test_is_an_error_of_another_kind_left_alone() -> None:
    assert refusal(ConnectionResetError()) is None
    assert refusal(ssl.SSLError(1, "something new")) is Refusal.BROKEN


def test_are_refusals_one_line_that_say_what_to_do() -> None:
    for one in Refusal:
        assert "\n" not in one.value
        assert not one.value.endswith(".")


def test_does_nothing_of_a_leaf_stay_open() -> None:
    ann = member(ONE)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        ann.renew(NOW)
    assert len(os.listdir("/proc/self/fd")) == before


def test_does_a_repr_show_no_secret() -> None:
    assert repr(member(ONE, TWO)) == f"<Identity {ANN} of {ONE} and {TWO}>"
