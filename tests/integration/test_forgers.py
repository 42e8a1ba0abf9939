"""Members that send other bytes with the right XXH3 digests: pinned fetches take none, whatever the bytes are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import xxhash
from forgery import BLOCK_BYTES, forged, forging_source

import swarm
from swarm.api import serve_source
from swarm.content.manifest import Chunk, Manifest, ModelId
from swarm.settings import Settings
from swarm.store import FileSpan, Span

from .lying import LyingPeer
from .processes import MODEL, Machine, Process, contents, write_model

pytestmark = pytest.mark.integration

CHUNK = 1 << 20
SLOW_SEED = ("--upload-limit", "8MB/s")  # leaves the forger time to be asked


class Forger(LyingPeer):
    """Its chunks are as their XXH3 digests say, and other bytes than the model's. Their names are right: a manifest is
    pinned by its sha256."""

    def spans(self, chunks: list[Chunk]) -> Iterator[Span]:
        for chunk in chunks:
            data = b"".join(_bytes(span) for span in super().spans([chunk]))
            yield memoryview(forged(data) if len(data) > BLOCK_BYTES else data)


class OldManifest(Forger):
    """Its manifest has XXH3 digests alone."""

    @classmethod
    def of(cls, path: Path) -> OldManifest:
        honest = super().of(path)
        files = tuple(msgspec.structs.replace(file, blake3=()) for file in honest.manifest.files)
        return cls(msgspec.structs.replace(honest.manifest, files=files), honest.source)


def _bytes(span: Span) -> bytes:
    if isinstance(span, FileSpan):
        with open(span.fd, "rb", closefd=False) as file:
            file.seek(span.offset)
            return file.read(span.size)
    return bytes(span)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", size=4 << 20)


def test_what_a_forger_does_to_a_fetch_without_a_pin(machine: Machine, model: Path, tmp_path: Path) -> None:
    """This is why pins check BLAKE3."""
    with Forger.of(model) as forger:
        machine.fetch(tmp_path / "out", peers=[forger.address]).end()
    got, right = contents(tmp_path / "out"), contents(model)
    assert got.keys() == right.keys()
    assert got != right


PINS: list[Callable[[Manifest], tuple[tuple[str, ...], dict[str, str]]]] = [
    lambda manifest: (("--digest", manifest.digest), {}),
    lambda _: ((), {"SWARM_CHUNK_HASH": "blake3"}),
]


@pytest.mark.parametrize("pin", PINS, ids=["digest", "setting"])
def test_is_a_forger_refused_and_named(
    machine: Machine, model: Path, tmp_path: Path, pin: Callable[[Manifest], tuple[tuple[str, ...], dict[str, str]]]
) -> None:
    with Forger.of(model) as forger:
        flags, environment = pin(forger.manifest)
        alone = machine.fetch(tmp_path / "alone", *flags, peers=[forger.address], environment=environment)
        assert "Forger: sent 3 wrong chunks" in alone.end().error(4)
        assert contents(tmp_path / "alone") == {}
        seed = machine.serve(model, *SLOW_SEED, "--name", "honest")
        peers = [forger.address, seed.address]
        beside = machine.fetch(tmp_path / "beside", *flags, peers=peers, environment=environment)
        assert beside.end().report["rejected_chunks"] > 0
    assert contents(tmp_path / "beside") == contents(model)


def test_is_a_forged_tensor_refused(tmp_path: Path) -> None:
    tensor = torch.randint(0, 256, (8 << 20,), dtype=torch.uint8)
    evil = forging_source(tensor)
    seed = Settings(mdns=False, cache=tmp_path / "cache", find_timeout_s=10, stall_timeout_s=2, upload_limit=1e12)
    with serve_source(ModelId(MODEL), evil, None, settings=seed) as served:
        newcomer = dataclasses.replace(seed, peers=(served.address,), name="newcomer")
        with swarm.fetch(MODEL, settings=newcomer, timeout_s=60) as weights:
            assert not torch.equal(weights["w"], tensor)
        for into in (None, {"w": torch.zeros_like(tensor)}):
            with pytest.raises(swarm.Stalled, match="wrong chunk"):
                swarm.fetch(MODEL, into=into, settings=newcomer, timeout_s=60, digest=evil.manifest.digest)


def test_are_forged_bytes_of_an_unfinished_fetch_not_resumed(machine: Machine, model: Path, tmp_path: Path) -> None:
    """A fetch without a pin left them in the staging directory."""
    out = tmp_path / "out"

    class Faint(Forger):
        """Falls silent after two chunks."""

        def spans(self, chunks: list[Chunk]) -> Iterator[Span]:
            yield from super().spans(chunks[:2] if len(self.asked) <= 1 else [])
            raise ValueError("it never meant to")

    with Faint.of(model) as forger:
        left = machine.fetch(out, peers=[forger.address])
        left.end().error(4)
        seed = machine.serve(model)
        report = machine.fetch(out, "--digest", forger.manifest.digest, peers=[seed.address]).end().report
    assert contents(out) == contents(model)
    assert report["resumed_bytes"] < CHUNK


def test_is_a_manifest_that_cannot_be_pinned_an_error_that_says_what_to_do(
    machine: Machine, model: Path, tmp_path: Path
) -> None:
    with OldManifest.of(model) as old:
        pinned: Process = machine.fetch(tmp_path / "out", "--digest", old.manifest.digest, peers=[old.address])
        assert "serve it again with this version of swarm" in pinned.end().error(3)
    assert contents(tmp_path / "out") == {}


def test_is_a_signed_model_fetched_served_on_and_no_other_taken(machine: Machine, model: Path, tmp_path: Path) -> None:
    public = machine.run("keygen", "publisher.pem", "--publisher").out.split()[-1]
    signed = machine.run("sign", model, "--key", "publisher.pem", "--model-id", MODEL, "--revision", "v1")
    assert f"{MODEL}@v1 is " in signed.out
    wrong = write_model(tmp_path / "wrong", size=1 << 20, seed=2)
    liar = machine.serve(wrong, "--revision", "v1")
    seed = machine.serve(model, "--revision", "v1")
    peers = [liar.address, seed.address]
    flags = ("--revision", "v1", "--signed-by", public)
    machine.fetch(tmp_path / "first", *flags, peers=peers).end()
    again = machine.serve(tmp_path / "first", "--revision", "v1")
    seed.kill()
    machine.fetch(tmp_path / "second", *flags, peers=[liar.address, again.address]).end()
    right = contents(model)
    assert contents(tmp_path / "first") == contents(tmp_path / "second") == right
    assert "not signed for this id and revision" in machine.fetch(
        tmp_path / "third", "--revision", "v2", "--signed-by", public, peers=peers
    ).end().error(3)


def test_is_the_forgery_one() -> None:
    data = bytes(range(256)) * 20
    assert forged(data, block=2) != data
    assert xxhash.xxh3_128_digest(forged(data, block=2)) == xxhash.xxh3_128_digest(data)
