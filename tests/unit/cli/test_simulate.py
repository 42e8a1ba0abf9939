"""`swarm simulate`: what it accepts, prints, writes and exits with."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.cli import main as cli
from swarm.cli.main import main
from swarm.cli.simulate import failure, seconds_text, trace_line
from swarm.content.bitfield import Bitfield
from swarm.content.manifest import CHUNK_BYTES_MAX
from swarm.errors import LocalProtocolError, SettingsError
from swarm.protocol.messages import NodeId
from swarm.simulation.crowd import Crowd
from swarm.simulation.report import quantile
from swarm.simulation.setup import Burst
from swarm.transfer import download_events, upload

SMALL = ["simulate", "--newcomers", "4", "--chunks", "16", "--model", "1GB"]
LOST = [*SMALL, "--kill-seed-at", "50%"]


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def read(arguments: list[str]) -> Burst:
    """The burst that the command would play."""
    options = vars(cli._parser().parse_args(arguments))
    return Burst.read({name: options[name] for name in Burst.__dataclass_fields__})


# What it accepts


def test_what_do_words_mean() -> None:
    words = "--model 2GB --rate 10Gbit/s --delay 2 --noticed 3 --slow 25% --late 0.5 --chunks 64 --rng-seed -3"
    burst = read(["simulate", *words.split()])
    assert (burst.model_bytes, burst.rate_bytes_per_s) == (2 * 10**9, 1.25e9)
    assert (burst.delay_s, burst.noticed_s) == (0.002, 3.0)
    assert (burst.slow, burst.late, burst.rng_seed) == (0.25, 0.5, -3)
    assert read(["simulate", "--delay", "0.5ms"]) == read(["simulate"]) == Burst()
    assert read(["simulate", "--delay", "700us"]).delay_s == pytest.approx(0.0007)


parts = st.floats(0, 1)


@given(
    st.builds(
        Burst,
        newcomers=st.integers(1, 2000),
        seeds=st.integers(1, 9),
        chunks=st.integers(1024, 4096),
        model_bytes=st.integers(4096, 1024 * CHUNK_BYTES_MAX),
        rate_bytes_per_s=st.floats(1, 1e12),
        delay_s=st.floats(0, 10),
        rng_seed=st.integers(),
        kill_newcomers=parts,
        kill_seed_at=st.none() | parts,
        noticed_s=st.floats(0, 100),
        corrupt=st.floats(0, 0.5),
        liars=st.integers(0, 1),
        rack_slower=st.floats(0.1, 10),
    )
)
def test_does_the_command_of_a_setup_replay_it(burst: Burst) -> None:
    program, *arguments = shlex.split(burst.command)
    assert program == "swarm"
    assert read(arguments) == burst


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--newcomers 0", "newcomers: 0; at least 1"),
        ("--newcomers many", "newcomers: 'many' is not a whole number"),
        ("--seeds 0", "seeds: 0; at least 1 is needed, or 0 with an origin, for example --origin-rate 1Gbit/s"),
        ("--chunks 7", "chunks: 7 for 16000000000 bytes: it takes at least 239"),
        ("--chunks 32 --model 9B", "chunks: 32 for 9 bytes"),
        ("--model big", "model: 'big' is not a size such as 16GB"),
        ("--model 0GB", "model: 0; at least 1"),
        ("--rate 9", "rate: '9' is not a rate"),
        ("--rate 0MB/s", "rate: 0.0; at least 1"),
        ("--delay soon", "delay: 'soonms' is not a time"),
        ("--delay 1.2.3", "delay: '1.2.3' is not a number"),
        ("--slow 1.5", "slow: 1.5 is not a part"),
        ("--slow nan", "slow: nan is not a part"),
        ("--late half", "late: 'half' is not a number"),
        ("--kill-newcomers 101%", "kill-newcomers: 1.01 is not a part"),
        ("--kill-seed-at 2", "kill-seed-at: 2.0 is not a part"),
        ("--corrupt 1", "nothing to simulate"),
        ("--liars 33", "liars: 33 of 32 newcomers"),
        ("--racks 40", "racks: 40 for 33 machines"),
        ("--rack-slower 0", "rack-slower: 0.0 is not a number above zero"),
        ("--rack-slower inf", "rack-slower: inf is not a number above zero"),
        ("--runs 0", "runs: 0; at least 1"),
        ("--runs 2 --trace x", "trace: is of one run; leave out --runs"),
        ("--runs 2 --plot x", "plot: is of one run"),
    ],
)
def test_what_does_it_say_of_what_cannot_be_played(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *words.split()]) == SettingsError.exit_code
    out, err = printed(capsys)
    assert out == ""
    assert err.startswith("swarm: ")
    assert says in err
    assert err.count("\n") == 1


def test_what_is_the_lower_bound() -> None:
    assert Burst(newcomers=1, chunks=1024).bound_s == pytest.approx(12.8)  # no more than a plain copy
    assert Burst(newcomers=31, chunks=1024).bound_s == pytest.approx(12.8 * 1028 / 1024)
    assert Burst(newcomers=31, chunks=1024, per_machine=31).bound_s == pytest.approx(12.8)
    racks = Burst(newcomers=31, chunks=1024, racks=4, rack_slower=16)  # 8 links together, a 16th of that is half a link
    assert racks.bound_s == pytest.approx(2 * 12.8)


# What it prints


def test_what_is_printed_of_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--racks", "2", "--per-machine", "2", "--liars", "1", "--rng-seed", "2"]) == 0
    out, err = printed(capsys)
    assert err == ""
    assert out.startswith("4 newcomers, one seed, 1 GB in 16 chunks, links of 1.25 GB/s: one copy takes 800 ms\n")
    for words in ("done", "lower bound", "star", "1/4", "9/10", "all", "seeds sent", "control messages", "left a rack"):
        assert words in out
    assert "copies that entered a machine" in out
    assert "rejected chunks" in out


def test_who_was_banned_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--newcomers", "6", "--chunks", "48", "--model", "3GB", "--liars", "1"]) == 0
    assert "newcomer-0, which lies: banned by " in printed(capsys)[0]


def test_do_many_runs_give_median_and_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--runs", "3"]) == 0
    out, err = printed(capsys)
    assert err == ""
    for words in ("3 runs", "median", "least", "most", "all done", "times its lower bound", "last of a star 3.20 s"):
        assert words in out


def test_what_does_a_newcomer_that_never_finishes_make_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(LOST) == 1
    out, err = printed(capsys)
    assert "never" in out
    assert "4 of 4 newcomers (newcomer-0, newcomer-1, newcomer-2, ...) did not finish, " in err
    assert " of 16 chunks died with their last holders; replay it with: swarm simulate --newcomers 4 " in err
    assert err.count("\n") == 1
    assert main(shlex.split(err.rpartition("replay it with: ")[2])[1:]) == 1
    assert printed(capsys) == (out, err)


def test_is_a_bug_told_with_what_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise LocalProtocolError("broken")

    monkeypatch.setattr(upload.Upload, "handle", broken)
    assert main(SMALL) == 1
    assert "broken; replay it with: swarm simulate --newcomers 4 --chunks 16 --model 1GB\n" in printed(capsys)[1]


def test_what_is_said_when_all_chunks_are_there_and_a_newcomer_did_not_finish() -> None:
    report = Crowd(Burst(newcomers=2, chunks=16, model_bytes=10**9)).run(limit_s=0.5)
    assert "although every chunk has a holder, which is a bug in swarm; replay" in (failure(report) or "")


@pytest.mark.parametrize("runs", [1, 2])
def test_what_does_a_program_read(runs: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LOST, "--json", "--runs", str(runs), "--rng-seed", "5"]) == 1

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    told = json.loads(printed(capsys)[0], parse_constant=no_constant)
    assert told["setup"]["newcomers"] == 4
    assert told["bound_s"] > told["copy_s"] == pytest.approx(0.8)
    assert [run["rng_seed"] for run in told["runs"]] == list(range(5, 5 + runs))
    for run in told["runs"]:
        assert run["curve_s"]["all"] is run["last_ratio"] is None
        assert run["star_s"]["all"] == pytest.approx(3.2, abs=0.01)
        assert "did not finish" in run["failure"]
        assert len(run["unfinished"]) == 4


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.345, "12.35 s"), (0.25, "250 ms"), (math.inf, "never"), (math.nan, "-")]
)
def test_how_are_seconds_printed(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("part", "value"), [(0.25, 1.0), (0.5, 2.0), (0.75, 3.0), (0.9, 4.0), (1.0, 4.0)])
def test_which_is_the_quantile(part: float, value: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], part) == value
    assert math.isnan(quantile([], part))


# What it writes


def test_what_is_in_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert main([*SMALL, "--trace", str(path)]) == 0
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [path] == list(tmp_path.iterdir()), "no draft is left"
    assert all(isinstance(entry["at_s"], float) and entry["node"] and entry["what"] for entry in entries)
    assert [entry["at_s"] for entry in entries] == sorted(entry["at_s"] for entry in entries)
    verified = [entry for entry in entries if entry["what"] == "download.Announce"]
    assert sum(len(entry["chunks"]) for entry in verified) == 4 * 16
    assert {"crowd.Asked", "download.Complete", "upload.Grant"} <= {entry["what"] for entry in entries}


def test_what_is_a_line_of_a_trace() -> None:
    joined = download_events.PeerJoined(NodeId("seed-0"), Bitfield.full(9), superseeds=True)
    mates = download_events.Mates(frozenset({NodeId("b"), NodeId("a")}), frozenset())
    common = {"at_s": 1.5, "node": "newcomer-0"}
    place = {"superseeds": True, "distance": 0, "usual_bytes_per_s": 0.0}
    assert [json.loads(trace_line(1.5, "newcomer-0", what)) for what in (joined, mates)] == [
        {**common, "what": "download.PeerJoined", "peer": "seed-0", "holds": 9, **place},
        {**common, "what": "download.Mates", "on_host": ["a", "b"], "in_rack": []},
    ]


def test_is_a_trace_of_a_bug_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise LocalProtocolError("broken")

    monkeypatch.setattr(upload.Upload, "handle", broken)
    assert main([*SMALL, "--trace", str(tmp_path / "trace")]) == 1
    assert '"upload.Requested"' in (tmp_path / "trace").read_text(encoding="utf-8").splitlines()[-1]


@pytest.mark.parametrize("flag", ["--trace", "--plot"])
def test_what_if_a_file_cannot_be_written(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if flag == "--plot":
        pytest.importorskip("matplotlib")
    path = tmp_path / "nowhere" / "file.png"
    assert main([*SMALL, flag, str(path)]) == 5
    assert f"swarm: {path}: cannot be written (No such file or directory)" in printed(capsys)[1]


def test_is_a_file_left_as_it_was_when_a_run_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "trace").write_text("before", encoding="utf-8")
    monkeypatch.setattr(upload.Upload, "handle", interrupted)
    assert main([*SMALL, "--trace", str(tmp_path / "trace")]) == 130
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"trace": "before"}


def test_is_a_picture_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    assert main([*SMALL, "--plot", str(path), "--kill-newcomers", "0.5"]) == 0
    assert "<svg" in path.read_text(encoding="utf-8")
    assert [path] == list(tmp_path.iterdir())


def test_what_if_a_picture_is_of_no_known_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([*SMALL, "--plot", str(tmp_path / "picture.txt")]) == 2
    assert "picture.txt is no picture; " in printed(capsys)[1]


def test_what_if_there_is_no_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*SMALL, "--plot", str(tmp_path / "picture.png")]) == 2
    says = "swarm: plot: matplotlib is not installed; it comes with: pip install 'swarm-weights[plot]'\n"
    assert printed(capsys) == ("", says)
