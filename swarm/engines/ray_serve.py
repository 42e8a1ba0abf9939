"""A callback of Ray Serve LLM: its nodes get the model from each other before an engine starts.

    LLMConfig(
        model_loading_config={"model_id": "name", "model_source": "org/model"},
        callback_config={
            "callback_class": "swarm.engines.ray_serve.SwarmCallback",
            "callback_kwargs": {"key_file": "/etc/swarm/swarm.key"},
        },
    )

Ray calls it in the replica before its nodes are prepared, and then once on each node of the replica's placement group,
at the same time. The keyword arguments are settings. The engine then finds the model in the Hugging Face cache. With
`engine_kwargs={"load_format": "swarm"}` it also takes loaded tensors from engines that run.

Imported by Ray Serve alone. Must not know: how a node fetches (`ray`).
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase

from swarm.engines.ray import engine_env, fetch
from swarm.settings import Settings

PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"  # by which vLLM copies variables to its own Ray workers

log = logging.getLogger("swarm")


class SwarmCallback(CallbackBase):
    """See the module."""

    async def on_before_node_init(self) -> None:
        """In the replica: the tasks that prepare nodes and the engine's processes get the settings."""
        variables = engine_env(Settings.load(self.kwargs))
        variables[PREFIXES] = ",".join(filter(None, (os.environ.get(PREFIXES), "SWARM_")))
        given: dict[str, Any] = self.ctx.runtime_env or {}
        self.ctx.runtime_env = {**given, "env_vars": {**given.get("env_vars", {}), **variables}}
        os.environ.update(variables)

    def on_before_download_model_files_distributed(self) -> None:
        """On each node: fetches the model. What Ray itself copies from a bucket is left to it."""
        engine = self.llm_config.get_engine_config()
        model_id = engine.actual_hf_model_id
        if engine.mirror_config is not None or "://" in model_id or os.path.exists(model_id):
            log.info("%s is no model of the hub: Ray gets it without the swarm", model_id)
            return
        path = fetch(
            model_id, revision=self.llm_config.engine_kwargs.get("revision"), settings=Settings.load(self.kwargs)
        )
        log.info("%s is at %s", model_id, path)
