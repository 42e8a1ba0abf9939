"""Settings: one frozen dataclass, each field with its default, unit and help sentence.

    defaults < swarm.toml < SWARM_* environment variables < flags or keyword arguments

`None` means unset; 0 means 0. An unknown key is an error that names the nearest known key. No module reads settings
globally: objects get the numbers they need as arguments. The flags of the command line are generated from the fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import ipaddress
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swarm.errors import SettingsError, clean

ENVIRONMENT_PREFIX = "SWARM_"
FILE_NAME = "swarm.toml"
CHOICES = {
    "data_encryption": ("tls", "none"),
    "network": ("local", "lan", "wan"),
    "chunk_hash": ("xxh3-128", "blake3"),
    "origin": ("hf", "none"),
}
DEFAULT_PORT = 7000  # of a peer named without one; a node beyond loopback listens there if it is free
# Bounds of the protocol, which this module must not import; a test compares them. Messages with greater values are
# refused by every peer, so a node with such a setting would be ready and unreachable.
NAME_MAX = 256  # characters, in a Hello
ADDRESS_MAX = 256  # characters of HOST:PORT, in a Hello
LABEL_MAX = 32  # characters: gossip sends it to every member
CHUNK_BYTES_MAX, LEAF_BYTES_MIN = 64 << 20, 1024
SLOTS_MAX = 1024
NUMBER_MAX = 1e15  # of seconds and bytes per second: beyond, sums with a clock lose their precision
NEAR = 0.8  # difflib ratio from which an unknown variable counts as a misspelling

_HOST = r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
_ADDRESS = re.compile(
    rf"(?:\[([0-9A-Fa-f:.]{{2,45}}(?:%[A-Za-z0-9_.-]{{1,15}})?)\]|({_HOST}))(?::([0-9]{{1,5}}))?", re.ASCII
)
_RATE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]i?)?(B|bit)(?:/s|ps)\s*", re.ASCII)
_SCALE = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SCALE |= {"Ki": 2**10, "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


# Where there is no home directory: nothing can be written there, as in a home that is read-only, and errors show why.
NO_CACHE = Path("/dev/null/no-home-directory-set-SWARM_CACHE")


def _cache_dir() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "swarm"
    except RuntimeError:  # neither HOME nor a line in /etc/passwd
        return NO_CACHE


def _setting(default: Any, help_text: str, *, flag: bool = True) -> Any:
    """A field. `flag=False` keeps it off the command line, which has flags for common settings only."""
    metadata = {"help": help_text, "flag": flag}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Settings of a node. Read them with `Settings.load`, change them with `dataclasses.replace`."""

    name: str | None = _setting(None, "name shown to other nodes; unset: host name and the start of the node id")
    listen: str = _setting(
        "127.0.0.1:0",
        "HOST[:PORT] to listen on: an address, a network card (eth0), or 0.0.0.0 or [::] for all cards and families; "
        "without a port 7000 if it is free; port 0: any free one",
    )
    advertise: str | None = _setting(
        None, "ADDRESS[:PORT] that peers dial, e.g. behind a port mapping; unset: where links come from, and `listen`"
    )
    peers: tuple[str, ...] = _setting(
        (), "HOST[:PORT] of a node to join through, by default port 7000; a DNS name may have many addresses"
    )
    key_file: Path | None = _setting(
        None, "file with the cluster key; nodes with the same key form a cluster. `swarm keygen` creates it"
    )
    data_encryption: str = _setting(
        "tls", "tls, or none: with a cluster key, authenticate peers but send chunks unencrypted", flag=False
    )
    insecure: bool = _setting(False, "listen beyond this machine without a cluster key")
    trusted: tuple[str, ...] = _setting(
        (), "machines, e.g. 10.0.0.5,10.1.0.0/16, with nodes that may introduce models; unset: all", flag=False
    )
    signed_by: tuple[str, ...] = _setting(
        (), "public key of a publisher; fetches take only models that such a publisher signed (`swarm sign`)"
    )
    mdns: bool = _setting(True, "discover nodes and announce this node in the local network by multicast DNS")
    network: str | None = _setting(
        None, "preset of gossip timeouts: local, lan or wan; unset: local on loopback, else lan", flag=False
    )
    host: str | None = _setting(
        None, "label of this machine, announced to peers; unset: a digest of the boot id", flag=False
    )
    rack: str | None = _setting(None, "label of the rack of this machine, announced to peers", flag=False)
    origin: str = _setting(
        "hf",
        "where models come from when no peer has them: hf for ids like org/model, or none; addresses name their own",
    )
    origin_limit: float | None = _setting(None, "maximum rate of reads from an origin, e.g. 150MB/s")
    origin_readers: int | None = _setting(
        None, "maximum number of nodes that read an origin at once; unset: all that fetch", flag=False
    )
    upload_limit: float | None = _setting(None, "maximum upload rate to all peers together, e.g. 150MB/s")
    upload_hours: tuple[str, ...] = _setting(
        (),
        "upload limits by the hour, e.g. Mon-Fri 08:00-18:00=100MB/s; the first that holds replaces `upload_limit`",
        flag=False,
    )
    timeout_s: float | None = _setting(None, "maximum seconds for a fetch; unset: unlimited while chunks arrive")
    chunk_bytes: int | None = _setting(
        None,
        "maximum bytes per chunk when serving; unset: size / 1024, 256 KiB to 16 MiB (GPU: size / 128, up to 64 MiB)",
        flag=False,
    )
    leaf_bytes: int | None = _setting(
        None, "bytes hashed per leaf when serving; unset: 512 KiB, 16 KiB for GPU tensors", flag=False
    )
    compile_caches: bool | None = _setting(
        None,
        "engines exchange compile caches (executable code) with the members of their cluster, or with the machines in "
        "`trusted` alone; unset: only where a cluster key protects the node",
        flag=False,
    )
    chunk_hash: str = _setting(
        "xxh3-128",
        "chunk hash that fetches check: xxh3-128 detects corruption; blake3 (slower) also detects forgery; pinned "
        "fetches check both",
        flag=False,
    )
    cache: Path = _setting(_cache_dir, "directory for cached manifests and for downloads of engines", flag=False)
    cache_limit_gb: float = _setting(
        200.0, "maximum size of `cache` in GB; unused entries are evicted, least recently used first", flag=False
    )
    find_timeout_s: float | None = _setting(
        None,
        "seconds to search for a peer that serves the model; unset: `timeout_s`, else 10, or 2.5 if no node is found",
        flag=False,
    )
    wait: bool = _setting(False, "wait for a seed for as long as it takes, or until `timeout_s`")
    stall_timeout_s: float = _setting(30.0, "seconds without a verified chunk before a fetch fails", flag=False)
    idle_timeout_s: float = _setting(
        5.0, "seconds without data on a granted transfer; then its chunks are requested elsewhere", flag=False
    )
    drain_timeout_s: float = _setting(
        10.0, "seconds after SIGTERM for running uploads, and for chunks that only this node has; 0: none", flag=False
    )
    upload_slots: int = _setting(
        8, "maximum concurrent uploads; more share the bandwidth, fewer leave gaps between transfers", flag=False
    )
    congestion: str | None = _setting(
        None, "TCP congestion control for chunks; unset: system default, cubic within a host", flag=False
    )
    agent: bool = _setting(True, "fetch through the agent of this machine where it runs (`swarm agent`)", flag=False)
    hub_listen: str = _setting(
        "127.0.0.1:7080", "HOST:PORT where the agent answers as the Hugging Face hub does (HF_ENDPOINT)", flag=False
    )
    hub_limit_gb: float | None = _setting(
        None,
        "GB of models that the agent keeps in the Hugging Face cache, of those that swarm wrote; the least recently "
        "used are evicted; unset: no limit",
        flag=False,
    )
    hold: tuple[str, ...] = _setting(
        (), "models that the agent fetches at its start and keeps, as ID or ID@REVISION", flag=False
    )
    metrics_listen: str | None = _setting(
        None, "HOST:PORT of a listener for /healthz, /readyz and /metrics alone, open to all that reach it"
    )
    metrics_token_file: Path | None = _setting(
        None,
        "file with a bearer token that lets programs of other machines read /healthz, /readyz and /metrics",
        flag=False,
    )
    transports: tuple[str, ...] = _setting(
        (), "transports preferred between trusted nodes: nccl, gloo, ucc or a plugin; none of them encrypts", flag=False
    )
    fsync: bool = _setting(True, "fsync files before they get their final names", flag=False)

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            if (value := getattr(self, name)) is not None or not kind.endswith("| None"):
                object.__setattr__(self, name, _parse(name, value, kind))
        self._check_addresses()
        host, _ = split_address("listen", self.listen, default_port=0)
        if self.insecure and self.key_file:
            raise SettingsError("insecure", "a cluster key protects this node; choose one of --insecure and --key-file")
        if not self.reaches_out and not is_loopback(host):
            raise SettingsError(
                "listen",
                f"{host} is reachable from other machines and no cluster key protects this node; give one with "
                "--key-file, listen on 127.0.0.1, or accept the risk with --insecure",
            )
        if self.key_file and self.transports and self.data_encryption != "none":
            raise SettingsError(
                "transports",
                f"{', '.join(self.transports)}: chunks would be unencrypted, and the cluster key requires encryption; "
                'set data_encryption = "none" on a trusted network, or leave this out',
            )
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) is not None and value not in choices:
                raise SettingsError(name, f"{value!r} is not one of {', '.join(choices)}")
        for name, chars_max in (("name", NAME_MAX), ("host", LABEL_MAX), ("rack", LABEL_MAX)):
            text = getattr(self, name)
            if text is not None and not (len(text) <= chars_max and text.isprintable()):
                raise SettingsError(
                    name, f"{clean(repr(text))} is not a text of at most {chars_max} printable characters"
                )
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("stall_timeout_s", "idle_timeout_s", "upload_slots"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingsError(name, f"{getattr(self, name)} is not a number above zero")
        if not self.cache_limit_gb >= 0:
            raise SettingsError(
                "cache_limit_gb", f"{self.cache_limit_gb} is not a size; 0 keeps nothing, inf everything"
            )
        for name in (
            "upload_limit",
            "hub_limit_gb",
            "origin_limit",
            "origin_readers",
            "timeout_s",
            "find_timeout_s",
            "chunk_bytes",
            "leaf_bytes",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:  # also rejects NaN
                raise SettingsError(name, f"{value} is not a number above zero; leave it out for no limit")
        for name, least, most in (
            ("find_timeout_s", 0, NUMBER_MAX), ("stall_timeout_s", 0, NUMBER_MAX), ("idle_timeout_s", 0, NUMBER_MAX),
            ("timeout_s", 0, NUMBER_MAX), ("drain_timeout_s", 0, NUMBER_MAX), ("upload_limit", 0, NUMBER_MAX),
            ("upload_slots", 1, SLOTS_MAX), ("chunk_bytes", 1, CHUNK_BYTES_MAX),
            ("leaf_bytes", LEAF_BYTES_MIN, CHUNK_BYTES_MAX),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise SettingsError(name, f"{value} is not from {least} to {most:.15g}")

    def _check_addresses(self) -> None:
        for peer in self.peers:
            split_address("peer", peer, default_port=DEFAULT_PORT, least_port=1)
        if self.advertise is not None:
            host, _ = split_address("advertise", self.advertise, default_port=0)
            if not is_literal(host):
                raise SettingsError("advertise", f"{host!r} is not an IP address, and datagrams are not sent to names")
        split_address("hub_listen", self.hub_listen, least_port=0)
        if self.metrics_listen is not None:
            split_address("metrics_listen", self.metrics_listen, least_port=0)
        for publisher in self.signed_by:
            if not re.fullmatch(r"[0-9a-f]{64}", publisher):
                raise SettingsError(
                    "signed_by",
                    f"{clean(repr(publisher))} is not a public key: 64 hexadecimal digits of `swarm sign`",
                )
        for network in self.trusted:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError as error:
                raise SettingsError("trusted", f"{error}; name addresses or networks, as in 10.1.0.0/16") from error

    @property
    def cache_limit_bytes(self) -> float:
        """`cache_limit_gb` in bytes, possibly infinite."""
        return self.cache_limit_gb * 1e9

    @property
    def reaches_out(self) -> bool:
        """Whether the node talks to other machines."""
        return self.insecure or self.key_file is not None

    @classmethod
    def load(
        cls,
        given: Mapping[str, Any] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        file: Path | None = None,
    ) -> Settings:
        """Settings merged from all sources. `given` holds flags or keyword arguments; `None` values are ignored.

        Raises SettingsError for an unknown key, a value of the wrong type, or a file that is not TOML.
        """
        environment = os.environ if environment is None else environment
        values = _from_file(file or Path(FILE_NAME), required=file is not None)
        kinds = _kinds()
        for variable, text in environment.items():
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            if variable == ENVIRONMENT_PREFIX + name.upper() and name in kinds:
                values[name] = _parse(variable, text, kinds[name])
            elif variable.startswith(ENVIRONMENT_PREFIX) and (near := difflib.get_close_matches(name, kinds, 1, NEAR)):
                # Other software uses the prefix too: Kubernetes does, for a service named swarm.
                raise SettingsError(variable, f"unknown; did you mean {ENVIRONMENT_PREFIX + near[0].upper()}?")
        for name, value in (given or {}).items():
            if value is not None:
                values[name] = _parse(name, value, _kinds()[_known(name)])
        return cls(**values)


def split_address(
    setting: str, text: str, *, default_port: int | None = None, least_port: int | None = None
) -> tuple[str, int]:
    """Parses HOST:PORT or [IPV6]:PORT. With `default_port` HOST alone is valid, and port 0 unless `least_port` is 1.

    Raises SettingsError.
    """
    match = _ADDRESS.fullmatch(text.strip()) if len(text) <= ADDRESS_MAX else None
    if match and (match[1] or match[2]).isdigit():
        raise SettingsError(setting, f"{text!r} needs a host, as in 127.0.0.1:{match[1] or match[2]}")
    if match is None or (match[1] and not (":" in match[1] and is_literal(match[1]))):
        raise SettingsError(setting, f"{text!r} is not HOST:PORT (an IPv6 address goes in brackets: [::1]:7000)")
    host = match[1] or match[2]
    port = int(match[3]) if match[3] else default_port
    least = (1 if default_port is None else 0) if least_port is None else least_port
    if port is None or not least <= port < 1 << 16:
        raise SettingsError(setting, f"{text!r} is not HOST:PORT: it needs a port from {least} to 65535")
    return host, port


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_literal(host: str) -> bool:
    """Whether `host` is an IP address, which needs no DNS lookup."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@functools.lru_cache(4096)
def is_loopback(host: str) -> bool:
    """Whether `host` is a loopback address, 'localhost' or the loopback card."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", "lo")


def parse_rate(setting: str, text: str) -> float:
    """Bytes per second of `150MB/s`, `1.2Gbit/s` or `64MiB/s`. Raises SettingsError."""
    match = _RATE.fullmatch(text)
    if match is None:
        raise SettingsError(setting, f"{text!r} is not a rate such as 150MB/s, 64MiB/s or 1.2Gbit/s")
    number, prefix, unit = match.groups(default="")
    return float(number) * _SCALE[prefix] / (8 if unit == "bit" else 1)


def _kinds() -> dict[str, str]:
    return {f.name: str(f.type) for f in dataclasses.fields(Settings)}


def _known(name: str, where: str = "setting") -> str:
    kinds = _kinds()
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0)
        raise SettingsError(name, f"unknown {where}; did you mean {near[0]!r}?")
    return name


def _from_file(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if required:
            raise SettingsError("config", f"{path} does not exist") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        if isinstance(error, PermissionError) and not required and not os.access(path.parent, os.X_OK):
            return {}  # a container whose user may not enter its working directory
        raise SettingsError(str(path), f"cannot be read: {error}") from error
    return {_known(name, f"key in {path}"): _parse(name, value, _kinds()[name]) for name, value in table.items()}


def _parse(name: str, value: Any, kind: str) -> Any:
    """Converts a value to the type of its field: parses strings, checks the type of other values."""
    if kind.startswith("tuple"):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            raise SettingsError(name, f"{value!r} is not a list of texts")
        return tuple(item.strip() for item in items if item.strip())
    if name.lower().endswith(("upload_limit", "origin_limit")) and isinstance(value, str):
        return parse_rate(name, value)
    kind = kind.removesuffix(" | None")
    if isinstance(value, str):
        try:
            return _READERS[kind](value)
        except (ValueError, KeyError, RuntimeError):  # RuntimeError: `~` without a home directory
            raise SettingsError(name, f"{clean(repr(value))} is not a valid {kind}") from None
    accepted: dict[str, type | tuple[type, ...]] = {"bool": bool, "int": int, "float": (int, float), "Path": Path}
    if not isinstance(value, accepted.get(kind, str)) or (isinstance(value, bool) and kind != "bool"):
        raise SettingsError(name, f"{clean(repr(value))} is not a valid {kind}")
    if kind == "float" and isinstance(value, int) and abs(value) > sys.float_info.max:
        raise SettingsError(name, f"a number of {value.bit_length()} bits is not a valid {kind}")
    return value


def _read_bool(text: str) -> bool:
    text = text.strip().lower()
    if text not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError(text)
    return text in ("1", "true", "yes", "on")


_READERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "bool": _read_bool,
    "int": int,
    "float": float,
    "Path": lambda text: Path(text).expanduser(),
}
