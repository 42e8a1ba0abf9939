import asyncio
import logging
import subprocess
import sys
from typing import Any

import pytest

from swarm.net import discovery
from swarm.net.discovery import Mdns


def test_without_multicast_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable(**_: Any) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("zeroconf.asyncio.AsyncZeroconf", unavailable)

    async def main() -> None:
        mdns = Mdns()
        await mdns.start(node_id="0" * 16, hosts=("127.0.0.1",), port=7000, found=lambda _: None)
        assert repr(mdns) == "<Mdns 0000000000000000 off, 0 found>"
        await mdns.close()

    with caplog.at_level(logging.WARNING, logger="swarm.net.discovery"):
        asyncio.run(main())
    (record,) = caplog.records
    assert "No such device" in record.message
    assert "--peer" in record.message


def test_zeroconf_is_imported_only_when_mdns_starts() -> None:
    program = f"import {discovery.__name__}, sys; sys.exit('zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
