"""Tiny random models of several kinds, as directories that vLLM loads, made in seconds.

Their weights are scaled up: else greedy output hardly depends on them, and every comparison would hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCABULARY = 512
SCALE = 5.0
SHARD = 0.4  # of a model's bytes: three files
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WORDS = ["peer", "serves", "every", "chunk", "on", "as", "soon", "it", "is", "verified", "newcomers", "feed", "others"]
PROMPTS = [" ".join(WORDS[(start * step) % len(WORDS)] for start in range(1, 8)) for step in range(1, 51)]


def dense(dtype: str, *, tied: bool) -> PreTrainedConfig:
    return Qwen2Config(**SHAPE, tie_word_embeddings=tied, dtype=dtype)


def bigger() -> PreTrainedConfig:
    """About 12 MB in fp32: several dozen chunks."""
    return Qwen2Config(
        **SHAPE | {"hidden_size": 256, "intermediate_size": 1024}, tie_word_embeddings=False, dtype="float32"
    )


def mixtral() -> PreTrainedConfig:
    return MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, dtype="bfloat16")


def deepseek() -> PreTrainedConfig:
    shape = SHAPE | {"num_key_value_heads": 4}
    return DeepseekV3Config(
        **shape,
        q_lora_rank=64,
        kv_lora_rank=512,  # this and the next: the only sizes that vLLM has a CPU kernel for
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        dtype="bfloat16",
    )


def write(directory: Path, config: PreTrainedConfig, *, seed: int = 1, sharded: bool = True) -> Path:
    """A model directory with weights, config and tokenizer: in several files with an index, unless told otherwise."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(SCALE)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=int(size * SHARD) if sharded else size * 2)
    assert (directory / "model.safetensors.index.json").exists() == sharded
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(PROMPTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


def write_w8a8(directory: Path, *, seed: int = 1) -> Path:
    """A dense model in compressed-tensors W8A8-int8, in one file: weights per channel, activations per token."""
    write(directory, dense("bfloat16", tied=False), seed=seed, sharded=False)
    file = directory / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        if name.endswith("proj.weight"):
            scale = (tensor.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-8)
            tensors[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": weights | {"strategy": "token", "dynamic": True},
            }
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_mistied(directory: Path, *, seed: int = 1) -> Path:
    """A model whose config says that embeddings are tied, and whose files have a head of their own."""
    write(directory, dense("float32", tied=False), seed=seed)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return directory


KINDS: dict[str, Callable[[Path], Path]] = {
    "dense-bf16": lambda path: write(path, dense("bfloat16", tied=False)),
    "dense-fp32": lambda path: write(path, dense("float32", tied=False)),
    "tied-bf16": lambda path: write(path, dense("bfloat16", tied=True)),
    "tied-fp32": lambda path: write(path, dense("float32", tied=True)),
    "mistied-fp32": write_mistied,
    "w8a8-int8": write_w8a8,
    "moe-bf16": lambda path: write(path, mixtral()),
    "mla-bf16": lambda path: write(path, deepseek()),
}
