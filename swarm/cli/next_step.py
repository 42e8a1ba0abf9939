"""The commands that `serve` and `fetch` name for the next step, on this machine or another."""

from __future__ import annotations

import shlex

from swarm.settings import DEFAULT_PORT, Settings


def fetch_command(model_id: str, address: str, settings: Settings) -> str:
    """The command that fetches the model elsewhere, as it is typed there; the key file has to be copied."""
    key = ["--key-file", str(settings.key_file)] if settings.key_file else []
    opened = ["--insecure"] if settings.insecure else []
    return shlex.join(["swarm", "fetch", model_id, "--peer", address, *key, *opened])


def listening(settings: Settings) -> str:
    """The flags that let other machines reach a node."""
    key = "" if settings.reaches_out else " --key-file KEY (made by `swarm keygen KEY`, a copy on every machine)"
    return f"--listen 0.0.0.0:{DEFAULT_PORT}{key}"
