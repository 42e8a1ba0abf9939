"""Fills a torch module in place from a served module: `python examples/into_a_model.py`.

Here both are in one process. In practice the second half runs on another replica, which finds the first by `peers` or
multicast DNS.
"""

import torch

import swarm


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))


trained, fresh = build(), build()
with swarm.serve(trained.state_dict(), model_id="example/mlp", settings=swarm.Settings(mdns=False)) as served:
    settings = swarm.Settings(mdns=False, peers=(served.address,))
    with swarm.fetch("example/mlp", into=fresh.state_dict(), settings=settings) as fetched:
        print(f"{len(fetched)} tensors, {fetched.fetched.bytes} bytes, digest {fetched.digest[:16]}")

inputs = torch.randn(4, 64)
print("same outputs:", torch.equal(trained(inputs), fresh(inputs)))
