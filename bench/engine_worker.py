"""A vLLM engine for `bench/engines.py`: says when it has answered, then generates for as long as it is asked to.

    python bench/engine_worker.py --model DIR

Prints JSON lines. Each number that it reads from its standard input is the seconds to generate for; it answers with
tokens per second. Needs no tokenizer: prompts are token ids.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

CLOCK_STARTED = time.time()
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 16, 32


def say(**what: object) -> None:
    print("BENCH " + json.dumps(what), flush=True)


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    imported = time.time()
    llm = LLM(
        sys.argv[sys.argv.index("--model") + 1],
        load_format=os.environ["BENCH_FORMAT"],
        model_loader_extra_config=json.loads(os.environ.get("BENCH_EXTRA", "{}")),
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=128,
        max_num_seqs=PROMPTS,
        distributed_executor_backend="uni",
    )
    made = time.time()
    prompts: list[Any] = [{"prompt_token_ids": [2 + i + n for i in range(PROMPT_TOKENS)]} for n in range(PROMPTS)]
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    many = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    llm.generate(prompts[:1], one, use_tqdm=False)
    say(
        spawned_to_python_s=CLOCK_STARTED - float(os.environ["BENCH_BEGAN"]),
        import_s=imported - CLOCK_STARTED,
        engine_s=made - imported,
        token_s=time.time() - made,
        total_s=time.time() - float(os.environ["BENCH_BEGAN"]),
    )
    for line in sys.stdin:
        began, count = time.monotonic(), 0
        while time.monotonic() - began < float(line):
            count += sum(len(out.outputs[0].token_ids) for out in llm.generate(prompts, many, use_tqdm=False))
        say(tokens_per_s=count / (time.monotonic() - began))
    os._exit(0)


if __name__ == "__main__":
    main()
