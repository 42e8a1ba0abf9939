"""What does a signature prove, and what is none?"""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from swarm.content.manifest import Digest, ModelId
from swarm.errors import SettingsError
from swarm.security import signatures

MODEL, DIGEST = ModelId("org/model"), Digest("ab" * 32)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    signatures.create(tmp_path / "publisher.pem")
    return tmp_path / "publisher.pem"


def test_does_a_signature_hold_for_its_id_digest_and_revision_alone(key: Path) -> None:
    private = signatures.read_key(key)
    mine = [signatures.public(private)]
    signed = signatures.sign(private, MODEL, DIGEST, revision="v1")
    assert signatures.valid([signed], mine, MODEL, DIGEST, revision="v1") == (signed,)
    assert signatures.valid([signed], mine, MODEL, DIGEST, revision=None) == (signed,)
    assert signatures.valid([signed], mine, MODEL, DIGEST, revision="v2") == ()
    assert signatures.valid([signed], mine, ModelId("org/other"), DIGEST, revision="v1") == ()
    assert signatures.valid([signed], mine, MODEL, Digest("cd" * 32), revision="v1") == ()
    assert signatures.valid([signed], ["00" * 32], MODEL, DIGEST, revision="v1") == ()


@pytest.mark.parametrize("change", [{"revision": "v2"}, {"model_id": "org/other"}, {"signature": "00" * 64}])
def test_is_an_altered_signature_none(key: Path, change: dict[str, str]) -> None:
    private = signatures.read_key(key)
    altered = msgspec.structs.replace(signatures.sign(private, MODEL, DIGEST, revision="v1"), **change)
    asked = ModelId(altered.model_id)
    assert signatures.valid([altered], [altered.publisher], asked, DIGEST, revision=None) == ()


def test_is_another_publishers_name_on_a_signature_none(key: Path, tmp_path: Path) -> None:
    signed = signatures.sign(signatures.read_key(key), MODEL, DIGEST)
    stolen = msgspec.structs.replace(signed, publisher=signatures.create(tmp_path / "other.pem"))
    assert signatures.valid([stolen], [stolen.publisher], MODEL, DIGEST, revision=None) == ()
    no_point = msgspec.structs.replace(signed, publisher="ff" * 32)
    assert signatures.valid([no_point], [no_point.publisher], MODEL, DIGEST, revision=None) == ()


def test_is_a_key_private_and_never_overwritten(key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    with pytest.raises(SettingsError, match="never overwritten"):
        signatures.create(key)
    assert key.read_bytes() == before


def test_what_is_no_key(tmp_path: Path) -> None:
    place = tmp_path / "k"
    with pytest.raises(SettingsError, match="does not exist; make one with: swarm keygen"):
        signatures.read_key(place)
    place.write_text("swarm-key-1:q83v")
    with pytest.raises(SettingsError, match="is not a private key in PEM"):
        signatures.read_key(place)
    subprocess.run(["openssl", "genpkey", "-algorithm", "x25519", "-out", place], check=True, timeout=60)
    with pytest.raises(SettingsError, match="is not an Ed25519 key"):
        signatures.read_key(place)


def test_is_a_key_of_openssl_taken(tmp_path: Path) -> None:
    place = tmp_path / "k"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", place], check=True, timeout=60)
    private = signatures.read_key(place)
    signed = signatures.sign(private, MODEL, DIGEST)
    assert signatures.valid([signed], [signatures.public(private)], MODEL, DIGEST, revision=None)
