"""Where does a setting come from, and is every wrong one told to the user?"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.content import manifest
from swarm.errors import SettingsError
from swarm.protocol import messages, packets
from swarm.protocol.messages import Address, NodeId
from swarm.protocol.packets import Profile, Record, State
from swarm.settings import Settings, is_loopback, join_address, parse_rate, split_address

# A text for every field, as an environment variable would hold it, and what it becomes.
TEXTS: dict[str, tuple[str, Any]] = {
    "name": ("me", "me"),
    "listen": ("127.0.0.2:7000", "127.0.0.2:7000"),
    "advertise": ("10.0.0.1:80", "10.0.0.1:80"),
    "peers": ("a:1, b:2,", ("a:1", "b:2")),
    "key_file": ("/tmp/swarm.key", Path("/tmp/swarm.key")),
    "data_encryption": ("none", "none"),
    "insecure": ("yes", True),
    "trusted": ("10.0.0.5, 10.1.0.0/16", ("10.0.0.5", "10.1.0.0/16")),
    "signed_by": (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        ("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",),
    ),
    "mdns": ("off", False),
    "network": ("wan", "wan"),
    "host": ("h1", "h1"),
    "rack": ("r1", "r1"),
    "origin": ("none", "none"),
    "origin_limit": ("8Mbit/s", 1e6),
    "origin_readers": ("2", 2),
    "upload_limit": ("8Mbit/s", 1e6),
    "upload_hours": ("08:00-18:00=1MB/s, 22:00-06:00=none", ("08:00-18:00=1MB/s", "22:00-06:00=none")),
    "timeout_s": ("2.5", 2.5),
    "chunk_bytes": ("4096", 4096),
    "leaf_bytes": ("2048", 2048),
    "compile_caches": ("on", True),
    "chunk_hash": ("blake3", "blake3"),
    "cache": ("/tmp/cache", Path("/tmp/cache")),
    "cache_limit_gb": ("0.5", 0.5),
    "find_timeout_s": ("1", 1.0),
    "wait": ("yes", True),
    "stall_timeout_s": ("1e1", 10.0),
    "idle_timeout_s": ("0.5", 0.5),
    "drain_timeout_s": ("30", 30.0),
    "upload_slots": ("3", 3),
    "congestion": ("cubic", "cubic"),
    "agent": ("off", False),
    "hub_listen": ("127.0.0.1:0", "127.0.0.1:0"),
    "hub_limit_gb": ("500", 500.0),
    "hold": ("org/a, org/b@v1", ("org/a", "org/b@v1")),
    "metrics_listen": ("0.0.0.0:9100", "0.0.0.0:9100"),
    "metrics_token_file": ("/tmp/token", Path("/tmp/token")),
    "transports": ("gloo, ucc", ("gloo", "ucc")),
    "fsync": ("0", False),
}
FIELDS = [field.name for field in dataclasses.fields(Settings)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # no swarm.toml there
    return tmp_path


def load(given_values: dict[str, Any] | None = None, **environment: str) -> Settings:
    return Settings.load(given_values, environment=environment)


def test_which_source_counts_most(elsewhere: Path) -> None:
    assert load().upload_slots == 8
    (elsewhere / "swarm.toml").write_text("upload_slots = 1\nidle_timeout_s = 1\nfind_timeout_s = 1\n")
    settings = load({"upload_slots": 3}, SWARM_UPLOAD_SLOTS="2", SWARM_IDLE_TIMEOUT_S="2")
    assert (settings.upload_slots, settings.idle_timeout_s, settings.find_timeout_s) == (3, 2.0, 1)


def test_does_a_flag_that_was_not_given_count_for_nothing() -> None:
    assert load({"upload_slots": None}, SWARM_UPLOAD_SLOTS="2").upload_slots == 2


def test_is_the_process_environment_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARM_NAME", "from outside")
    assert Settings.load().name == "from outside"


def test_is_every_field_in_the_table() -> None:
    assert set(TEXTS) == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_has_every_field_help(name: str) -> None:
    metadata = {field.name: field.metadata for field in dataclasses.fields(Settings)}[name]
    assert len(metadata["help"]) > 20
    assert isinstance(metadata["flag"], bool)


@pytest.mark.parametrize("name", FIELDS)
def test_has_every_field_a_twin_in_the_environment(name: str) -> None:
    text, value = TEXTS[name]
    environment = {f"SWARM_{name.upper()}": text}
    assert getattr(Settings.load(environment=environment), name) == value
    assert getattr(load(), name) != value


@pytest.mark.parametrize("name", FIELDS)
def test_does_the_constructor_read_text_as_load_does(name: str) -> None:
    text, value = TEXTS[name]
    values: dict[str, Any] = {name: text}
    assert Settings(**values) == load(values)
    assert getattr(Settings(**values), name) == value


@pytest.mark.parametrize("peers", ["a:1,b:2", ["a:1", "b:2"], ("a:1", "b:2")])
def test_are_peers_a_tuple_however_they_are_given(peers: Any) -> None:
    assert Settings(peers=peers).peers == ("a:1", "b:2")
    assert hash(Settings(peers=peers)) == hash(Settings(peers=("a:1", "b:2")))


@pytest.mark.parametrize(
    "wrong",
    [
        {"peers": 7}, {"peers": [1]}, {"peers": None}, {"mdns": 1}, {"mdns": None}, {"upload_slots": True},
        {"upload_slots": 1.5}, {"upload_slots": None}, {"timeout_s": []}, {"listen": 7000}, {"listen": None},
        {"name": 7}, {"cache": 7}, {"upload_limit": "fast"}, {"upload_limit": "150"},
    ],
)  # fmt: skip
def test_does_the_constructor_refuse_what_load_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize("transport", ["gloo", "ucc", "nccl"])
def test_do_transports_that_do_not_encrypt_wait_for_the_word_when_there_is_a_key(transport: str) -> None:
    given = {"key_file": "key", "transports": transport}
    with pytest.raises(SettingsError, match=rf'transports: {transport}: .*data_encryption = "none"'):
        load(given)
    assert load({**given, "data_encryption": "none"}).transports == (transport,)


@pytest.mark.parametrize("wrong", ["seed.example.org:7000", "7000", "10.0.0.1:", "[10.0.0.1]:1"])
def test_is_only_an_address_advertised(wrong: str) -> None:
    with pytest.raises(SettingsError, match="advertise"):
        load({"advertise": wrong})


@pytest.mark.parametrize("name", FIELDS)
def test_can_every_field_be_in_the_file(elsewhere: Path, name: str) -> None:
    (elsewhere / "other.toml").write_text(f"{name} = '{TEXTS[name][0]}'")
    assert getattr(Settings.load(environment={}, file=elsewhere / "other.toml"), name) == TEXTS[name][1]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("peers = ['a:1', 'b:2']", "peers", ("a:1", "b:2")),
        ("upload_limit = 1000", "upload_limit", 1000),
        ("mdns = false", "mdns", False),
        ("timeout_s = 3", "timeout_s", 3),
        ("\ufefftimeout_s = 3", "timeout_s", 3),  # a byte order mark, as editors of Windows write it
    ],
)
def test_are_values_of_toml_taken(elsewhere: Path, line: str, name: str, value: object) -> None:
    (elsewhere / "swarm.toml").write_text(line)
    assert getattr(load(), name) == value


@pytest.mark.parametrize(
    "line",
    [
        "peers = true", "peers = 7", "peers = [1]", "mdns = 1", "upload_slots = true", "upload_slots = 1.5",
        "timeout_s = []", "listen = 7000", "upload_limit = 'fast'", "timeout_s = nan", "idle_timeout_s = nan",
        "timeout_s = inf", "not toml", "a = \"\xff",
    ],
)  # fmt: skip
def test_is_a_wrong_value_of_the_file_refused(elsewhere: Path, line: str) -> None:
    (elsewhere / "swarm.toml").write_text(line, encoding="latin-1")
    with pytest.raises(SettingsError):
        load()


def test_is_a_file_that_was_asked_for_and_is_missing_an_error(elsewhere: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        Settings.load(environment={}, file=elsewhere / "missing.toml")
    (elsewhere / "directory.toml").mkdir()
    with pytest.raises(SettingsError, match="cannot be read"):
        Settings.load(environment={}, file=elsewhere / "directory.toml")


@pytest.mark.parametrize("may_enter", [False, True])
def test_a_working_directory_that_may_not_be_entered_has_no_settings(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, *, may_enter: bool
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(os, "access", lambda *_: may_enter)
    with pytest.raises(SettingsError, match="cannot be read") if may_enter else contextlib.nullcontext():
        assert load() == Settings()


def test_does_an_unknown_key_name_the_nearest_one(elsewhere: Path) -> None:
    with pytest.raises(SettingsError, match="did you mean 'upload_limit'"):
        load({"uplod_limit": 1})
    (elsewhere / "swarm.toml").write_text("mdsn = true")
    with pytest.raises(SettingsError, match=r"key in swarm.toml; did you mean 'mdns'"):
        load()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("MDNS", "maybe"), ("MDNS", ""), ("UPLOAD_SLOTS", "2.5"), ("UPLOAD_SLOTS", "many"), ("TIMEOUT_S", "soon"),
        ("TIMEOUT_S", "nan"), ("TIMEOUT_S", "inf"), ("UPLOAD_LIMIT", "150"), ("LISTEN", "a:b:c"),
    ],
)  # fmt: skip
def test_does_a_wrong_variable_name_itself(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=rf"(?i){name}: ") as caught:
        Settings.load(environment={f"SWARM_{name}": text})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("SWARM_PEER", "SWARM_PEERS"),
        ("SWARM_UPLOAD_LIMT", "SWARM_UPLOAD_LIMIT"),
        ("SWARM_TIMEOUT", "SWARM_TIMEOUT_S"),
        ("SWARM_name", "SWARM_NAME"),
    ],
)
def test_is_a_variable_that_is_nearly_a_setting_an_error(variable: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=rf"^{variable}: unknown; did you mean {meant}\?"):
        Settings.load(environment={variable: "1"})


@pytest.mark.parametrize(
    "variable", ["SWARM_PORT", "SWARM_SERVICE_HOST", "SWARM_SERVICE_PORT", "SWARM_PORT_7000_TCP", "SWARM_", "NAME"]
)
def test_is_a_variable_of_another_program_left_alone(variable: str) -> None:
    assert Settings.load(environment={variable: "tcp://10.0.0.1:7000"}) == load()


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_is_it_true(text: str) -> None:
    assert load(SWARM_INSECURE=text).insecure


@pytest.mark.parametrize("text", ["0", "False", "no", "OFF"])
def test_is_it_false(text: str) -> None:
    assert not load(SWARM_MDNS=text).mdns


@pytest.mark.parametrize("name", ["upload_limit", "timeout_s", "chunk_bytes"])
def test_is_unset_something_else_than_0(name: str) -> None:
    assert getattr(Settings(), name) is None
    wrong: Any
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(SettingsError, match=name):
            dataclasses.replace(Settings(), **{name: wrong})


@pytest.mark.parametrize("name", ["find_timeout_s", "stall_timeout_s", "idle_timeout_s", "upload_slots"])
def test_must_it_be_above_0(name: str) -> None:
    wrong: Any
    for wrong in (0, -1, math.nan):
        with pytest.raises(SettingsError, match=name):
            dataclasses.replace(Settings(), **{name: wrong})


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("1B/s", 1), ("150MB/s", 150e6), ("1.2Gbit/s", 150e6), ("64MiB/s", 64 * 2**20), ("8kbit/s", 1000),
        ("1KB/s", 1000), ("1KiB/s", 1024), ("2Tbitps", 25e10), ("0.5 GB/s", 5e8), (" 1MB/s ", 1e6),
    ],
)  # fmt: skip
def test_how_fast_is_that(text: str, bytes_per_s: float) -> None:
    assert parse_rate("upload_limit", text) == bytes_per_s


@pytest.mark.parametrize(
    "text", ["", "150", "150MB", "MB/s", "-1MB/s", "1e3MB/s", "1XB/s", "1MB/h", "\u0661MB/s", "1.MB/s"]
)
def test_is_it_no_rate(text: str) -> None:
    with pytest.raises(SettingsError, match="is not a rate such as"):
        parse_rate("upload_limit", text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:7000", ("127.0.0.1", 7000)), ("host", ("host", 9)), ("host:0", ("host", 0)), ("[::1]", ("::1", 9)),
        ("[::1]:65535", ("::1", 65535)), ("[fe80::1%2]:1", ("fe80::1%2", 1)), (" host:1 ", ("host", 1)),
    ],
)  # fmt: skip
def test_where_is_that(text: str, address: tuple[str, int]) -> None:
    assert split_address("listen", text, default_port=9) == address
    assert split_address("listen", join_address(*address), default_port=9) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "::1",
        "::1:7000",
        "[::1",
        "host:",
        "host:x",
        "a:b:1",
        "host:65536",
        "[x]:1",
        "[1.2.3.4]:1",
        "a b:1",
        "-x:1",
        "a..b:1",
        "h\u00f6st:1",
        "http://host:1",
        "[::1%]:1",
        "[::1% 2]:1",
        "x" * 64 + ":1",
    ],
)
def test_is_it_no_address(text: str) -> None:
    with pytest.raises(SettingsError, match="listen: "):
        split_address("listen", text, default_port=9)


@pytest.mark.parametrize("text", ["7000", " 7000 ", "7000:7000", "[7000]"])
def test_does_a_port_alone_say_what_host_it_needs(text: str) -> None:
    with pytest.raises(SettingsError, match=r"listen: .* needs a host, as in 127\.0\.0\.1:7000"):
        split_address("listen", text, default_port=9)


def test_must_an_address_to_dial_have_a_port() -> None:
    for text in ("host", "host:0"):
        with pytest.raises(SettingsError, match="HOST:PORT: it needs a port from 1"):
            split_address("peer", text)


@given(st.text(max_size=20))
def test_does_garbage_only_ever_raise_settings_error(text: str) -> None:
    try:
        host, port = split_address("peer", text)
    except SettingsError:
        return
    assert host
    assert 0 <= port <= 65535


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
        ("192.168.0.1", False), ("localhost.example.org", False), ("127.0.0.1.example.org", False),
    ],
)  # fmt: skip
def test_can_no_other_machine_reach_it(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@pytest.mark.parametrize("listen", ["0.0.0.0", "0.0.0.0:7000", "[::]:7000", "192.168.0.1", "myhost:7000"])
def test_must_listening_beyond_this_machine_be_wanted(listen: str) -> None:
    with pytest.raises(SettingsError, match="--insecure"):
        Settings(listen=listen)
    assert Settings(listen=listen, insecure=True).listen == listen


def test_does_the_cache_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert load().cache == Path("/somewhere/swarm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert load().cache == Path("~/.cache/swarm").expanduser()
    assert load(SWARM_CACHE="~/mine").cache == Path("~/mine").expanduser()


def test_without_a_home_directory_the_cache_is_a_place_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    cache = Settings.load(environment={}).cache
    assert "SWARM_CACHE" in str(cache)
    with pytest.raises(OSError, match="Not a directory"):
        cache.mkdir(parents=True)
    assert Settings.load(environment={"SWARM_CACHE": "/somewhere"}).cache == Path("/somewhere")
    with pytest.raises(SettingsError, match="cache"):
        Settings.load({"cache": "~/cache"}, environment={})


@pytest.mark.parametrize(
    ("setting", "longest"),
    [("name", "n" * 256), ("host", "h" * 32), ("rack", "r" * 32), ("upload_slots", 1024), ("chunk_bytes", 64 << 20)],
)
def test_is_the_greatest_value_one_that_peers_accept_and_the_next_one_refused(setting: str, longest: Any) -> None:
    """A node with a value that peers refuse would say that it is ready, and be reachable by no peer."""
    accepted = getattr(dataclasses.replace(Settings(), **{setting: longest}), setting)
    hello = messages.Hello(
        messages.PROTOCOL,
        "1",
        NodeId("a" * 16),
        accepted if setting == "name" else "n",
        1,
        (Address("h:1"),),
        "0" * 32,
        (),
        (),
    )
    assert messages.decode(messages.encode(hello)) == hello
    label = accepted if setting in ("host", "rack") else ""
    slots = accepted if setting == "upload_slots" else 1
    record = Record(
        NodeId("a" * 16), 0, State.ALIVE, 0, "n", (Address("h:1"),), Profile((), 0, (), label, label, 0, slots)
    )
    assert packets.decode(packets.encode(packets.Gossip(record.node, (record,)))).sender == record.node
    if setting == "chunk_bytes":
        assert accepted == manifest.CHUNK_BYTES_MAX
    longer: Any = longest + "x" if isinstance(longest, str) else longest + 1
    with pytest.raises(SettingsError, match=setting):
        dataclasses.replace(Settings(), **{setting: longer})


@pytest.mark.parametrize("setting", ["name", "host", "rack"])
@pytest.mark.parametrize("text", ["a\tb", "a\x1b[2Jb", "a\u202eb", "a\x7f"])
def test_has_a_name_no_control_characters(setting: str, text: str) -> None:
    wrong: dict[str, Any] = {setting: text}
    with pytest.raises(SettingsError, match="printable") as refused:
        dataclasses.replace(Settings(), **wrong)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("peers", ("host:",)), ("peers", ("ok:1", "host:65536")), ("peers", (".".join(["h" * 60] * 5) + ":1",)),
        ("listen", ".".join(["h" * 60] * 5)), ("leaf_bytes", 1023), ("leaf_bytes", (64 << 20) + 1),
        ("upload_slots", 10**400), ("find_timeout_s", 10**400), ("timeout_s", 1e16), ("upload_limit", 1e16),
    ],
)  # fmt: skip
def test_is_a_value_beyond_the_protocol_refused_at_the_start(setting: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=setting.removesuffix("s") if setting == "peers" else setting) as refused:
        dataclasses.replace(Settings(), **{setting: value}, insecure=True)
    assert len(str(refused.value)) <= 1000
