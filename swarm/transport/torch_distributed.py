"""torch.distributed as a transport: pairs of processes over gloo or UCC, without a global group, ports or environment.

Two processes form a group of two for each session. torch's rendezvous store for the group goes over the connection of
the session, which is idle then:

    asker | key bytes: u32 | value bytes: u32 | key | value |  <->  the same, from the holder

For clusters of trusted nodes: both libraries trust the sizes of their peer, so a peer that sends more than announced
ends the receiving process. The setting `transports` enables them. UCC reaches fabrics beyond TCP, with a torch that is
built with it; gloo is for CPUs and for tests of `paired`.

Must not know: transfers, users' tensors. Imports torch when the first transport is made.
"""

from __future__ import annotations

import ctypes
import datetime
import functools
import importlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from swarm.errors import SettingsError, TransportError
from swarm.store import View
from swarm.transport import Pace
from swarm.transport.byte_stream import ByteStream
from swarm.transport.paired import (
    ASKER,
    HOLDER,
    HOST_PIECE_BYTES_MAX,
    Done,
    PairedTransport,
    at_once,
    read_exactly,
    write_all,
)
from swarm.transport.sink import on_host

if TYPE_CHECKING:
    import torch

MAGIC = {"gloo": b"SWRG", "ucc": b"SWRU"}
SETUP_TIMEOUT_S = 4.0  # below a peer's timeout for a session; 3 ms are usual, 50 with UCC
_SIZES = struct.Struct(">II")
STORED_BYTES_MAX = 64 << 10  # total of a setup: the addresses of two processes are hundreds of bytes


class TorchDistTransport(PairedTransport):
    """The transport over a backend of torch; `scheme` is its name."""

    def __init__(
        self, host: str, port: int, *, backend: str, pace: Pace | None = None, congestion: str | None = None
    ) -> None:
        """Raises SettingsError when this torch lacks the backend."""
        demand(backend)
        super().__init__(host, port, pace=pace, congestion=congestion)
        self.scheme = backend
        self.magic = MAGIC[backend]
        self._host = host

    def _make_lane(self, stream: ByteStream, rank: int) -> PairLane:
        return PairLane(stream, self.scheme, rank, host=self._host)


class PairLane:
    """A group of two. Raises TransportError when its setup fails."""

    on_device = False

    def __init__(self, stream: ByteStream, backend: str, rank: int, *, host: str) -> None:
        self._other = ASKER if rank == HOLDER else HOLDER
        self._backend = backend
        self._scratch: memoryview | None = None
        stream.block(SETUP_TIMEOUT_S)
        try:
            self._group = _group(backend, _store_class()(stream), rank, host=host)
        except (RuntimeError, OSError, EOFError) as error:  # torch's own errors are RuntimeErrors
            raise TransportError(f"{backend}: the setup of the pair failed ({_first_line(error)})") from error

    def begin(self) -> None:
        """Nothing: all calls block."""

    def send(self, view: View, *, timeout_s: float) -> None:
        """Blocks."""
        self._finish(lambda tensor: self._group.send([tensor], self._other, 0), view, timeout_s)

    def receive(self, view: View, *, timeout_s: float) -> None:
        """Blocks."""
        self._finish(lambda tensor: self._group.recv([tensor], self._other, 0), view, timeout_s)

    def end(self, *, timeout_s: float) -> Done:
        """The calls are done already."""
        return at_once

    def flush(self) -> None:
        """Nothing."""

    def puts_off(self) -> bool:
        """Never."""
        return False

    def abandon(self) -> None:
        """Nothing is enqueued."""

    def scratch(self, size: int) -> View:
        """Host memory."""
        if self._scratch is None:
            self._scratch = memoryview(bytearray(HOST_PIECE_BYTES_MAX))
        return self._scratch[:size]

    def close(self) -> None:
        """Drops the group."""
        self._group = None

    def _finish(self, post: Any, view: View, timeout_s: float) -> None:
        try:
            if not post(_tensor(on_host(view))).wait(datetime.timedelta(seconds=timeout_s)):
                raise TransportError(f"{self._backend}: the other end did not call within {timeout_s:g} s")
        except RuntimeError as error:
            raise TransportError(f"{self._backend}: {_first_line(error)}") from error


def demand(backend: str) -> None:
    """Raises SettingsError with the missing part, when this torch lacks a backend."""
    if why := _missing(backend):
        raise SettingsError("transports", why)


def _missing(backend: str) -> str | None:
    if backend not in MAGIC:
        return f"{backend!r} is not one of nccl, {', '.join(MAGIC)}"
    try:
        import torch
        import torch.distributed
    except ImportError:
        return f"{backend} needs torch: pip install torch"
    if not torch.distributed.is_available():
        return f"{backend}: torch {torch.__version__} was built without torch.distributed"
    built = torch.distributed.is_gloo_available() if backend == "gloo" else torch.distributed.is_ucc_available()
    if not built:
        return f"{backend}: torch {torch.__version__} was built without it; build torch with it, or use tcp"
    return None


def _group(backend: str, store: Any, rank: int, *, host: str) -> Any:
    dist: Any = importlib.import_module("torch.distributed")  # its types depend on the build of torch
    timeout = datetime.timedelta(seconds=SETUP_TIMEOUT_S)
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        return dist.ProcessGroupGloo(store, rank, 2, options)
    return dist.ProcessGroupUCC(store, rank, 2, timeout)


@functools.cache
def _store_class() -> Any:
    store: Any = importlib.import_module("torch.distributed").Store

    class StreamStore(store):  # type: ignore[misc] # torch is imported late
        """The keys that both ends set, exchanged over the stream. Raises OSError and EOFError."""

        def __init__(self, stream: ByteStream) -> None:
            super().__init__()
            self._stream = stream
            self._known: dict[str, bytes] = {}
            self._room = STORED_BYTES_MAX

        def set(self, key: str, value: str | bytes) -> None:
            data = value.encode() if isinstance(value, str) else bytes(value)
            self._known[key] = data
            write_all(self._stream, _SIZES.pack(len(key.encode()), len(data)) + key.encode() + data)

        def get(self, key: str) -> bytes:
            while key not in self._known:
                key_bytes, value_bytes = _SIZES.unpack(read_exactly(self._stream, _SIZES.size))
                self._room -= _SIZES.size + key_bytes + value_bytes
                if self._room < 0:
                    raise EOFError(f"the peer stores more than {STORED_BYTES_MAX} bytes")
                known = read_exactly(self._stream, key_bytes).decode("ascii", "replace")
                self._known[known] = read_exactly(self._stream, value_bytes)
            return self._known[key]

        def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
            for key in keys:
                self.get(key)

    return StreamStore


def _tensor(view: memoryview) -> torch.Tensor:
    """The memory of the view, which may be read-only: torch.frombuffer warns about read-only buffers."""
    import torch

    memory = np.frombuffer(view, np.uint8)
    tensor = torch.frombuffer((ctypes.c_ubyte * memory.nbytes).from_address(memory.ctypes.data), dtype=torch.uint8)
    tensor._keeps = memory  # type: ignore[attr-defined]
    return tensor


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
