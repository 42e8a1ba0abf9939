"""The exceptions of `swarm`, grouped by the party that can act on them.

    SwarmError
      SettingsError            user: a setting is invalid; names the setting and the accepted values
      ManifestError            user: no peer serves the model, or a manifest is unusable
        ManifestNotFound · ManifestInvalid · CheckpointIncomplete · ManifestConflict
      FetchError               caller of `fetch`: the fetch gave up and can be resumed: Stalled · FetchTimeout
      StoreError               user: local disk or memory: StoreFull · StoreConflict · SourceChanged
      PeerError                node: a peer failed; becomes an event and a journal entry
        PeerUnreachable · PeerTimeout · NotAdmitted · NotSwarm · RemoteProtocolError · VersionSkew
      TransportError           node: a transfer failed; its chunks are requested from another peer
      AgentError               user: what the agent of this machine says
      LocalProtocolError       developer: a bug in swarm

Each exception has typed fields. Its text is a single line: the event, its place, and the next step. Text of peers and
files in it is bounded and printable (`clean`), in lines of the log too (`CleanFilter`).
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

CHARS_MAX = 300  # of a value in a line
LINE_CHARS_MAX = 1000  # of an error or a line of the log
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CUT = " … "


def clean(text: object, *, chars_max: int = CHARS_MAX) -> str:
    """Text of peers, files and traces fit for a terminal: one line of at most `chars_max` characters.

    A longer text loses its middle: without a bound it fills a log. Control characters move the cursor, bidirectional
    ones reorder the line.

    A character that Unicode does not call printable (control, format, surrogate, private use) is replaced.
    """
    line = str(text)
    if len(line) > chars_max:
        tail = (chars_max - len(_CUT)) // 3
        line = line[: chars_max - len(_CUT) - tail] + _CUT + line[len(line) - tail :]
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else _REPLACEMENT for c in line)


class CleanFilter(logging.Filter):
    """Cleans the messages and tracebacks of a logger: peers choose names and ids in them, and the handlers of programs
    that use the API write them to terminals and files as they are."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replaces message, arguments and traceback."""
        record.msg, record.args = clean(record.getMessage(), chars_max=LINE_CHARS_MAX), None
        if record.exc_info and not record.exc_text:
            lines = "".join(traceback.format_exception(*record.exc_info)).splitlines()
            record.exc_text = "\n".join(clean(line, chars_max=LINE_CHARS_MAX) for line in lines)
        return True


class SwarmError(Exception):
    """Base class. `exit_code` is the exit status of the command line."""

    exit_code = 1

    def __str__(self) -> str:
        return clean(super().__str__(), chars_max=LINE_CHARS_MAX)


class SettingsError(SwarmError):
    """A setting has an invalid value."""

    exit_code = 2

    def __init__(self, setting: str, why: str) -> None:
        super().__init__(f"{setting}: {why}")
        self.setting = setting
        self.why = why


class ManifestError(SwarmError):
    """A manifest is missing or unusable."""

    exit_code = 3


class ManifestNotFound(ManifestError):
    """No reachable peer serves the model id (or the pinned digest)."""

    def __init__(self, model_id: str, *, tried: Sequence[str], waited_s: float, advice: str | None = None) -> None:
        """`advice`: what to do; '' if the lines of `tried` say it."""
        where = ", ".join(tried) if tried else "no peer was found"
        what = "start `swarm serve` on a machine that has the model, or name a peer with --peer"
        todo = what if advice is None else advice
        searched = f"{waited_s:.1f}".removesuffix(".0")
        super().__init__(
            f"no peer serves {model_id!r} (searched for {searched} s: {where}){f'; {todo}' if todo else ''}"
        )
        self.model_id = model_id
        self.tried = tuple(tried)


class RevisionNotFound(ManifestNotFound):
    """Peers serve the model id, and none the revision. `revisions`: those that exist, one tuple for each content."""

    def __init__(self, model_id: str, revision: str, *, revisions: Sequence[Sequence[str]]) -> None:
        known = [" = ".join(names) if names else "a content without a revision" for names in revisions]
        first = next((names[0] for names in revisions if names), None)
        command = f"choose one: swarm fetch {model_id}@{first}" if first else "serve it with --revision LABEL"
        SwarmError.__init__(
            self, f"{model_id!r} is served, but not its revision {revision!r}; there is {'; '.join(known)}; {command}"
        )
        self.model_id = model_id
        self.revision = revision
        self.tried = tuple(known)


class ManifestInvalid(ManifestError):
    """A manifest, or a file to be described by a manifest, breaks the format."""

    def __init__(self, subject: str, why: str) -> None:
        super().__init__(f"{subject}: {why}")
        self.subject = subject
        self.why = why


class CheckpointIncomplete(ManifestInvalid):
    """A directory lacks files of its model. The text names them."""


class ManifestConflict(ManifestError):
    """Peers announce different digests under the same model id.

    `holders`: digest -> names of peers; `revisions`: digest -> revisions, as far as known.
    """

    def __init__(
        self,
        model_id: str,
        holders: Mapping[str, Sequence[str]],
        revisions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        named = {digest: names[0] for digest, names in (revisions or {}).items() if names}
        commands = [f"swarm fetch {model_id}@{named[digest]}" for digest in sorted(holders) if digest in named]
        chosen = f"choose a revision ({', '.join(commands)}), or " if commands else "choose "
        sides = "; ".join(f"{digest} at {', '.join(peers)}" for digest, peers in sorted(holders.items()))
        super().__init__(
            f"{model_id!r} is served with {len(holders)} different contents ({sides}); "
            f"{chosen}the digest with --digest, or stop the wrong source"
        )
        self.model_id = model_id
        self.holders = {digest: tuple(peers) for digest, peers in holders.items()}


class Unpinnable(ManifestError):
    """A fetch is pinned, and the manifest has no BLAKE3 digests to check it by."""

    def __init__(self, model_id: str, digest: str) -> None:
        super().__init__(
            f"{model_id!r} ({digest[:12]}…) cannot be pinned: its manifest has XXH3 digests alone, which a member can "
            "forge; serve it again with this version of swarm on the node that has the files, and fetch the new digest"
        )
        self.model_id = model_id
        self.digest = digest


class NotOfCommit(ManifestError):
    """Peers serve files as a commit that are not those that the origin lists for it."""

    def __init__(self, model_id: str, digest: str, commit: str, origin: str, why: str) -> None:
        super().__init__(
            f"{model_id!r}: what members serve as commit {commit[:12]} ({digest[:12]}…) is not what {origin} lists "
            f"for it ({why}); a member lies, or has damaged files: check the nodes that serve it with `swarm verify`"
        )
        self.model_id = model_id
        self.digest = digest
        self.commit = commit
        self.origin = origin
        self.why = why


class Unsigned(ManifestNotFound):
    """Peers serve the model, and none of its contents is signed by a publisher that this node trusts."""

    def __init__(self, model_id: str, revision: str | None, holders: Mapping[str, Sequence[str]]) -> None:
        asked, what = (model_id, "this id") if revision is None else (f"{model_id}@{revision}", "this id and revision")
        sides = "; ".join(f"{digest[:12]}… at {', '.join(peers)}" for digest, peers in sorted(holders.items()))
        SwarmError.__init__(
            self,
            f"{asked!r} is served, but not signed for {what} by a publisher of "
            f" `signed_by` ({sides}); have the publisher sign it (swarm sign PATH --key KEY) and serve it again",
        )
        self.model_id = model_id
        self.tried = tuple(name for peers in holders.values() for name in peers)


class FetchError(SwarmError):
    """A fetch gave up. Verified chunks are kept; the next fetch resumes from them."""

    exit_code = 4


class Stalled(FetchError):
    """No chunk arrived for too long. `missing` and `total` count chunks; `tried` has a line for each peer."""

    def __init__(self, model_id: str, *, missing: int, total: int, waited_s: float, tried: Sequence[str]) -> None:
        peers = "; ".join(tried) if tried else "no peer holds them"
        super().__init__(
            f"{model_id!r} stalled: {missing} of {total} chunks are missing and nothing arrived for "
            f"{waited_s:.0f} s ({peers}); run the same fetch again to resume"
        )
        self.missing = missing
        self.total = total
        self.tried = tuple(tried)


class FetchTimeout(FetchError):
    """The caller's deadline passed. `fraction` of the chunks were verified by then.

    `why`: what the origin answered last, if that was a failure.
    """

    def __init__(self, model_id: str, *, timeout_s: float, fraction: float, why: str = "") -> None:
        super().__init__(
            f"{model_id!r} was {fraction:.0%} complete after the {timeout_s:g} s allowed{f' ({why})' if why else ''}; "
            "run the same fetch again to resume, or allow more time"
        )
        self.why = why
        self.timeout_s = timeout_s
        self.fraction = fraction


class StoreError(SwarmError):
    """The local disk or memory fails to store or to read bytes."""

    exit_code = 5


class StoreFull(StoreError):
    """Not enough free space for the missing chunks. `why` is for a lack of something else than bytes."""

    def __init__(self, where: Path | str, *, need_bytes: int, free_bytes: int, why: str = "") -> None:
        why = why or f"{need_bytes} bytes are needed and {free_bytes} are free"
        super().__init__(f"{where}: {why}; make room, or choose another directory with --out")
        self.where = str(where)
        self.need_bytes = need_bytes
        self.free_bytes = free_bytes


class StoreConflict(StoreError):
    """The fetch would overwrite existing data, or another fetch writes to the same place."""

    def __init__(self, where: Path | str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = str(where)
        self.why = why


class SourceChanged(StoreError):
    """A served file or tensor changed, so its chunks no longer match the manifest."""

    def __init__(self, where: Path | str, why: str) -> None:
        super().__init__(f"{where} changed while it was served ({why}); it is withdrawn: serve it again")
        self.where = str(where)
        self.why = why


class PeerError(SwarmError):
    """Another node misbehaved or disconnected. `final`: the same call will fail again until a user acts."""

    exit_code = 6
    final = False

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"{peer}: {why}")
        self.peer = peer
        self.why = why


class PeerUnreachable(PeerError):
    """The connection could not be made, or was lost."""


class PeerTimeout(PeerError):
    """The peer did not answer before the deadline."""


class NotAdmitted(PeerError):
    """A node did not prove its membership of the cluster, to us or to the peer."""

    final = True


class NotSwarm(PeerError):
    """Another program than swarm answers at the address."""

    final = True


class RemoteProtocolError(PeerError):
    """The peer broke the protocol."""


class VersionSkew(PeerError):
    """The peer speaks another version of the protocol."""

    final = True

    def __init__(self, peer: str, *, theirs: int, ours: int, software: str) -> None:
        older = "it" if theirs < ours else "this node"
        super().__init__(peer, f"speaks protocol {theirs} (swarm {software}), this node speaks {ours}; upgrade {older}")
        self.theirs = theirs
        self.ours = ours


class AgentError(SwarmError):
    """The agent of this machine did not do what it was asked; its own line and exit code. `gone`: it broke off."""

    def __init__(self, why: str, *, exit_code: int = 1, gone: bool = False) -> None:
        super().__init__(why)
        self.exit_code = exit_code
        self.gone = gone


class TransportError(SwarmError):
    """A transport failed during a transfer."""


class OriginError(SwarmError):
    """An origin cannot be read. `lasting`: a later attempt would fail too; `retry_s`: seconds that it asks to wait."""

    exit_code = 7
    lasting = False

    def __init__(self, origin: str, why: str, *, retry_s: float = 0.0, lasting: bool = False) -> None:
        super().__init__(f"{origin}: {why}")
        self.origin = origin
        self.why = why
        self.retry_s = retry_s
        self.lasting = self.lasting or lasting


class OriginUnreachable(OriginError):
    """No connection, or it broke or fell silent; or the origin is busy."""


class OriginBusy(OriginUnreachable):
    """The origin answers that it cannot answer: its fault, or too many requests."""


class OriginUnusable(OriginError):
    """The origin answers, and not with what was asked for."""


class OriginDenied(OriginError):
    """The origin demands a token, or does not accept the given one."""

    lasting = True


class OriginNotFound(OriginError):
    """The origin has no such model, revision or file."""

    lasting = True


class OriginChanged(OriginError):
    """The bytes at the origin are not those that it listed."""

    lasting = True


class LocalProtocolError(SwarmError):
    """This node broke its own protocol: a bug in swarm."""

    exit_code = 70


for _name in ("swarm", "swarm.http"):  # a filter of a logger does not see the records of its children
    logging.getLogger(_name).addFilter(CleanFilter())
