"""The transport of docs/transports.md: it is the file in examples/, keeps the contract, and carries a fetch."""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import swarm
from swarm import Settings
from swarm.testing import CHECKS, check_transport, pairs_of, run_check
from swarm.testing.transports import Check
from swarm.transport import registry
from swarm.transport.inproc import InprocTransport
from swarm.transport.registry import GROUP, Factory, TransportConfig

ROOT = Path(__file__).parent.parent.parent
POINT = EntryPoint("unix", "unix_transport:UnixTransport", GROUP)


@pytest.fixture
def unix(monkeypatch: pytest.MonkeyPatch) -> Factory:
    monkeypatch.syspath_prepend(ROOT / "examples")
    factory: Factory = POINT.load()
    return factory


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_does_the_example_keep_the_contract(unix: Factory, check: Check) -> None:
    run_check(check, pairs_of(unix))


def test_does_the_contract_notice_a_broken_transport() -> None:
    class Boastful(InprocTransport):
        def reach(self, address: str) -> bool:
            return True

    def make(config: TransportConfig) -> Boastful:
        return Boastful()

    with pytest.raises(AssertionError, match="`reach` says True for what is no address"):
        check_transport(pairs_of(make))


def test_counts_the_document_the_checks() -> None:
    assert f"asks {len(CHECKS)} questions" in (ROOT / "docs/transports.md").read_text(encoding="utf-8")


def test_does_the_document_show_the_example() -> None:
    _, _, code = (ROOT / "examples/unix_transport.py").read_text(encoding="utf-8").partition('"""\n\n')
    assert f"```python\n{code}```" in (ROOT / "docs/transports.md").read_text(encoding="utf-8")


def test_do_two_nodes_fetch_over_the_example(
    unix: Factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model").mkdir()
    data = bytes(range(256)) * 10_000
    (tmp_path / "model" / "weights.bin").write_bytes(data)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [POINT] if group == GROUP else [])

    def settings(name: str, *peers: str) -> Settings:
        # A limit rules out `inproc`, which is preferred within a process.
        return Settings(
            name=name, mdns=False, cache=tmp_path / name, peers=peers, transports=("unix",), upload_limit=1e12
        )

    with caplog.at_level(logging.INFO, "swarm"):
        served = swarm.serve(tmp_path / "model", model_id="org/model", settings=settings("seed"))
        with served, swarm.fetch("org/model", out=tmp_path / "out", settings=settings("newcomer", served.address)):
            assert (tmp_path / "out" / "weights.bin").read_bytes() == data
    assert "transport=unix to seed because both nodes are on this machine; tcp also possible" in caplog.messages
