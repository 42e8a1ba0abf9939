"""vLLM's descriptions of model classes, exchanged like compile caches.

vLLM reads the description of a model's class before it starts any worker, and makes it in a process of its own, which
takes 15 to 20 s. So `swarm run` fetches it beside config and tokenizer. It is JSON, and named by the digest of the
class's source: vLLM ignores that of another source.

Must not know: vLLM.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from swarm.api import Served
from swarm.engines import compile_caches
from swarm.engines.layout import Fingerprint
from swarm.errors import SwarmError
from swarm.settings import Settings

log = logging.getLogger("swarm")


def offer(architectures: Sequence[str], settings: Settings) -> Served | None:
    """Serves this machine's descriptions, which have those of a model with these architectures.

    None where there are none. Raises as `compile_caches.offer` does.
    """
    wanted = _key(architectures)
    return compile_caches.offer(wanted, settings, places=_places()) if wanted else None


def install(model: Path, settings: Settings) -> None:
    """Fetches the descriptions for the model at this directory, if a member that is linked by now offers them.

    Never raises.
    """
    if compile_caches.refusal(settings):
        return
    try:
        config = json.loads((model / "config.json").read_bytes())
        if wanted := _key(config.get("architectures") or ()):
            installed = compile_caches.install(wanted, settings, places=_places(), find_timeout_s=0.0)
            installed.served.close()
            log.info("descriptions of model classes: %s", installed)
    except (SwarmError, OSError, ValueError, TypeError, AttributeError) as error:
        log.info("descriptions of model classes: vLLM makes its own (%s)", error)


def _key(architectures: Sequence[str]) -> Fingerprint | None:
    """None for another vLLM than this Python's, whose version is not known."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Fingerprint({"modelinfos": ",".join(architectures), "vllm": version}) if architectures else None


def _places() -> dict[str, Path]:
    return {"vllm-modelinfos": compile_caches.vllm_root(os.environ) / compile_caches.MODELINFOS}
