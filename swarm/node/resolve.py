"""Resolution of a model id: its holders, their agreement on a digest, and the manifest of that digest.

That a manifest is the right one rests on its sha256, the digest, which the caller pins, a publisher signs, or all
reachable holders announce.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeAlias

from swarm.content import commit
from swarm.content.manifest import Digest, Manifest, ModelId, decode
from swarm.errors import (
    ManifestConflict,
    ManifestError,
    ManifestNotFound,
    PeerError,
    RevisionNotFound,
    SettingsError,
    Unsigned,
)
from swarm.journal import Resolved
from swarm.node.holders import Holder
from swarm.node.node import Node
from swarm.peers.peer import Peer
from swarm.protocol.messages import NodeId, Origin, Signature
from swarm.security.signatures import valid
from swarm.settings import split_address

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

# Time for conflicting digests, from the first holder on: while an address has not answered yet, and at least. By then
# the first holder has shared its members.
SETTLE_S, SETTLE_LEAST_S = 0.3, 0.05
POLL_S = 0.1
MANIFEST_TIMEOUT_S = 15.0
ORIGIN_TIMEOUT_S = 2.0
ORIGINS_ASKED_MAX = 4  # holders of a digest; the first may have been killed
# Without a limit of the user: as long as a node is known that may still serve it, else shorter.
FIND_TIMEOUT_S = 10.0
NOTHING_FOUND_S = 2.5  # multicast finds nodes within 1.7 s
REFUSED_S = 0.5  # while every address that the user named refuses: multicast may find another node
PARTS_S = 5.0  # time for holders of parts of a commit to announce the whole, and to link to a holder
OTHER_REVISION_S = 2.0  # time for a holder of the revision to be found, once holders of others are known
LINK_S = 0.5
ASKED_AHEAD_MAX = 4  # manifests; a peer that announces ever new digests would fill the memory with them


async def resolve(
    node: Node,
    model_id: ModelId,
    *,
    digest: Digest | None,
    find_timeout_s: float | None,
    trusted: Sequence[str] = (),
    revision: str | None = None,
) -> tuple[Manifest, Origin | None]:
    """Manifest and origin of a model id.

    `find_timeout_s`: seconds to look for a holder, maybe infinite; None: FIND_TIMEOUT_S, or NOTHING_FOUND_S if no node
    is found that might be one. If every address that the user named refuses this node, it ends at once.

    `trusted`: addresses and networks. Without a pinned digest, only nodes there may introduce a model, over a link: the
    address of a link is proven by its packets, that of gossip is not.

    `revision`: a branch, tag, label, commit or its first 7 or more digits; the origin of the result has it.

    With publishers of the node, only a digest that one of them signed for this id, and for this revision if there is
    one, is a candidate.

    Raises ManifestNotFound without a holder in time, its kinds RevisionNotFound if holders have other revisions only
    and Unsigned if a publisher is missing, ManifestConflict if holders disagree and no digest is pinned.
    """
    began_at_s = node.now()
    agreed: dict[Digest, float] = {}  # digest -> seconds on the node's clock

    def over(error: str | None) -> None:
        found, agreed_at_s = next(iter(agreed.items()), (digest, None))
        node.record("node", Resolved(model_id, found, began_at_s, agreed_at_s, error))

    try:
        found = await _resolve(
            node, model_id, agreed, digest=digest, find_timeout_s=find_timeout_s, trusted=trusted, revision=revision
        )
    except BaseException as error:
        over(str(error) or type(error).__name__)
        raise
    over(None)
    return found


async def full_digest(node: Node, model_id: ModelId, first: str, *, find_timeout_s: float | None) -> Digest:
    """The only announced digest of a model id that begins with these digits. Only a whole digest pins: digits choose.

    Raises SettingsError if several begin with them, or those of other ids alone; ManifestNotFound if none is announced
    in time.
    """
    limit_s = FIND_TIMEOUT_S if find_timeout_s is None else find_timeout_s
    deadline, first_seen = node.now() + limit_s, None
    with node.seeking(None):
        while True:
            ids = {model_id, commit.part_name(model_id)}
            announced = {a.digest: a.model_id for a in node.announced() if a.digest.startswith(first)}
            own = {digest for digest in node.holdings() if digest.startswith(first)}
            found = sorted(own | {digest for digest, of in announced.items() if of in ids})
            if (found or announced) and first_seen is None:
                first_seen = node.now()
            settled = first_seen is not None and node.now() - first_seen >= (
                SETTLE_S if node.searching else SETTLE_LEAST_S
            )
            if len(found) > 1:
                raise SettingsError("digest", f"{first!r} begins {', '.join(found)}; say more digits of one")
            if found and settled:
                return found[0]
            if not found and announced and settled:
                digest, other = next(iter(announced.items()))
                why = f"{first!r} begins a digest of {other}, and none of {model_id}; fetch {other}, or say {digest}"
                raise SettingsError("digest", why)
            if not found and node.now() >= deadline:
                raise ManifestNotFound(model_id, tried=node.tried(), waited_s=limit_s)
            await node.changed(SETTLE_LEAST_S if found else POLL_S)


async def _resolve(
    node: Node,
    model_id: ModelId,
    agreed: dict[Digest, float],
    *,
    digest: Digest | None,
    find_timeout_s: float | None,
    trusted: Sequence[str],
    revision: str | None,
) -> tuple[Manifest, Origin | None]:
    search = _Search(node, node.now(), find_timeout_s)
    failures: dict[str, None] = {}  # each once, in order
    introducers = networks(trusted)
    unusable: set[NodeId] = set()  # nodes that sent a manifest of another digest, and would again
    signed = _Signed(node, model_id, revision) if node.publishers else None
    with _Answers(node) as answers:
        while True:
            with node.seeking(digest):
                found_digest, holders = await _agreed(
                    node,
                    model_id,
                    answers,
                    digest=digest,
                    search=search,
                    trusted=introducers,
                    revision=revision,
                    signed=signed,
                )
            if found_digest:
                agreed.setdefault(found_digest, node.now())
            if found_digest and (own := node.described(found_digest)):
                return signed.sealed(own) if signed else own
            if found_digest is None:
                distrusted = sorted(
                    set(chain.from_iterable(map(_names, node.holders(model_id).values()))) if introducers else ()
                )
                refused = [
                    f"{name} may not introduce it, as `trusted` does not name its machine" for name in distrusted
                ]
                raise search.not_found(model_id, [*refused, *failures, *node.tried()])
            with node.seeking(found_digest):  # gossip may know holders without a link
                for peer in [holder.peer for holder in holders if holder.peer and holder.node not in unusable]:
                    if failures and search.over:
                        break
                    try:
                        answer = await answers.of(peer, found_digest)
                        return signed.sealed(answer) if signed else answer
                    except (PeerError, ManifestError) as error:
                        failures[f"{peer.name}: {error}"] = None
                        if isinstance(error, ManifestError):
                            unusable.add(peer.node)
                if search.over:
                    raise search.not_found(model_id, list(failures) or node.tried())
                await node.changed(POLL_S)


@dataclass(frozen=True)
class _Search:
    """The time that a resolution has for finding a holder."""

    node: Node
    began: float
    limit_s: float | None

    @property
    def over(self) -> bool:
        """Whether the time has passed."""
        return self._passed_s >= (FIND_TIMEOUT_S if self.limit_s is None else self.limit_s)

    @property
    def hopeless(self) -> bool:
        """Whether no holder can be expected: only a user can change that every address refuses this node, or no node
        was found at all."""
        if self.node.refused and self.node.named_peers:
            return self._passed_s >= REFUSED_S
        return self.limit_s is None and (self.node.refused or self.node.alone) and self._passed_s >= NOTHING_FOUND_S

    def not_found(self, model_id: ModelId, tried: Sequence[str]) -> ManifestNotFound:
        """The error at the end."""
        advice = "" if self.node.refused else None
        if self.node.confined and self.node.alone:
            advice = "start `swarm serve` here; nodes of other machines are found with their key file, --key-file KEY"
        return ManifestNotFound(model_id, tried=tried, waited_s=self._passed_s, advice=advice)

    @property
    def _passed_s(self) -> float:
        return self.node.now() - self.began


class _Answers:
    """Manifests and origins from peers, requested ahead: on a busy link a request takes longer than the agreement."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._asked: dict[tuple[NodeId, Digest], asyncio.Task[tuple[Manifest, Origin | None]]] = {}

    def ask(self, peer: Peer, digest: Digest) -> asyncio.Task[tuple[Manifest, Origin | None]]:
        """Requests them, once."""
        key = peer.node, digest
        if key not in self._asked:
            if len(self._asked) >= ASKED_AHEAD_MAX:
                _give_up(self._asked.pop(next(iter(self._asked))))
            self._asked[key] = asyncio.create_task(self._ask(peer, digest))
        return self._asked[key]

    async def of(self, peer: Peer, digest: Digest) -> tuple[Manifest, Origin | None]:
        """The answer of a peer. Raises PeerError or ManifestInvalid; the next call requests them again."""
        try:
            return await self.ask(peer, digest)
        finally:
            self._asked.pop((peer.node, digest), None)

    async def _ask(self, peer: Peer, digest: Digest) -> tuple[Manifest, Origin | None]:
        manifest_requests = self._node.manifest_requests
        timeout_s = MANIFEST_TIMEOUT_S + ORIGIN_TIMEOUT_S  # on a slow link it arrives behind other messages
        origin = asyncio.create_task(manifest_requests.origin(peer, digest, timeout_s=timeout_s))
        try:
            data = await manifest_requests.manifest(peer, digest, timeout_s=MANIFEST_TIMEOUT_S)
            manifest = await asyncio.get_running_loop().run_in_executor(None, partial(decode, data, digest=digest))
            with contextlib.suppress(TimeoutError):
                return manifest, await asyncio.wait_for(origin, ORIGIN_TIMEOUT_S)
            return manifest, None
        finally:
            origin.cancel()

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._asked.values():
            _give_up(task)


def _give_up(task: asyncio.Task[tuple[Manifest, Origin | None]]) -> None:
    """Ends a request that was made ahead in vain, and marks its exception as retrieved."""
    if not task.cancel() and not task.cancelled():
        task.exception()


async def _agreed(
    node: Node,
    model_id: ModelId,
    answers: _Answers,
    *,
    digest: Digest | None,
    search: _Search,
    trusted: Sequence[Network],
    revision: str | None,
    signed: _Signed | None,
) -> tuple[Digest | None, list[Holder]]:
    """The agreed digest and its holders; (None, []) without a holder when the search is over.

    Raises ManifestConflict, RevisionNotFound, Unsigned.
    """
    first_seen: float | None = None
    origins: dict[Digest, Origin | None] = {}
    while True:
        if digest is not None:
            holders = {digest: found} if (found := node.holders_of(digest)) or node.described(digest) else {}
        else:
            holders = node.holders(model_id)
            if trusted:
                own = {d: nodes for d, nodes in holders.items() if node.described(d)}
                holders = own | introduced(holders, trusted)
        now = node.now()
        if holders:
            first_seen = now if first_seen is None else first_seen
            settle_s = SETTLE_S if node.searching else SETTLE_LEAST_S
            if digest is not None or now - first_seen >= settle_s:
                if revision is not None or len(holders) > 1:
                    origins |= await _origins(node, {d: n for d, n in holders.items() if d not in origins})
                served = holders
                holders = await _wanted(node, answers, holders, origins, revision=revision, signed=signed)
                reached = {d: nodes for d, nodes in holders.items() if d in origins or any(h.peer for h in nodes)}
                # Either they see soon that they hold parts of one artifact, or gossip of a killed node is out of date.
                undecided = len(reached) == 1 or _of_one_commit(reached, origins)
                if len(holders) > 1 and now - first_seen < PARTS_S and undecided:
                    await node.changed(POLL_S)
                    continue
                holders = reached if len(holders) > 1 and reached else holders
                if len(holders) > 1:
                    names = {str(d): o.shown() for d, o in origins.items() if o}
                    raise ManifestConflict(model_id, {d: _names(nodes) for d, nodes in holders.items()}, names)
                if holders:
                    return next(iter(holders.items()))
                if signed and (search.over or now - first_seen >= OTHER_REVISION_S):
                    raise Unsigned(model_id, revision, {d: _names(nodes) for d, nodes in served.items()})
                if search.over or (origins.keys() >= served.keys() and now - first_seen >= OTHER_REVISION_S):
                    shown = [o.shown() if (o := origins.get(d)) else [] for d in served]
                    raise RevisionNotFound(model_id, revision or "", revisions=shown)
                await node.changed(POLL_S)
                continue
            if len(holders) == 1:
                [(candidate, claimants)] = holders.items()
                if linked := next((holder.peer for holder in claimants if holder.peer), None):
                    answers.ask(linked, candidate)
        elif search.over or search.hopeless:
            return None, []
        await node.changed(SETTLE_LEAST_S if holders else POLL_S)


class _Signed:
    """The digests that a publisher signed, with the signatures that hold, as holders send them.

    A holder may withhold signatures, so every linked one is asked, each once for a digest.
    """

    def __init__(self, node: Node, model_id: ModelId, revision: str | None) -> None:
        self.found: dict[Digest, tuple[Signature, ...]] = {}
        self._node = node
        self._model_id = model_id
        self._revision = revision
        self._asked: set[tuple[NodeId, Digest]] = set()

    async def ask(self, holders: Mapping[Digest, list[Holder]]) -> None:
        """Asks the holders of digests without a signature that holds. Opens links where there are none."""
        await asyncio.gather(*(self._ask(d, nodes) for d, nodes in holders.items() if d not in self.found))

    def sealed(self, answer: tuple[Manifest, Origin | None]) -> tuple[Manifest, Origin | None]:
        """The answer with these signatures in its origin: who sent it may have withheld them."""
        manifest, origin = answer
        return manifest, (origin or Origin("", {})).signed(self.found[manifest.digest])

    async def _ask(self, digest: Digest, holders: list[Holder]) -> None:
        if own := self._node.described(digest):
            self._take(digest, own[1])
        peers = [holder.peer for holder in holders if holder.peer and (holder.node, digest) not in self._asked]
        if not peers:
            with self._node.seeking(digest):
                await self._node.changed(LINK_S)
        for peer in peers:
            if digest in self.found:
                return
            self._asked.add((peer.node, digest))
            self._take(digest, await self._node.manifest_requests.origin(peer, digest, timeout_s=ORIGIN_TIMEOUT_S))

    def _take(self, digest: Digest, origin: Origin | None) -> None:
        offered = origin.signatures if origin else ()
        if held := valid(offered, self._node.publishers, self._model_id, digest, revision=self._revision):
            self.found[digest] = held


async def _wanted(
    node: Node,
    answers: _Answers,
    holders: Mapping[Digest, list[Holder]],
    origins: Mapping[Digest, Origin | None],
    *,
    revision: str | None,
    signed: _Signed | None,
) -> dict[Digest, list[Holder]]:
    """Those that are signed or of the revision, as far as that is asked for; of parts of a commit the whole alone."""
    if signed:
        await signed.ask(holders)
        found = {digest: nodes for digest, nodes in holders.items() if digest in signed.found}
    else:
        named = {digest for digest, origin in origins.items() if origin and origin.is_revision(revision or "")}
        found = {digest: nodes for digest, nodes in holders.items() if revision is None or digest in named}
        found = _without_promises(node, found, origins)
    whole = await _whole(node, answers, found, origins) if len(found) > 1 else None
    return {whole: found[whole]} if whole else found


def _without_promises(
    node: Node, holders: dict[Digest, list[Holder]], origins: Mapping[Digest, Origin | None]
) -> dict[Digest, list[Holder]]:
    """Without the promises of a commit of which a node serves a manifest: they are the same files."""
    promises = node.promises()
    commits = {o.commit for digest in holders if digest not in promises and (o := origins.get(digest)) and o.commit}
    same = {digest for digest in promises & holders.keys() if (o := origins.get(digest)) and o.commit in commits}
    return {digest: nodes for digest, nodes in holders.items() if digest not in same}


def _of_one_commit(digests: Iterable[Digest], origins: Mapping[Digest, Origin | None]) -> bool:
    commits = {origin.commit if (origin := origins.get(digest)) else "" for digest in digests}
    return len(commits) == 1 and "" not in commits


async def _whole(
    node: Node,
    answers: _Answers,
    holders: Mapping[Digest, list[Holder]],
    origins: Mapping[Digest, Origin | None],
) -> Digest | None:
    """The digest of one commit's artifact of which the others are parts (`content.commit`); None without one."""
    if not _of_one_commit(holders, origins):
        return None
    manifests = []
    for digest, nodes in holders.items():
        peer = next((holder.peer for holder in nodes if holder.peer), None)
        if own := node.described(digest):
            manifests.append(own[0])
        elif peer is None:
            return None
        else:
            try:
                manifests.append((await answers.ask(peer, digest))[0])
            except (PeerError, ManifestError):
                return None
    found = commit.whole(manifests)
    return found.digest if found and found.digest in holders else None


async def _origins(node: Node, holders: Mapping[Digest, list[Holder]]) -> dict[Digest, Origin | None]:
    """Origins of digests from linked holders. Links are opened for digests without one.

    A digest whose holders do not answer is left out: a killed node says nothing about its revision.
    """

    async def ask(digest: Digest, nodes: list[Holder]) -> tuple[Digest, Origin | None] | None:
        if own := node.described(digest):
            return digest, own[1]
        with node.seeking(digest):
            peers = [holder.peer for holder in nodes if holder.peer][:ORIGINS_ASKED_MAX]
            if not peers:
                await node.changed(LINK_S)
            told = await _first_origin(node, peers, digest)
            return (digest, told[0]) if told else None

    answers = await asyncio.gather(*(ask(digest, nodes) for digest, nodes in holders.items()))
    return dict(answer for answer in answers if answer)


async def _first_origin(node: Node, peers: Sequence[Peer], digest: Digest) -> list[Origin | None]:
    """The first origin that one of the peers knows, or None if they know none; empty if none of them answers."""
    requests = node.manifest_requests
    asked = [asyncio.create_task(requests.answered_origin(peer, digest, timeout_s=ORIGIN_TIMEOUT_S)) for peer in peers]
    told: list[Origin | None] = []
    try:
        for answer in asyncio.as_completed(asked):
            with contextlib.suppress(PeerError):
                told = [await answer]
                if told[0]:
                    break
    finally:
        for task in asked:
            if not task.cancel() and not task.cancelled():
                task.exception()  # marks it as retrieved
    return told


def networks(trusted: Sequence[str]) -> list[Network]:
    """The networks of `trusted`, which Settings has checked."""
    return [ipaddress.ip_network(network, strict=False) for network in trusted]


def introduced(holders: Mapping[Digest, list[Holder]], trusted: Sequence[Network]) -> dict[Digest, list[Holder]]:
    """The digests that a peer on a trusted machine announces."""
    return {
        digest: nodes
        for digest, nodes in holders.items()
        if any(holder.peer and may_introduce(holder.peer, trusted) for holder in nodes)
    }


def may_introduce(peer: Peer, trusted: Sequence[Network]) -> bool:
    """Whether a peer is on a trusted machine."""
    with contextlib.suppress(SettingsError, ValueError):  # a peer in this process, or at a host name
        address = ipaddress.ip_address(split_address("peer", peer.link.remote)[0])
        return any(address in network for network in trusted)
    return False


def _names(holders: list[Holder]) -> list[str]:
    return [f"{holder.name} ({holder.address})" for holder in holders] or ["this node"]
