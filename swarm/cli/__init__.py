"""The `swarm` command: flags in `main`, commands in `commands`, and a module for each larger command."""
