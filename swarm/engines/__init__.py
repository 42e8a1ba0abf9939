"""Engines and libraries that load models: how each of them takes its weights from the swarm."""
