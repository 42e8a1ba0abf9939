"""A process that serves tensors of its own on the GPU: `python -m gpu.sources KIND SETTING=VALUE ...`, in tests/.

Prints its address once others can fetch, and serves until its input ends; for each line of it the allocator gives back
what it kept of the host's memory, and `trimmed` is printed. KIND `corrupt`: it then changes its tensors
behind torch's back. KIND `model`: a language model, which goes on generating; it says so after the first round.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

import torch

import swarm
from swarm.settings import Settings

MODEL = "org/model"


def state(megabytes: int = 256) -> dict[str, torch.Tensor]:
    """The same in every process."""
    dice = torch.Generator(device="cuda").manual_seed(5)
    rows = torch.randn(megabytes // 4, 2 << 20, device="cuda", generator=dice).to(torch.bfloat16)
    tensors = {f"layer{n}": row.clone() for n, row in enumerate(rows)} | {
        f"norm{n}": rows[n, :999].clone() for n in range(8)
    }
    return tensors | {"tied": tensors["layer0"]}


def language_model(seed: int, device: str = "cuda:0") -> Any:
    """A model of real architecture with random weights, the same for one seed."""
    torch.manual_seed(seed)
    return _built().to(device=device)


def empty_model(device: str) -> Any:
    """A model of the same class, built without memory, then given some: what is no weight is made anew."""
    with torch.device("meta"):
        model = _built()
    model.to_empty(device=device)
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:  # the rotary embedding's frequencies, which no state dict has
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, type(module)(model.config).to(device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _built() -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def generated(model: Any) -> list[int]:
    """Some tokens, the likeliest each time."""
    prompt = torch.arange(16, device=model.device)[None]
    greedy = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    return [int(token) for token in tokens[0]]


def main() -> None:
    kind, *given = sys.argv[1:]
    settings = Settings.load({"mdns": False, **dict(pair.split("=", 1) for pair in given)})
    model = language_model(1) if kind == "model" else None
    tensors = model.state_dict() if model else state()
    first = generated(model) if model else []
    over = threading.Event()
    with swarm.serve(tensors, model_id=MODEL, settings=settings) as served:
        if kind == "corrupt":
            for tensor in tensors.values():
                tensor.data.view(torch.uint8)[:16] ^= 1
            torch.cuda.synchronize()
        print(served.address, flush=True)
        if model:
            threading.Thread(target=_until_it_ends, args=(over,)).start()
            rounds = 0
            while not over.is_set():
                assert generated(model) == first
                rounds += 1
                if rounds == 1:
                    print("generating", flush=True)
            print(rounds, *first, flush=True)
        else:
            _until_it_ends(over)


def _until_it_ends(over: threading.Event) -> None:
    for _ in sys.stdin:
        trim()
        print("trimmed", flush=True)
    over.set()


def trim() -> None:
    """What the allocator keeps of the host's memory goes back: NCCL leaves it 1.7 MiB for each communicator."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main()
