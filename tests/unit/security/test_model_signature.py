"""Signatures of OpenSSF Model Signing: one that its own program made, and what is none."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from swarm.errors import ManifestInvalid, SettingsError
from swarm.security.model_signature import public_key, signed_files

# Made by model_signing 1.1.1 from a directory with config.json and sub/w.bin.
KEY = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEZJuGsffyJFgkOMjTgSFpp/RHBPWz
hyHu2IQg0zbcxYb0c1N3NXqRKtpLwpMr/Bgegw/LHWQwBb/AfgWejiqEww==
-----END PUBLIC KEY-----"""
PAYLOAD = (
    b"ewogICJfdHlwZSI6ICJodHRwczovL2luLXRvdG8uaW8vU3RhdGVtZW50L3YxIiwKICAic3ViamVjdCI6IFsKICAgIHsKICAgICAg"
    b"Im5hbWUiOiAibXNtIiwKICAgICAgImRpZ2VzdCI6IHsKICAgICAgICAic2hhMjU2IjogImU4ODdiZTQ4NTcyYWRlMjEzMjQzMGZi"
    b"ZGRlYmU1ZDVhNmVmMjA0OWRkOWQ3YzVmNjJiZDVlZGY2YjIxMDBkMjUiCiAgICAgIH0KICAgIH0KICBdLAogICJwcmVkaWNhdGVU"
    b"eXBlIjogImh0dHBzOi8vbW9kZWxfc2lnbmluZy9zaWduYXR1cmUvdjEuMCIsCiAgInByZWRpY2F0ZSI6IHsKICAgICJzZXJpYWxp"
    b"emF0aW9uIjogewogICAgICAibWV0aG9kIjogImZpbGVzIiwKICAgICAgImFsbG93X3N5bWxpbmtzIjogZmFsc2UsCiAgICAgICJp"
    b"Z25vcmVfcGF0aHMiOiBbCiAgICAgICAgIi5naXQiLAogICAgICAgICIuZ2l0YXR0cmlidXRlcyIsCiAgICAgICAgIi5naXRodWIi"
    b"LAogICAgICAgICIuZ2l0aWdub3JlIgogICAgICBdLAogICAgICAiaGFzaF90eXBlIjogInNoYTI1NiIKICAgIH0sCiAgICAicmVz"
    b"b3VyY2VzIjogWwogICAgICB7CiAgICAgICAgImRpZ2VzdCI6ICJlMzQ2NDMyMDIxYjA0MTc5NTE4ZDk2MTRmMzU2MGNjZDcxMzU0"
    b"YTRlZTEwMWRkY2I4OTNkNjk1OWE5ZDYzMDFjIiwKICAgICAgICAiYWxnb3JpdGhtIjogInNoYTI1NiIsCiAgICAgICAgIm5hbWUi"
    b"OiAiY29uZmlnLmpzb24iCiAgICAgIH0sCiAgICAgIHsKICAgICAgICAiZGlnZXN0IjogIjY4ZDJhMDFmMzQ1NTIzODA3Yjg2NDcz"
    b"ZWMyYThmZmU2YTg1ODI5Y2RjYTJmOWM4YjNiZmM1ZWE3NGE5NWZiYWQiLAogICAgICAgICJhbGdvcml0aG0iOiAic2hhMjU2IiwK"
    b"ICAgICAgICAibmFtZSI6ICJzdWIvdy5iaW4iCiAgICAgIH0KICAgIF0KICB9Cn0="
)
BUNDLE = b"""{
 "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
 "verificationMaterial": {
  "publicKey": {
   "hint": "9fb29e61a38690537ab7591d54cb06b5d2a31bec3a39346d4aa8550d70f05db7"
  },
  "tlogEntries": []
 },
 "dsseEnvelope": {
  "payload": "@P@",
  "payloadType": "application/vnd.in-toto+json",
  "signatures": [
   {
    "sig": "MEUCIQDgi92d24T290eFJ52hE1LGejU6egUIV1Hh8qRrHIAmTwIgNtmcaQhBjX4nXnXaZW3prLDCzcxY4a9zyHtkl4DNqNk=",
    "keyid": ""
   }
  ]
 }
}""".replace(b"@P@", PAYLOAD)


def changed(**fields: Any) -> bytes:
    """The bundle with other fields in its envelope."""
    bundle = json.loads(BUNDLE)
    bundle["dsseEnvelope"].update(fields)
    return json.dumps(bundle).encode()


def test_is_a_signature_of_the_program_taken() -> None:
    assert signed_files(BUNDLE, public_key(KEY)) == {
        "config.json": "e346432021b04179518d9614f3560ccd71354a4ee101ddcb893d6959a9d6301c",
        "sub/w.bin": "68d2a01f345523807b86473ec2a8ffe6a85829cdca2f9c8b3bfc5ea74a95fbad",
    }


def test_is_a_signature_with_another_key_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(ManifestInvalid, match=r"model.sig: is not signed with this key"):
        signed_files(BUNDLE, public_key(pem))


def test_is_another_statement_under_the_signature_refused() -> None:
    payload = base64.b64decode(json.loads(BUNDLE)["dsseEnvelope"]["payload"]).replace(b"config.json", b"cOnfig.json")
    with pytest.raises(ManifestInvalid, match="is not signed with this key"):
        signed_files(changed(payload=base64.b64encode(payload).decode()), public_key(KEY))


@pytest.mark.parametrize(
    "bundle",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        changed(payloadType="text/plain"),
        changed(payload="?"),
        changed(payload="\u1000"),
        changed(signatures=[]),
    ],
    ids=["empty", "no_envelope", "nested", "kind", "no_base64", "beyond_ascii", "unsigned"],
)
def test_what_is_no_signature(bundle: bytes) -> None:
    with pytest.raises(ManifestInvalid, match=r"model.sig: is not a signature of OpenSSF Model Signing"):
        signed_files(bundle, public_key(KEY))


@pytest.mark.parametrize(
    "material",
    [{"certificate": {"rawBytes": "AAAA"}, "tlogEntries": []}, {"x509CertificateChain": {"certificates": []}}],
    ids=["keyless", "chain"],
)
def test_is_a_signature_without_a_key_told_from_a_wrong_one(material: dict[str, Any]) -> None:
    bundle = json.dumps({**json.loads(BUNDLE), "verificationMaterial": material}).encode()
    with pytest.raises(ManifestInvalid, match=r"an identity \(keyless Sigstore, .*model_signing verify sigstore"):
        signed_files(bundle, public_key(KEY))


def test_what_is_no_key() -> None:
    with pytest.raises(SettingsError, match="not a public key in PEM"):
        public_key(b"ssh-ed25519 AAAA")
    small = ec.generate_private_key(ec.SECP224R1()).public_key()
    with pytest.raises(SettingsError, match="curve P-256"):
        public_key(small.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
