"""What a node tells of the origins that it reads."""

from __future__ import annotations

from swarm.content.manifest import Digest
from swarm.journal import Entry, Journal, OriginListed, OriginNode, OriginRead, Received
from swarm.observe.origin_record import ORIGINS_MAX, OriginRecords
from swarm.protocol.messages import NodeId
from swarm.transfer.origin_driver import origin_node

DIGEST = Digest("d" * 64)
HUB = OriginNode(NodeId("a" * 16), "origin hub", "hf")


def records(*events: object) -> OriginRecords:
    """One second apart, beginning at 1."""
    found, journal = OriginRecords(), Journal()
    found.follow(journal)
    for at_s, event in enumerate(events, 1):
        journal.record(at_s, "node", event)
    return found


def test_are_bytes_requests_and_retries_counted() -> None:
    found = records(
        OriginListed(HUB, 0.1, "hub: 503"), OriginListed(HUB, 0.1, None), Received(HUB.node, DIGEST, 0, 50),
        Received(NodeId("b" * 16), DIGEST, 1, 7), OriginRead(HUB, "a", 0, 50, 1.0, "hub: it broke"),
    )  # fmt: skip
    assert found.records[HUB.node].report(6.0) == {
        "id": HUB.node, "name": "origin hub", "scheme": "hf", "bytes": 50, "rate_bytes_per_s": 10, "requests": 3,
        "retries": 2, "error": "hub: it broke",
    }  # fmt: skip
    assert (found.bytes["hf"], found.requests["hf"], found.retries["hf"]) == (50, 3, 2)


def test_does_a_lasting_failure_count_as_no_retry_and_success_forget_it() -> None:
    found = records(OriginRead(HUB, "a", 0, 0, 1.0, "hub: gone", lasting=True))
    assert (found.records[HUB.node].retries, found.records[HUB.node].error) == (0, "hub: gone")
    found.apply(Entry(9.0, "node", OriginRead(HUB, "a", 0, 9, 1.0, None)))
    assert found.records[HUB.node].error is None


def test_are_only_the_latest_origins_kept_and_all_counted() -> None:
    many = [OriginNode(NodeId(f"{n:016x}"), f"origin {n}", "https") for n in range(ORIGINS_MAX + 5)]
    found = records(*(OriginListed(origin, 0.1, None) for origin in many))
    assert list(found.records) == [origin.node for origin in many[5:]]
    assert found.requests["https"] == len(many)


def test_is_an_origin_named_by_its_place_alike_at_every_node() -> None:
    names = {
        ("hf", "https://huggingface.co/org/model"): "origin huggingface.co",
        ("https", "https://me:secret@host:8443/a/b?c=d"): "origin host:8443",
        ("s3", "s3://bucket/some/model"): "origin s3://bucket",
        ("file", "file:///mnt/models/a"): "origin file:///mnt/models/a",
        ("file", "/mnt/models/a"): "origin /mnt/models/a",
        ("https", "https://[broken/a"): "origin https://[broken/a",
    }
    assert {key: origin_node(*key).name for key in names} == names
    assert origin_node("hf", "https://hub/a") == origin_node("hf", "https://hub/b")
    assert origin_node("hf", "https://hub/a").node != origin_node("https", "https://hub/a").node
