"""OpenSSF Model Signing (https://github.com/sigstore/model-transparency): `model.sig`, and what it says of a model.

    model.sig = Sigstore bundle (JSON) > DSSE envelope > in-toto statement > resources: path, sha256 of the file
    signature = ECDSA over "DSSEv1" SP length(type) SP type SP length(payload) SP payload     (secure-systems-lab/dsse)

Only signatures with a key are verified here. Those with an identity need Sigstore's trust root, which changes and comes
from the network: for them there is the program `model_signing`, and a line says so.

Must not know: the files on the disk.
"""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from swarm.content.manifest import FILES_MAX, PATH_BYTES_MAX
from swarm.errors import ManifestInvalid, SettingsError

FILE_NAME = "model.sig"
BUNDLE_BYTES_MAX = 64 << 20
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_HASHES = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}  # by the size of the curve in bits


class _Signature(msgspec.Struct):
    sig: str


class _Envelope(msgspec.Struct, rename="camel"):
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[list[_Signature], msgspec.Meta(min_length=1, max_length=1)]


class _Material(msgspec.Struct, rename="camel", frozen=True):
    """What the signer gives for the verification: a key, or a certificate of an identity."""

    certificate: object = None
    chain: object = msgspec.field(default=None, name="x509CertificateChain")


class _Bundle(msgspec.Struct, rename="camel"):
    dsse_envelope: _Envelope
    verification_material: _Material = _Material()


class _Resource(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=PATH_BYTES_MAX)]
    algorithm: Literal["sha256"]
    digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class _Predicate(msgspec.Struct):
    resources: Annotated[list[_Resource], msgspec.Meta(max_length=FILES_MAX)]


class _Statement(msgspec.Struct):
    type_: Literal["https://in-toto.io/Statement/v1"] = msgspec.field(name="_type")
    predicate_type: Literal["https://model_signing/signature/v1.0"] = msgspec.field(name="predicateType")
    predicate: _Predicate


_bundles = msgspec.json.Decoder(_Bundle)
_statements = msgspec.json.Decoder(_Statement)


def public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a signer, in PEM. Raises SettingsError."""
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError as error:
        raise SettingsError("model_signature", f"not a public key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.key_size not in _HASHES:
        raise SettingsError("model_signature", "not the public key of a curve P-256, P-384 or P-521")
    return key


def signed_files(bundle: bytes, key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """sha256 of each file by path, as the signer says. Raises ManifestInvalid unless the signature is this key's."""
    if len(bundle) > BUNDLE_BYTES_MAX:
        raise ManifestInvalid(FILE_NAME, f"has more than {BUNDLE_BYTES_MAX} bytes")
    try:
        found = _bundles.decode(bundle)
        envelope, material = found.dsse_envelope, found.verification_material
        payload = base64.b64decode(envelope.payload, validate=True)
        signature = base64.b64decode(envelope.signatures[0].sig, validate=True)
    except (ValueError, RecursionError) as error:  # ValueError: also of base64, for letters beyond ASCII
        raise ManifestInvalid(FILE_NAME, f"is not a signature of OpenSSF Model Signing: {error}") from error
    if material.certificate or material.chain:
        raise ManifestInvalid(
            FILE_NAME,
            "is signed with a certificate of an identity (keyless Sigstore, or an authority of your own) and without a "
            "key: its trust root is not here; use `model_signing verify sigstore`, or `verify certificate`",
        )
    try:
        key.verify(signature, _encoded(envelope.payload_type, payload), ec.ECDSA(_HASHES[key.curve.key_size]))
    except InvalidSignature:
        raise ManifestInvalid(FILE_NAME, "is not signed with this key") from None
    try:
        resources = _statements.decode(payload).predicate.resources
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(FILE_NAME, f"says nothing of files: {error}") from error
    return {resource.name: resource.digest for resource in resources}


def _encoded(kind: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
