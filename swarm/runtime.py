"""The event loop of a process, in a thread, and the nodes on it, for synchronous callers, coroutines and threads.

Calls with equal settings share a node. It closes when its last user releases it, or when the process ends. A forked
child inherits no threads: it starts its own runtime and leaves its parent's nodes alone. `new_node` composes a node
with its environment, status page, metrics and dashboard.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from swarm import __version__
from swarm.checkpoint.hf_cache import cache_root
from swarm.dashboard.disk_room import DiskRoom
from swarm.dashboard.server import Dashboard
from swarm.membership import config
from swarm.net.host_environment import HostEnvironment, machine_label
from swarm.net.http_pages import HEALTH, METRICS, READY, Asset, HealthPage
from swarm.net.pausing_loop import PausingLoop
from swarm.node.node import Node
from swarm.node.status_client import PATH as STATUS_PATH
from swarm.observe import opentelemetry
from swarm.observe.fetch_record import FetchRecords
from swarm.observe.node_report import NodeReport
from swarm.observe.prometheus import Figure, Metrics
from swarm.settings import Settings, is_loopback, split_address

T = TypeVar("T")
EXIT_TIMEOUT_S = 2.0

_environments: weakref.WeakKeyDictionary[Node, HostEnvironment] = weakref.WeakKeyDictionary()


def new_node(
    settings: Settings, *, lenient: bool = False, figures: Callable[[], Iterable[Figure]] = tuple
) -> tuple[Node, NodeReport]:
    """A node of this machine, not open yet, and its status report.

    `lenient`: as of `HostEnvironment`; `figures`: further metrics of the process.
    """
    report = NodeReport(
        lambda: {
            "version": __version__,
            "open": environment.open_to_all,
            "mdns": environment.mdns,
            "withdrawn": {lost.model_id: lost.why for lost in node.lost},
        }
    )
    dashboard = Dashboard(report, room=DiskRoom(cache_root))
    metrics = Metrics(lambda: report.report(node.now()), dashboard.view, lambda: node.unready, figures)
    metrics_page = Asset("text/plain", metrics.exposition)
    environment = HostEnvironment(
        settings,
        {
            STATUS_PATH: lambda: report.report(node.now()),
            METRICS: metrics_page,
            HEALTH: HealthPage(lambda: node.broken),
            READY: HealthPage(lambda: node.unready),
            **dashboard.pages(),
        },
        lenient=lenient,
    )
    host, _ = split_address("listen", settings.listen, default_port=0)
    network = settings.network or ("local" if is_loopback(host) else "lan")
    node = Node(
        environment,
        network={"local": config.local, "lan": config.lan, "wan": config.wan}[network](),
        host=settings.host or machine_label(),
        rack=settings.rack or "",
        publishers=settings.signed_by,
        check_blake3=settings.chunk_hash == "blake3",
        upload_slots=settings.upload_slots,
        idle_timeout_s=settings.idle_timeout_s,
        stall_timeout_s=settings.stall_timeout_s,
    )
    node.name = settings.name or f"{socket.gethostname()}-{node.id[:6]}"
    _environments[node] = environment
    report.follow(node.journal)
    metrics.follow(node.journal)
    opentelemetry.follow(node.journal, report.fetches)
    dashboard.attach(node, environment.read)
    dashboard.follow(node.journal)
    return node, report


def reload(node: Node, settings: Settings) -> list[str]:
    """Gives a node of `new_node` what may change while it runs (`HostEnvironment.reload`). Raises SettingsError."""
    return _environments[node].reload(settings)


@dataclass
class _Shared:
    node: Node
    report: NodeReport
    opening: asyncio.Task[None]
    users: int = field(default=0)


class Runtime:
    """An event loop in a thread, and the nodes on it."""

    def __init__(self) -> None:
        self._loop = PausingLoop()
        self._thread = threading.Thread(target=self._run, name="swarm", daemon=True)
        self._nodes: dict[Settings, _Shared] = {}
        self._thread.start()
        atexit.register(self._close_all)

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Starts work on the loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(
        self, work: Coroutine[Any, Any, T], *, look: Callable[[], object] | None = None, look_every_s: float = 1.0
    ) -> T:
        """Does work on the loop and waits for it. Ctrl-C cancels the work, and waits for its cleanup.

        `look` is called in this thread until the work is done; its error ends the work.
        """
        over = threading.Event()

        async def watched() -> T:
            try:
                return await work
            finally:
                over.set()

        future = self.submit(watched())
        try:
            while look and not concurrent.futures.wait([future], timeout=look_every_s).done:
                look()
            return future.result()
        except BaseException:
            if future.cancel():
                over.wait(EXIT_TIMEOUT_S)
            raise

    def abandon(self) -> None:
        """For a forked child, where the thread does not exist: the process ends without waiting for it."""
        atexit.unregister(self._close_all)

    async def acquire(self, settings: Settings) -> Node:
        """An open node with these settings; on the loop only. Raises SettingsError."""
        shared = self._nodes.get(settings)
        if shared is None:
            node, report = new_node(settings, lenient=True)
            shared = self._nodes[settings] = _Shared(node, report, asyncio.ensure_future(node.open()))
        shared.users += 1
        try:
            await asyncio.shield(shared.opening)
        except BaseException:
            await self.release(settings)
            raise
        return shared.node

    def fetches(self, settings: Settings) -> FetchRecords:
        """The records of the fetches of an acquired node."""
        return self._nodes[settings].report.fetches

    async def release(self, settings: Settings) -> None:
        """Undoes an `acquire`; on the loop only."""
        shared = self._nodes.get(settings)
        if shared is None:
            return  # `_close_all` closed it
        shared.users -= 1
        if shared.users == 0:
            del self._nodes[settings]
            shared.opening.cancel()  # if it is not open yet
            await asyncio.gather(shared.opening, return_exceptions=True)
            await shared.node.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _close_all(self) -> None:
        async def close() -> None:
            nodes = [shared.node for shared in self._nodes.values()]
            self._nodes.clear()
            await asyncio.gather(*(node.close() for node in nodes), return_exceptions=True)

        concurrent.futures.wait([self.submit(close())], timeout=EXIT_TIMEOUT_S)


_lock = threading.Lock()
_runtime: Runtime | None = None
_inherited: list[Runtime] = []  # never finalized: their selectors are shared with the parent


def runtime() -> Runtime:
    """This process's runtime, started on first use."""
    global _runtime
    with _lock:
        if _runtime is None:
            _runtime = Runtime()
        return _runtime


def _start_afresh() -> None:
    """In a forked child the thread that held the lock does not exist, so the lock is replaced."""
    global _lock, _runtime
    _lock = threading.Lock()
    if _runtime is not None:
        _runtime.abandon()
        _inherited.append(_runtime)
        _runtime = None


os.register_at_fork(after_in_child=_start_afresh)
