from __future__ import annotations

import pytest

from swarm.observe.units import count


@pytest.mark.parametrize(
    ("number", "noun", "text"), [(1, "node", "1 node"), (0, "node", "0 nodes"), (2, "fetch", "2 fetches")]
)
def test_does_a_noun_agree_with_its_number(number: int, noun: str, text: str) -> None:
    assert count(number, noun) == text
