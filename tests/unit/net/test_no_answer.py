"""What a failed connection means, as a table."""

from __future__ import annotations

import errno

import pytest

from swarm.net import no_answer
from swarm.net.addresses import CardAddress, Machine
from swarm.net.no_answer import Fault

HERE = Machine((CardAddress("lo", "127.0.0.1", 8), CardAddress("eth0", "10.0.0.5", 24), CardAddress("eth0", "fd00::5")))


@pytest.mark.parametrize(
    ("number", "address", "fault"),
    [
        (errno.ECONNREFUSED, "10.0.0.9:7000", Fault.REFUSED),
        (errno.ECONNREFUSED, "127.0.0.1:7000", Fault.REFUSED_LOOPBACK),
        (errno.ECONNREFUSED, "[::1]:7000", Fault.REFUSED_LOOPBACK),
        (errno.ENETUNREACH, "10.9.0.9:7000", Fault.UNREACHABLE),
        (errno.EHOSTUNREACH, "10.9.0.9:7000", Fault.UNREACHABLE),
        (errno.ETIMEDOUT, "10.9.0.9:7000", Fault.SILENT),
        (errno.ECONNRESET, "10.9.0.9:7000", Fault.LOST),
        (None, "10.9.0.9:7000", Fault.LOST),
    ],
)
def test_which_fault_is_it(number: int | None, address: str, fault: Fault) -> None:
    assert no_answer.fault_of(number, address) is fault


def test_a_node_of_this_machine_that_listens_on_loopback_is_told_apart() -> None:
    assert no_answer.fault_of(errno.ECONNREFUSED, "10.0.0.5:7000", loopback_answers=True) is Fault.LOOPBACK_ONLY
    assert no_answer.loopback_twin("10.0.0.5:7000", HERE) == ("127.0.0.1", 7000)
    assert no_answer.loopback_twin("[fd00::5]:7000", HERE) == ("::1", 7000)
    assert no_answer.loopback_twin("10.0.0.9:7000", HERE) is None, "of another machine nothing can be known"
    assert no_answer.loopback_twin("127.0.0.1:7000", HERE) is None


@pytest.mark.parametrize("fault", Fault)
def test_every_line_says_what_to_do_where(fault: Fault) -> None:
    line = no_answer.line(fault, "10.0.0.9:7123", detail="why")
    assert "{" not in line
    assert line.isprintable()
    assert fault is Fault.LOST or ";" in line
