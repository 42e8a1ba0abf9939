"""Does the journal keep what happened, in order, and tell whoever wants to know?"""

from __future__ import annotations

import pytest

from swarm import journal as journals
from swarm.content.manifest import Digest, ModelId
from swarm.journal import ArtifactsAnnounced, Entry, Joined, Journal, Left
from swarm.protocol.messages import Address, Announcement, NodeId
from swarm.transfer.download_events import PeerHas


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


def test_do_entries_that_a_peer_fills_push_out_older_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 announcements of the largest size would take 800 MB."""
    monkeypatch.setattr(journals, "BYTES_KEPT", 1 << 20)
    artifacts = tuple(
        Announcement(ModelId(str(number).ljust(256, "m")), Digest(f"{number:064x}"), "checkpoint", 1, 1, 1, False)
        for number in range(256)
    )
    journal = Journal()
    for number in range(100):
        journal.record(number, "peer", ArtifactsAnnounced(NodeId("a" * 16), artifacts))
    assert 1 <= len(list(journal)) <= 3
    for number in range(100):
        journal.record(number, "peer", PeerHas(NodeId("a" * 16), tuple(range(1 << 16))))
    assert len(list(journal)) == 1, "the latest is kept, whatever its size"
    for number in range(500):
        journal.record(number, "node", number)
    assert len(list(journal)) == 500
