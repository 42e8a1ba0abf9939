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

    from swarm import build

    honest = build.tensors

    def corrupting(given: dict[str, torch.Tensor], **how: Any) -> Any:
        source = honest(given, **how)
        largest = max(given.values(), key=lambda tensor: tensor.numel())
        largest.detach().reshape(-1).view(torch.uint8).numpy()[::1000] ^= 0xFF
        print("CORRUPTED", flush=True)
        return source

    build.tensors = corrupting  # type: ignore[assignment]


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
    )
    ready = time.monotonic()
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
        from swarm.engines import vllm_loader

        (join,) = vllm_loader.joins()
        assert join.serving
        join.serving.result(60)
        llm.collective_rpc(method)
        print(f"TOLD {method}", flush=True)
    print("ANSWERED " + json.dumps(report), flush=True)
    sys.stdin.read()
    os._exit(0)  # as workers end: no goodbye


if __name__ == "__main__":
    main()
