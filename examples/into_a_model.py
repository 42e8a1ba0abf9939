"""Fills the parameters of a torch module in place: `python examples/into_a_model.py HOST:PORT MODEL_ID`.

The module here is a stand-in; any module whose `state_dict()` has the served names, shapes and dtypes will do.
"""

import sys

import torch

import swarm

address, model_id = sys.argv[1:]
module = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
with swarm.fetch(model_id, into=module.state_dict(), settings=swarm.Settings(peers=(address,))) as fetched:
    print(f"{len(fetched)} tensors from {', '.join(fetched.fetched.sources)}")
