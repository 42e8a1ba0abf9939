"""The command: its flags, what it prints, its exit codes, and what it must not import."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import swarm
from swarm import errors
from swarm.checkpoint.digest_cache import remember
from swarm.checkpoint.manifest_builder import checkpoint
from swarm.cli import commands, kept
from swarm.cli import main as cli
from swarm.cli.main import main
from swarm.node import status_client
from swarm.security import cluster_key
from swarm.settings import Settings
from swarm.store.partial_directory import PARTIAL

COMMANDS = ["serve", "fetch", "status", "storage", "verify", "ls", "rm", "keygen", "demo", "simulate"]
DEADLINE_S = 60.0
LOCAL = ["--no-mdns"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's caches nor a swarm.toml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}" * 500)
    return tmp_path / "model"


@pytest.fixture
def ready_line(model: Path, tmp_path: Path) -> Iterator[str]:
    """What `swarm serve` in a process of its own says once others can fetch."""
    arguments = [sys.executable, "-m", "swarm", "serve", str(model), "--model-id", "org/model", *LOCAL]
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(swarm.__file__).parent.parent), "SWARM_NAME": "seed"},
    ) as process:
        killer = threading.Timer(DEADLINE_S, process.kill)
        killer.start()
        try:
            line = process.stdout.readline() if process.stdout else ""
            assert " ready: org/model, " in line
            yield line
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0  # stopping a seed is no failure
        finally:
            killer.cancel()
            process.kill()


@pytest.fixture
def seed(ready_line: str) -> str:
    """The address of a running `swarm serve`."""
    return ready_line.split()[0]


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_which_version_is_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert printed(capsys)[0] == f"swarm {swarm.__version__}\n"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_has_every_command_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*filter(None, [command]), "--help"])
    out, _ = printed(capsys)
    assert f"usage: swarm {command}" in out
    if not command:
        assert all(out.count(f"\n  {each} ") == 1 for each in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["fly"], ["serve"], ["fetch"], ["verify"], ["fetch", "x", "--no-such-flag"],
        ["serve", "x", "--timeout", "2.5"], ["fetch", "x", "--out", ""],
    ],
)  # fmt: skip
def test_is_a_wrong_command_line_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    name = " ".join(["swarm", *(each for each in arguments[:1] if each in COMMANDS)])
    told, hint = printed(capsys)[1].splitlines()
    assert told.startswith(f"{name}: ")
    assert hint == f"see `{name} --help`"


@pytest.mark.parametrize("command", ["fetch x", "status", "verify x", "simulate", "demo"])
def test_help_of_the_command_is_named_for_an_unknown_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--no-such-flag"])
    name = f"swarm {command.split()[0]}"
    assert printed(capsys)[1] == f"{name}: unrecognized arguments: --no-such-flag\nsee `{name} --help`\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("fetch --bogus", "unrecognized arguments: --bogus"),
        ("fetch --bogus=3 x", "unrecognized arguments: --bogus"),
        ("serve --lisen 0.0.0.0", "unrecognized arguments: --lisen; did you mean --listen?"),
        ("fetch --key-fil k", "the following arguments are required: MODEL_ID"),
        ("help bogus", "swarm: no command 'bogus'"),
        ("fecth x", "swarm: no command 'fecth'; did you mean fetch?"),
    ],
)
def test_is_the_unknown_flag_named_and_not_what_else_is_missing(
    line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[0]


def test_help_of_a_command_is_that_of_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "fetch"]) == 0
    told = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fetch", "--help"])
    assert told == capsys.readouterr().out
    assert "--key-file" in told
    assert "--metrics-listen HOST:PORT" in told
    assert "file:///DIR" in told, "what stands for MODEL_ID is explained"


def test_is_every_command_in_a_group() -> None:
    parser = cli._parser()
    found = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    assert sorted(name for names in cli.GROUPS.values() for name in names) == sorted(found.choices)


def test_help_is_a_command_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0
    assert printed(capsys)[0].startswith("usage: swarm ")


PUBLISHER = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
FLAGS = {
    "name": ["--name", "me"],
    "listen": ["--listen", "127.0.0.2"],
    "advertise": ["--advertise", "10.0.0.1:80"],
    "peers": ["--peer", "a:1", "--peer", "b:2"],
    "key_file": ["--key-file", "k"],
    "insecure": ["--insecure"],
    "wait": ["--wait"],
    "mdns": ["--no-mdns"],
    "upload_limit": ["--upload-limit", "8Mbit/s"],
    "timeout_s": ["--timeout", "2.5"],
    "signed_by": ["--signed-by", PUBLISHER],
    "origin": ["--origin", "none"],
    "origin_limit": ["--origin-limit", "8Mbit/s"],
    "metrics_listen": ["--metrics-listen", "0.0.0.0:9100"],
}


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        (command, field)
        for command in ("serve", "fetch")
        for field in dataclasses.fields(Settings)
        if field.metadata["flag"]
        # A seed has no end and looks for no seed, and its --origin is an address to read.
        if command == "fetch" or field.name not in ("timeout_s", "wait", "origin")
    ],
)
def test_has_every_setting_its_flag(command: str, setting: dataclasses.Field[object]) -> None:
    options = cli._parser().parse_args([command, "x", *FLAGS[setting.name]])
    wanted = {
        "name": "me",
        "listen": "127.0.0.2",
        "advertise": "10.0.0.1:80",
        "peers": ("a:1", "b:2"),
        "key_file": Path("k"),
        "insecure": True,
        "wait": True,
        "mdns": False,
        "upload_limit": 1e6,
        "timeout_s": 2.5,
        "signed_by": (PUBLISHER,),
        "origin": "none",
        "origin_limit": 1e6,
        "metrics_listen": "0.0.0.0:9100",
    }
    assert getattr(commands.settings_of(options), setting.name) == wanted[setting.name]
    plain = commands.settings_of(cli._parser().parse_args([command, "x"]))
    assert getattr(plain, setting.name) == getattr(Settings(), setting.name)


def test_do_flags_count_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_NAME", "from outside")
    assert commands.settings_of(cli._parser().parse_args(["fetch", "x"])).name == "from outside"
    assert commands.settings_of(cli._parser().parse_args(["fetch", "x", "--name", "me"])).name == "me"


ERRORS = [
    (errors.SwarmError("x"), 1),
    (errors.SettingsError("listen", "x"), 2),
    (errors.ManifestNotFound("m", tried=[], waited_s=1), 3),
    (errors.ManifestInvalid("m", "x"), 3),
    (errors.ManifestConflict("m", {"a": ["p"], "b": ["q"]}), 3),
    (errors.Stalled("m", missing=1, total=2, waited_s=3, tried=[]), 4),
    (errors.FetchTimeout("m", timeout_s=1, fraction=0.5), 4),
    (errors.StoreFull("d", need_bytes=2, free_bytes=1), 5),
    (errors.StoreConflict("d", "x"), 5),
    (errors.SourceChanged("d", "x"), 5),
    (errors.PeerUnreachable("p", "x"), 6),
    (errors.NotAdmitted("p", "x"), 6),
    (errors.VersionSkew("p", theirs=2, ours=1, software="2.0"), 6),
    (errors.TransportError("x"), 1),
    (errors.LocalProtocolError("x"), 70),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_what_does_an_error_exit_with(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(addresses: object, context: object, *, within_s: float) -> None:
        raise error

    monkeypatch.setattr(status_client, "ask_any", fail)
    monkeypatch.setenv("SWARM_MDNS", "0")
    assert main(["status"]) == code
    out, err = printed(capsys)
    assert out == ""
    assert err.startswith("swarm: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["serve", "missing"], 2, "neither a path here nor a model in the local Hugging Face cache"),
        (["serve", "org/missing"], 2, "or read it from the hub: swarm serve --origin org/missing"),
        (["fetch", ""], 2, "model_id: '' cannot be announced"),
        (["fetch", "https://huggingface.co/org/m/tree/v2"], 2, "is a page of the hub; say org/m@v2"),
        (["run", "--", "no-such-engine", "org/m"], 2, "no-such-engine is not a program on PATH"),
        (["sign", "empty", "--key", "none.pem"], 2, "make one with: swarm keygen none.pem --publisher"),
        (["serve", "./missing"], 2, "does not exist"),
        (["serve", "empty"], 3, "holds no file to serve"),
        (["serve", "empty", "--listen", "0.0.0.0"], 2, "--insecure"),
        (["serve", "empty", "--listen", "a:b:c"], 2, "is not HOST:PORT"),
        (["serve", "empty", "--origin", "none"], 2, "origin: 'none' is a value for a fetch"),
        (["serve", "empty", "--origin", "hf"], 2, "leave --origin out"),
        (["fetch", "x", "--upload-limit", "fast"], 2, "is not a rate"),
        (["fetch", "x", "--timeout", "0"], 2, "above zero"),
        (["fetch", "x", "--peer", "a:b:c"], 2, "is not HOST:PORT"),
        (["fetch", "x", "--digest", "abc"], 2, "'abc' is not a digest: 64 digits"),
        (["fetch", "x", "--timeout", "0.05"], 3, "no peer serves 'x'"),
        (["status"], 6, "no node of this user runs on this machine"),
        (["status", "--peer", "127.0.0.1:0"], 2, "needs a port"),
        (["status", "--peer", "nowhere.invalid"], 6, "nowhere.invalid:7000: "),
        (["verify", "empty"], 3, "holds no file to serve"),
        (["verify", "empty", "--digest", "abc"], 2, "'abc' is neither a digest nor the first 6"),
        (["verify", "org/model"], 5, "org/model: does not exist; name a directory"),
        (["rm", "org/model", "--yes"], 2, "is a fetch of 'org/model' by swarm; fetched by swarm: nothing; files"),
        (["ls", "--peer", "nowhere.invalid"], 6, "nowhere.invalid:7000: "),
        (["verify", "missing"], 5, "missing: does not exist; name a directory that `swarm fetch --out DIR` filled"),
        (["verify", "unfinished"], 5, "unfinished: a fetch into it is unfinished; run that fetch again"),
    ],
)
def test_what_does_a_failed_command_say(
    arguments: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWARM_MDNS", "0")  # `status` would find the nodes of others on this network
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / PARTIAL).mkdir(parents=True)
    assert main([*arguments, *(LOCAL if arguments[0] in ("serve", "fetch") else [])]) == code
    out, err = printed(capsys)
    assert out == ""
    assert says in err.splitlines()[-1]


def test_is_a_key_made_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen"]) == 0
    out, _ = printed(capsys)
    key = cluster_key.load(Path("swarm.key")).first
    assert out.startswith(f"swarm.key: a new cluster key, fingerprint {key}; ")
    assert cluster_key.PREFIX not in out
    assert main(["keygen"]) == 2
    assert "swarm.key exists" in printed(capsys)[1]


def test_is_a_directory_verified(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, source, _ = checkpoint(model, cache_dir=tmp_path / "cache")
    source.close()
    remember(tmp_path / "cache", model, manifest)
    assert main(["verify", "model"]) == 0
    assert f"1 files, 1 kB, as fetched ({manifest.digest[:16]})" in printed(capsys)[0]
    (model / "config.json").write_bytes(b"[]" * 500)
    assert main(["verify", "model"]) == 1
    assert "config.json: 1 of 1 chunks differ" in printed(capsys)[0]
    (model / PARTIAL).mkdir()
    assert main(["verify", "model"]) == 5
    assert "model: a fetch into it is unfinished" in printed(capsys)[1]


def test_does_the_ready_line_hold_what_it_takes_to_pin_the_content(
    ready_line: str, model: Path, tmp_path: Path
) -> None:
    manifest, source, _ = checkpoint(model, cache_dir=tmp_path / "cache")
    source.close()
    assert ready_line.endswith(f" digest {manifest.digest}\n")


def test_is_a_served_model_shown_and_fetched(
    seed: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["status", "--json"], ["status", "--json", "--peer", seed]):
        assert main(arguments) == 0
        report = json.loads(printed(capsys)[0])
        assert list(report) == FIELDS
        assert report["node"]["address"] == seed
        assert report["artifacts"][0]["members"] == {"seed": 1.0}
    assert main(["status"]) == 0
    assert "nothing is being fetched" in printed(capsys)[0]

    fetch = ["fetch", "org/model", "--peer", seed, "--out", "out", "--no-seed", *LOCAL]
    assert main([*fetch, "--json"]) == 0
    report = json.loads(printed(capsys)[0])
    assert report["sources"] == {"seed": 1000}
    assert report.keys() == {
        "model_id", "digest", "bytes", "seconds", "rate_bytes_per_s", "sources", "rejected_chunks", "resumed_bytes",
        "out", "transports", "proven", "unproven",
    }  # fmt: skip
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert main(fetch) == 0
    assert "verified, 1 kB kept from before -> out" in printed(capsys)[0]
    assert main(["verify", "out"]) == 0


FIELDS = [
    "schema", "node", "members", "artifacts", "transfers", "origins", "omitted", "fetches", "links", "warnings",
    "asked",
]  # fmt: skip

LIGHT = """
import sys
from swarm.cli import commands
from swarm.cli import main as cli
{statement}
print(*sorted({{"torch", "aiohttp", "zeroconf", "numpy"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import swarm", set()),
        ("cli.main(['status'])", set()),
        ("cli.main(['status', '--json'])", set()),
        ("cli.main(['verify', 'nothing'])", {"numpy"}),
        ("cli._parser()", set()),
        ("cli.main(['simulate', '--newcomers', '0'])", set()),
        ("from swarm import settings, errors; from swarm.protocol import messages", set()),
        ("swarm = __import__('swarm'); swarm.fetch", {"aiohttp", "numpy"}),
    ],
)
def test_does_it_start_light(statement: str, allowed: set[str], tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", LIGHT.format(statement=statement)],
        cwd=tmp_path,
        # Where no node runs on this machine, status looks for one by mDNS, and then only it needs zeroconf.
        env={**os.environ, "PYTHONPATH": str(Path(swarm.__file__).parent.parent), "SWARM_MDNS": "0"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert found.returncode == 0, found.stderr
    assert set(found.stdout.splitlines()[-1].split()) <= allowed


@pytest.mark.parametrize(
    ("flags", "level"), [([], "INFO"), (["-v"], "DEBUG"), (["--verbose"], "DEBUG"), (["-q"], "WARNING")]
)
def test_how_much_is_logged(flags: list[str], level: str) -> None:
    assert main(["help", *flags]) == 0
    assert logging.getLevelName(logging.getLogger("swarm").level) == level


def test_are_paths_on_one_line_however_narrow_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = f"/models/{'deep/' * 40}snapshot"
    row = {"model_id": "org/model", "revisions": ["main"], "digest": "ab" * 32, "bytes": 10**6, "path": path}
    kept.show({"swarm": [], "here": [row]})
    assert f"abababababab {path}" in printed(capsys)[0].splitlines()


def test_does_ctrl_c_while_the_command_is_imported_leave_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'swarm.cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    root = Path(swarm.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    ended = subprocess.run(
        [sys.executable, "-m", "swarm", "ls"], env=environment, capture_output=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")
