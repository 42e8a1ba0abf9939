"""`swarm run -- COMMAND`: fetches the model's metadata, then becomes the engine.

    vllm serve org/model  ->  vllm serve ~/.cache/swarm/models/... --served-model-name org/model --load-format swarm

An engine reads config and tokenizer long before its workers load weights, so a machine without the model needs them
first. They go to a directory that replaces the model in the command. If the model is on the machine already, only the
load format is added.

Owns where a command names its model. Must not know: nodes, beyond `fetch`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.api import BRING_FIND_S, bring, fetch_of_commit, manifest_of
from swarm.checkpoint import hf_cache
from swarm.engines import cache_gc, metadata, vllm_modelinfos
from swarm.engines.layout import metadata_id
from swarm.engines.pin import EnginePin, digest_of
from swarm.errors import ManifestNotFound, NotOfCommit, SettingsError, SwarmError
from swarm.settings import Settings

MODEL_FLAGS = ("--model", "--model-path")
SERVED_NAME, LOAD_FORMAT = "--served-model-name", "--load-format"

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class LaunchCommand:
    """A command to execute, and variables to add to its environment."""

    command: tuple[str, ...]
    environment: dict[str, str]


def prepare(command: Sequence[str], settings: Settings, *, model_id: str | None = None) -> LaunchCommand:
    """The command to execute instead, once the metadata of its model is on this machine.

    Raises SettingsError for a command without a model, ManifestNotFound for a model that no peer serves and that is not
    on this machine, ManifestConflict when peers serve different contents, and the errors of `swarm.fetch`.
    """
    place, word = _model(command, model_id)
    revision = _value(command, "--revision")
    alone, tail = hf_cache.with_revision(word)
    if tail is not None and not Path(word).exists():
        why = f"{word!r} is no model of an engine, which takes the revision by itself: say {alone} --revision {tail}"
        raise SettingsError("command", why)
    here = Path(word) if Path(word).is_dir() else hf_cache.snapshot(word, revision=revision or "main")
    name = model_id or _name(word, here)
    pin = EnginePin.of(name, digest=digest_of(os.environ), revision=revision)
    settings = pin.settings(settings)
    environment = {"SWARM_MODEL_ID": name, **environment_of(settings)}
    if here is not None and (metadata.is_whole(here) or (here / metadata.DESCRIPTION).is_file()):
        log.info("%s: is on this machine, at %s", name, here)
        return LaunchCommand(_with_format(command), environment)
    from_hub = here is None and hf_cache.is_model_id(word) and not Path(word).exists()
    # Without a node that serves it, the hub is read: that is soon known where all replicas start at the same time.
    find_timeout_s = settings.find_timeout_s
    if from_hub:
        find_timeout_s = min(find_timeout_s or BRING_FIND_S, BRING_FIND_S)
    looking = dataclasses.replace(settings, find_timeout_s=find_timeout_s)
    try:
        directory = _fetch_metadata(name, looking, revision, pin, for_vllm=_takes_vllm_flags(command))
    except (ManifestNotFound, NotOfCommit) as error:
        if not from_hub and not (here is not None and (here / "config.json").is_file()):
            raise
        if from_hub and _brought(word, settings, revision):
            return LaunchCommand(_with_format(command), environment)
        log.warning("%s; the engine starts without the swarm", error)
        return LaunchCommand(_with_format(command), environment)
    log.info("%s: config, tokenizer and headers are at %s", name, directory)
    changed = [*command]
    changed[place] = f"{changed[place].partition('=')[0]}={directory}" if word != changed[place] else str(directory)
    if _takes_vllm_flags(command) and not _has(command, SERVED_NAME):
        changed += [SERVED_NAME, word]
    return LaunchCommand(_with_format(changed), environment)


def _brought(model_id: str, settings: Settings, revision: str | None) -> bool:
    """Whether a model is in the Hugging Face cache now, read from the hub together with other replicas."""
    if settings.origin == "none" or "/" not in model_id:
        return False
    try:
        place = bring(model_id, revision, settings=settings)
    except SwarmError as error:
        log.warning("%s: was not read from the hub by the swarm (%s)", model_id, error)
        return False
    log.info("%s: is in the Hugging Face cache now, at %s", model_id, place)
    return True


def _fetch_metadata(model_id: str, settings: Settings, revision: str | None, pin: EnginePin, *, for_vllm: bool) -> Path:
    """The laid-out model directory; for vLLM also the descriptions of its classes."""
    settings.cache.mkdir(parents=True, exist_ok=True)
    incoming = Path(tempfile.mkdtemp(dir=settings.cache, prefix=".metadata-"))
    try:
        unsynced = dataclasses.replace(settings, fsync=False)
        commit, proven = pin.commit_of(metadata.DESCRIPTION), bool(pin.commit or pin.digest)
        with fetch_of_commit(metadata_id(model_id), out=incoming, commit=commit, settings=unsynced, revision=revision):
            if pin.digest:
                metadata.demand(incoming, manifest_of(model_id, pin.digest, settings=unsynced))
            adopted = metadata.adopt(settings.cache, incoming, proven=proven)
            if for_vllm:
                vllm_modelinfos.install(adopted, unsynced)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    directory = metadata.lay_out(settings.cache, model_id, adopted, proven=proven)
    cache_gc.hold(directory, through_exec=True)
    cache_gc.prune(settings.cache, settings.cache_limit_bytes)
    return directory


def _model(command: Sequence[str], model_id: str | None) -> tuple[int, str]:
    """The index of the word that names the model, and the model."""
    for number, word in enumerate(command):
        flag, equals, value = word.partition("=")
        if flag in MODEL_FLAGS:
            if equals:
                return number, value
            if number + 1 < len(command):
                return number + 1, command[number + 1]
        if word == "serve" and number and number + 1 < len(command) and not command[number + 1].startswith("-"):
            return number + 1, command[number + 1]
    if model_id is not None and model_id in command:
        return list(command).index(model_id), model_id
    raise SettingsError(
        "command", f"{' '.join(command)!r} names no model after `serve`, {' or '.join(MODEL_FLAGS)}; say --model-id ID"
    )


def _name(word: str, here: Path | None) -> str:
    if here is None and not word.startswith((".", "/")):
        return word
    path = here or Path(word)
    return hf_cache.model_id_of(path) or path.resolve().name


def _takes_vllm_flags(command: Sequence[str]) -> bool:
    return any(Path(word).name == "vllm" or word.startswith("vllm.entrypoints.") for word in command)


def _with_format(command: Sequence[str]) -> tuple[str, ...]:
    if _takes_vllm_flags(command) and not _has(command, LOAD_FORMAT):
        return (*command, LOAD_FORMAT, "swarm")
    return tuple(command)


def _has(command: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in command)


def _value(command: Sequence[str], flag: str) -> str | None:
    for word, after in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == flag and (value if equals else after):
            return value if equals else after
    return None


def environment_of(settings: Settings) -> dict[str, str]:
    """SWARM_* variables that give other processes, such as an engine's workers, these settings."""
    changed = {}
    defaults = Settings()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(defaults, field.name) and value is not None:
            changed[f"SWARM_{field.name.upper()}"] = _text(field.name, value)
    return changed


def _text(name: str, value: object) -> str:
    if name in ("upload_limit", "origin_limit"):
        return f"{value:.0f}B/s"
    return ",".join(value) if isinstance(value, tuple) else str(value)
