"""The addresses of this machine's network cards, and the source addresses of its default routes.

Read anew at each call: cards come and go. Must not know: which of the addresses are of use.
"""

from __future__ import annotations

import contextlib
import socket

import ifaddr

from swarm.net.addresses import CardAddress, Machine

# Addresses that are on no network (RFC 5737, RFC 3849): the way there is the default route.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def read() -> Machine:
    """This machine as it is now. Without permission to ask the kernel it has no addresses."""
    found = []
    with contextlib.suppress(OSError):
        for adapter in ifaddr.get_adapters():
            for each in adapter.ips:
                if isinstance(each.ip, str):
                    found.append(CardAddress(adapter.nice_name, each.ip, each.network_prefix))
                else:
                    host, _, zone = each.ip
                    zoned = f"{host}%{adapter.nice_name}" if zone else host
                    found.append(CardAddress(adapter.nice_name, zoned, each.network_prefix))
    routed = (_source(family, host) for family, host in _ELSEWHERE)
    return Machine(tuple(found), tuple(host for host in routed if host))


def _source(family: socket.AddressFamily, host: str) -> str | None:
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: asks the routing table for the source address
        return str(probe.getsockname()[0])
    return None
