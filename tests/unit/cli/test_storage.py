"""Sources and directories of `swarm storage`, as KServe calls its storage initializer."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.cli import main as cli
from swarm.cli.storage import pairs, patterns
from swarm.errors import SettingsError


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("org/model", "org/model"),
        ("org/model@v2", "org/model@v2"),
        ("hf://org/model", "hf://org/model"),
        ("hf://org/model:0123abcd", "hf://org/model@0123abcd"),
        ("hf://org/model:refs/pr/1", "hf://org/model@refs/pr/1"),
        ("s3://bucket/dir", "s3://bucket/dir"),
        ("gs://bucket/a:b@c", "gs://bucket/a:b@c"),
        ("https://host:8443/dir/", "https://host:8443/dir/"),
        ("file:///mnt/nfs/model", "file:///mnt/nfs/model"),
        ("/mnt/pvc/model", "file:///mnt/pvc/model"),
    ],
)
def test_are_sources_those_of_kserve(said: str, meant: str) -> None:
    assert pairs([said, "/mnt/models"]) == [(meant, Path("/mnt/models"))]


def test_are_several_sources_taken_in_pairs() -> None:
    assert pairs(["org/a", "/a", "hf://org/b:v1", "/b"]) == [("org/a", Path("/a")), ("hf://org/b@v1", Path("/b"))]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["org/a"], "has no directory"),
        (["org/a", "/a", "org/b"], "org/b has no directory"),
        (["hf://model", "/a"], "is not hf://org/model"),
        (["hf://org/model/file", "/a"], "is not hf://org/model"),
        (["model", "/a"], "is not hf://org/model"),
        (["pvc://claim/model", "/a"], "mounted by KServe"),
    ],
)
def test_is_a_wrong_call_an_error_of_usage(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match=why):
        pairs(words)
    assert cli.main(["storage", *words]) == 2
    assert why in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("[]", None),
        ('["*.safetensors", " *.json "]', ["*.safetensors", "*.json"]),
        ("*.safetensors, *.json", ["*.safetensors", "*.json"]),
        ('"*.gguf"', ["*.gguf"]),
        ("[unclosed", ["[unclosed"]),
    ],
)
def test_are_patterns_read_as_kserve_reads_them(text: str, expected: list[str] | None) -> None:
    assert patterns({"STORAGE_ALLOW_PATTERNS": text}, "STORAGE_ALLOW_PATTERNS") == expected
    assert patterns({}, "STORAGE_ALLOW_PATTERNS") is None
