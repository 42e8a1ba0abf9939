"""A checkpoint of Qwen2.5-7B's shapes in bf16 with random weights, and a tokenizer for all of its ids.

    python bench/engines_gpu_model.py DIRECTORY [--layers 28] [--hidden 3584] [--experts 0] [--device cuda]

Linear layers keep the scale of what goes through them, so that every one of them decides which token comes next.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHARDS = 8


def tokenizer(path: Path, vocabulary: int) -> None:
    """All bytes, all pairs of bytes, and as many triples as there is room for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words, merges = list(letters), []
    for length in (1, 2):
        for left in [word for word in words if len(word) == length]:
            for right in letters:
                if len(words) < vocabulary - 2:
                    words.append(left + right)
                    merges.append((left, right))
    words += ["<s>", "</s>"]
    made = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(path / "tokenizer.json"))
    told = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 32768,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=3584)
    parser.add_argument("--vocabulary", type=int, default=152064)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    began = time.monotonic()
    path, hidden, vocabulary = options.directory, options.hidden, options.vocabulary
    path.mkdir(parents=True)
    head, inner = 128, 18944 * hidden // 3584 // 64 * 64
    heads, kv = hidden // head, max(1, hidden // head // 7)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "torch_dtype": "bfloat16",
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(options.layers):
        at = f"model.layers.{n}."
        for name, rows in (("q", heads * head), ("k", kv * head), ("v", kv * head)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, heads * head)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = (hidden,)
        if options.experts:
            shapes[f"{at}block_sparse_moe.gate.weight"] = (options.experts, hidden)
            for e in range(options.experts):
                shapes[f"{at}block_sparse_moe.experts.{e}.w1.weight"] = (inner, hidden)
                shapes[f"{at}block_sparse_moe.experts.{e}.w3.weight"] = (inner, hidden)
                shapes[f"{at}block_sparse_moe.experts.{e}.w2.weight"] = (hidden, inner)
        else:
            shapes[f"{at}mlp.gate_proj.weight"] = (inner, hidden)
            shapes[f"{at}mlp.up_proj.weight"] = (inner, hidden)
            shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    if options.experts:
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(".bias")}
        config |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": options.experts,
            "num_experts_per_tok": 2,
        }
    (path / "config.json").write_text(json.dumps(config, indent=1))
    eos = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    (path / "generation_config.json").write_text(json.dumps(eos))
    tokenizer(path, vocabulary)

    total = sum(torch.Size(shape).numel() * 2 for shape in shapes.values())
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled > total / SHARDS:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += torch.Size(shape).numel() * 2
    files = {name: f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n, one in enumerate(shards) for name in one}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))

    def write(number: int) -> None:
        dice = torch.Generator(device=options.device)
        dice.manual_seed(1000 + number)
        made = {}
        for name in shards[number]:
            shape = shapes[name]
            if len(shape) == 1:
                one = torch.full(shape, 0.0 if name.endswith(".bias") else 1.0, device=options.device)
            else:
                one = torch.randn(shape, generator=dice, device=options.device)
                one *= 1.0 if "embed" in name else shape[1] ** -0.5
            made[name] = one.to(torch.bfloat16).cpu()
        save_file(made, path / files[shards[number][0]], metadata={"format": "pt"})

    with ThreadPoolExecutor(SHARDS) as pool:
        list(pool.map(write, range(len(shards))))
    print(f"made {total / 1e9:.2f} GB in {len(shards)} files, {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
