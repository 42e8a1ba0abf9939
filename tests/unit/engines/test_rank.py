"""Ports and names of the ranks of an engine."""

from __future__ import annotations

from swarm.engines.rank import Rank
from swarm.settings import Settings


def test_has_each_rank_its_own_port_and_name() -> None:
    shared = Settings(listen="0.0.0.0:7000", name="replica", insecure=True)
    ranks = [Rank(f"tp{number}", number).settings(shared) for number in range(2)]
    assert [each.listen for each in ranks] == ["0.0.0.0:7000", "0.0.0.0:7001"]
    assert [each.name for each in ranks] == ["replica-tp0", "replica-tp1"]


def test_leaves_a_rank_the_known_port_to_the_first_where_no_port_is_given() -> None:
    for listen in ("0.0.0.0", "eth0", "0.0.0.0:0"):
        shared = Settings(listen=listen, insecure=True)
        assert [Rank(str(number), number).settings(shared).listen for number in range(2)] == [listen] * 2
