"""Who is known and who is worth dialling, as a state machine.

Addresses come from discovery (given by hand, found by multicast) and from other members; the machine decides when to
dial which, drops one of two links that both ends opened to each other at the same time, and tells new members about
the others, so that one address is enough to join. Everything heard expires: an address that cannot be reached, or
that hangs up at once, is tried less and less often, and forgotten if it stays out of reach and nobody gave it by hand.

What a peer says of its own address is a claim. It is enough to dial the address, and to spare this node a second link
to where others say the same; it never stands in the way of an address given by hand, and never tells this node which
addresses are its own: only dialling does.

Must not know: sockets, clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from swarm.errors import LocalProtocolError
from swarm.messages import ADDRESSES_MAX

LINKS_MAX = 64  # control links one node keeps; each costs a socket and about 50 KB
KNOWN_MAX = 1024  # addresses remembered; beyond that strangers cannot make this node remember more
FAILURES_MAX = 5  # then an address nobody gave by hand is forgotten
OWN_MAX = 64  # of this node's own addresses; all of 127.0.0.0/8 may be it, so the oldest are found out again
RETRY_FIRST_S, RETRY_LONGEST_S = 0.5, 15.0
BRIEF_S = 5.0  # a link this short was turned away ("too many links"), not lost: a hello takes far less, use far more


@dataclass(frozen=True)
class Found:
    """Discovery names an address. `lasting`: given by hand, never forgotten."""

    address: str
    lasting: bool


@dataclass(frozen=True)
class Told:
    """A member names addresses that it is connected to."""

    addresses: tuple[str, ...]


@dataclass(frozen=True)
class DialFailed:
    """Nobody could be talked to at this address."""

    address: str


@dataclass(frozen=True)
class LinkUp:
    """Hello was exchanged. `link` numbers the link; `dialled` is the address this node dialled, if it did."""

    link: int
    node: str
    address: str
    dialled: str | None


@dataclass(frozen=True)
class LinkDown:
    """A link is gone."""

    link: int


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class Dial:
    """Open a link to this address."""

    address: str


@dataclass(frozen=True)
class Welcome:
    """From now on this link is the way to its node; tell it of these addresses."""

    link: int
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Drop:
    """Close this link, and why."""

    link: int
    why: str


Event: TypeAlias = Found | Told | DialFailed | LinkUp | LinkDown | Tick
Action: TypeAlias = Dial | Welcome | Drop


@dataclass
class _Address:
    lasting: bool
    failures: int = 0  # in a row, of reaching it
    brief: int = 0  # in a row, of its links that ended within `BRIEF_S`
    due_at: float = 0.0
    dialling: bool = False
    node: str | None = None  # who answered there last: one node may have several addresses


@dataclass(frozen=True)
class _Link:
    number: int
    node: str
    address: str
    dialled: str | None
    since: float


class Membership:
    """The members one node knows. `node` is its own id."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._known: dict[str, _Address] = {}
        self._links: dict[int, _Link] = {}
        self._own: dict[str, None] = {}  # in the order of dialling

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about one event."""
        match event:
            case Found(address, lasting):
                self._learn(address, lasting)
            case Told(addresses):
                for address in addresses:
                    self._learn(address, False)
            case DialFailed(address):
                self._failed(address, now)
            case LinkUp():
                return [*self._up(event, now), *self._due(now)]
            case LinkDown(number):
                self._down(number, now)
            case Tick():
                pass
            case _:
                raise LocalProtocolError(f"membership cannot handle {event!r}")
        return self._due(now)

    def unanswered(self) -> list[str]:
        """Addresses that have neither answered nor failed yet."""
        linked = self._linked()
        untried = (a for a, k in self._known.items() if not k.failures and not k.brief)
        return sorted(a for a in untried if a not in linked)

    def tried(self) -> list[str]:
        """What became of every address, for error messages."""
        linked = self._linked()
        return [f"{a}: {_fate(k)}" for a, k in sorted(self._known.items()) if a not in linked]

    def _learn(self, address: str, lasting: bool) -> None:
        if address in self._own:
            return
        if known := self._known.get(address):
            known.lasting = known.lasting or lasting
        elif len(self._known) < KNOWN_MAX or lasting:
            self._known[address] = _Address(lasting)

    def _failed(self, address: str, now: float) -> None:
        if known := self._known.get(address):
            known.dialling = False
            known.failures += 1
            known.due_at = now + _pause_s(known.failures)
            if known.failures >= FAILURES_MAX and not known.lasting:
                del self._known[address]

    def _up(self, event: LinkUp, now: float) -> list[Action]:
        if event.dialled and (known := self._known.get(event.dialled)):
            known.dialling, known.failures, known.node = False, 0, event.node
        if event.node == self._node:
            if event.dialled:
                self._met_itself(event.dialled)
            return [Drop(event.link, "this is myself")]
        link = _Link(event.link, event.node, event.address, event.dialled, now)
        twin = next((other for other in self._links.values() if other.node == event.node), None)
        if twin is None and len(self._links) >= LINKS_MAX:
            return [Drop(event.link, "too many links")]
        actions: list[Action] = []
        if twin is not None:
            if not self._better(link, twin):
                return [Drop(link.number, "another link is open")]
            del self._links[twin.number]  # its node stays linked: no failure of its address
            actions.append(Drop(twin.number, "another link is open"))
        self._learn(event.address, False)
        others = sorted({other.address for other in self._links.values()} - {event.address})
        self._links[link.number] = link
        return [*actions, Welcome(link.number, tuple(others[:ADDRESSES_MAX]))]

    def _met_itself(self, address: str) -> None:
        self._known.pop(address, None)
        self._own[address] = None
        if len(self._own) > OWN_MAX:
            del self._own[next(iter(self._own))]

    def _better(self, link: _Link, twin: _Link) -> bool:
        """Both ends keep the link that the smaller id dialled; of two such, the newer: the older one must be dead."""
        if (link.dialled is None) == (twin.dialled is None):
            return True
        return (link.dialled is not None) == (self._node < link.node)

    def _down(self, number: int, now: float) -> None:
        if link := self._links.pop(number, None):
            for address, known in self._known.items():
                if not _leads_to(address, known, link):
                    continue
                if now - link.since >= BRIEF_S:
                    known.brief = 0
                elif address == link.dialled:  # who dialled in may claim any address, and has not turned this node away
                    known.brief += 1
                known.due_at = max(known.due_at, now + _pause_s(max(known.brief, 1)))

    def _due(self, now: float) -> list[Action]:
        linked = self._linked()
        due = sorted(a for a, k in self._known.items() if a not in linked and not k.dialling and k.due_at <= now)
        due = due[: LINKS_MAX - len(self._links)]
        for address in due:
            self._known[address].dialling = True
        return [Dial(address) for address in due]

    def _linked(self) -> set[str]:
        nodes = {link.node for link in self._links.values()}
        dialled = {link.dialled for link in self._links.values()}
        claimed = {link.address for link in self._links.values()}
        return {
            address
            for address, known in self._known.items()
            if known.node in nodes or address in dialled or (address in claimed and not known.lasting)
        }

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        nodes = [link.node for link in self._links.values()]
        if len(nodes) != len(set(nodes)) or self._node in nodes:
            raise LocalProtocolError(f"{self!r}: two links to one node, or one to itself")
        if self._own.keys() & self._known.keys():
            raise LocalProtocolError(f"{self!r}: knows its own address as somebody else's")

    def __repr__(self) -> str:
        return f"<Membership {self._node[:8]} {len(self._links)} links | {len(self._known)} addresses>"


def _leads_to(address: str, known: _Address, link: _Link) -> bool:
    claimed = address == link.address and not known.lasting
    return known.node == link.node or address == link.dialled or claimed


def _pause_s(failures: int) -> float:
    """How long to leave an address alone after so many failures in a row, at least one."""
    return min(RETRY_FIRST_S * 2.0 ** min(failures - 1, 16), RETRY_LONGEST_S)  # 2.0 ** 1024 is an OverflowError


def _fate(known: _Address) -> str:
    if known.failures:
        return f"no answer, tried {known.failures} times"
    return f"hung up at once, {known.brief} times" if known.brief else "not connected just now"
