"""Whom this node is linked with, as a state machine.

Addresses come from discovery (given by hand, found by multicast), from members over their links, and from gossip, which
also says who holds what. The machine decides whom to dial: everybody in a small swarm; in a larger one a few that hold
what this node wants, a seed among them and half of them on its own host, and nobody once it wants nothing. Who was
given by hand is always dialled, and whoever dials in is welcome up to `LINKS_MAX`. So the swarm is a random graph of a
bounded degree, and gossip, not the links, is what everybody hears.

Where datagrams do not get through, links show it: they stand, and gossip knows nobody. Then all addresses are dialled.

It drops one of two links that both ends opened to each other at the same time, links to the dead, and links of no use
that stand in the way of others. Everything heard expires: an address that cannot be reached, or that hangs up at once,
is tried less and less often, and forgotten if it stays out of reach and nobody vouches for it.

What a peer says of its own address is a claim. It is enough to dial the address, and to spare this node a second link
to where others say the same; it never stands in the way of an address given by hand, and never tells this node which
addresses are its own: only dialling does.

Must not know: sockets, clocks, datagrams.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from swarm.content.manifest import Digest
from swarm.errors import LocalProtocolError
from swarm.peers import selection
from swarm.peers.selection import LINKS_FIRST, LINKS_FULL, LINKS_MOST, LINKS_WANTED, Candidate
from swarm.protocol.messages import ADDRESSES_MAX, Address, NodeId
from swarm.protocol.packets import Record, State

LINKS_MAX = 64  # control links one node keeps; each costs a socket and about 50 KB
KNOWN_MAX = 1024  # addresses remembered; beyond that strangers cannot make this node remember more
FAILURES_MAX = 5  # then an address nobody gave by hand is forgotten
OWN_MAX = 64  # of this node's own addresses; all of 127.0.0.0/8 may be it, so the oldest are found out again
RETRY_FIRST_S, RETRY_LONGEST_S = 0.5, 15.0
BRIEF_S = 5.0  # a link this short was turned away ("too many links"), not lost: a hello takes far less, use far more
GOSSIP_LATE_S = 3.0  # a link stands for so long and gossip knows nobody: datagrams do not get through
IDLE_S = 30.0  # a link that neither end can use is kept so long: the next fetch may be near


@dataclass(frozen=True)
class AddressDiscovered:
    """Discovery names an address. `lasting`: given by hand, never forgotten."""

    address: Address
    lasting: bool


@dataclass(frozen=True)
class AddressesShared:
    """A member names addresses that it is connected to."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True)
class DialFailed:
    """Nobody could be talked to at this address."""

    address: Address


@dataclass(frozen=True)
class LinkUp:
    """Hello was exchanged. `link` numbers the link; `dialled` is the address this node dialled, if it did.

    `holds`: what the node announces, see `HoldingsAnnounced`.
    """

    link: int
    node: NodeId
    address: Address
    dialled: Address | None
    holds: Mapping[Digest, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class LinkDown:
    """A link is gone."""

    link: int


@dataclass(frozen=True)
class HoldingsAnnounced:
    """A linked node says what it holds: by digest, whether all of it."""

    link: int
    holds: Mapping[Digest, bool]


@dataclass(frozen=True)
class MemberUpdated:
    """Gossip says something new of a member."""

    record: Record


@dataclass(frozen=True)
class Wanted:
    """What this node is looking for from now on. `more`: also something of which it does not know the digest."""

    digests: frozenset[Digest]
    more: bool = False


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class Dial:
    """Open a link to this address."""

    address: Address


@dataclass(frozen=True)
class Welcome:
    """From now on this link is the way to its node; tell it of these addresses."""

    link: int
    addresses: tuple[Address, ...]


@dataclass(frozen=True)
class Drop:
    """Close this link, and why."""

    link: int
    why: str


Event: TypeAlias = (
    AddressDiscovered
    | AddressesShared
    | DialFailed
    | LinkUp
    | LinkDown
    | HoldingsAnnounced
    | MemberUpdated
    | Wanted
    | Tick
)
Action: TypeAlias = Dial | Welcome | Drop


@dataclass
class _Address:
    lasting: bool
    failures: int = 0  # in a row, of reaching it
    brief: int = 0  # in a row, of its links that ended within `BRIEF_S`
    due_at: float = 0.0
    dialling: bool = False
    node: NodeId | None = None  # who answered there last: one node may have several addresses


@dataclass
class _Link:
    number: int
    node: NodeId
    address: Address
    dialled: Address | None
    since: float
    holds: Mapping[Digest, bool]


@dataclass(frozen=True)
class _Member:
    """What gossip says. `more`: it holds more than there was room to say. `load`: transfers a slot."""

    address: Address
    distance: int
    load: float
    holds: Mapping[Digest, bool]
    more: bool


class Connections:
    """The members one node knows. `node` is its own id; `host` and `rack` are labels of where it runs."""

    def __init__(self, node: NodeId, *, rng: random.Random, host: str = "", rack: str = "") -> None:
        self._node = node
        self._host, self._rack = host, rack
        self._rng = rng
        self._known: dict[Address, _Address] = {}
        self._links: dict[int, _Link] = {}
        self._own: dict[Address, None] = {}  # in the order of dialling
        self._members: dict[NodeId, _Member] = {}  # the living, by node
        self._living_at: dict[Address, NodeId] = {}  # who of them, by address
        self._wants = Wanted(frozenset())
        self._wanted_since: dict[Digest, float] = {}
        self._most_dialled = LINKS_MOST  # more once gossip was found to be blocked

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about one event."""
        actions: list[Action] = []
        match event:
            case AddressDiscovered(address, lasting):
                self._learn(address, lasting)
            case AddressesShared(addresses):
                for address in addresses:
                    self._learn(address, False)
            case DialFailed(address):
                self._failed(address, now)
            case LinkUp():
                actions = self._up(event, now)
            case LinkDown(number):
                self._down(number, now)
            case HoldingsAnnounced(number, holds):
                if link := self._links.get(number):
                    link.holds = holds
                return []
            case MemberUpdated(record):
                return self._hear(record, now)  # whom to dial waits for the next Tick: gossip comes in bursts
            case Wanted(digests):
                self._wants = event
                self._wanted_since = {digest: self._wanted_since.get(digest, now) for digest in sorted(digests)}
            case Tick():
                actions = self._drop_idle(now)
            case _:
                raise LocalProtocolError(f"membership cannot handle {event!r}")
        return [*actions, *self._due(now)]

    def unanswered(self) -> list[Address]:
        """Addresses that were dialled, and have neither answered nor failed yet."""
        return sorted(a for a, k in self._known.items() if k.dialling and not k.failures and not k.brief)

    def tried(self) -> list[str]:
        """What became of every address, for error messages."""
        linked = self._linked()
        return [f"{a}: {_fate(k)}" for a, k in sorted(self._known.items()) if a not in linked]

    def _learn(self, address: Address, lasting: bool) -> None:
        if address in self._own:
            return
        if known := self._known.get(address):
            known.lasting = known.lasting or lasting
        elif len(self._known) < KNOWN_MAX or lasting:
            self._known[address] = _Address(lasting)

    def _failed(self, address: Address, now: float) -> None:
        if known := self._known.get(address):
            known.dialling = False
            known.failures += 1
            known.due_at = now + _pause_s(known.failures)
            if known.failures >= FAILURES_MAX and not known.lasting and address not in self._living_at:
                del self._known[address]

    def _up(self, event: LinkUp, now: float) -> list[Action]:
        if event.dialled and (known := self._known.get(event.dialled)):
            known.dialling, known.failures, known.node = False, 0, event.node
        if event.node == self._node:
            if event.dialled:
                self._met_itself(event.dialled)
            return [Drop(event.link, "this is myself")]
        link = _Link(event.link, event.node, event.address, event.dialled, now, event.holds)
        twin = next((other for other in self._links.values() if other.node == event.node), None)
        if twin is None and len(self._links) >= LINKS_MAX:
            return [Drop(event.link, "too many links")]
        if twin is None and not event.dialled and self._full() and event.node in self._members:
            return [Drop(event.link, "full while it fetches")]  # whom gossip reaches finds others
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

    def _met_itself(self, address: Address) -> None:
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

    def _hear(self, record: Record, now: float) -> list[Action]:
        if record.node == self._node:
            return []
        if (known := self._members.pop(record.node, None)) and self._living_at.get(known.address) == record.node:
            del self._living_at[known.address]
        if record.state < State.DEAD:
            profile = record.profile
            self._members[record.node] = _Member(
                address=record.address,
                distance=profile.distance(self._host, self._rack),
                load=profile.uploads / max(1, profile.slots),
                holds={held.digest: held.chunks == held.chunks_total for held in profile.artifacts},
                more=profile.omitted > 0,
            )
            self._living_at[record.address] = record.node
            return []
        why = "gossip says that it left" if record.state is State.LEFT else "gossip says that it is dead"
        dead = [link for link in self._links.values() if link.node == record.node]
        for link in dead:
            self._give_up(link, now)
        forgotten = self._known.get(record.address)
        if forgotten and not forgotten.lasting and not forgotten.dialling and record.address not in self._living_at:
            del self._known[record.address]
        return [Drop(link.number, why) for link in dead]

    def _give_up(self, link: _Link, now: float) -> None:
        del self._links[link.number]
        for address, known in self._known.items():
            if _leads_to(address, known, link):
                known.due_at = max(known.due_at, now + RETRY_FIRST_S)

    def _drop_idle(self, now: float) -> list[Action]:
        """Ends links that this node dialled by itself and neither end can use: both hold all that they want."""
        if self._wants.digests or self._wants.more or self._small() or self._blocked(now):
            return []
        idle = [
            link
            for link in self._by_itself()
            if now - link.since >= IDLE_S and link.node in self._members and link.holds and all(link.holds.values())
        ]
        for link in idle:
            self._give_up(link, now)
        return [Drop(link.number, "there is nothing to do for each other") for link in idle]

    def _due(self, now: float) -> list[Action]:
        """Whom to dial, and which link gives way to that."""
        blocked, small = self._blocked(now), self._small()
        limit = LINKS_MAX if blocked else self._for_all_wanted(LINKS_MOST)
        self._most_dialled = max(self._most_dialled, limit)
        linked = self._linked()
        dialling = [address for address, known in self._known.items() if known.dialling]
        due = sorted(a for a, k in self._known.items() if a not in linked and not k.dialling and k.due_at <= now)
        room = LINKS_MAX - len(self._links) - len(dialling)
        by_hand = [address for address in due if self._known[address].lasting][: max(0, room)]
        for address in by_hand:
            self._known[address].dialling = True
        taken = len(self._by_itself()) + sum(not self._known[address].lasting for address in dialling)
        members = self._to_dial(now) if self._wants.digests or self._wants.more or small else {}
        holders = {node: m for node, m in members.items() if not self._wants.digests.isdisjoint(m.holds)}
        drops = self._make_way(min(len(holders), taken + len(holders) - limit), now)
        free = min(room - len(by_hand), limit - taken) + len(drops)
        chosen = self._choose_holders(holders, free, now)
        others = {a for a in due if not self._known[a].lasting and (blocked or small or not self._is_member(a))}
        others |= {m.address for m in members.values() if small or (self._wants.more and m.more)}
        others -= {*chosen, *by_hand}
        free = max(0, free - len(chosen))
        picked = sorted(others) if len(others) <= free else sorted(self._rng.sample(sorted(others), free))
        for address in picked:
            self._known.setdefault(address, _Address(False)).dialling = True
        return [*drops, *(Dial(address) for address in (*by_hand, *chosen, *picked))]

    def _choose_holders(self, holders: dict[NodeId, _Member], free: int, now: float) -> list[Address]:
        """Marks up to `free` of these as being dialled, and returns their addresses."""
        chosen: list[Address] = []
        if free <= 0:
            return chosen
        sources = {digest: self._sources(digest) for digest in self._wanted_since}
        for digest, linked in sorted(sources.items(), key=lambda item: len(item[1])):
            few = now - self._wanted_since[digest] < selection.SETTLE_S and not self._small()
            others = [
                self._candidate(node, member.holds[digest])
                for node, member in holders.items()
                if digest in member.holds and member.address not in chosen
            ]
            ones = [self._candidate(node, whole) for node, whole in linked.items()]
            good = selection.choose(ones, others, wanted=LINKS_FIRST if few else LINKS_WANTED, rng=self._rng)
            for candidate in good[: max(0, free - len(chosen))]:
                address = self._members[candidate.node].address
                known = self._known.setdefault(address, _Address(False))
                known.dialling, known.node = True, candidate.node
                chosen.append(address)
        return sorted(chosen)

    def _candidate(self, node: NodeId, whole: bool) -> Candidate:
        member = self._members.get(node)
        return Candidate(node, whole, member.distance, member.load) if member else Candidate(node, whole, 1, 0.0)

    def _make_way(self, count: int, now: float) -> list[Action]:
        """Gives up to `count` links up that are of no use for what is wanted."""
        useless = [link for link in self._by_itself() if self._wants.digests.isdisjoint(link.holds)]
        useless = useless[: max(0, count)]
        for link in useless:
            self._give_up(link, now)
        return [Drop(link.number, "makes way for somebody who holds what is wanted here") for link in useless]

    def _sources(self, digest: Digest) -> dict[NodeId, bool]:
        """Nodes that are linked or dialled and hold it: whether all of it."""
        found = {link.node: link.holds[digest] for link in self._links.values() if digest in link.holds}
        for address, known in self._known.items():
            node = known.node or self._living_at.get(address)
            if known.dialling and node and (member := self._members.get(node)) and digest in member.holds:
                found[node] = member.holds[digest]
        return found

    def _for_all_wanted(self, links: int) -> int:
        """So many links for each artifact that is wanted, and at least so many; at most all there are."""
        return min(links * max(1, len(self._wants.digests)), LINKS_MAX)

    def _full(self) -> bool:
        """Whether who is fetching has as many links as are good for a burst: see `mesh`."""
        wanted = self._wants.digests
        newcomers = sum(not any(link.holds.get(digest) for digest in wanted) for link in self._links.values())
        return bool(wanted) and newcomers >= self._for_all_wanted(LINKS_FULL)

    def _by_itself(self) -> list[_Link]:
        """Links that this node dialled without being told to by hand."""
        return [
            link
            for link in self._links.values()
            if link.dialled and not ((known := self._known.get(link.dialled)) and known.lasting)
        ]

    def _to_dial(self, now: float) -> dict[NodeId, _Member]:
        """Members that are neither linked nor dialled, nor out of reach just now, by id."""
        linked = {link.node for link in self._links.values()}
        known = {node: self._known.get(member.address) for node, member in self._members.items()}
        return {
            node: self._members[node]
            for node in sorted(known.keys() - linked)
            if self._members[node].address not in self._own
            and ((k := known[node]) is None or (not k.dialling and k.due_at <= now))
        }

    def _is_member(self, address: Address) -> bool:
        return address in self._living_at or self._known[address].node in self._members

    def _small(self) -> bool:
        """Whether everybody can be linked with everybody. Without gossip every address may be somebody."""
        linked = {link.node for link in self._links.values()}
        return len(linked | self._members.keys() if self._members else self._known) <= LINKS_WANTED

    def _blocked(self, now: float) -> bool:
        """Whether links stand where gossip found nobody."""
        return not self._members and any(now - link.since >= GOSSIP_LATE_S for link in self._links.values())

    def _linked(self) -> set[Address]:
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
        dialling = [known for known in self._known.values() if known.dialling and not known.lasting]
        if len(self._links) > LINKS_MAX or len(self._by_itself()) + len(dialling) > self._most_dialled:
            raise LocalProtocolError(f"{self!r}: too many links")
        if any(self._members[node].address != address for address, node in self._living_at.items()):
            raise LocalProtocolError(f"{self!r}: expects a member where it is not")

    def __repr__(self) -> str:
        return (
            f"<Connections {self._node[:8]} {len(self._links)} links | {len(self._known)} addresses | "
            f"{len(self._members)} members>"
        )


def _leads_to(address: Address, known: _Address, link: _Link) -> bool:
    claimed = address == link.address and not known.lasting
    return known.node == link.node or address == link.dialled or claimed


def _pause_s(failures: int) -> float:
    """How long to leave an address alone after so many failures in a row, at least one."""
    return min(RETRY_FIRST_S * 2.0 ** min(failures - 1, 16), RETRY_LONGEST_S)  # 2.0 ** 1024 is an OverflowError


def _fate(known: _Address) -> str:
    if known.failures:
        return f"no answer, tried {known.failures} times"
    return f"hung up at once, {known.brief} times" if known.brief else "not connected just now"
