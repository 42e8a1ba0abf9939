"""Models of the `transformers` library, built in the memory that the swarm fetched into: no file, no second copy.

    model = swarm.transformers.load("org/model")            # its config.json arrives with the weights
    model = swarm.transformers.load("org/model", config)    # or with a config of yours

transformers initialises tensors that a checkpoint lacks and drops those that a class does not have, both with a warning
only; the model then generates different tokens. `build` makes them errors. Ties and the conversion of checkpoint names,
such as stacking a MoE's experts, are the library's own.

Owns the choice of a class and that check. Must not know: nodes, stores. Imports transformers when a model is built:
`import swarm` works without it.
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
    """Fetches a model into memory and builds it there, as `from_pretrained` does from its directory.

    The parameters share the fetched memory unless `dtype` or a conversion (stacked experts) needs other memory. The
    node serves them until the process ends or writes to one of them. `build` describes `config`, `model_class` and
    `dtype`, `swarm.fetch` the rest.

    Raises as `swarm.fetch` and `build` do.
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
    """A model that shares the memory of fetched weights.

    `config` defaults to the fetched config.json; it is not changed. `model_class` defaults to the class that the config
    names, else to its causal language model. `dtype` "auto" is the config's, else that of the weights.

    Raises SettingsError without a config or a class, or for a model that cannot be built in memory, and StoreConflict
    if the tensors are not those of that class with that config.
    """
    library = _library()
    if weights.path is not None:
        raise SettingsError("weights", f"they are files at {weights.path}; give that path to from_pretrained")
    config = config or _config(library, weights.files)
    if getattr(config, "quantization_config", None) is not None:
        raise SettingsError(
            "config", f"it is of a quantised model, whose tensors are made as files are read; {INSTEAD}"
        )
    chosen = model_class or _class_of(library, config)
    devices = {tensor.device for tensor in weights.values() if tensor.device.type != "cpu"}
    if devices:
        _demand_accelerate()
    try:
        model, loading = chosen.from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=dtype,
            device_map={"": devices.pop()} if devices else None,
            ignore_mismatched_sizes=True,  # `_demand_all` refuses them
            output_loading_info=True,
        )
    except RuntimeError as error:  # a conversion of tensors that do not fit together
        why = f"its tensors cannot be converted to those of {chosen.__name__} ({str(error).splitlines()[0]})"
        raise StoreConflict(weights.fetched.model_id, f"{why}; is the config that of this model?") from error
    _demand_all(weights.fetched.model_id, chosen, loading)
    model.config.name_or_path = model.name_or_path = weights.fetched.model_id
    if model.can_generate() and (settings := _json(weights.files, GENERATION_CONFIG)):
        model.generation_config = type(model.generation_config).from_dict(settings)
    return model


def _config(library: Any, files: Mapping[str, memoryview]) -> PreTrainedConfig:
    described = _json(files, CONFIG)
    if described is None:
        raise SettingsError("config", f"the fetched model has no {CONFIG}; give the model's config")
    kind = described.get("model_type")
    if kind not in library.CONFIG_MAPPING:
        why = f"transformers {library.__version__} knows no model type {kind!r}; install one that does"
        raise SettingsError("config", f"{why}, or, if the model brings code of its own, {INSTEAD}")
    found: PreTrainedConfig = library.CONFIG_MAPPING[kind].from_dict(described)
    return found


def _class_of(library: Any, config: PreTrainedConfig) -> type[PreTrainedModel]:
    for name in config.architectures or ():
        if isinstance(found := getattr(library, name, None), type):
            return found
    if type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING:
        causal: type[PreTrainedModel] = library.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return causal
    named = ", ".join(config.architectures or ()) or "no architecture"
    raise SettingsError(
        "config", f"it names {named}, which transformers {library.__version__} has not; say model_class=CLASS"
    )


def _demand_all(model_id: str, chosen: type[PreTrainedModel], loading: Mapping[str, Any]) -> None:
    """Raises StoreConflict unless the model's tensors and the fetched tensors have the same names and shapes."""
    differing = sorted(loading["mismatched_keys"])
    complaints = {
        "missing": sorted(loading["missing_keys"]),
        "unexpected": sorted(loading["unexpected_keys"]),
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
        raise SettingsError("config", f"the fetched {name} cannot be read: {error}") from error


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise SettingsError(
            "transformers", f"cannot be imported ({error}): pip install 'swarm-weights[engines]'"
        ) from error
    return transformers


def _demand_accelerate() -> None:
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise SettingsError("device", "transformers needs accelerate for models on a GPU: pip install accelerate")
