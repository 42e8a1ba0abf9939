"""Admission of askers by token: `TokenTransport`, the base of all transports.

The holder admits a token when a link opens and revokes it when the link closes. A peer whose session broke opens a
second session with the same token, often before the holder notices the break, so the latest live session counts.

Must not know: connections, transfers.
"""

from __future__ import annotations

import asyncio
from typing import Generic, Protocol, TypeVar

from swarm.errors import TransportError
from swarm.transport import Outbound

SESSIONS_PER_TOKEN = 2  # the session in use, and its replacement while the break is not noticed yet


class HolderSession(Outbound, Protocol):
    """The holder's end of a session, as its transport keeps it."""

    @property
    def alive(self) -> bool:
        """Whether the session can carry another transfer."""

    async def close(self) -> None:
        """Ends the session; transfers in flight fail with TransportError."""


S = TypeVar("S", bound=HolderSession)


class TokenTransport(Generic[S]):
    """The part of a `Transport` that admits tokens. A subclass adds `address`, `reach` and `connect`, and calls
    `add_session` for each session that an asker opens with an admitted token."""

    scheme: str
    reason = "its address is reachable"
    usual_bytes_per_s = 0.0

    def __init__(self) -> None:
        self._admitted: dict[str, Admission[S]] = {}

    def admit(self, token: str) -> None:
        """Lets a peer open sessions with this token. Admitting a token twice is the same as once."""
        self._admitted.setdefault(token, Admission())

    async def accept(self, token: str, *, timeout_s: float) -> S:
        """The latest live session opened with this token, waiting up to `timeout_s` for it. Raises TransportError."""
        if (admission := self._admitted.get(token)) is None:
            raise TransportError(f"{self.scheme}: the token is not admitted")
        try:
            async with asyncio.timeout(timeout_s):
                while (session := admission.current) is None:
                    if admission.revoked:
                        raise TransportError(f"{self.scheme}: the token was revoked")
                    admission.changed.clear()
                    await admission.changed.wait()
        except TimeoutError as error:
            raise TransportError(f"{self.scheme}: the peer opened no session within {timeout_s:g} s") from error
        return session

    def is_admitted(self, token: str) -> bool:
        """Whether a session with this token may be opened."""
        return token in self._admitted

    async def add_session(self, token: str, session: S) -> None:
        """Adds a session that an asker opened; closes it when its token was revoked meanwhile."""
        admission = self._admitted.get(token)
        await (admission.add(session) if admission is not None else session.close())

    async def revoke(self, token: str) -> None:
        """Closes the sessions opened with this token and refuses the token from now on."""
        if (admission := self._admitted.pop(token, None)) is not None:
            await admission.revoke()

    async def close(self) -> None:
        """Revokes every token."""
        await asyncio.gather(*(self.revoke(token) for token in list(self._admitted)))


class Admission(Generic[S]):
    """An admitted token and the sessions opened with it, oldest first."""

    def __init__(self) -> None:
        self.revoked = False
        self.count = 0  # greatest session number proven so far, where the transport has such proofs
        self.changed = asyncio.Event()
        self.sessions: list[S] = []

    @property
    def current(self) -> S | None:
        """The latest session, if it is alive."""
        latest = self.sessions[-1] if self.sessions else None
        return latest if latest is not None and latest.alive else None

    async def add(self, session: S) -> None:
        """Adds the latest session; closes those beyond SESSIONS_PER_TOKEN."""
        self.sessions.append(session)
        self.changed.set()
        replaced = self.sessions[:-SESSIONS_PER_TOKEN]
        self.sessions = self.sessions[-SESSIONS_PER_TOKEN:]
        for old in replaced:
            await old.close()

    async def revoke(self) -> None:
        """Closes all sessions; `accept` that waits fails."""
        self.revoked = True
        self.changed.set()
        await asyncio.gather(*(session.close() for session in self.sessions))
