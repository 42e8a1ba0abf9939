"""Who says more than anybody honest would: one allowance for each sender, refilled as time passes.

    allowance(t) = min(BURST, allowance + RATE_PER_S x seconds), less one for everything said

Who has used its allowance up is muted for `MUTE_S`: nothing that it says counts, and what it says meanwhile does not
prolong that. Pure: told the time.

Must not know: what is said, links, datagrams. `linking` asks for nodes, `gathering` for addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

SENDERS_MAX = 4096  # remembered; above that the one that was silent for longest is forgotten
MUTE_S = 30.0


@dataclass(slots=True)
class _Sender:
    allowance: float
    at_s: float
    muted_until_s: float = 0.0


class RateLimiter:
    """The allowances of all senders of one kind. `rate_per_s` is what each may say for ever, `burst` at once."""

    def __init__(self, *, rate_per_s: float, burst: float) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._senders: dict[str, _Sender] = {}  # who spoke last is last

    def is_muted(self, who: str, now: float) -> bool:
        """Whether nothing that it says counts at this time."""
        sender = self._senders.get(who)
        return sender is not None and now < sender.muted_until_s <= now + MUTE_S  # later: the clock was set back

    def charge(self, who: str, now: float) -> bool:
        """It says something more; returns whether it floods, and is muted from now on: once for each time."""
        sender = self._senders.pop(who, None) or _Sender(self._burst, now)
        self._senders[who] = sender
        if len(self._senders) > SENDERS_MAX:
            del self._senders[next(iter(self._senders))]
        passed_s = max(0.0, now - sender.at_s)  # less than nothing: the clock was set back
        sender.allowance = min(self._burst, sender.allowance + passed_s * self._rate_per_s)
        sender.at_s = now
        if sender.allowance < 1.0 and not self.is_muted(who, now):
            sender.muted_until_s = now + MUTE_S
            return True
        sender.allowance = max(0.0, sender.allowance - 1.0)
        return False

    def __repr__(self) -> str:
        return f"<RateLimiter {len(self._senders)} senders, {self._rate_per_s:g} a second each>"
