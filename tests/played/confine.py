"""Confines itself as systemd does, and becomes a program: `confine.py UNIT -- PROGRAM`. Run as the unit's user.

Played here: SystemCallFilter, RestrictAddressFamilies and MemoryDenyWriteExecute, by libseccomp and prctl. What needs
mounts and another user is done before.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

ALLOW, PR_SET_MDWE, MDWE_REFUSE_EXEC_GAIN = 0x7FFF0000, 65, 1


class _Argument(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def options(unit: Path) -> dict[str, list[str]]:
    """The options of a unit, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith(("#", "[")):
            found.setdefault(name, []).append(value)
    return found


def calls(unit: Path) -> set[str]:
    """The system calls that SystemCallFilter allows."""
    allowed: set[str] = set()
    for line in options(unit)["SystemCallFilter"]:
        named = set[str]().union(*(_members(word) for word in line.removeprefix("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


def _members(name: str) -> set[str]:
    if not name.startswith("@"):
        return {name}
    shown = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    words = [line.strip() for line in shown.stdout.splitlines()[1:]]
    return set[str]().union(*(_members(word) for word in words if word and not word.startswith("#")))


def main() -> None:
    unit, allowed, program = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[4:]
    libc, seccomp = ctypes.CDLL(None, use_errno=True), ctypes.CDLL("libseccomp.so.2")
    said = options(unit)
    if said["MemoryDenyWriteExecute"] == ["yes"] and libc.prctl(PR_SET_MDWE, MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
        print("confine: this kernel cannot deny writable and executable memory", file=sys.stderr)
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(0x00050000 | errno.EPERM))
    families = [int(getattr(socket, name)) for name in said["RestrictAddressFamilies"][0].split()]
    for name in allowed:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue  # of another architecture
        if name != "socket":
            assert not seccomp.seccomp_rule_add(context, ALLOW, number, 0)
        for family in families if name == "socket" else []:
            first = _Argument(0, 4, family, 0)  # equal
            assert not seccomp.seccomp_rule_add_array(context, ALLOW, number, 1, ctypes.byref(first))
    assert not seccomp.seccomp_load(context), "the filter was not loaded"
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
