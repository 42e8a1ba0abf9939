"""The tensors of `swarm.testing.stores.sample` for torch."""

from __future__ import annotations

import torch

from swarm.testing.stores import SAMPLE_TENSORS

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
KINDS_OF_SAMPLE = {name: (DTYPES[dtype], shape) for name, (dtype, _, shape) in SAMPLE_TENSORS.items()}
