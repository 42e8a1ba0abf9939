"""Which addresses a node tells, which told addresses it believes, and in which order it dials them.

A peer is reached at the address that its link came from (with the port of its listener) or was dialled at: packets
prove it. Beside it a node tells every address of the families that it listens on, or with `--advertise` that one.

    listening on       tells
    0.0.0.0 or [::]    the addresses of all cards, of both families: those of the default routes first
    a card (eth0)      the addresses of the card
    10.0.0.5           10.0.0.5
    127.0.0.1          itself; nodes of other machines ignore it

Told addresses are claims. A node dials a told address only if it is a literal of one host, without a zone, and not of
this machine's loopback unless the claim came over loopback: a peer cannot turn a node against the services of its own
machine, nor make it look up names.

Must not know: sockets, clocks, links. The interfaces of the machine are arguments.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from swarm.errors import SettingsError
from swarm.protocol.messages import ADDRESSES_OWN_MAX, Address
from swarm.settings import is_literal, is_loopback, join_address, split_address

WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
# Cards of containers and virtual machines: their addresses mean another machine elsewhere, so they are told last.
_INNER_CARDS = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman", "lxc", "lxd")

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class CardAddress:
    """An address of a network card (interface) of this machine. `host` of a link-local IPv6 address has its zone."""

    card: str
    host: str
    prefix: int = 32


@dataclass(frozen=True)
class Machine:
    """The addresses of this machine, and the source addresses of its default routes, IPv4's and IPv6's."""

    cards: tuple[CardAddress, ...] = ()
    routed: tuple[str, ...] = ()


def hosts_to_listen_on(host: str, machine: Machine) -> tuple[str, ...]:
    """The literal hosts of a `listen` setting: both wildcards for one, the addresses of a card for its name.

    Empty for another name, which has to be looked up.
    """
    if host in WILDCARDS:
        return (host, *(other for other in WILDCARDS if other != host))
    if is_literal(host):
        return (host,)
    return tuple(each.host for each in machine.cards if each.card == host)


def told(listening: Sequence[str], port: int, machine: Machine) -> tuple[Address, ...]:
    """The addresses that a node tells about itself, the best first, at most ADDRESSES_OWN_MAX.

    `listening`: the literal hosts of its sockets. Addresses with a zone (link-local IPv6) mean nothing elsewhere and
    are left out: such a node is reached where its packets come from.
    """
    hosts: list[str] = []
    for host in listening:
        if host not in WILDCARDS:
            hosts.append(host)
            continue
        version = _ip(host).version
        own = [each for each in machine.cards if _ip(each.host).version == version and not is_loopback(each.host)]
        hosts += [each.host for each in sorted(own, key=lambda each: _rank(each, machine.routed))]
    useful = [host for host in hosts if not _is_zoned(host)]
    ordered = _by_family([Address(join_address(host, port)) for host in dict.fromkeys(useful)])
    return tuple(ordered[:ADDRESSES_OWN_MAX])


def multicast_hosts(machine: Machine) -> tuple[str, ...]:
    """The addresses of cards on which other machines are looked for by multicast: one of each card and family."""
    found: dict[tuple[str, int], str] = {}
    for each in machine.cards:
        if not is_loopback(each.host):
            found.setdefault((each.card, _ip(each.host).version), each.host)
    return tuple(found.values())


def announced(listening: Sequence[str], machine: Machine) -> tuple[str, ...]:
    """The hosts at which multicast DNS announces a node: every address that it listens on, link-local ones included."""
    return tuple(each.host for each in machine.cards if not is_loopback(each.host) and listens_at(listening, each.host))


def local(listening: Sequence[str], port: int) -> Address:
    """The address at which programs of this machine reach the node."""
    host = listening[0]
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared
    return Address(join_address(own, port))


def listens_at(listening: Sequence[str], host: str) -> bool:
    """Whether a node with these sockets takes connections to this own address of the machine."""
    address = _ip(host)
    wildcard = "::" if address.version == 6 else "0.0.0.0"  # noqa: S104 - compared
    return any(each == wildcard or _ip(each) == address for each in listening)


def usable(
    claimed: Iterable[str], machine: Machine, *, loopback: bool, beyond: bool, zoned: bool = False
) -> tuple[Address, ...]:
    """The told addresses that may be dialled, in dial order, without duplicates, at most ADDRESSES_OWN_MAX.

    `loopback`: addresses of this machine's loopback may, since the claim came over it. `beyond`: those of other
    machines may; `zoned`: also those with a zone, since this machine has set it. Link-local addresses of IPv4 may where
    a card has one: elsewhere the services of clouds are there.
    """

    def may_be_dialled(text: str) -> bool:
        host = host_of(text)
        if host is None or not _is_single(host) or (_is_zoned(host) and not (zoned and "%" in host)):
            return False
        if _ip(host).is_loopback:
            return loopback
        return beyond and (not _ip(host).is_link_local or "%" in host or _is_on_link(host, machine))

    found = dict.fromkeys(Address(text) for text in claimed if may_be_dialled(text))
    return in_dial_order(list(itertools.islice(found, ADDRESSES_OWN_MAX)), machine)


def behind(remote: str, port: int) -> Address | None:
    """The address at which the node at the other end of a link listens, given the socket address of that end."""
    host = host_of(remote)
    return Address(join_address(host, port)) if host is not None else None


def in_dial_order(addresses: Sequence[Address], machine: Machine) -> tuple[Address, ...]:
    """The addresses in the order in which they are tried: those on a network of this machine first, then as told, with
    the families in turn (RFC 8305)."""
    near = [address for address in addresses if _is_on_link(host_of(address) or "", machine)]
    far = [address for address in addresses if address not in near]
    return (*_by_family(near), *_by_family(far))


@functools.lru_cache(4096)
def host_of(address: str) -> str | None:
    """The host of HOST:PORT if it is a literal."""
    try:
        host, _ = split_address("address", address)
    except SettingsError:
        return None
    return host if is_literal(host) else None


@functools.lru_cache(4096)
def _is_single(host: str) -> bool:
    """Whether a literal is the usual address of a single host."""
    address = _ip(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return False
    reserved = address.is_reserved and not address.is_loopback
    return not (address.is_multicast or address.is_unspecified or reserved)


def _rank(each: CardAddress, routed: Sequence[str]) -> tuple[bool, bool, bool]:
    """False sorts before True: addresses of default routes, then of outer cards, link-local ones last."""
    inner = each.card.startswith(_INNER_CARDS)
    return _ip(each.host).is_link_local, each.host not in routed, inner


def _by_family(addresses: Sequence[Address]) -> list[Address]:
    """The addresses with IPv4 and IPv6 in turn, beginning with the family of the first."""
    six = [address for address in addresses if address.startswith("[")]
    four = [address for address in addresses if not address.startswith("[")]
    pairs = itertools.zip_longest(*((six, four) if addresses[:1] == six[:1] else (four, six)))
    return [address for pair in pairs for address in pair if address is not None]


@functools.lru_cache(4096)
def _is_on_link(host: str, machine: Machine) -> bool:
    if not is_literal(host):
        return False
    address = _ip(host)
    networks = (ipaddress.ip_network(f"{_ip(own.host)}/{own.prefix}", strict=False) for own in machine.cards)
    return any(network.version == address.version and address in network for network in networks)


@functools.lru_cache(4096)
def _ip(host: str) -> IpAddress:
    """The address without its zone."""
    return ipaddress.ip_address(host.partition("%")[0])


def _is_zoned(host: str) -> bool:
    return "%" in host or (":" in host and _ip(host).is_link_local)
