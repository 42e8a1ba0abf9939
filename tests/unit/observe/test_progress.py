"""Progress of a fetch for its caller: the numbers, the bar, and where no bar is drawn."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from swarm.content.manifest import Digest, ModelId
from swarm.journal import Entry, FetchEnded, FetchStarted, Received
from swarm.observe import progress as progresses
from swarm.observe.fetch_record import FetchRecords
from swarm.observe.progress import Bar, Progress, draws_bars, in_notebook, watch
from swarm.protocol.messages import NodeId

DIGEST = Digest("d" * 64)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def records() -> FetchRecords:
    made = FetchRecords()
    made.apply(Entry(0, "node", FetchStarted(ModelId("org/model"), DIGEST, 4000, 1000)))
    return made


def test_does_the_callback_get_what_is_done_and_left(records: FetchRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(progresses, "time", SimpleNamespace(monotonic=lambda: now))
    seen: list[Progress] = []
    looking = watch("org/model", seen.append)
    assert looking is not None
    looking.look()
    looking.resolved(records, DIGEST, 4000)
    looking.look()
    now = 11.0
    for chunk, node in ((0, "n1"), (1, "n2")):
        records.apply(Entry(1, "node", Received(NodeId(node), DIGEST, chunk, 500)))
    looking.look()
    records.apply(Entry(2, "node", FetchEnded(DIGEST, None)))
    looking.look()
    looking.look(done=True)
    looking.end()
    assert seen[:2] == [Progress("org/model"), Progress("org/model", 1000, 4000)]
    assert seen[2] == Progress("org/model", 2000, 4000, 1000.0, 2, 2.0)
    assert seen[3].bytes_total == 4000
    assert (seen[4].bytes_done, seen[4].bytes_total, seen[4].peers, seen[4].done) == (4000, 4000, 2, True)


def test_is_a_bar_drawn_over_itself_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    bar = Bar()
    for state in (
        Progress("org/\x1b[2Jmodel"),
        Progress("org/model", 2_000_000, 4_000_000, 1e6, 2, 2.0),
        Progress("org/model", 2_000_000, 4_000_000),
        Progress("org/model", 4_000_000, 4_000_000, peers=1, done=True),
    ):
        bar.show(state)
    bar.end()
    first, *lines = terminal.getvalue().removeprefix("\r").split("\r")
    assert "\x1b" not in first
    assert "looking for peers" in first
    assert "[##########----------]  50% 2 MB of 4 MB, 1 MB/s, 2 peers, 2 s left" in lines[0]
    assert "0 peers, waiting" in lines[1]
    assert lines[2].rstrip() == "org/model: 4 MB, verified, from 1 peer"
    assert terminal.getvalue().endswith("\n")
    assert len({len(line) for line in lines[:2]}) <= 2


def test_is_a_line_never_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "30")
    Bar().show(Progress("org/model", 1, 4_000_000))
    assert len(terminal.getvalue()) <= 30


@pytest.mark.parametrize(
    ("stream", "term", "shown", "drawn"),
    [
        (Terminal(), "xterm", None, True),
        (Terminal(), "xterm", False, False),
        (Terminal(), "dumb", None, False),
        (io.StringIO(), "xterm", None, False),
        (io.StringIO(), "xterm", True, True),
        (None, "xterm", None, False),
    ],
)
def test_where_is_a_bar_drawn(
    stream: io.StringIO | None, term: str, shown: bool | None, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    assert (watch("org/model", shown) is not None) == drawn


def test_is_a_notebook_known_by_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for shell, notebook in ((SimpleNamespace(kernel=object()), True), (SimpleNamespace(), False), (None, False)):
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        assert in_notebook() == draws_bars() == notebook
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()
