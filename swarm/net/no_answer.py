"""What it means that no node answers at an address: pure functions from a failed dial to a fault and its line.

Each fault has a remedy of its own, so an error never says 'no answer' alone. A firewall that drops packets and a
machine that is off look alike from here; so do a port without a program and a node that listens on its own loopback
only, unless the address is one of this machine.

Must not know: sockets, links.
"""

from __future__ import annotations

import errno
from enum import Enum

from swarm.net.addresses import Machine, host_of
from swarm.settings import is_loopback, split_address


class Fault(Enum):
    """Why a dial failed. The value is a template of the line: `{port}` is that of the address."""

    REFUSED = (
        "no program listens there (connection refused); is `swarm serve` running, and with --listen 0.0.0.0:{port}? "
        "Without --listen a node is reachable from its own machine only"
    )
    REFUSED_LOOPBACK = (
        "no program listens there on this machine, which is what a loopback address means; for a node of another "
        "machine, start it with --listen 0.0.0.0:{port} and name its address"
    )
    LOOPBACK_ONLY = "the node listens on 127.0.0.1 only; start it with --listen 0.0.0.0:{port}"
    UNREACHABLE = "no route to this address ({detail}); are both machines on one network?"
    SILENT = "no answer{detail}; is the machine on, and does a firewall let TCP port {port} through?"
    BUSY = "no answer{detail}, though the port is open; the program is stopped or busy, or is no swarm node"
    NOT_SWARM = "answers, and is no swarm node ({detail}); is it the right port?"
    LOST = "the connection broke ({detail})"


_BY_NUMBER = {
    errno.ECONNREFUSED: Fault.REFUSED,
    errno.ENETUNREACH: Fault.UNREACHABLE,
    errno.EHOSTUNREACH: Fault.UNREACHABLE,
    errno.EADDRNOTAVAIL: Fault.UNREACHABLE,
    errno.EAFNOSUPPORT: Fault.UNREACHABLE,
    errno.ENETDOWN: Fault.UNREACHABLE,
    errno.EHOSTDOWN: Fault.UNREACHABLE,
    errno.EINVAL: Fault.UNREACHABLE,  # a link-local address without a zone
    errno.EACCES: Fault.UNREACHABLE,  # a firewall of this machine
    errno.EPERM: Fault.UNREACHABLE,
    errno.ETIMEDOUT: Fault.SILENT,
}


def fault_of(number: int | None, address: str, *, loopback_answers: bool = False) -> Fault:
    """The fault of a connection that failed with this errno.

    `loopback_answers`: the address is of this machine, and a program listens on the same port of its loopback.
    """
    fault = _BY_NUMBER.get(number or 0, Fault.LOST)
    if fault is not Fault.REFUSED:
        return fault
    if loopback_answers:
        return Fault.LOOPBACK_ONLY
    return Fault.REFUSED_LOOPBACK if is_loopback(host_of(address) or "") else fault


def line(fault: Fault, address: str, *, detail: str = "") -> str:
    """What happened and what to do, without the address."""
    _, port = split_address("peer", address)
    return fault.value.format(port=port, detail=detail)


def loopback_twin(address: str, machine: Machine) -> tuple[str, int] | None:
    """Where a node of this machine would listen that can be reached over loopback only; None for other machines."""
    host = host_of(address)
    if host is None or is_loopback(host) or all(each.host != host for each in machine.cards):
        return None
    return ("::1" if ":" in host else "127.0.0.1"), split_address("peer", address)[1]
