"""The records of all members but the own, the merge of rumours, and the rumours still to be passed on.

A record has two halves. In (incarnation, state) the newer incarnation is valid, and within it the worse state; only
the member itself raises its incarnation. Of (name, addresses, profile) the newer `version` is valid. So a merge is a
maximum: rumours may be late, doubled and in any order, and all members end with the same view. Both numbers are on a
ring (`packets.is_newer`): a false rumour cannot claim a number that the member itself cannot follow.

The record of a dead member stays for `dead_memory_s` as a tombstone, so that a late rumour that the member is alive is
known to be old. Tombstones are never taken from other members: they would circulate for ever.

Must not know: packets and their order, sockets, clocks.
"""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass

from swarm.errors import LocalProtocolError
from swarm.protocol import packets
from swarm.protocol.messages import NodeId
from swarm.protocol.packets import (
    ID_LAST,
    STATUSES_MAX,
    Record,
    Rumour,
    State,
    Status,
    Sync,
    is_newer,
    next_after,
    overrules,
)

MEMBERS_MAX = 4096  # beyond that strangers cannot make this node remember more
MISSES_MAX = 8  # rumours that do not fit into the rest of a datagram, before it is sent
SMALLEST_BYTES = 20  # of a rumour


class MemberTable:
    """All members but the own. Members that are alive or suspect ("living") have a random order of probing."""

    def __init__(self, *, rng: random.Random) -> None:
        self._rng = rng
        self._records: dict[NodeId, Record] = {}
        self._ids: list[NodeId] = []  # sorted
        self._living: list[NodeId] = []  # alive or suspect, in the order of probing
        self._next = 0

    def __len__(self) -> int:
        """The number of living members."""
        return len(self._living)

    def get(self, node: NodeId) -> Record | None:
        """The record of a member, living or not."""
        return self._records.get(node)

    def records(self) -> list[Record]:
        """All records, by id."""
        return [self._records[node] for node in self._ids]

    def lost(self) -> list[Record]:
        """Members that are dead without goodbye, and not forgotten yet."""
        return [record for record in self._records.values() if record.state is State.DEAD]

    def between(self, first: NodeId, last: NodeId) -> list[Record]:
        """Records with ids from `first` to `last`, both included, by id."""
        low, high = bisect.bisect_left(self._ids, first), bisect.bisect_right(self._ids, last)
        return [self._records[node] for node in self._ids[low:high]]

    def merge(self, rumour: Rumour) -> Record | None:
        """Merges a rumour about another member. Returns its new record, or None if the rumour is no news."""
        known = self._records.get(rumour.node)
        if known is None:
            if not isinstance(rumour, Record) or rumour.state >= State.DEAD or len(self._records) >= MEMBERS_MAX:
                return None
            self._add(rumour)
            return rumour
        merged = known
        if isinstance(rumour, Record) and is_newer(rumour.version, known.version):
            merged = packets.replace(rumour, incarnation=known.incarnation, state=known.state)
        if overrules(rumour, known):
            merged = packets.replace(merged, incarnation=rumour.incarnation, state=rumour.state)
        if merged is known:
            return None
        self._records[rumour.node] = merged
        was, lives = known.state < State.DEAD, merged.state < State.DEAD
        if lives and not was:
            self._add_living(rumour.node)
        elif was and not lives:
            self._remove_living(rumour.node)
        return merged

    def softened(self, rumour: Rumour) -> Rumour:
        """A rumour of a Sync, which may be old, with SUSPECT in place of DEAD for a living member: it can refute."""
        known = self._records.get(rumour.node)
        if rumour.state is not State.DEAD or (known and known.state >= State.DEAD):
            return rumour
        if isinstance(rumour, Record):
            return packets.replace(rumour, state=State.SUSPECT) if known else rumour
        return Status(rumour.node, rumour.incarnation, State.SUSPECT, rumour.version)

    def window(self, first: NodeId, *, room_bytes: int) -> tuple[NodeId, tuple[Status, ...]]:
        """The last id and the statuses of the largest window from id `first` that fits into `room_bytes`."""
        statuses: list[Status] = []
        for node in self._ids[bisect.bisect_left(self._ids, first) :]:
            status = self._records[node].status
            room_bytes -= packets.size(status)
            if statuses and (room_bytes < 0 or len(statuses) == STATUSES_MAX):
                return statuses[-1].node, tuple(statuses)
            statuses.append(status)
        return ID_LAST, tuple(statuses)

    def compare(self, sync: Sync, *, own: Record) -> tuple[list[Record], tuple[NodeId, ...]]:
        """The records in the window that the sender of a Sync lacks, and the ids of those that this node lacks."""
        theirs = {status.node: status for status in sync.statuses}
        ours = [record for record in (*self.between(sync.first, sync.last), own) if record.node != sync.sender]
        lacking = [
            record
            for record in ours
            if sync.first <= record.node <= sync.last and _is_news(record, theirs.get(record.node))
        ]
        wants = tuple(status.node for status in sync.statuses if status.node != own.node and self._wants(status))
        return sorted(lacking, key=lambda record: record.node), wants

    def forget(self, node: NodeId) -> None:
        """Removes a tombstone."""
        if (record := self._records.get(node)) and record.state >= State.DEAD:
            del self._records[node]
            del self._ids[bisect.bisect_left(self._ids, node)]

    def next_to_probe(self) -> Record | None:
        """The living members in turn, shuffled after each round: a member waits for two rounds at most."""
        if not self._living:
            return None
        if self._next >= len(self._living):
            self._rng.shuffle(self._living)
            self._next = 0
        self._next += 1
        return self._records[self._living[self._next - 1]]

    def sample(self, count: int, *, but: NodeId | None = None) -> list[Record]:
        """Up to `count` random living members."""
        chosen = self._rng.sample(self._living, min(count + 1, len(self._living)))
        return [self._records[node] for node in chosen if node != but][:count]

    def check(self) -> None:
        """Raises LocalProtocolError when an invariant does not hold."""
        living = {node for node, record in self._records.items() if record.state < State.DEAD}
        if len(self._living) != len(living) or set(self._living) != living:
            raise LocalProtocolError(f"{self!r}: the order of probing does not hold the living members")
        if self._ids != sorted(self._records):
            raise LocalProtocolError(f"{self!r}: the ids are not those of the records")

    def _wants(self, status: Status) -> bool:
        known = self._records.get(status.node)
        return is_newer(status.version, known.version) if known else status.state < State.DEAD

    def _add(self, record: Record) -> None:
        self._records[record.node] = record
        bisect.insort(self._ids, record.node)
        self._add_living(record.node)

    def _add_living(self, node: NodeId) -> None:
        # SWIM 4.3: at a random place, so that newcomers are not probed in a row.
        self._living.insert(self._rng.randrange(len(self._living) + 1), node)

    def _remove_living(self, node: NodeId) -> None:
        place = self._living.index(node)
        del self._living[place]
        if place < self._next:
            self._next -= 1

    def __repr__(self) -> str:
        return f"<MemberTable {len(self)} living of {len(self._records)}>"


class SyncWalk:
    """The position of anti-entropy on the ring of node ids, which it walks again and again.

    Only the answer to the latest Sync counts: a lost, late or forged answer does no harm.
    """

    def __init__(self) -> None:
        self.cursor = packets.ID_FIRST  # of the next window
        self.whole = False  # the whole ring was compared once
        self._laps = 0  # rounds left at the shorter interval
        self._asked: tuple[int, NodeId] | None = None

    @property
    def hurried(self) -> bool:
        """Whether to use the shorter interval: in the first round, and after `hurry`."""
        return self._laps > 0 or not self.whole

    def hurry(self) -> None:
        """Shortens the interval: members changed, anywhere on the ring."""
        self._laps = 2  # the rest of this round, and a whole round

    def asked(self, sequence: int, last: NodeId) -> None:
        """A Sync of the ids from the cursor to `last` was sent."""
        self._asked = sequence, last

    def settled(self, sequence: int, until: NodeId) -> bool:
        """An answer arrived. Returns whether the next Sync is due at once: the window or the first round has a rest."""
        if self._asked is None or self._asked[0] != sequence or not self.cursor <= until <= self._asked[1]:
            return False
        last = self._asked[1]
        self._asked = None
        self.cursor = packets.following(until)
        if until == ID_LAST:
            self.whole = True
            self._laps = max(0, self._laps - 1)
        return until < last or not self.whole


def agree(record: Record, other: Record) -> bool:
    """Whether two records of a member have equal contents, or different versions."""
    contents = record.name, record.addresses, record.profile
    return record.version != other.version or contents == (other.name, other.addresses, other.profile)


def refute(own: Record, rumour: Rumour) -> Record | None:
    """The own record with an incarnation that overrules the rumour, or None if the rumour is right or old.

    An earlier process with this id may have announced greater numbers, or other contents under the same version.
    """
    differs = isinstance(rumour, Record) and not agree(own, rumour)
    changed = is_newer(rumour.version, own.version)
    if not overrules(rumour, own) and not differs and not changed:
        return None
    version = next_after(own.version, rumour.version) if differs or changed else own.version
    return packets.replace(own, incarnation=next_after(own.incarnation, rumour.incarnation), version=version)


def _is_news(record: Record, status: Status | None) -> bool:
    """Whether a node that knows this status lacks the record. A node without status needs no tombstone."""
    if status is None:
        return record.state < State.DEAD
    newer = overrules(record, status)
    return newer or is_newer(record.version, status.version)


@dataclass(frozen=True)
class _Fresh:
    rumour: Rumour
    size: int


class RumourQueue:
    """The rumours still to be passed on: the least sent first, of those the newest (memberlist's broadcast queue).

    A member has a status and a record in the queue at most; news about it replaces them, and counts as unsent.
    """

    def __init__(self) -> None:
        self._rounds: list[dict[tuple[NodeId, type], _Fresh]] = [{}]  # by the number of times that they were sent

    def __bool__(self) -> bool:
        return any(self._rounds)

    def __len__(self) -> int:
        return sum(map(len, self._rounds))

    def put(self, rumour: Rumour) -> None:
        """Queues news. A record contains a status, so it replaces both."""
        replaced: tuple[type, ...] = (Status, Record) if isinstance(rumour, Record) else (Status,)
        for waiting in self._rounds:
            for kind in replaced:
                waiting.pop((rumour.node, kind), None)
        self._rounds[0][rumour.node, type(rumour)] = _Fresh(rumour, packets.size(rumour))

    def take(self, room_bytes: int, *, times: int) -> list[Rumour]:
        """Rumours that fit; each is taken `times` times in all."""
        taken: list[tuple[int, tuple[NodeId, type]]] = []
        misses = 0
        for sent, waiting in enumerate(self._rounds):
            for key in reversed(waiting):
                if room_bytes < SMALLEST_BYTES or misses > MISSES_MAX:
                    break
                if waiting[key].size <= room_bytes:
                    room_bytes -= waiting[key].size
                    taken.append((sent, key))
                else:
                    misses += 1
        return [self._advance(sent, key, times) for sent, key in taken]

    def _advance(self, sent: int, key: tuple[NodeId, type], times: int) -> Rumour:
        fresh = self._rounds[sent].pop(key)
        if sent + 1 < times:
            while len(self._rounds) <= sent + 1:
                self._rounds.append({})
            self._rounds[sent + 1][key] = fresh
        return fresh.rumour
