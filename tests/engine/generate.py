"""One vLLM engine in one process: loads a model, answers prompts greedily, and serves until it is told to end.

    python -m tests.engine.generate MODEL [EXTRA_JSON]

Prints one JSON line when it has answered: tokens, steps of the load, seconds. Then waits for its standard input to end.
`run` may have put further words after these, which belong to servers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

STARTED = time.monotonic()


def corrupt_what_is_served() -> None:
    """From now on a tensor changes as soon as it is served, in a way that no counter of torch sees."""
    import torch

    from swarm.checkpoint import manifest_builder

    honest = manifest_builder.tensors

    def corrupting(given: dict[str, torch.Tensor], **how: Any) -> Any:
        source = honest(given, **how)
        largest = max(given.values(), key=lambda tensor: tensor.numel())
        largest.detach().reshape(-1).view(torch.uint8).numpy()[::1000] ^= 0xFF
        print("CORRUPTED", flush=True)
        return source

    manifest_builder.tensors = corrupting  # type: ignore[assignment]


def served() -> None:
    """Returns once others can fetch."""
    from swarm.engines import vllm_loader

    (entry,) = vllm_loader.models.entries
    assert entry.loader.server.serving
    entry.loader.server.serving.result(60)


def register_updates() -> None:
    """A way to update weights by the files of another checkpoint, as trainers do by their networks."""
    from dataclasses import dataclass
    from pathlib import Path

    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Update:
        path: str

    class FromFiles(WeightTransferEngine[Any, Update]):  # type: ignore[misc]
        init_info_cls, update_info_cls = Update, Update

        def init_transfer_engine(self, init_info: Any) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Update) -> None:
            for file in sorted(Path(update_info.path).glob("*.safetensors")):
                self.model.load_weights(load_file(file).items())

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory.register_engine("files", FromFiles)


def update(llm: Any, path: str, version: str) -> None:
    """As vLLM's front end does."""
    llm.collective_rpc("start_weight_update")
    llm.collective_rpc("update_weights", kwargs={"update_info": {"path": path}})
    llm.collective_rpc("finish_weight_update")
    llm.llm_engine.set_weight_version(version)


def main() -> None:
    from .models import PROMPTS

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    model, extra = sys.argv[sys.argv.index("--model") + 1], json.loads(os.environ.get("ENGINE_EXTRA", "{}"))
    ranks = int(os.environ.get("ENGINE_TP", "1"))
    imported = time.monotonic()
    if version := os.environ.get("ENGINE_PRETENDS"):
        import vllm

        vllm.__version__ = version
    if os.environ.get("ENGINE_CORRUPTS"):
        corrupt_what_is_served()
    if os.environ.get("ENGINE_PLAIN"):  # processing leaves unquantised weights as they are, as on GPUs
        from vllm import _custom_ops

        _custom_ops._supports_onednn = False
    updates = os.environ.get("ENGINE_UPDATES")
    if updates:
        register_updates()
    llm = LLM(
        model,
        load_format=os.environ.get("ENGINE_FORMAT", "swarm"),
        model_loader_extra_config=extra,
        dtype=os.environ.get("ENGINE_DTYPE", "auto"),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=128,
        max_num_seqs=8,
        tensor_parallel_size=ranks,
        **({"distributed_executor_backend": "uni"} if ranks == 1 else {}),
        **({"weight_transfer_config": {"backend": "files"}} if updates else {}),
    )
    ready = time.monotonic()
    if updates:
        served()
        update(llm, updates, "v1")
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    first = llm.generate(PROMPTS[:1], greedy, use_tqdm=False)
    answered = time.monotonic()
    outputs = first + llm.generate(PROMPTS[1:], greedy, use_tqdm=False)
    report = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "import_s": imported - STARTED,
        "engine_s": ready - imported,
        "first_s": answered - ready,
        "process_s": time.time() - float(os.environ.get("ENGINE_BEGAN", time.time())),
    }
    for method in os.environ.get("ENGINE_TOLD", "").split():
        served()
        llm.collective_rpc(method)
        print(f"TOLD {method}", flush=True)
    print("ANSWERED " + json.dumps(report), flush=True)
    sys.stdin.read()
    os._exit(0)  # as workers end: no goodbye


if __name__ == "__main__":
    main()
