"""Nodes that the settings name: addresses, and names that DNS resolves to many (a Kubernetes headless service).

DNS lists a killed node for as long as its record lives, so an address found here is only a hint. A name is asked for
again and again: replicas start later, and a cluster changes its answers.

Must not know: links, members, multicast.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Sequence

from swarm.errors import PeerError, PeerTimeout, PeerUnreachable
from swarm.net.environment import Found
from swarm.protocol.messages import Address
from swarm.settings import DEFAULT_PORT, is_literal, join_address, split_address

RESOLVE_TIMEOUT_S = 5.0
RESOLVE_EVERY_S = 5.0  # a name may have more addresses later, of replicas that start later
RESOLVE_SOON_S, RESOLVE_SOON_FOR_S = 1.0, 15.0  # replicas of one rollout start within seconds of each other

log = logging.getLogger("swarm")


class PeerNames:
    """The peers of the settings. Raises SettingsError for a malformed address."""

    def __init__(self, peers: Sequence[str]) -> None:
        self._peers = static(peers)
        # A resolver that asks a dead server first answers after 5 s.
        self._unanswered = {peer for peer in self._peers if not is_literal(split_address("peer", peer)[0])}
        self._unknown: dict[Address, PeerError] = {
            peer: PeerTimeout(peer, "its name is still being looked up") for peer in self._unanswered
        }

    def __bool__(self) -> bool:
        return bool(self._peers)

    @property
    def unresolved(self) -> list[str]:
        """A line for each name that is not known just now."""
        return sorted(map(str, self._unknown.values()))

    @property
    def resolving(self) -> bool:
        """Whether a name is still looked up for the first time."""
        return bool(self._unanswered)

    async def follow(self, found: Found) -> None:
        """Reports the addresses of the names, as often as they may have changed, until it is cancelled."""
        async with asyncio.TaskGroup() as names:  # side by side: one resolver may be silent
            for peer in self._peers:
                names.create_task(self._follow(peer, found), name=f"swarm-resolve {peer}")

    async def _follow(self, peer: Address, found: Found) -> None:
        clock, warned = asyncio.get_running_loop().time, False
        name, soon_until_s = Name(peer), clock() + RESOLVE_SOON_FOR_S
        while True:
            try:
                known = await name.resolve()
            except PeerError as error:
                self._unknown[peer] = error
                if not isinstance(error, PeerTimeout):
                    self._unanswered.discard(peer)
                if not warned:  # it may exist once its first replica runs
                    log.warning("%s; asking again every %g s", error, RESOLVE_EVERY_S)
                warned = True
            else:
                self._unknown.pop(peer, None)
                self._unanswered.discard(peer)
                for address in known:
                    found((address,), address == peer)
            await asyncio.sleep(RESOLVE_SOON_S if clock() < soon_until_s else RESOLVE_EVERY_S)


def static(peers: Sequence[str]) -> list[Address]:
    """The listed addresses in canonical form, without duplicates. Raises SettingsError for invalid addresses."""
    split = (split_address("peer", peer, default_port=DEFAULT_PORT, least_port=1) for peer in peers)
    return list(dict.fromkeys(Address(join_address(*each)) for each in split))


class Name:
    """A peer of the settings whose name is looked up again and again: the DNS of a cluster changes its answers.

    One question at a time, on a thread of its own that is left behind at a timeout: a silent resolver blocks the caller
    for a minute, and the threads of asyncio's executor hash and write files.
    """

    def __init__(self, address: Address) -> None:
        """Raises SettingsError for a malformed address."""
        self.address = address
        self._host, self._port = split_address("peer", address)
        self._asked: asyncio.Future[list[Address]] | None = None

    async def resolve(self, *, timeout_s: float = RESOLVE_TIMEOUT_S) -> list[Address]:
        """The addresses of the name, each with the port; of a literal itself. Raises PeerUnreachable, PeerTimeout."""
        if is_literal(self._host):
            return [Address(join_address(self._host, self._port))]
        asked = self._asked = self._asked or self._ask()
        try:
            async with asyncio.timeout(timeout_s):
                known = await asyncio.shield(asked)
        except TimeoutError as error:  # the next call waits for the same answer
            raise PeerTimeout(self.address, f"its name was not resolved within {timeout_s:g} s") from error
        except OSError as error:
            self._asked = None
            what = f"this name is not known ({error.strerror or error}); check it, or name an address"
            raise PeerUnreachable(self.address, what) from error
        self._asked = None
        return known

    def _ask(self) -> asyncio.Future[list[Address]]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Address]] = loop.create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # also if no call waits any more

        def tell(known: list[Address], error: OSError | None) -> None:
            if answer.done():
                return
            if error:
                answer.set_exception(error)
            else:
                answer.set_result(known)

        def ask() -> None:
            known: list[Address] = []
            failed: OSError | None = None
            try:
                infos = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                known = list(dict.fromkeys(Address(join_address(str(at[0]), self._port)) for *_, at in infos))
            except OSError as error:
                failed = error
            except UnicodeError as error:
                failed = OSError(f"no name of DNS: {error}")
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, known, failed)

        threading.Thread(target=ask, name=f"swarm-dns {self._host}", daemon=True).start()
        return answer


async def resolve(address: Address, *, timeout_s: float = RESOLVE_TIMEOUT_S) -> list[Address]:
    """As `Name.resolve`, once. Raises SettingsError for a malformed address."""
    return await Name(address).resolve(timeout_s=timeout_s)
