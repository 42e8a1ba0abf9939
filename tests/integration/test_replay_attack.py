"""A trace that an attacker wrote, in the page that shows it: its texts are texts there, and nothing of it runs."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm.content.bitfield import Bitfield
from swarm.content.manifest import Digest, ModelId
from swarm.journal import Entry, FetchEnded, FetchStarted, Joined, Opened, Received
from swarm.observe import trace
from swarm.protocol.messages import Address, NodeId, unsayable
from swarm.transfer import download_events as events

from .processes import Machine

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = [pytest.mark.browser, pytest.mark.timeout(170)]

CHROMIUM = Path("/usr/bin/chromium")
HIT = "globalThis.hit=1"
TEXTS = (
    f"<img src=x onerror={HIT}><script>{HIT}</script>",
    f"\"'><svg onload={HIT}>",
    f"</script><script>{HIT}</script>",
    "${" + HIT + "}{{" + HIT + "}}",
    f"javascript:{HIT}",
    "x;background:url(//evil.example/x)}*{color:red",
    "\x1b]0;owned\x07\x00\u202e\u2066\u200b\r\n",
    "'] , *:not(['",
    "__proto__",
    "W" * 100_000,
)


def story() -> list[Entry]:
    """A fetch for each text, which all its names are."""
    happened: list[tuple[str, Any]] = [("node", Opened(NodeId("f" * 16), TEXTS[0], Address(TEXTS[1]), *TEXTS[2:4]))]
    for number, text in enumerate(TEXTS):
        peer, digest = NodeId(f"{number:016x}"), Digest(f"{number:064x}")
        model_id = ModelId("org/model" if unsayable(text) else text)
        happened += [
            ("node", Joined(peer, text, Address(text), text)),
            ("node", FetchStarted(model_id, digest, 80, 0, 8, ())),
            (digest, events.PeerJoined(peer, Bitfield(8, range(8)))),
            (digest, events.Ask(peer, 1, (1, 2), text)),
            (digest, events.Granted(peer, 1, (1, 2))),
            ("node", Received(peer, digest, 1, 10)),
            (digest, events.ChunkCorrupt(peer, 1, 2)),
            (digest, events.Ban(peer, text)),
            (digest, events.TransferFailed(peer, 1, text)),
            ("node", FetchEnded(digest, text)),
        ]
    return [Entry(at / 100, subject, event) for at, (subject, event) in enumerate(happened)]


def test_does_nothing_of_a_crafted_trace_run(machine: Machine, tmp_path: Path) -> None:
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    path = tmp_path / "trace"
    path.write_text("".join(json.dumps(trace.event(entry)) + "\n" for entry in story()))
    replay = machine.start("replay", path, "--web")
    replay.wait_for(" shows it again")
    url = re.findall(r"http://\S+", replay.out)[0]
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        shown(browser.new_page(), url)
        browser.close()
    replay.send(signal.SIGTERM)
    assert replay.end().code == 0
    assert "\x1b" not in replay.out + replay.err


def shown(page: Any, url: str) -> None:
    elsewhere: list[str] = []
    broken: list[str] = []
    watch: dict[str, Callable[[Any], object]] = {
        "request": lambda asked: None if asked.url.startswith(url) else elsewhere.append(asked.url),
        "dialog": lambda dialog: elsewhere.append(dialog.message),
        "popup": lambda popup: elsewhere.append(popup.url),
        "pageerror": lambda error: broken.append(str(error)),
    }
    for event, heed in watch.items():
        page.on(event, heed)
    page.goto(url)
    page.wait_for_selector("#replay:not([hidden])")
    page.wait_for_selector(f"#rows tr:nth-child({len(TEXTS) + 1})")
    written = page.text_content("body")
    assert f"onerror={HIT}" in written, "the names are shown, as text"
    assert page.evaluate("globalThis.hit") is None
    assert page.evaluate("document.querySelectorAll('img, script:not([src]), svg[onload], iframe').length") == 0
    assert page.evaluate("({}).name") is None
    assert (elsewhere, broken) == ([], [])
