"""Which addresses are told, believed and dialled, as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.net import addresses
from swarm.net.addresses import CardAddress, Machine
from swarm.protocol.messages import ADDRESSES_OWN_MAX, Address

LO = (CardAddress("lo", "127.0.0.1", 8), CardAddress("lo", "::1", 128))
ETH0 = (
    CardAddress("eth0", "10.0.0.5", 24),
    CardAddress("eth0", "fd00::5", 64),
    CardAddress("eth0", "fe80::5%eth0", 64),
)
IB0 = (CardAddress("ib0", "10.9.0.5", 16),)
DOCKER = (CardAddress("docker0", "172.17.0.1", 16),)
SIX = (CardAddress("eth0", "fd00::5", 64), CardAddress("eth0", "fe80::5%eth0", 64))
EVERYWHERE = ("0.0.0.0", "::")
NONE = Machine(LO)
ONE = Machine((*LO, *ETH0), ("10.0.0.5", "fd00::5"))
TWO = Machine((*DOCKER, *LO, *IB0, *ETH0), ("10.0.0.5",))


@pytest.mark.parametrize(
    ("host", "machine", "hosts"),
    [
        ("0.0.0.0", ONE, ("0.0.0.0", "::")),
        ("::", ONE, ("::", "0.0.0.0")),
        ("127.0.0.1", ONE, ("127.0.0.1",)),
        ("10.0.0.5", ONE, ("10.0.0.5",)),
        ("eth0", ONE, ("10.0.0.5", "fd00::5", "fe80::5%eth0")),
        ("ib0", TWO, ("10.9.0.5",)),
        ("lo", ONE, ("127.0.0.1", "::1")),
        ("ib0", ONE, ()),  # no card here: a name to look up
        ("seed.example", ONE, ()),
    ],
)
def test_where_does_a_node_listen(host: str, machine: Machine, hosts: tuple[str, ...]) -> None:
    assert addresses.hosts_to_listen_on(host, machine) == hosts


@pytest.mark.parametrize(
    ("listening", "machine", "told"),
    [
        (EVERYWHERE, ONE, ("10.0.0.5:7000", "[fd00::5]:7000")),
        (EVERYWHERE, Machine((*LO, *ETH0)), ("10.0.0.5:7000", "[fd00::5]:7000")),  # no default route
        (EVERYWHERE, TWO, ("10.0.0.5:7000", "[fd00::5]:7000", "10.9.0.5:7000", "172.17.0.1:7000")),
        (("::", "0.0.0.0"), TWO, ("[fd00::5]:7000", "10.0.0.5:7000", "10.9.0.5:7000", "172.17.0.1:7000")),
        (EVERYWHERE, Machine((*LO, *SIX)), ("[fd00::5]:7000",)),
        (("0.0.0.0",), ONE, ("10.0.0.5:7000",)),  # without IPv6
        (EVERYWHERE, NONE, ()),
        (EVERYWHERE, Machine((*LO, ETH0[2])), ()),  # link-local only: a zone means nothing elsewhere
        (EVERYWHERE, Machine((CardAddress("eth0", "169.254.7.7", 16), ETH0[0])), ("10.0.0.5:7000", "169.254.7.7:7000")),
        (("10.9.0.5",), TWO, ("10.9.0.5:7000",)),
        (("10.0.0.5", "fd00::5", "fe80::5%eth0"), ONE, ("10.0.0.5:7000", "[fd00::5]:7000")),  # --listen eth0
        (("127.0.0.1",), ONE, ("127.0.0.1:7000",)),
        (("::1",), ONE, ("[::1]:7000",)),
    ],
)  # fmt: skip
def test_what_does_a_node_tell(listening: tuple[str, ...], machine: Machine, told: tuple[str, ...]) -> None:
    assert addresses.told(listening, 7000, machine) == told


def test_is_what_a_node_tells_bounded() -> None:
    cards = tuple(CardAddress(f"eth{n}", f"10.0.{n}.5", 24) for n in range(99))
    assert len(addresses.told(EVERYWHERE, 1, Machine(cards))) == ADDRESSES_OWN_MAX


@pytest.mark.parametrize(
    ("listening", "local"),
    [
        (EVERYWHERE, "127.0.0.1:7000"),
        (("::", "0.0.0.0"), "[::1]:7000"),
        (("10.0.0.5",), "10.0.0.5:7000"),
        (("127.0.0.1",), "127.0.0.1:7000"),
    ],
)
def test_where_do_programs_of_this_machine_reach_it(listening: tuple[str, ...], local: str) -> None:
    assert addresses.local(listening, 7000) == local


@pytest.mark.parametrize(
    ("listening", "own", "takes"),
    [
        (EVERYWHERE, "10.0.0.5", True),
        (EVERYWHERE, "fe80::5%eth0", True),
        (("0.0.0.0",), "fd00::5", False),
        (("10.9.0.5",), "10.0.0.5", False),
        (("127.0.0.1",), "10.0.0.5", False),
        (("127.0.0.1",), "127.0.0.1", True),
    ],
)
def test_does_a_node_take_connections_where_its_link_comes_from(
    listening: tuple[str, ...], own: str, takes: bool
) -> None:
    assert addresses.listens_at(listening, own) is takes


NEAR, FAR = "10.0.0.9:7000", "192.0.2.9:7000"


@pytest.mark.parametrize(
    ("claimed", "flags", "believed"),
    [
        ([FAR, NEAR], {}, (NEAR, FAR)),  # those on a network of this machine first
        ([NEAR, NEAR], {}, (NEAR,)),
        (["[fd00::9]:1", NEAR, "[2001:db8::9]:1", FAR], {}, ("[fd00::9]:1", NEAR, "[2001:db8::9]:1", FAR)),
        ([NEAR, "10.0.0.8:1", "[fd00::9]:1"], {}, (NEAR, "[fd00::9]:1", "10.0.0.8:1")),  # families in turn
        (["127.0.0.1:6379", "[::1]:6379", "127.9.9.9:1"], {}, ()),
        (["127.0.0.1:7000"], {"loopback": True}, ("127.0.0.1:7000",)),
        (["127.0.0.1:7000", NEAR], {"loopback": True, "beyond": False}, ("127.0.0.1:7000",)),
        ([NEAR], {"beyond": False}, ()),
        (["[::ffff:127.0.0.1]:1", "[::ffff:10.0.0.9]:1"], {"loopback": True}, ()),
        (["0.0.0.0:1", "[::]:1", "224.0.0.251:5353", "[ff02::fb]:5353", "255.255.255.255:1", "240.0.0.1:1"], {}, ()),
        (["169.254.169.254:80"], {}, ()),  # the services of clouds
        (["[fe80::9]:1", "[fe80::9%eth0]:1"], {}, ()),
        (["[fe80::9]:1", "[fe80::9%eth0]:1"], {"zoned": True}, ("[fe80::9%eth0]:1",)),
        (["seed.example:7000", "localhost:1", "x", "", "10.0.0.9", "10.0.0.9:0", "10.0.0.9:99999"], {}, ()),
    ],
)
def test_which_told_addresses_may_be_dialled(
    claimed: list[str], flags: dict[str, bool], believed: tuple[str, ...]
) -> None:
    assert addresses.usable(claimed, ONE, **{"loopback": False, "beyond": True, **flags}) == believed


def test_are_link_local_addresses_dialled_where_a_card_has_one() -> None:
    machine = Machine((CardAddress("eth0", "169.254.7.7", 16),))
    claimed = ["169.254.1.1:7000"]
    assert addresses.usable(claimed, machine, loopback=False, beyond=True) == tuple(claimed)


@given(st.lists(st.text(max_size=60), max_size=80))
def test_is_garbage_never_dialled(claimed: list[str]) -> None:
    for address in addresses.usable(claimed, ONE, loopback=True, beyond=True, zoned=True):
        assert addresses.host_of(address)


def test_is_what_a_peer_makes_others_dial_bounded() -> None:
    claimed = [f"10.0.0.{n}:7000" for n in range(200)]
    assert len(addresses.usable(claimed, ONE, loopback=False, beyond=True)) == ADDRESSES_OWN_MAX


@pytest.mark.parametrize(
    ("remote", "port", "address"),
    [
        ("10.0.0.9:51234", 7000, "10.0.0.9:7000"),
        ("[fe80::9%eth0]:51234", 7000, "[fe80::9%eth0]:7000"),
        ("unknown", 7000, None),
    ],
)
def test_a_peer_is_reached_where_its_link_comes_from(remote: str, port: int, address: str | None) -> None:
    assert addresses.behind(remote, port) == address


def test_multicast_goes_out_once_for_each_card_and_family() -> None:
    assert addresses.multicast_hosts(TWO) == ("172.17.0.1", "10.9.0.5", "10.0.0.5", "fd00::5")
    assert addresses.multicast_hosts(NONE) == ()


def test_every_address_is_announced_that_a_node_listens_on() -> None:
    assert addresses.announced(EVERYWHERE, ONE) == ("10.0.0.5", "fd00::5", "fe80::5%eth0")
    assert addresses.announced(("10.9.0.5",), TWO) == ("10.9.0.5",)
    assert addresses.announced(("127.0.0.1",), TWO) == ()


def test_addresses_without_a_literal_keep_their_order() -> None:
    names = [Address("b:1"), Address("a:1")]
    assert addresses.in_dial_order(names, ONE) == tuple(names)
