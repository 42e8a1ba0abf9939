"""`python -m swarm` is the `swarm` command.

Imports take most of the time of a short command. Ctrl-C meanwhile ends it as it ends a program in C, without a
traceback: so this module imports nothing before `main` has set that.
"""

import signal


def main() -> int:
    """Runs the command of this process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it was started to ignore SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from swarm.cli.main import main as command

    return command()


if __name__ == "__main__":
    raise SystemExit(main())
