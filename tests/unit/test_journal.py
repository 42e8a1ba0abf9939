"""Does the journal keep what happened, in order, and tell whoever wants to know?"""

from __future__ import annotations

import pytest

from swarm import journal as journals
from swarm.journal import Entry, Joined, Journal, Left
from swarm.protocol.messages import Address, NodeId


def test_are_entries_kept_in_order() -> None:
    journal = Journal()
    journal.record(1.0, "a", Left(NodeId("a"), "tired"))
    journal.record(1.0, "b", Joined(NodeId("b"), "bee", Address("127.0.0.1:1"), "tcp"))
    assert [entry.subject for entry in journal] == ["a", "b"]
    assert str(next(iter(journal))).split() == ["1.0000", "a", "Left(node='a',", "why='tired')"]


def test_are_the_oldest_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "ENTRIES_KEPT", 3)
    journal = Journal()
    for number in range(5):
        journal.record(number, "node", number)
    assert [entry.event for entry in journal] == [2, 3, 4]


def test_does_a_subscriber_hear_what_comes_after_it() -> None:
    journal, heard = Journal(), list[Entry]()
    journal.record(0, "node", "before")
    journal.subscribe(heard.append)
    journal.record(1, "node", "after")
    assert heard == [Entry(1, "node", "after")]


def test_may_the_journal_be_written_to_while_it_is_read() -> None:
    journal = Journal()
    journal.record(0, "node", 0)
    for entry in journal:
        journal.record(1, "node", entry)
    assert len(list(journal)) == 2


def test_does_a_subscriber_hear_only_the_kinds_that_it_names() -> None:
    journal, numbers, everything = Journal(), list[object](), list[object]()
    journal.subscribe(lambda entry: numbers.append(entry.event), int, float)
    journal.subscribe(lambda entry: everything.append(entry.event))
    for what in (1, "two", 3.0):
        journal.record(0.0, "node", what)
    assert numbers == [1, 3.0]
    assert everything == [1, "two", 3.0]
