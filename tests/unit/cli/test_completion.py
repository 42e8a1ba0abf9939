"""What may stand for the word that is being typed: everything comes from the parser."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.cli import completion
from swarm.cli.main import _commands, _parser, main

IDS = ["org/small", "org/smaller", "other/model"]


def answer(*words: str) -> list[str]:
    return [line.partition("\t")[0] for line in completion.answer(_commands(_parser()), words, IDS)]


def test_are_all_commands_offered_with_their_help() -> None:
    lines = completion.answer(_commands(_parser()), [""], IDS)
    assert "fetch\tFetch a model from peers, or from its origin where none has it." in lines
    assert set(answer("")) == set(_commands(_parser()))
    assert answer("ver") == ["verify"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("fetch", "org/"), ["org/small", "org/smaller"]),
        (("fetch", "org/small", "--ind"), []),
        (("fetch", "org/small", "--inc"), ["--include"]),
        (("fetch", "--include", ""), []),  # a pattern is no file
        (("fetch", "--out", ""), [completion.FILES]),
        (("fetch", "--out=x", "or"), ["org/small", "org/smaller"]),
        (("serve", "o"), ["org/small", "org/smaller", "other/model", completion.FILES]),
        (("replay", ""), [completion.FILES]),
        (("help", "keyg"), ["keygen"]),
        (("completion", "z"), ["zsh"]),
        (("keygen", "-"), ["-h", "--help", "-v", "--verbose", "-q", "--quiet", "--log-json", "--publisher"]),
        (("status", "--watch", "--w"), []),  # it is there
        (("fetch", "x", "--include", "*.json", "--inc"), ["--include"]),  # it may come again
        (("run", "--no-m"), ["--no-mdns"]),
        (("run", "--", "vllm", "serve", "--"), [completion.FILES]),
        (("storage", "hf://org/model", ""), [completion.FILES]),
        (("no-such-command", ""), []),
    ],
)  # fmt: skip
def test_what_is_offered(words: tuple[str, ...], offered: list[str]) -> None:
    found = answer(*words)
    assert found == offered


def test_without_a_place_left_the_flags_are_offered_once() -> None:
    assert "--watch" in answer("status", "")
    assert "-v" not in answer("status", "")


def test_does_the_command_answer_with_the_models_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models--org--my--model").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["completion", "bash", "--", "fetch", "o"]) == 0
    assert capsys.readouterr().out == "org/my--model\n"


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_is_the_script_printed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert f"swarm completion {shell} -- " in capsys.readouterr().out
