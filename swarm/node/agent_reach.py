"""Whether the agent of this machine can stand in for a program's own fetch: what may each of them find?

An agent says which settings decide that. A program whose own settings ask for something else, another key, peers of
its own or a publisher's signature, goes on without the agent: what it gets must not depend on whether one runs.
"""

from __future__ import annotations

import os
from pathlib import Path

from swarm import __version__
from swarm.protocol.agent_messages import VERSION, Greeting
from swarm.settings import Settings

SAME = ("signed_by", "trusted", "chunk_hash", "origin")  # must be those of the agent, also where a program has none
ASKED = ("key_file", "insecure", "peers", "transports", "data_encryption")  # must be, where the program sets them


def greeting(settings: Settings, *, node: str, hub: str, hub_cache: Path) -> Greeting:
    """The greeting of an agent with these settings."""
    reach = {name: _said(settings, name) for name in (*SAME, *ASKED)}
    return Greeting(VERSION, __version__, os.getpid(), node, hub, str(hub_cache), reach)


def objection(settings: Settings, said: Greeting) -> str:
    """Why a program with these settings goes on without the agent; '' if it need not."""
    plain = Settings()
    for name in SAME:
        if _said(settings, name) != said.reach.get(name):
            return f"its {name} is another one"
    for name in ASKED:
        own, theirs = _said(settings, name), said.reach.get(name, ())
        if own != _said(plain, name) and not (set(own) <= set(theirs) if name == "peers" else own == theirs):
            return f"its {name} is another one"
    return ""


def _said(settings: Settings, name: str) -> tuple[str, ...]:
    value = getattr(settings, name)
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, tuple) else (str(value),)
