"""`swarm run -- COMMAND`: brings what an engine reads before its weights, then becomes the engine.

    vllm serve org/model  ->  vllm serve ~/.cache/swarm/models/... --served-model-name org/model --load-format swarm

An engine reads config and tokenizer long before its workers load weights, so a machine that has nothing needs them
first. They go to a directory of their own, which takes the model's place in the command. Where the model is here
already, the command is left as it is, but for the load format.

Owns how the model is found in a command. Must not know: nodes beyond `fetch`.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm.api import fetch
from swarm.checkpoint import hf_cache
from swarm.engines import cache_gc, metadata
from swarm.engines.layout import metadata_id
from swarm.errors import ManifestNotFound, SettingsError
from swarm.settings import Settings

MODEL_FLAGS = ("--model", "--model-path")
SERVED_NAME, LOAD_FORMAT = "--served-model-name", "--load-format"

log = logging.getLogger("swarm")


@dataclass(frozen=True)
class Launch:
    """A command to become, and what the environment must say for it beside what it says already."""

    command: tuple[str, ...]
    environment: dict[str, str]


def prepare(command: Sequence[str], settings: Settings, *, model_id: str | None = None) -> Launch:
    """Fetches what the command's engine needs first, and says what to execute instead.

    Raises SettingsError when the command names no model, ManifestNotFound when nobody serves it and it is not here
    either, ManifestConflict when others disagree on what it is, and what `swarm.fetch` raises.
    """
    place, word = _model(command, model_id)
    here = _here(word)
    name = model_id or _name(word, here)
    if here is not None and (metadata.is_whole(here) or (here / metadata.DESCRIPTION).is_file()):
        log.info("%s: is on this machine, at %s", name, here)
        return Launch(_with_format(command), _environment(settings, name))
    try:
        directory = _bring(name, settings)
    except ManifestNotFound as error:
        if not (hf_cache.is_model_id(word) and here is None and not Path(word).exists()) and not _configured(here):
            raise
        log.warning("%s; going on without the swarm", error)
        return Launch(_with_format(command), _environment(settings, name))
    log.info("%s: config, tokenizer and headers are at %s", name, directory)
    changed = [*command]
    changed[place] = f"{changed[place].partition('=')[0]}={directory}" if word != changed[place] else str(directory)
    if _takes_vllm_flags(command) and not _has(command, SERVED_NAME):
        changed += [SERVED_NAME, word]
    return Launch(_with_format(changed), _environment(settings, name))


def _bring(model_id: str, settings: Settings) -> Path:
    """Fetches the metadata of a model and lays it out."""
    settings.cache.mkdir(parents=True, exist_ok=True)
    incoming = Path(tempfile.mkdtemp(dir=settings.cache, prefix=".metadata-"))
    try:
        brief = dataclasses.replace(settings, fsync=False)
        with fetch(metadata_id(model_id), out=incoming, settings=brief):
            adopted = metadata.adopt(settings.cache, incoming)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    directory = metadata.lay_out(settings.cache, model_id, adopted)
    cache_gc.hold(directory, through_exec=True)
    cache_gc.prune(settings.cache, settings.cache_limit_bytes)
    return directory


def _model(command: Sequence[str], model_id: str | None) -> tuple[int, str]:
    """Where in the command the model is named, and how."""
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


def _here(word: str) -> Path | None:
    """The directory that the engine would read, if there is one."""
    return Path(word) if Path(word).is_dir() else hf_cache.snapshot(word)


def _name(word: str, here: Path | None) -> str:
    if here is None and not word.startswith((".", "/")):
        return word
    path = here or Path(word)
    return hf_cache.model_id_of(path) or path.resolve().name


def _configured(here: Path | None) -> bool:
    return here is not None and (here / "config.json").is_file()


def _takes_vllm_flags(command: Sequence[str]) -> bool:
    return any(Path(word).name == "vllm" or word.startswith("vllm.entrypoints.") for word in command)


def _with_format(command: Sequence[str]) -> tuple[str, ...]:
    if _takes_vllm_flags(command) and not _has(command, LOAD_FORMAT):
        return (*command, LOAD_FORMAT, "swarm")
    return tuple(command)


def _has(command: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in command)


def _environment(settings: Settings, model_id: str) -> dict[str, str]:
    """What tells the engine's workers the settings that this process was given."""
    changed = {"SWARM_MODEL_ID": model_id}
    plain = Settings()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(plain, field.name) and value is not None:
            changed[f"SWARM_{field.name.upper()}"] = _text(field.name, value)
    return changed


def _text(name: str, value: object) -> str:
    if name == "upload_limit":
        return f"{value:.0f}B/s"
    return ",".join(value) if isinstance(value, tuple) else str(value)
