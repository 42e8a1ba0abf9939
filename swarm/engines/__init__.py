"""Inference engines and libraries: how each loads its weights from the swarm."""
