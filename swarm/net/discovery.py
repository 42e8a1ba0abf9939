"""Discovery by mDNS (RFC 6762): addresses of nodes for the first contact, without any setup.

It rarely crosses subnets or pods: there the settings name nodes (`peer_names`). A killed node stays listed for more
than an hour, so an address found here is only a hint: links and gossip decide which nodes are alive, and the handshake
identifies the node.

mDNS is readable by every host of the network, so it carries no models. A node on loopback is announced on loopback; a
node that listens on several cards is announced with all its addresses on each of them.

A newcomer finds a seed by mDNS within about 0.1 s (up to 8 nodes on one host, newcomers 0.3 s apart), because it

- asks from a port of its own. The answer to a question from the shared port 5353 either goes to all hosts, and is not
  repeated within a second, so newcomers of a burst wait 1.1 to 1.7 s; or it goes to the asking host alone, and there
  the kernel may give it to another process that shares the port (1.1 s);
- does not probe for its name before it announces itself: node ids are random, and probing takes 1 s.

Must not know: links, membership, models. zeroconf is imported when mDNS starts: the import slows the command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, TypeAlias

from swarm.net import cards
from swarm.net.addresses import multicast_hosts
from swarm.protocol.messages import ADDRESSES_OWN_MAX, PROTOCOL, Address
from swarm.settings import is_loopback, join_address

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

OnNode: TypeAlias = Callable[[tuple[Address, ...]], None]  # the addresses of one node

SERVICE_TYPE = "_swarm-weights._tcp.local."
RESOLVE_TIMEOUT_S = 5.0
SILENT_AFTER_S = 10.0  # own announcements come back at once, and go out over some seconds
CLOSE_TIMEOUT_S = 2.0  # the goodbye takes 0.4 s

# Limits on work that strangers on the network cause.
FOUND_MAX = 4096  # remembered nodes, each reported once
LOOKUPS_MAX = 64  # names looked up at once; an announcement normally contains its address

_ASK_S = 5.0  # questions go out after 0, 1 and 3 s; later nodes announce themselves
_LOOKUP_TIMEOUT_MS = 3000
_TOGETHER_S = 0.2  # within which answers to one question arrive

log = logging.getLogger("swarm")


class Mdns:
    """Announces a node on the local network and reports the others. `start` once, `close` always."""

    def __init__(self) -> None:
        self._node_id = ""
        self._loopback = False
        self._heard = False  # any announcement, its own included
        self._announced_at_s: float | None = None
        self._found: OnNode = _ignore
        self._reported: set[tuple[str, tuple[Address, ...]]] = set()
        self._sockets: list[AsyncZeroconf] = []
        self._browsers: list[AsyncServiceBrowser] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = "on" if self._sockets else "off"
        return f"<Mdns {self._node_id or '-'} {state}, {len(self._reported)} found>"

    @property
    def started(self) -> bool:
        """Whether multicast sockets are open."""
        return bool(self._sockets)

    def silent(self, now: float) -> bool:
        """Whether not even the node's own announcement was heard: a firewall of this machine drops multicast.

        The kernel loops multicast back without a network, so hearing itself says nothing about the network. `now`: the
        loop's clock.
        """
        return (
            bool(self._sockets)
            and not self._heard
            and self._announced_at_s is not None
            and now - self._announced_at_s > SILENT_AFTER_S
        )

    async def start(self, *, node_id: str, hosts: Sequence[str], port: int, found: OnNode) -> None:
        """Announces `node_id` at each of the hosts and calls `found(addresses)` once for the addresses of another node.

        `hosts`: addresses of cards of this machine, which it is announced on. With port 0 it only listens there.
        `found` runs on the loop; it must be quick and must not raise. Returns before the first announcement. Without
        multicast it logs a line and does nothing.
        """
        self._node_id, self._found = node_id, found
        try:
            if not hosts:
                raise OSError("this machine has no network card with an address")
            self._loopback = all(is_loopback(each) for each in hosts)
            self._open(list(hosts), port)
        except (OSError, RuntimeError) as error:  # RuntimeError: the card is gone meanwhile
            log.warning("mDNS is unavailable (%s); nodes will not find each other: name one with --peer", error)
            await self.close()

    async def close(self) -> None:
        """Says goodbye and closes the sockets."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        browsers, self._browsers = self._browsers, []
        sockets, self._sockets = self._sockets, []
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for browser in browsers:
                    await browser.async_cancel()
                await asyncio.gather(*(each.async_close() for each in sockets))
        except TimeoutError:
            log.warning("mDNS did not close within %g s; others may list this node for a while", CLOSE_TIMEOUT_S)

    def _open(self, hosts: list[str], port: int) -> None:
        from zeroconf import DNSQuestionType, ServiceInfo
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

        logging.getLogger("zeroconf").setLevel(logging.ERROR)  # it warns of every address that is still being set up

        def browse(messenger: AsyncZeroconf, question: DNSQuestionType | None) -> AsyncServiceBrowser:
            self._sockets.append(messenger)
            browser = AsyncServiceBrowser(
                messenger.zeroconf, SERVICE_TYPE, handlers=[self._on_change], question_type=question
            )
            self._browsers.append(browser)
            return browser

        # ::1 has no multicast; announcements on 127.0.0.1 may contain an IPv6 address.
        interfaces = ["127.0.0.1"] if self._loopback else hosts
        asker = AsyncZeroconf(interfaces=interfaces, unicast=True)
        asking = browse(asker, None)
        shared = AsyncZeroconf(interfaces=interfaces)
        browse(shared, DNSQuestionType.QM)
        self._spawn(self._stop_asking(asker, asking), "ask")
        if not port:
            return
        info = ServiceInfo(
            SERVICE_TYPE,
            f"{self._node_id}.{SERVICE_TYPE}",
            port=port,
            parsed_addresses=list(dict.fromkeys(host.partition("%")[0] for host in hosts)),
            properties={"v": str(PROTOCOL)},
            server=f"{self._node_id}.local.",
        )
        self._spawn(self._announce(shared, info), "announce")

    async def _announce(self, messenger: AsyncZeroconf, info: ServiceInfo) -> None:
        from zeroconf import Error

        try:
            # 'cooperating' skips probing, see the module's docstring.
            await (await messenger.async_register_service(info, cooperating_responders=True))
            self._announced_at_s = asyncio.get_running_loop().time()
        except (Error, OSError) as error:
            log.warning("mDNS could not announce this node (%r); others reach it only with --peer", error)

    async def _stop_asking(self, asker: AsyncZeroconf, browser: AsyncServiceBrowser) -> None:
        # Answers to a private port are valid for 10 s only, so a browser there would ask for ever.
        await asyncio.sleep(_ASK_S)
        await browser.async_cancel()
        await asker.async_close()
        self._browsers.remove(browser)
        self._sockets.remove(asker)

    def _on_change(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        from zeroconf import ServiceStateChange
        from zeroconf.asyncio import AsyncServiceInfo

        self._heard = True
        node_id = name.removesuffix(f".{SERVICE_TYPE}")
        if node_id == self._node_id or state_change is ServiceStateChange.Removed:
            return
        info = AsyncServiceInfo(service_type, name)
        if info.load_from_cache(zeroconf):
            self._report(info)
        elif len(self._tasks) < LOOKUPS_MAX:
            self._spawn(self._look_up(zeroconf, info), f"look up {node_id}")

    async def _look_up(self, zeroconf: Zeroconf, info: ServiceInfo) -> None:
        from zeroconf import Error

        try:
            if await info.async_request(zeroconf, _LOOKUP_TIMEOUT_MS):
                self._report(info)
        except (Error, OSError) as error:
            log.debug("mDNS lists %s, but not where it is: %r", info.name, error)

    def _report(self, info: ServiceInfo) -> None:
        # A loopback address is reachable only from loopback, and multicast on loopback is from there.
        hosts = [host for host in info.parsed_scoped_addresses() if is_loopback(host) == self._loopback]
        if not info.port or not hosts:
            return
        addresses = tuple(Address(join_address(host, info.port)) for host in hosts[: ADDRESSES_OWN_MAX + 1])
        if (info.name, addresses) in self._reported:
            return
        if len(self._reported) >= FOUND_MAX:
            self._reported.clear()  # reporting a node twice is harmless
        self._reported.add((info.name, addresses))
        self._found(addresses)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"mdns: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def nearby(timeout_s: float) -> list[Address]:
    """Addresses of nodes of this machine and its network. Returns _TOGETHER_S after the first, or after `timeout_s`."""
    found: list[Address] = []
    heard = asyncio.Event()

    def report(addresses: tuple[Address, ...]) -> None:
        found.extend(addresses)
        heard.set()

    beyond = multicast_hosts(cards.read())
    listening = [Mdns() for hosts in (("127.0.0.1",), beyond) if hosts]
    try:
        for mdns, hosts in zip(listening, (("127.0.0.1",), beyond), strict=False):
            await mdns.start(node_id="", hosts=hosts, port=0, found=report)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(heard.wait(), timeout_s)
            await asyncio.sleep(_TOGETHER_S)
    finally:
        await asyncio.gather(*(mdns.close() for mdns in listening))
    return found


def _ignore(addresses: tuple[Address, ...]) -> None:
    """The value of `found` before `start`."""
