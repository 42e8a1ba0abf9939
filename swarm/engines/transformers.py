"""Models of the `transformers` library, built in memory from what the swarm brings: no file, no second copy.

    model = swarm.transformers.load("org/model")            # its config.json arrives with the weights
    model = swarm.transformers.load("org/model", config)    # or one's own

Owns how a class is chosen, and that nothing but the whole checkpoint counts as loaded: transformers makes up what a
checkpoint lacks and drops what a class has no place for, each with no more than a warning, and then answers
differently. Ties and the conversion of checkpoint names (experts of a MoE into stacked ones) are the library's own.

Must not know: nodes, stores. Imports transformers when a model is built: `import swarm` works without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from swarm.api import Weights, fetch
from swarm.errors import SettingsError, StoreConflict
from swarm.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
NAMES_SHOWN = 3
INSTEAD = "fetch into a directory and load that: from_pretrained(swarm.fetch(model_id, out=DIR).path)"


def load(
    model_id: str,
    config: PreTrainedConfig | None = None,
    *,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | str = "auto",
    device: str = "cpu",
    digest: str | None = None,
    timeout_s: float | None = None,
    settings: Settings | None = None,
) -> PreTrainedModel:
    """Fetches a model into memory and builds it there, as `from_pretrained` would out of its directory.

    The model's parameters are the memory that was fetched into, where neither `dtype` nor a conversion (stacked
    experts) asks for other memory; the node goes on to serve them until the end of the process, or until one of them
    is written to. `build` says what `config`, `model_class` and `dtype` mean; the rest is as in `swarm.fetch`.

    Raises what `swarm.fetch` and `build` raise.
    """
    weights = fetch(model_id, device=device, digest=digest, timeout_s=timeout_s, settings=settings)
    try:
        return build(weights, config, model_class=model_class, dtype=dtype)
    except BaseException:
        weights.close()
        raise


def build(
    weights: Weights,
    config: PreTrainedConfig | None = None,
    *,
    model_class: type[PreTrainedModel] | None = None,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """The model of fetched weights, which share their memory with it.

    `config` defaults to the config.json that was fetched; it is not changed. `model_class` defaults to the class that
    the config names, or else its causal language model. `dtype` "auto" is the config's, or else the weights' own.

    Raises SettingsError when there is no config or no class, or what they ask for cannot be built in memory, and
    StoreConflict when the tensors are not those of that class with that config.
    """
    _demand_transformers()
    if weights.path is not None:
        raise SettingsError("weights", f"they are files at {weights.path}; give that path to from_pretrained")
    config = config or _config(weights.files)
    if getattr(config, "quantization_config", None) is not None:
        raise SettingsError(
            "config", f"it is of a quantised model, whose tensors are made as files are read; {INSTEAD}"
        )
    chosen = model_class or _class_of(config)
    devices = {tensor.device for tensor in weights.values()} - {_cpu()}
    if devices:
        _demand_accelerate()
    try:
        model, told = chosen.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            device_map={"": devices.pop()} if devices else None,
            ignore_mismatched_sizes=True,  # they are told, and refused with all the rest
            output_loading_info=True,
        )
    except RuntimeError as error:  # what a conversion makes of tensors that do not fit together
        why = f"its tensors cannot be converted to those of {chosen.__name__} ({str(error).splitlines()[0]})"
        raise StoreConflict(weights.fetched.model_id, f"{why}; is the config that of this model?") from error
    _demand_all(weights.fetched.model_id, chosen, told)
    model.config.name_or_path = model.name_or_path = weights.fetched.model_id
    if model.can_generate() and (settings := _json(weights.files, GENERATION_CONFIG)):
        model.generation_config = type(model.generation_config).from_dict(settings)
    return model


def _config(files: Mapping[str, memoryview]) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    described = _json(files, CONFIG)
    if described is None:
        raise SettingsError("config", f"what was fetched has no {CONFIG}; give the model's config")
    kind = described.get("model_type")
    if kind not in CONFIG_MAPPING:
        why = f"transformers {_version()} knows no model type {kind!r}; install one that does"
        raise SettingsError("config", f"{why}, or, if the model brings code of its own, {INSTEAD}")
    return CONFIG_MAPPING[kind].from_dict(described)


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    import transformers

    for name in config.architectures or ():
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        causal: type[PreTrainedModel] = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return causal
    named = ", ".join(config.architectures or ()) or "no architecture"
    raise SettingsError("config", f"it names {named}, which transformers {_version()} has not; say model_class=CLASS")


def _demand_all(model_id: str, chosen: type[PreTrainedModel], told: Mapping[str, Any]) -> None:
    """Raises StoreConflict unless every tensor found its place and every place its tensor."""
    differing = sorted(told["mismatched_keys"])
    complaints = {
        "missing": sorted(told["missing_keys"]),
        "unexpected": sorted(told["unexpected_keys"]),
        "different": [f"{name} is {list(has)} and not {list(wants)}" for name, has, wants in differing],
    }
    wrong = [f"{len(items)} {kind}: {', '.join(items[:NAMES_SHOWN])}" for kind, items in complaints.items() if items]
    if wrong:
        raise StoreConflict(
            model_id, f"its tensors are not those of {chosen.__name__} with this config ({'; '.join(wrong)})"
        )


def _json(files: Mapping[str, memoryview], name: str) -> dict[str, Any] | None:
    if name not in files:
        return None
    try:
        return dict(json.loads(bytes(files[name])))
    except (ValueError, TypeError) as error:
        raise SettingsError("config", f"the {name} that was fetched cannot be read: {error}") from error


def _demand_transformers() -> None:
    try:
        import transformers  # noqa: F401 - whether it is there
    except ImportError as error:
        raise SettingsError(
            "transformers", f"cannot be imported ({error}): pip install 'swarm-weights[engines]'"
        ) from error


def _demand_accelerate() -> None:
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise SettingsError("device", "transformers needs accelerate for models on a GPU: pip install accelerate")


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")
