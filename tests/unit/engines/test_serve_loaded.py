from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import pytest
import torch

from swarm.content.manifest import Digest, ModelId
from swarm.engines.layout import Fingerprint
from swarm.engines.serve_loaded import TensorServer
from swarm.store import Source


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"embed": torch.full((64, 8), value), "norm": torch.full((8,), value + 1)}


class Stand:
    """A tensor server, and what peers could get of it: bytes of 'norm' by id."""

    def __init__(self, version: str | None = None) -> None:
        self.sources: dict[str, Source] = {}
        self.server = TensorServer(
            "m rank 0",
            version=version,
            describe=lambda named: (ModelId(f"m as {named}"), Fingerprint({"version": str(named)})),
            serve=self.sources.__setitem__,
            withdraw=self._withdraw,
        )

    def _withdraw(self, digests: set[Digest], why: str) -> None:
        for name in [name for name, source in self.sources.items() if source.manifest.digest in digests]:
            self.sources.pop(name).close()

    def settled(self) -> set[str]:
        """Ids of what is served once nothing goes on in the background."""
        assert self.server.serving is not None
        self.server.serving.result(30)
        return set(self.sources)

    def serving(self, held: Callable[[], dict[str, torch.Tensor]]) -> Stand:
        self.server.keep(held)
        self.server.begin({"tensors": self.server.publish})
        assert self.settled()
        return self


def digest(stand: Stand) -> str:
    ((_, source),) = stand.sources.items()
    return source.manifest.digest


def test_are_tensors_served_again_whose_memory_went_and_came_back() -> None:
    held = tensors(1)
    stand = Stand().serving(lambda: held)
    before = digest(stand)
    stand.server.pause("a test")
    assert not stand.sources
    held["norm"].data.zero_()
    held["norm"].data.copy_(tensors(1)["norm"])
    stand.server.resume()
    assert stand.settled() == {"m as None"}
    assert digest(stand) == before


def test_are_tensors_that_came_back_as_others_not_served_again(caplog: pytest.LogCaptureFixture) -> None:
    held = tensors(1)
    stand = Stand().serving(lambda: held)
    stand.server.pause("a test")
    held["norm"].data[0] = 7
    with caplog.at_level("INFO", "swarm"):
        stand.server.resume()
        assert not stand.settled()
    assert "not served again: their bytes changed" in caplog.text
    held["norm"].data[0] = 2  # what it was
    stand.server.pause("again")
    stand.server.resume()
    assert not stand.settled()


def test_are_tensors_not_served_that_were_not_hashed_before_their_memory_went(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stand = Stand()
    stand.server.keep(lambda: tensors(1))
    stand.server.pause("a test")
    with caplog.at_level("INFO", "swarm"):
        stand.server.resume()
    stand.server.begin({"tensors": stand.server.publish})
    assert not stand.settled()
    assert "was released before they were hashed" in caplog.text


def test_are_tensors_that_changed_not_served_after_a_sleep(caplog: pytest.LogCaptureFixture) -> None:
    stand = Stand().serving(lambda: tensors(1))
    with caplog.at_level("INFO", "swarm"):
        stand.server.begin_change("a test")
    assert "served no longer, until the engine starts anew: a test" in caplog.text
    stand.server.end_change()
    stand.server.pause("another one")
    stand.server.resume()
    assert not stand.settled()


def test_does_a_sleep_wait_for_whoever_reads_the_tensors() -> None:
    """Memory that is being hashed must not go, and what was hashed is not served by then."""
    stand, reading, asleep = Stand(), threading.Event(), threading.Event()
    order: list[str] = []

    def slowly() -> dict[str, torch.Tensor]:
        reading.set()
        asleep.wait(0.2)  # nobody may be asleep meanwhile
        order.append("read")
        return tensors(1)

    stand.server.keep(slowly)
    stand.server.begin({"tensors": stand.server.publish})
    assert reading.wait(30)
    stand.server.pause("a test")
    order.append("asleep")
    asleep.set()
    assert not stand.settled()
    assert order == ["read", "asleep"]


def test_are_weights_that_were_updated_served_as_their_version_alone() -> None:
    stand = Stand().serving(lambda: tensors(1))
    before = digest(stand)
    for version, value in (("v1", 2.0), ("v2", 3.0)):
        stand.server.begin_change("an update")
        assert not stand.sources
        stand.server.end_change()
        assert not stand.sources
        stand.server.set_version(version, functools.partial(tensors, value))
        assert stand.settled() == {f"m as {version}"}
        assert digest(stand) != before
        stand.server.pause("a nap")
        stand.server.resume()
        assert stand.settled() == {f"m as {version}"}


def test_is_a_version_that_was_taken_from_a_twin_served_as_that() -> None:
    stand = Stand("v7").serving(lambda: tensors(1))
    assert set(stand.sources) == {"m as v7"}


@pytest.mark.parametrize(
    ("steps", "version", "why"),
    [
        ([], "v1", "no change of the weights has finished"),
        (["begin_change"], "v1", "no change of the weights has finished"),
        (["end_change"], "v1", "no change of the weights has finished"),
        (["begin_change", "end_change", "begin_change"], "v1", "no change of the weights has finished"),
        (["begin_change", "end_change", "pause"], "v1", "their memory is away"),
        (["begin_change", "end_change"], "", "other weights had that name"),
        (["begin_change", "end_change"], "v0", "other weights had that name"),
    ],
)
def test_is_nothing_served_as_a_version_that_it_may_not_be(
    steps: list[str], version: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    stand = Stand("v0").serving(lambda: tensors(1))
    for step in steps:
        getattr(stand.server, step)(*(() if step == "end_change" else ("a test",)))
    left = set(stand.sources)
    with caplog.at_level("INFO", "swarm"):
        stand.server.set_version(version, lambda: tensors(2))
    assert stand.settled() == left
    assert why in caplog.text
