"""Resolution of a model id: its holders, their agreement on a digest, and the manifest of that digest.

That a manifest is the right one rests on its sha256, the digest, which the caller pins, a publisher signs, or all
reachable holders announce.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from swarm.content import commit
from swarm.content.manifest import Digest, Manifest, ModelId
from swarm.errors import ManifestError, ManifestNotFound, PeerError, SettingsError
from swarm.journal import Resolved
from swarm.node.agreement import FIND_TIMEOUT_S, POLL_S, SETTLE_LEAST_S, SETTLE_S, Search, agreed_digest, names_of
from swarm.node.manifest_answers import Answers
from swarm.node.node import Node
from swarm.node.trust import Signed, networks
from swarm.protocol.messages import NodeId, Origin


async def resolve(
    node: Node,
    model_id: ModelId,
    *,
    digest: Digest | None,
    find_timeout_s: float | None,
    trusted: Sequence[str] = (),
    revision: str | None = None,
) -> tuple[Manifest, Origin | None]:
    """Manifest and provenance of a model id.

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
    search = Search(node, node.now(), find_timeout_s)
    failures: dict[str, None] = {}  # each once, in order
    introducers = networks(trusted)
    unusable: set[NodeId] = set()  # nodes that sent a manifest of another digest, and would again
    signed = Signed(node, model_id, revision) if node.publishers else None
    with Answers(node) as answers:
        while True:
            with node.seeking(digest):
                found_digest, holders = await agreed_digest(
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
                    set(chain.from_iterable(map(names_of, node.holders(model_id).values()))) if introducers else ()
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
