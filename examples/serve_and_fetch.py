"""Serves a state dict and fetches it in the same process: `python examples/serve_and_fetch.py`."""

import torch

import swarm

weights = {"layer.weight": torch.randn(1024, 1024, dtype=torch.bfloat16), "layer.bias": torch.zeros(1024)}

with (
    swarm.serve(weights, model_id="example/tiny", settings=swarm.Settings(mdns=False)) as served,
    swarm.fetch("example/tiny", settings=swarm.Settings(mdns=False, peers=(served.address,))) as fetched,
):
    for name, tensor in fetched.items():
        assert torch.equal(tensor, weights[name])
        print(f"{name}: {tuple(tensor.shape)} {tensor.dtype}")
    print(f"{fetched.fetched.bytes} bytes, verified, digest {fetched.digest[:16]}")
