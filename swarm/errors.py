"""Every error that `swarm` raises, split by who can act on it.

    SwarmError
      SettingsError            the user: a setting is wrong; names it and the accepted values
      ManifestError            nobody serves the model, or what describes it is unusable
        ManifestNotFound · ManifestInvalid · ManifestConflict
      FetchError               what `fetch` raises when it gives up: Stalled · FetchTimeout
      StoreError               the local disk or memory: StoreFull · StoreConflict · SourceChanged
      PeerError                another node; stays inside, becomes an event and a journal line
        PeerUnreachable · PeerTimeout · NotAdmitted · RemoteProtocolError · VersionSkew
      TransportError           a data plane failed; the chunk is asked for elsewhere
      LocalProtocolError       a bug in swarm itself

An error has fields, not only text. Its text says what happened, where, and what to do next, on one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


class SwarmError(Exception):
    """Base of everything that `swarm` raises on purpose. `exit_code` is what the command line exits with."""

    exit_code = 1


class SettingsError(SwarmError):
    """A setting has a value that cannot be used."""

    exit_code = 2

    def __init__(self, setting: str, why: str) -> None:
        super().__init__(f"{setting}: {why}")
        self.setting = setting
        self.why = why


class ManifestError(SwarmError):
    """What describes an artifact is missing or unusable."""

    exit_code = 3


class ManifestNotFound(ManifestError):
    """No peer that was reached serves the model id (or the pinned digest)."""

    def __init__(self, model_id: str, *, tried: Sequence[str], waited_s: float) -> None:
        where = ", ".join(tried) if tried else "no peer was found"
        super().__init__(
            f"nobody serves {model_id!r} (asked for {waited_s:.0f} s: {where}); "
            "start `swarm serve` somewhere, or name a peer with --peer"
        )
        self.model_id = model_id
        self.tried = tuple(tried)


class ManifestInvalid(ManifestError):
    """A manifest, or a file that it should describe, breaks the format."""

    def __init__(self, subject: str, why: str) -> None:
        super().__init__(f"{subject}: {why}")
        self.subject = subject
        self.why = why


class ManifestConflict(ManifestError):
    """Two peers announce different contents under one model id."""

    def __init__(self, model_id: str, holders: Mapping[str, Sequence[str]]) -> None:
        sides = "; ".join(f"{digest} at {', '.join(who)}" for digest, who in sorted(holders.items()))
        super().__init__(
            f"{model_id!r} is served with {len(holders)} different contents ({sides}); "
            "choose one with --digest, or stop the wrong source"
        )
        self.model_id = model_id
        self.holders = {digest: tuple(who) for digest, who in holders.items()}


class FetchError(SwarmError):
    """A fetch gave up. What was verified so far is kept and resumed by the next fetch."""

    exit_code = 4


class Stalled(FetchError):
    """Nothing arrived for too long. `missing` counts chunks, `tried` says what each peer did."""

    def __init__(self, model_id: str, *, missing: int, total: int, waited_s: float, tried: Sequence[str]) -> None:
        what = "; ".join(tried) if tried else "no peer holds them"
        super().__init__(
            f"{model_id!r} stalled: {missing} of {total} chunks are missing and nothing arrived for "
            f"{waited_s:.0f} s ({what}); run the same fetch again to resume"
        )
        self.missing = missing
        self.total = total
        self.tried = tuple(tried)


class FetchTimeout(FetchError):
    """The caller's own deadline passed."""

    def __init__(self, model_id: str, *, timeout_s: float, fraction: float) -> None:
        super().__init__(
            f"{model_id!r} was {fraction:.0%} complete after the {timeout_s:g} s allowed; "
            "run the same fetch again to resume, or allow more time"
        )
        self.timeout_s = timeout_s
        self.fraction = fraction


class StoreError(SwarmError):
    """The local disk or memory cannot take or give what it should."""

    exit_code = 5


class StoreFull(StoreError):
    """Not enough room for what is still missing."""

    def __init__(self, where: Path | str, *, need_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{where}: {need_bytes} bytes are needed and {free_bytes} are free; "
            "make room, or fetch to another place with --out"
        )
        self.where = str(where)
        self.need_bytes = need_bytes
        self.free_bytes = free_bytes


class StoreConflict(StoreError):
    """Something that is already there would have to be overwritten."""

    def __init__(self, where: Path | str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = str(where)
        self.why = why


class SourceChanged(StoreError):
    """A file or tensor changed while it was being served, so its chunks no longer match the manifest."""

    def __init__(self, where: Path | str, why: str) -> None:
        super().__init__(f"{where} changed while it was served ({why}); it is withdrawn: serve it again")
        self.where = str(where)
        self.why = why


class PeerError(SwarmError):
    """Another node did something wrong or went away."""

    exit_code = 6

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"{peer}: {why}")
        self.peer = peer
        self.why = why


class PeerUnreachable(PeerError):
    """No connection could be made, or it is gone."""


class PeerTimeout(PeerError):
    """The peer did not answer within its deadline."""


class NotAdmitted(PeerError):
    """One of the two nodes could not prove to the other that it belongs to the same cluster."""


class RemoteProtocolError(PeerError):
    """The peer broke the protocol."""


class VersionSkew(PeerError):
    """The peer speaks another version of the protocol."""

    def __init__(self, peer: str, *, theirs: int, ours: int, software: str) -> None:
        older = "it" if theirs < ours else "this node"
        super().__init__(peer, f"speaks protocol {theirs} (swarm {software}), this node speaks {ours}; upgrade {older}")
        self.theirs = theirs
        self.ours = ours


class TransportError(SwarmError):
    """A data plane failed while it moved one transfer."""


class LocalProtocolError(SwarmError):
    """This node broke its own rules: a bug in swarm."""

    exit_code = 70
