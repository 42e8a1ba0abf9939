"""The digest on which the holders of a model id agree, and the time that they get for it.

Holders are heard of one after the other, so the first digest settles for a moment. Parts of one commit agree on their
whole; what else differs is a conflict, or another revision.

Must not know: how a manifest is fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from swarm.content import commit
from swarm.content.manifest import Digest, ModelId
from swarm.errors import (
    ManifestConflict,
    ManifestError,
    ManifestNotFound,
    PeerError,
    RevisionNotFound,
    Unsigned,
)
from swarm.node.holders import Holder
from swarm.node.manifest_answers import Answers, origins_of
from swarm.node.node import Node
from swarm.node.trust import Network, Signed, introduced
from swarm.protocol.messages import Origin

# Time for conflicting digests, from the first holder on: while an address has not answered yet, and at least. By then
# the first holder has shared its members.
SETTLE_S, SETTLE_LEAST_S = 0.3, 0.05
POLL_S = 0.1
# Without a limit of the user: as long as a node is known that may still serve it, else shorter.
FIND_TIMEOUT_S = 10.0
NOTHING_FOUND_S = 2.5  # multicast finds nodes within 1.7 s
REFUSED_S = 0.5  # while every address that the user named refuses: multicast may find another node
PARTS_S = 5.0  # time for holders of parts of a commit to announce the whole, and to link to a holder
OTHER_REVISION_S = 2.0  # time for a holder of the revision to be found, once holders of others are known


@dataclass(frozen=True)
class Search:
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


async def agreed_digest(
    node: Node,
    model_id: ModelId,
    answers: Answers,
    *,
    digest: Digest | None,
    search: Search,
    trusted: Sequence[Network],
    revision: str | None,
    signed: Signed | None,
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
                    origins |= await origins_of(node, {d: n for d, n in holders.items() if d not in origins})
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
                    raise ManifestConflict(model_id, {d: names_of(nodes) for d, nodes in holders.items()}, names)
                if holders:
                    return next(iter(holders.items()))
                if signed and (search.over or now - first_seen >= OTHER_REVISION_S):
                    raise Unsigned(model_id, revision, {d: names_of(nodes) for d, nodes in served.items()})
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


async def _wanted(
    node: Node,
    answers: Answers,
    holders: Mapping[Digest, list[Holder]],
    origins: Mapping[Digest, Origin | None],
    *,
    revision: str | None,
    signed: Signed | None,
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
    answers: Answers,
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


def names_of(holders: list[Holder]) -> list[str]:
    """The holders, for error messages."""
    return [f"{holder.name} ({holder.address})" for holder in holders] or ["this node"]
