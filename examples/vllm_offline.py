"""Offline inference with weights from peers: `swarm run -- python examples/vllm_offline.py --model org/model`.

A machine that has the model, or reaches the hub, needs no `swarm run`, and serves the model to peers.
"""

import argparse

from vllm import LLM, SamplingParams

parser = argparse.ArgumentParser(description="Answers one prompt.")
parser.add_argument("--model", required=True)

engine = LLM(parser.parse_args().model, load_format="swarm")
for output in engine.generate(["Peers feed each other because"], SamplingParams(temperature=0, max_tokens=32)):
    print(output.prompt, output.outputs[0].text)
