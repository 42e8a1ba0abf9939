"""The `swarm` command: argument parsing in `main`, one module for each command that needs more."""
