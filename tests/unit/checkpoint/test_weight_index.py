"""Which files hold the tensors of a checkpoint, and what is said of one that is incomplete."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from swarm.checkpoint import manifest_builder
from swarm.content import safetensors_header
from swarm.content.manifest import Manifest, decode
from swarm.errors import ManifestInvalid
from swarm.store.memory import TensorIndex

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 4976698672\n"


def weights(*names: str) -> bytes:
    header = safetensors_header.compose([(name, "U8", (4,), 4) for name in names])
    return len(header).to_bytes(8, "little") + header + b"".join(name.encode().ljust(4)[:4] for name in names)


def index(**shards: str) -> bytes:
    return json.dumps({"weight_map": shards}).encode()


def fill(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def built(root: Path, files: dict[str, bytes]) -> Manifest:
    manifest, source, _ = manifest_builder.checkpoint(fill(root / "m", files), cache_dir=root / "cache")
    with closing(source):
        assert decode(manifest.encoded, digest=manifest.digest) == manifest
        return manifest


def owners(manifest: Manifest) -> dict[str, str]:
    """File of each tensor."""
    tensors = TensorIndex(manifest)
    by_file = zip(manifest.files, tensors.by_file, strict=True)
    return {t.name: file.path for file, entries in by_file for t in entries if tensors.owners.get(t.name) is t}


def gguf() -> bytes:
    """A vocabulary of two tokens, alignment 64, and a tensor of 2 x 32 in blocks of 4 bits."""
    vocabulary = string(b"tokens") + struct.pack("<IIQ", 9, 8, 2) + string(b"a") + string(b"b")
    alignment = string(b"general.alignment") + struct.pack("<II", 4, 64)
    tensor = string(b"w") + struct.pack("<IQQIQ", 2, 32, 2, 2, 64)
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + vocabulary + alignment + tensor
    return header.ljust(-(-len(header) // 64) * 64) + b"x" * (64 + 2 * 18)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def archive() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    return data.getvalue()


TWO = {"s-1.safetensors": weights("a"), "s-2.safetensors": weights("b")}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"model.safetensors": weights("a")}, {"a": "model.safetensors"}, id="no index"),
        pytest.param(
            TWO
            | {"model.safetensors.index.json": index(a="s-1.safetensors", b="s-2.safetensors")}
            | {"consolidated.safetensors": weights("a", "z"), "broken.safetensors": b"no header"},
            {"a": "s-1.safetensors", "b": "s-2.safetensors"},
            id="files beside the index",
        ),
        pytest.param(
            {"s-1.safetensors": weights("a", "x"), "s-2.safetensors": weights("x", "more")}
            | {"model.safetensors.index.json": index(a="s-1.safetensors", x="s-2.safetensors")},
            {"a": "s-1.safetensors", "x": "s-2.safetensors", "more": "s-2.safetensors"},
            id="tensor in two files",
        ),
        pytest.param(
            TWO | {"model.safetensors.index.json": index(a="s-2.safetensors", b="s-2.safetensors")},
            {"b": "s-2.safetensors"},
            id="index names one file",
        ),
        pytest.param(
            {"s-1.safetensors": weights("a", "x"), "s-2.safetensors": weights("b")}
            | {"model.safetensors.index.json": index(a="s-1.safetensors", b="s-2.safetensors", x="s-2.safetensors")},
            {"a": "s-1.safetensors", "b": "s-2.safetensors", "x": "s-1.safetensors"},
            id="index names a file that lacks the tensor",
        ),
        pytest.param(
            {"m.safetensors": weights("a"), "model.safetensors.index.json": index(a="m.safetensors")}
            | {"c.safetensors": weights("c"), "consolidated.safetensors.index.json": index(c="c.safetensors")},
            {"a": "m.safetensors"},
            id="index of another library",
        ),
        pytest.param(
            {"unet/m.safetensors": weights("a"), "unet/m.safetensors.index.json": index(a="m.safetensors")}
            | {"vae/m.safetensors": weights("v")},
            {"a": "unet/m.safetensors", "v": "vae/m.safetensors"},
            id="index of a folder",
        ),
        pytest.param(
            TWO
            | {"model.safetensors.index.json": index(a="s-1.safetensors", b="s-2.safetensors")}
            | {"original/consolidated.safetensors": weights("a"), "vae/m.safetensors": weights("v")}
            | {"vae/m.safetensors.index.json": index(v="m.safetensors")},
            {"a": "s-1.safetensors", "b": "s-2.safetensors", "v": "vae/m.safetensors"},
            id="files below the index",
        ),
        pytest.param(
            {
                "model.safetensors": weights("a"),
                "consolidated.safetensors": weights("l.a"),
                "x.safetensors": weights("x"),
            },
            {"a": "model.safetensors", "x": "x.safetensors"},
            id="the same weights for another library",
        ),
        pytest.param({"consolidated.safetensors": weights("a")}, {"a": "consolidated.safetensors"}, id="only that"),
    ],
)
def test_are_tensors_those_of_the_files_that_the_index_names(
    files: dict[str, bytes], expected: dict[str, str], tmp_path: Path
) -> None:
    manifest = built(tmp_path, files)
    assert owners(manifest) == expected
    assert {file.path for file in manifest.files} == files.keys()


def test_does_a_new_index_count_for_files_that_are_hashed_already(tmp_path: Path) -> None:
    built(tmp_path, TWO)
    manifest = built(tmp_path, {"model.safetensors.index.json": index(a="s-1.safetensors")})
    assert owners(manifest) == {"a": "s-1.safetensors"}
    assert manifest_builder.known(tmp_path / "m", cache_dir=tmp_path / "cache") in (None, manifest)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"model.safetensors.index.json": index(a="s.safetensors")}, "are missing: s.safe"),
        (TWO | {"model.safetensors.index.json": index(a="s-1.safetensors", b="t.safetensors")}, "t.safetensors; "),
        ({"pytorch_model.bin.index.json": index(a="a.bin", b="b.bin"), "a.bin": b"x"}, r"missing: b\.bin"),
        ({"model-00002-of-00003.safetensors": weights("a")}, "missing: model-00001-of-00003"),
        ({"q/m-00001-of-00002.gguf": b"x"}, r"q/m-00002-of-00002\.gguf"),
        ({"pytorch_model-00000-of-00002.bin": b"x"}, r"pytorch_model-00001-of-00002\.bin"),
        ({"model.safetensors": POINTER}, r"git-lfs pointer in place of the file of 4976698672 bytes; run `git"),
        ({"pytorch_model.bin": POINTER}, "git-lfs pointer"),
        ({"model.gguf": POINTER}, "git-lfs pointer"),
        ({"model.safetensors.index.json": POINTER}, "git-lfs pointer"),
        ({"model.safetensors": POINTER.replace(b"\n", b"\r\n")}, "git-lfs pointer in place of the file of 49766"),
        ({"tokenizer.json": POINTER, "model.safetensors": weights("a")}, "tokenizer.json: is a git-lfs pointer"),
        ({"u/d.safetensors.index.fp16.json": index(a="d-00001-of-00002.fp16.safetensors")}, "are missing: u/d-00001"),
        ({"model.fp16-00001-of-00002.safetensors": weights("a")}, r"model\.fp16-00002-of-00002\.safetensors"),
        ({"d-00001-of-00002.fp16.safetensors": weights("a")}, r"d-00002-of-00002\.fp16\.safetensors"),
        ({"tf_model.h5.index.json": index(a="tf_model-00001-of-00001.h5")}, r"tf_model-00001-of-00001\.h5"),
        ({"model.safetensors": b""}, "too short|empty"),
        ({"pytorch_model.bin": b""}, "is empty"),
        ({"pytorch_model.bin": b"PK\3\4" + b"x" * 99}, "truncated: 103 bytes without an end of its archive"),
        ({"m.gguf": gguf()[:-1]}, r"m\.gguf: is truncated: \d+ bytes of at least \d+"),
        ({"m.gguf": gguf()[:40]}, r"m\.gguf: is truncated: 40 bytes"),
        ({"model.safetensors": weights("a"), "model.safetensors.aria2": b"x"}, "unfinished download of model.safet"),
        ({"m.gguf": b"<!DOCTYPE html><html>"}, r"m\.gguf: is a web page"),
        ({"pytorch_model.bin": b"\n<HTML><head>"}, r"pytorch_model\.bin: is a web page"),
        ({"m.gguf.part": b"x"}, r"unfinished download of m\.gguf"),
        ({"config.json": b'{"architectures": ["LlamaForCausalLM"]}'}, "is of LlamaForCausalLM, and no weights"),
        ({"vae/config.json": b'{"architectures": ["Vae"]}', "model.safetensors": weights("a")}, "vae/config.json: "),
        ({"adapter_config.json": b'{"peft_type": "LORA"}', "README.md": b"x"}, "is of LORA, and no weights"),
    ],
)  # fmt: skip
def test_is_an_incomplete_checkpoint_refused_with_what_is_missing(
    files: dict[str, bytes], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ManifestInvalid, match=says):
        built(tmp_path, {"config.json": b"{}"} | files)


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": weights("a"), "pytorch_model.bin.index.json": index(a="p-00001-of-00001.bin")},
        {"a-00001-of-00001.gguf": b"x", "notes-1-of-3.gguf": b"x"},
        {"p-00000-of-00002.bin": b"x", "p-00001-of-00002.bin": b"x"},
        {"m.safetensors": weights("a"), "model.safetensors.index.json": index(a="m.safetensors")}
        | {"old-00001-of-00002.safetensors": weights("a")},
        {"m.gguf": gguf(), "other.gguf": b"GGUF of a later version", "pytorch_model.bin": archive()},
        {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "onnx/model.onnx": b"x"},
        {"config.json": b'{"architectures": ["X"]}', "adapter_config.json": b"no JSON", "w.ckpt": b"x"},
        {"config.json": b"{}", "tokenizer.json": b"{}"},
        {"u/d.safetensors.index.fp16.json": index(a="d-00001-of-00001.fp16.safetensors")}
        | {"u/d-00001-of-00001.fp16.safetensors": weights("a")},
    ],
)
def test_is_a_complete_checkpoint_served(files: dict[str, bytes], tmp_path: Path) -> None:
    assert len(built(tmp_path, files).files) == len(files)


def test_is_a_single_gguf_file_a_model(tmp_path: Path) -> None:
    path = fill(tmp_path, {"m.gguf": b"GGUF"}) / "m.gguf"
    manifest, source, _ = manifest_builder.checkpoint(path, cache_dir=tmp_path / "cache")
    source.close()
    assert [file.path for file in manifest.files] == ["m.gguf"]
