"""The package's work on a GPU while another thread captures a CUDA graph, as an engine does at its start."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from swarm.content.manifest import HashScheme
from swarm.hashing.cuda import chunk_digests, prepare
from swarm.store import DeviceView, cuda
from swarm.store.staging import outgoing

pytestmark = pytest.mark.gpu


def view(tensor: torch.Tensor) -> DeviceView:
    return DeviceView(tensor.device.index, tensor.data_ptr(), tensor.nbytes, tensor)


def hashed(memory: torch.Tensor) -> None:
    with cuda.moving({}):  # as in a transport's thread, off torch's default stream
        chunk_digests(HashScheme(leaf_bytes=1 << 14), [[view(memory)[1:]]])


def staged(memory: torch.Tensor) -> None:
    assert b"".join(map(bytes, outgoing(view(memory)))) == bytes(3 << 20)


@pytest.mark.parametrize("what", ["hash", "stage", "allocation", "pinned", "query"])
def test_is_a_capture_not_spoilt(what: str) -> None:
    """Each of these fails, and spoils the capture, in a thread that did not say that it works beside captures."""
    memory = torch.zeros(3 << 20, dtype=torch.uint8, device="cuda")
    gpu, stream = cuda.gpu(0), cuda.new_stream(0)
    prepare(0)  # a module is not loaded during a capture

    def query() -> None:
        with cuda.beside_captures():
            stream.query()
            gpu.event().query()

    works: dict[str, Callable[[], object]] = {
        "hash": lambda: hashed(memory),
        "stage": lambda: staged(memory),
        "allocation": lambda: (gpu.allocation(memory.data_ptr()), gpu.export(gpu.allocation(memory.data_ptr())[0])),
        "pinned": lambda: cuda.Pinned(5 << 20),
        "query": query,
    }
    errors: list[BaseException] = []

    def work() -> None:
        try:
            works[what]()
        except BaseException as error:
            errors.append(error)

    x = torch.ones(16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
        z = y + 1
    graph.replay()
    torch.cuda.synchronize()
    assert not errors, errors
    assert z.tolist() == [3.0] * 16
