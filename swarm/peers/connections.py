"""The connection manager of a node, as a state machine: which addresses to dial, which links to keep.

Addresses come from discovery and from peers; gossip adds those of members, and their holdings. While at most
LINKS_WANTED nodes are known, every node is dialled. In a larger swarm a node dials holders of each wanted artifact,
a seed among them and half of them on its own host (`peers.selection`), and none while it wants nothing. Addresses that
the user configured (`lasting`) are always dialled. Incoming links are accepted up to LINKS_MAX. The links form a random
graph of bounded degree; gossip, not links, reaches all members. A link that is up for GOSSIP_LATE_S while gossip knows
no member shows that datagrams are blocked: then every address is dialled.

Dropped are: the second of two links between two nodes, links to dead members, useless links that keep a holder of a
wanted artifact out, and idle links. Dials back off exponentially (0.5 to 15 s) after a failure or a link shorter than
BRIEF_S. After FAILURES_MAX failures an address is forgotten, unless it is lasting or gossip lists it as alive.

A node may have several addresses. They are known under the first of them, and dialled together: the driver tries them
side by side. The addresses that a node claims in its Hello are not proven. They are dialled, and prevent a second link
to them. They do not prevent dialling a lasting address, and only dialling shows that an address is this node's own.

Told addresses must not make this node a scanner of its network: addresses that no node has answered at are dialled
STRANGE_PER_S times a second, after a burst of STRANGE_BURST. Nodes that gossip does not reach are told of new links.

Must not know: sockets, clocks, datagrams.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from swarm.content.manifest import Digest
from swarm.errors import LocalProtocolError
from swarm.journal import Paused
from swarm.peers import selection
from swarm.peers.selection import LINKS_FIRST, LINKS_FULL, LINKS_MOST, LINKS_WANTED, SEEDS_WANTED, Candidate
from swarm.protocol.messages import ADDRESSES_OWN_MAX, NODES_MAX, Address, NodeId
from swarm.protocol.packets import Record, State

LINKS_MAX = 64  # links of a node; each costs a socket and about 50 KB
KNOWN_MAX = 1024  # addresses; lasting ones may exceed it, strangers cannot
FAILURES_MAX = 5
OWN_MAX = 64  # own addresses; all of 127.0.0.0/8 may be own, and the oldest are found again by dialling
RETRY_FIRST_S, RETRY_LONGEST_S = 0.5, 15.0
BRIEF_S = 5.0  # a shorter link was refused ("too many links"); a link in use lasts far longer
GOSSIP_LATE_S = 3.0
STRANGE_PER_S, STRANGE_BURST = 16.0, 256  # a burst is four addresses of each of LINKS_MAX nodes
IDLE_S = 30.0  # a link that neither end can use is kept so long: the next fetch may be near


@dataclass(frozen=True)
class AddressDiscovered:
    """Discovery found a node. `lasting`: the user configured the address; it is never forgotten."""

    addresses: tuple[Address, ...]
    lasting: bool


@dataclass(frozen=True)
class AddressesShared:
    """A peer shared the addresses of each of its peers."""

    nodes: tuple[tuple[Address, ...], ...]


@dataclass(frozen=True)
class DialFailed:
    """No link came about at any address of the Dial that began with this address. `final`: a user has to act first."""

    address: Address
    why: str = "no answer"
    final: bool = False


@dataclass(frozen=True)
class LinkUp:
    """Hello was exchanged over link number `link`. `dialled`: the first address of the Dial, if this node dialled.

    `addresses`: where the other node is reached, the best first; that of a dialled link is the one that answered. None
    if it can only dial. `shared`: those that it tells, to be told to others. `holds`: see `HoldingsAnnounced`.
    """

    link: int
    node: NodeId
    addresses: tuple[Address, ...]
    dialled: Address | None
    holds: Mapping[Digest, bool] = field(default_factory=dict)
    shared: tuple[Address, ...] = ()


@dataclass(frozen=True)
class LinkDown:
    """A link ended."""

    link: int


@dataclass(frozen=True)
class HoldingsAnnounced:
    """The artifacts of the node at the other end: whether it holds all chunks, by digest."""

    link: int
    holds: Mapping[Digest, bool]


@dataclass(frozen=True)
class MemberUpdated:
    """Gossip has a new record of a member. `addresses`: those of the record that may be dialled, the best first."""

    record: Record
    addresses: tuple[Address, ...]


@dataclass(frozen=True)
class Wanted:
    """The artifacts that this node wants from now on. `unresolved`: also a model id without known digest."""

    digests: frozenset[Digest]
    unresolved: bool = False


@dataclass(frozen=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True)
class Dial:
    """Open a link to the node at one of these addresses."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True)
class Welcome:
    """This link is the way to its node from now on. Share the addresses of these nodes over it."""

    link: int
    nodes: tuple[tuple[Address, ...], ...]


@dataclass(frozen=True)
class ShareNodes:
    """Share the addresses of these nodes over a link."""

    link: int
    nodes: tuple[tuple[Address, ...], ...]


@dataclass(frozen=True)
class Drop:
    """Close this link."""

    link: int
    why: str


Event: TypeAlias = (
    Paused
    | AddressDiscovered
    | AddressesShared
    | DialFailed
    | LinkUp
    | LinkDown
    | HoldingsAnnounced
    | MemberUpdated
    | Wanted
    | Tick
)
Action: TypeAlias = Dial | Welcome | ShareNodes | Drop


@dataclass
class _Known:
    """An address. `node` is the latest node that answered there, `others` are further addresses of that node.

    `why`: the result of the last dial; `final`: only a user can change it.
    """

    lasting: bool
    others: tuple[Address, ...] = ()
    why: str = ""
    final: bool = False
    answered: bool = False
    failures: int = 0  # dials in a row
    brief: int = 0  # links in a row that ended within BRIEF_S
    dial_at: float = 0.0
    dialling: bool = False
    node: NodeId | None = None

    def delay_until(self, time: float) -> None:
        self.dial_at = max(self.dial_at, time)

    def __str__(self) -> str:
        if self.failures:
            return self.why if self.final or self.failures == 1 else f"{self.why} (tried {self.failures} times)"
        if self.dialling and not self.brief:
            return "no answer yet; is the machine on, and does a firewall let its TCP port through?"
        return f"hung up at once, {self.brief} times" if self.brief else "not connected just now"


@dataclass
class _Link:
    number: int
    node: NodeId
    addresses: tuple[Address, ...]
    dialled: Address | None
    since: float
    holds: Mapping[Digest, bool]
    shared: tuple[Address, ...]
    told: frozenset[tuple[Address, ...]] = frozenset()  # what was shared over it


@dataclass(frozen=True)
class _Member:
    """A member that is alive or suspect. `more`: it holds more artifacts than `holds`. `load`: uploads per slot."""

    addresses: tuple[Address, ...]
    distance: int
    load: float
    holds: Mapping[Digest, Candidate]
    more: bool


class Connections:
    """The links and known addresses of `node`. `host` and `rack` are its location labels."""

    def __init__(self, node: NodeId, *, rng: random.Random, host: str = "", rack: str = "") -> None:
        self._node = node
        self._host, self._rack = host, rack
        self._rng = rng
        self._known: dict[Address, _Known] = {}
        self._links: dict[int, _Link] = {}
        self._own: dict[Address, None] = {}  # own addresses, the oldest first
        self._members: dict[NodeId, _Member] = {}
        self._member_at: dict[Address, NodeId] = {}
        self._seeds: Counter[Digest] = Counter()  # members that hold all chunks
        self._wanted = Wanted(frozenset())
        self._wanted_since: dict[Digest, float] = {}
        self._budget, self._budget_at = float(STRANGE_BURST), 0.0
        self._share_at = 0.0
        self._most_dialled = LINKS_MOST  # for `check`

    def handle(self, event: Event, now: float) -> list[Action]:
        """Applies an event and returns the actions that follow from it."""
        actions: list[Action] = []
        match event:
            case AddressDiscovered(addresses, lasting):
                self._learn(addresses, lasting)
            case AddressesShared(nodes):
                for addresses in nodes:
                    self._learn(addresses, False)
            case DialFailed():
                self._dial_failed(event, now)
            case LinkUp():
                actions = self._link_up(event, now)
            case LinkDown(number):
                self._link_down(number, now)
            case HoldingsAnnounced(number, holds):
                if link := self._links.get(number):
                    link.holds = holds
                return []
            case MemberUpdated(record, addresses):
                return self._update_member(record, addresses, now)  # gossip comes in bursts: the next Tick dials
            case Wanted(digests):
                self._wanted = event
                self._wanted_since = {digest: self._wanted_since.get(digest, now) for digest in sorted(digests)}
            case Tick():
                actions = [*self._drop_idle(now), *self._share_news(now)]
            case Paused():
                self._start_again(now)
            case _:
                raise LocalProtocolError(f"connections cannot handle {event!r}")
        return [*actions, *self._dial(now)]

    def _start_again(self, now: float) -> None:
        """Dials at once where it waited, and gives every link its time again: peers may have closed links meanwhile."""
        for known in self._known.values():
            known.failures = known.brief = 0
            known.dial_at = now
        for link in self._links.values():
            link.since = now

    def unanswered(self) -> list[Address]:
        """Addresses whose first dial has neither failed nor led to a link yet."""
        return sorted(a for a, k in self._known.items() if k.dialling and not k.failures and not k.brief)

    def tried(self) -> list[str]:
        """A line for each address without a link, for error messages."""
        linked = self._linked()
        return [f"{address}: {known}" for address, known in sorted(self._known.items()) if address not in linked]

    @property
    def refused(self) -> bool:
        """Whether addresses are known, and the last dial of each has failed in a way that only a user can change."""
        return bool(self._known) and not self._links and all(k.failures and k.final for k in self._known.values())

    @property
    def looks_for_nodes(self) -> bool:
        """Whether this node wants something that it has no link for."""
        return self._wants_any() and not self._links

    @property
    def alone(self) -> bool:
        """Whether neither a node nor an address of one is known."""
        return not (self._known or self._links or self._members)

    def _learn(self, addresses: tuple[Address, ...], lasting: bool) -> None:
        found = [address for address in addresses if address not in self._own]
        if not found:
            return
        first, *others = found
        if known := self._known.get(first):
            known.lasting = known.lasting or lasting
            known.others = tuple(others) or known.others
        elif len(self._known) < KNOWN_MAX or lasting:
            self._known[first] = _Known(lasting, tuple(others))

    def _remembered(self, address: Address) -> _Known:
        """The entry of a member's address. Beyond KNOWN_MAX the oldest address that is not in use makes room."""
        if address not in self._known and len(self._known) >= KNOWN_MAX:
            spare = (a for a, known in self._known.items() if not known.lasting and not known.dialling)
            if oldest := next(spare, None):
                del self._known[oldest]
        return self._known.setdefault(address, _Known(False))

    def _dial_failed(self, event: DialFailed, now: float) -> None:
        if known := self._known.get(event.address):
            known.dialling = False
            known.failures += 1
            known.why, known.final = event.why, event.final
            known.dial_at = now + _backoff_s(known.failures)
            if known.failures >= FAILURES_MAX and not known.lasting and event.address not in self._member_at:
                del self._known[event.address]

    def _link_up(self, event: LinkUp, now: float) -> list[Action]:
        reached = event.addresses[0] if event.dialled and event.addresses else event.dialled
        if event.dialled and (known := self._known.get(event.dialled)):
            known.dialling, known.failures, known.final, known.answered = False, 0, False, True
            if reached == event.dialled:
                known.node = event.node
            elif known.node not in (None, event.node) or event.node == self._node:
                known.others = tuple(other for other in known.others if other != reached)  # another node is there
        if event.node == self._node:
            if reached:
                self._add_own(reached)
            return [Drop(event.link, "this is myself")]
        link = _Link(event.link, event.node, event.addresses, event.dialled, now, event.holds, event.shared)
        twin = next((other for other in self._links.values() if other.node == event.node), None)
        if twin is None and len(self._links) >= LINKS_MAX:
            return [Drop(event.link, "too many links")]
        if twin is None and not event.dialled and self._full() and event.node in self._members:
            return [Drop(event.link, "full while it fetches")]  # a member learns of other holders by gossip
        actions: list[Action] = []
        if twin is not None:
            if not self._supersedes(link, twin):
                return [Drop(link.number, "another link is open")]
            del self._links[twin.number]  # without backoff: its node stays linked
            actions.append(Drop(twin.number, "another link is open"))
        self._learn(event.addresses, False)
        self._links[link.number] = link
        return [*actions, Welcome(link.number, self._to_share(link, now))]

    def _share_news(self, now: float) -> list[Action]:
        """Tells nodes that gossip does not reach of nodes that they were not told of, every GOSSIP_LATE_S."""
        if now < self._share_at:
            return []
        self._share_at = now + GOSSIP_LATE_S
        late = [link for link in self._links.values() if link.node not in self._members and _is_late(link, now)]
        return [ShareNodes(link.number, nodes) for link in late if (nodes := self._to_share(link, now))]

    def _to_share(self, link: _Link, now: float) -> tuple[tuple[Address, ...], ...]:
        """The addresses of nodes to share over a link: of linked nodes, and of members where gossip does not reach."""
        found = sorted({other.shared for other in self._links.values() if other.shared and other is not link})
        if link.node not in self._members and _is_late(link, now):
            own = int(link.node, 16)  # holders first; of them others for each link, and the same each time
            members = [(not m.holds, int(node, 16) ^ own, m) for node, m in self._members.items() if m.addresses]
            found += [member.addresses[:ADDRESSES_OWN_MAX] for *_, member in heapq.nsmallest(NODES_MAX, members)]
        told = link.told
        link.told = told.intersection(found)  # bounded by what is known now
        news = tuple(n for n in dict.fromkeys(found) if n not in told and n != link.shared)[:NODES_MAX]
        link.told = link.told.union(news)
        return news

    def _add_own(self, address: Address) -> None:
        self._known.pop(address, None)
        self._own[address] = None
        if len(self._own) > OWN_MAX:
            del self._own[next(iter(self._own))]

    def _supersedes(self, link: _Link, twin: _Link) -> bool:
        """Both ends keep the link that the smaller id dialled. If one end dialled both, the older link is dead."""
        if (link.dialled is None) == (twin.dialled is None):
            return True
        return (link.dialled is not None) == (self._node < link.node)

    def _link_down(self, number: int, now: float) -> None:
        if link := self._links.pop(number, None):
            for address, known in self._known_of(link):
                if now - link.since >= BRIEF_S:
                    known.brief = 0
                elif address == link.dialled:  # an incoming link may claim any address, and was not refused there
                    known.brief += 1
                known.delay_until(now + _backoff_s(max(known.brief, 1)))

    def _update_member(self, record: Record, addresses: tuple[Address, ...], now: float) -> list[Action]:
        if record.node == self._node:
            return []
        moved = record.state >= State.DEAD
        if member := self._members.pop(record.node, None):
            for digest, candidate in member.holds.items():
                if candidate.whole:
                    self._seeds[digest] -= 1
                    if not self._seeds[digest]:
                        del self._seeds[digest]  # or members with ever new artifacts would fill the memory
            moved |= member.addresses != addresses
            for address in member.addresses if moved else ():
                if self._member_at.get(address) == record.node:
                    del self._member_at[address]
        if record.state < State.DEAD:
            profile = record.profile
            distance = profile.distance(self._host, self._rack)
            load = profile.uploads / max(1, profile.slots)
            holds = {
                held.digest: Candidate(record.node, held.chunks == held.chunks_total, distance, load)
                for held in profile.artifacts
            }
            for digest, candidate in holds.items():
                if candidate.whole:
                    self._seeds[digest] += 1
            self._members[record.node] = _Member(addresses, distance, load, holds, more=profile.omitted > 0)
            for address in addresses:
                self._member_at[address] = record.node
            return []
        why = "gossip says that it left" if record.state is State.LEFT else "gossip says that it is dead"
        drops = self._drop([link for link in self._links.values() if link.node == record.node], why, now)
        for address in addresses:
            known = self._known.get(address)
            if known and not known.lasting and not known.dialling and address not in self._member_at:
                del self._known[address]
        return drops

    def _drop(self, links: list[_Link], why: str, now: float) -> list[Action]:
        for link in links:
            del self._links[link.number]
            for _, known in self._known_of(link):
                known.delay_until(now + RETRY_FIRST_S)
        return [Drop(link.number, why) for link in links]

    def _drop_idle(self, now: float) -> list[Action]:
        """Drops dialled links of which neither end has a use: this node wants nothing, the other holds all it wants."""
        if self._wants_any() or self._small() or self._blocked(now):
            return []
        idle = [
            link
            for link in self._dialled_links()
            if now - link.since >= IDLE_S and link.node in self._members and link.holds and all(link.holds.values())
        ]
        return self._drop(idle, "there is nothing to do for each other", now)

    def _dial(self, now: float) -> list[Action]:
        """Dials lasting addresses, then holders of wanted artifacts, then others; drops useless links for holders."""
        blocked, small = self._blocked(now), self._small()
        limit = LINKS_MAX if blocked else self._for_all_wanted(LINKS_MOST)
        self._most_dialled = max(self._most_dialled, limit)
        linked = self._linked()
        dialling = [known for known in self._known.values() if known.dialling]
        due = sorted(a for a, k in self._known.items() if a not in linked and not k.dialling and k.dial_at <= now)
        room = LINKS_MAX - len(self._links) - len(dialling)
        lasting = [address for address in due if self._known[address].lasting][: max(0, room)]
        for address in lasting:
            self._known[address].dialling = True
        taken = len(self._dialled_links()) + sum(not known.lasting for known in dialling)
        lacking = self._lacking(now, small=small)
        members = self._to_dial(now) if lacking or self._wanted.unresolved or small else []
        holders = [m for m in members if not self._wanted.digests.isdisjoint(m.holds)] if lacking else []
        drops = self._drop_useless(min(len(holders), taken + len(holders) - limit), now)
        free = min(room - len(lasting), limit - taken, self._affordable(now)) + len(drops)
        chosen = self._choose_holders(holders, lacking, free)
        others = {a for a in due if not self._known[a].lasting and (blocked or small or not self._is_member(a))}
        firsts = {m.addresses[0]: m for m in members if small or (self._wanted.unresolved and m.more)}
        others = (others | firsts.keys()) - {*chosen, *lasting}
        free = max(0, free - len(chosen))
        picked = sorted(others) if len(others) <= free else sorted(self._rng.sample(sorted(others), free))
        for address in picked:
            known = self._enter(firsts[address]) if address in firsts else self._remembered(address)
            known.dialling = True
        dials = [Dial((address, *self._known[address].others)) for address in (*lasting, *chosen, *picked)]
        self._budget -= sum(len(dial.addresses) for dial in dials if self._is_strange(dial.addresses[0]))
        return [*drops, *dials]

    def _is_strange(self, address: Address) -> bool:
        """Whether an address was only told, and no node has answered there yet."""
        return not self._known[address].lasting and not self._known[address].answered

    def _affordable(self, now: float) -> int:
        """The strange addresses that may be dialled now."""
        self._budget = min(STRANGE_BURST, self._budget + STRANGE_PER_S * max(0.0, now - self._budget_at))
        self._budget_at = now
        return max(0, int(self._budget))

    def _enter(self, member: _Member) -> _Known:
        """The entry of a member, under its first address."""
        known = self._remembered(member.addresses[0])
        known.others = tuple(other for other in member.addresses[1:] if other not in self._own)
        return known

    def _lacking(self, now: float, *, small: bool) -> dict[Digest, tuple[dict[NodeId, bool], int]]:
        """Wanted artifacts with fewer sources than wanted: the sources, and the links that are wanted besides seeds."""
        lacking = {}
        for digest, since in self._wanted_since.items():
            settling = now - since < selection.SETTLE_S and not small
            wanted = LINKS_FIRST if settling else LINKS_WANTED
            sources = self._sources(digest)
            if len(sources) < wanted + min(SEEDS_WANTED, self._seeds[digest] + sum(sources.values())):
                lacking[digest] = sources, wanted
        return lacking

    def _choose_holders(
        self, holders: list[_Member], lacking: dict[Digest, tuple[dict[NodeId, bool], int]], free: int
    ) -> list[Address]:
        """Marks up to `free` of the holders as dialled, for the artifact with the fewest sources first."""
        chosen: list[Address] = []
        for digest, (sources, wanted) in sorted(lacking.items(), key=lambda item: len(item[1][0])):
            if len(chosen) >= free:
                break
            others = [m.holds[digest] for m in holders if digest in m.holds and m.addresses[0] not in chosen]
            linked = [self._candidate(node, whole) for node, whole in sources.items()]
            for candidate in selection.choose(linked, others, wanted=wanted, rng=self._rng)[: free - len(chosen)]:
                member = self._members[candidate.node]
                address, known = member.addresses[0], self._enter(member)
                known.dialling, known.node = True, candidate.node
                chosen.append(address)
        return sorted(chosen)

    def _candidate(self, node: NodeId, whole: bool) -> Candidate:
        member = self._members.get(node)
        return Candidate(node, whole, member.distance, member.load) if member else Candidate(node, whole, 1, 0.0)

    def _drop_useless(self, count: int, now: float) -> list[Action]:
        useless = [link for link in self._dialled_links() if self._wanted.digests.isdisjoint(link.holds)]
        return self._drop(useless[: max(0, count)], "makes way for a holder of a wanted artifact", now)

    def _sources(self, digest: Digest) -> dict[NodeId, bool]:
        """Linked and dialled holders: whether each holds all chunks."""
        found = {link.node: link.holds[digest] for link in self._links.values() if digest in link.holds}
        for address, known in self._known.items():
            node = known.node or self._member_at.get(address)
            if known.dialling and node and (member := self._members.get(node)) and digest in member.holds:
                found[node] = member.holds[digest].whole
        return found

    def _wants_any(self) -> bool:
        return bool(self._wanted.digests) or self._wanted.unresolved

    def _for_all_wanted(self, links: int) -> int:
        """`links` for each wanted artifact, and for none as for one; at most LINKS_MAX."""
        return min(links * max(1, len(self._wanted.digests)), LINKS_MAX)

    def _full(self) -> bool:
        """Whether this node fetches and has LINKS_FULL links to newcomers: see `selection`."""
        wanted = self._wanted.digests
        newcomers = sum(not any(link.holds.get(digest) for digest in wanted) for link in self._links.values())
        return bool(wanted) and newcomers >= self._for_all_wanted(LINKS_FULL)

    def _dialled_links(self) -> list[_Link]:
        """Links that this node dialled, without those to lasting addresses."""
        return [
            link
            for link in self._links.values()
            if link.dialled and not ((known := self._known.get(link.dialled)) and known.lasting)
        ]

    def _to_dial(self, now: float) -> list[_Member]:
        """Members that are neither linked, dialled nor backing off."""
        linked = {link.node for link in self._links.values()}
        return [
            member
            for node, member in self._members.items()
            if node not in linked
            and member.addresses
            and member.addresses[0] not in self._own
            and not self._is_dialled(member, now)
        ]

    def _is_dialled(self, member: _Member, now: float) -> bool:
        """Whether an address of a member is dialled now, or its first backs off."""
        known = [self._known.get(address) for address in member.addresses]
        return any(each and each.dialling for each in known) or bool(known[0] and known[0].dial_at > now)

    def _is_member(self, address: Address) -> bool:
        return address in self._member_at or self._known[address].node in self._members

    def _small(self) -> bool:
        """Whether the swarm is small enough to link all nodes. Without gossip, every address counts as a node."""
        if not self._members:
            return len(self._known) <= LINKS_WANTED
        strangers = {link.node for link in self._links.values()} - self._members.keys()
        return len(strangers) + len(self._members) <= LINKS_WANTED

    def _blocked(self, now: float) -> bool:
        """Whether datagrams do not get through."""
        return not self._members and any(now - link.since >= GOSSIP_LATE_S for link in self._links.values())

    def _linked(self) -> set[Address]:
        nodes = {link.node for link in self._links.values()}
        dialled = {link.dialled for link in self._links.values()}
        claimed = {address for link in self._links.values() for address in link.addresses}
        return {
            address
            for address, known in self._known.items()
            if known.node in nodes or address in dialled or (address in claimed and not known.lasting)
        }

    def _known_of(self, link: _Link) -> list[tuple[Address, _Known]]:
        """The addresses that lead to the node of a link."""
        return [
            (address, known)
            for address, known in self._known.items()
            if known.node == link.node or address == link.dialled or (address in link.addresses and not known.lasting)
        ]

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        nodes = [link.node for link in self._links.values()]
        if len(nodes) != len(set(nodes)) or self._node in nodes:
            raise LocalProtocolError(f"{self!r}: two links to a node, or a link to itself")
        if self._own.keys() & self._known.keys():
            raise LocalProtocolError(f"{self!r}: knows its own address as that of another node")
        dialling = [known for known in self._known.values() if known.dialling and not known.lasting]
        if len(self._links) > LINKS_MAX or len(self._dialled_links()) + len(dialling) > self._most_dialled:
            raise LocalProtocolError(f"{self!r}: too many links")
        if any(address not in self._members[node].addresses for address, node in self._member_at.items()):
            raise LocalProtocolError(f"{self!r}: expects a member at another address than its own")

    def __repr__(self) -> str:
        return (
            f"<Connections {self._node[:8]} {len(self._links)} links | {len(self._known)} addresses | "
            f"{len(self._members)} members>"
        )


def _is_late(link: _Link, now: float) -> bool:
    """Whether gossip should have reached the node of a link by now; a node that can only dial takes no part in it."""
    return not link.addresses or now - link.since >= GOSSIP_LATE_S


def _backoff_s(failures: int) -> float:
    """Seconds before the next dial after this many failures in a row, at least 1."""
    return min(RETRY_FIRST_S * 2.0 ** min(failures - 1, 16), RETRY_LONGEST_S)  # 2.0 ** 1024 is an OverflowError
