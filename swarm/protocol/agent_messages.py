"""What programs of a machine and its agent say to each other over the control socket: JSON objects, one a line.

    agent                                program
    Greeting                   ───>
                               <───      Pull · List · Remove · Pin       one request a connection
    PullProgress ...           ───>
    Pulled · Models · Done · Failed      the last line; the agent hangs up

`version` is that of this protocol. A program and an agent of different versions say so and do nothing else: the program
then goes on without the agent.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

VERSION = 1
LINE_BYTES_MAX = 4 << 20  # 10,000 files at some 300 bytes
SOCKET = "control.sock"  # in FOLDER of the cache directory
FOLDER = "agent"
MODELS_MAX = 10_000

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Names = Annotated[tuple[_Id, ...], msgspec.Meta(max_length=1000)]


class Greeting(msgspec.Struct, frozen=True, tag="greeting"):
    """The first line. `node` and `hub`: addresses of the agent's node and of its hub-compatible face.

    `reach`: the settings that decide what its fetches can find; a program that wants others goes on without it.
    """

    version: int
    software: str
    pid: int
    node: str
    hub: str
    hub_cache: str
    reach: dict[str, tuple[str, ...]]


class Pull(msgspec.Struct, frozen=True, tag="pull"):
    """Fetch a model, or the files of it that match, into the agent's cache."""

    model_id: _Id
    revision: _Id | None = None
    digest: _Id | None = None
    include: _Names | None = None
    exclude: _Names = ()
    tensors: _Names | None = None
    pin: bool = False
    timeout_s: float | None = None


class List(msgspec.Struct, frozen=True, tag="list"):
    """Say which models there are."""


class Remove(msgspec.Struct, frozen=True, tag="remove"):
    """Stop serving a model, and remove what swarm wrote of it."""

    model_id: _Id
    revision: _Id | None = None


class Pin(msgspec.Struct, frozen=True, tag="pin"):
    """Keep a model whatever else comes, or not any more."""

    model_id: _Id
    revision: _Id | None = None
    pinned: bool = True


class PullProgress(msgspec.Struct, frozen=True, tag="progress"):
    """Bytes of the part that is fetched, and those of it that are verified."""

    bytes: int
    done_bytes: int
    rate_bytes_per_s: float


class PulledFile(msgspec.Struct, frozen=True, array_like=True):
    """A file of a snapshot: its path and the stamp that it had when it was verified."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class Pulled(msgspec.Struct, frozen=True, tag="pulled"):
    """The files are in the agent's cache. `sources`: bytes by peer; `resumed_bytes`: those that were here before."""

    model_id: str
    digest: str
    commit: str
    snapshot: str
    bytes: int
    seconds: float
    resumed_bytes: int
    sources: dict[str, int]
    files: tuple[PulledFile, ...]
    unproven: str = ""  # why the files of a commit that was asked for are not proven to be of it


class Row(msgspec.Struct, frozen=True):
    """A model of the agent's cache. `bytes`: of what swarm wrote; `served`: as a whole or in part; `used_at`: epoch."""

    model_id: str
    commit: str
    revisions: tuple[str, ...]
    bytes: int
    pinned: bool
    in_use: bool
    served: str
    used_at: float
    path: str


class Models(msgspec.Struct, frozen=True, tag="models"):
    """All of them. `limit_bytes`: None for no limit; `bytes`: what counts towards it."""

    rows: Annotated[tuple[Row, ...], msgspec.Meta(max_length=MODELS_MAX)]
    bytes: int
    limit_bytes: float | None


class Done(msgspec.Struct, frozen=True, tag="done"):
    """What was asked for is done, as these lines say."""

    lines: tuple[str, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It is not done: the line for the user, and the exit code that the same error of a command has."""

    why: str
    exit_code: int


Request: TypeAlias = Pull | List | Remove | Pin
Answer: TypeAlias = PullProgress | Pulled | Models | Done | Failed
Line: TypeAlias = Greeting | Answer

_requests: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
_lines: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def encode(message: Request | Line) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Raises ValueError for anything else than a request."""
    return _requests.decode(line)


def decode_line(line: bytes) -> Line:
    """Raises ValueError for anything else than a line of an agent."""
    return _lines.decode(line)
