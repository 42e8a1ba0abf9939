"""The dashboard of a real swarm in a real browser, with and without colours, by mouse and by keyboard.

Needs playwright and Chromium. With `SWARM_SCREENSHOTS=docs/pictures` the pictures of the documents are made anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm.content.manifest import Digest, ModelId
from swarm.journal import FetchStarted, Journal, Opened, OriginListed, OriginNode, Received
from swarm.observe.trace import tracing
from swarm.protocol.messages import Address, NodeId

from .processes import Machine, wait_until
from .stage import SLOW, TRACED, Stage, staged

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_file = pytest.importorskip("axe_playwright_python.base", reason="axe-core is not installed").AXE_FILE_PATH

pytestmark = [pytest.mark.browser, pytest.mark.timeout(170)]

CHROMIUM = Path("/usr/bin/chromium")
SHOWN_MS = 20_000  # what bench/dashboard.py measures as a second or two, on a machine that has nothing else to do
LOUD = ("error", "warning")
HARMLESS = {"minor", "moderate"}
KILLED = 2


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("stage"), size=160_000_000, rate="5MB/s") as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip("chromium is not installed")
    with playwright_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, stage: Stage) -> Iterator[Any]:
    """The seed's dashboard."""
    with opened_at(browser, stage.url) as found:
        yield found


@contextlib.contextmanager
def opened_at(browser: Any, url: str) -> Iterator[Any]:
    """A page, open; nothing may be complained of until it is closed."""
    complaints: list[str] = []
    opened = browser.new_page(viewport={"width": 1440, "height": 1000})
    opened.set_default_timeout(SHOWN_MS)
    opened.on("console", lambda said: complaints.append(f"{said.text} {said.location}") if said.type in LOUD else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith(url) else None)
    opened.goto(url)
    yield opened
    opened.close()
    assert complaints == []


BEYOND_THE_RING = """() => {
  const { left, right } = document.getElementById("ring").getBoundingClientRect();
  return [...document.querySelectorAll("#ring text")]
    .filter((text) => text.getBoundingClientRect().left < left || text.getBoundingClientRect().right > right)
    .map((text) => text.textContent);
}"""


CUT_HEADLINES = """() => [...document.querySelectorAll("#sums dd, #sums dt")]
  .filter((each) => each.scrollWidth > each.clientWidth || each.getBoundingClientRect().right > innerWidth)
  .map((each) => each.textContent)"""


OVERLAPPING_NAMES = """() => {
  const boxes = [...document.querySelectorAll("#ring .name, #ring .note")].filter((text) => text.textContent)
    .map((text) => [text.parentNode, text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([node, name, a]) => boxes
    .filter(([other, , b]) => node !== other && a.left < b.right - 2 && b.left < a.right - 2)
    .filter(([, , b]) => a.top < b.bottom - 2 && b.top < a.bottom - 2)
    .map(([, other]) => `${name} / ${other}`));
}"""


# In one look, since both go on.
SAYS_THE_WARNING_WHAT_THE_TABLE_SAYS = """(name) => {
  const rows = [...document.querySelectorAll("#rows tr")];
  const row = rows.find((row) => row.querySelector("button").textContent === name);
  return document.getElementById("warnings").textContent.includes(`${name} is slow: ${row.children[4].textContent},`);
}"""


def said(stage: Stage, path: str) -> Any:
    with urllib.request.urlopen(stage.url + path) as answer:
        return json.loads(answer.read())


def node(name: str) -> str:
    return f"#ring .node[aria-label^='{name}:']"


def faults(page: Any) -> list[str]:
    """What axe-core finds that keeps somebody out."""
    page.evaluate(Path(axe_file).read_text())
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{wrong['id']}: {at['target']} {at['failureSummary']}"
        for wrong in found["violations"]
        if wrong["impact"] not in HARMLESS
        for at in wrong["nodes"]
    ]


def picture(page: Any, name: str) -> None:
    """Keeps a screenshot, if pictures are wanted."""
    if folder := os.environ.get("SWARM_SCREENSHOTS"):
        wait_until(lambda: re.search(r" [2-9]\d %", page.get_attribute(node("replica-3"), "aria-label")), "progress")
        page.screenshot(path=f"{folder}/dashboard-{name}.png", full_page=True)


def test_shows_the_page_what_happens_while_a_fetch_runs(page: Any, stage: Stage) -> None:
    page.wait_for_selector("#rows tr:nth-child(9)")  # the seed, seven replicas, the liar
    page.wait_for_selector(f"{node('Liar')}.is-wrong")
    page.wait_for_selector(".link .line")
    wait_until(lambda: "is slow" in page.inner_text("#warnings"), "the slow replica to be named")
    page.wait_for_selector(f"{node(f'replica-{SLOW}')}.is-slow")
    assert "Liar sent" in page.inner_text("#warnings")
    page.wait_for_selector(f"{node('replica-3')}[aria-label*=' ready in ']")
    picture(page, "light")
    wait_until(
        lambda: page.evaluate(SAYS_THE_WARNING_WHAT_THE_TABLE_SAYS, f"replica-{SLOW}"), "one rate of who is slow"
    )
    assert re.search(r"chunks are with seed-0 only", page.inner_text("#alone"))
    assert re.search(r"members answered\. Liar did not", page.inner_text("#asked"))
    assert page.locator("#link-rows tr").count() == 5
    page.click("#links-more")
    page.wait_for_selector("#link-rows tr:nth-child(9)")
    assert faults(page) == []

    stage.replicas[KILLED].kill()
    killed = node(f"replica-{KILLED}")
    lost = page.wait_for_selector(f"{killed}.is-silent, {killed}.is-dead")  # as soon as its link breaks
    assert re.search(": (lost|dead)", lost.get_attribute("aria-label"))
    assert re.search(rf"replica-{KILLED} is (lost|dead)", page.inner_text("#warnings"))
    page.wait_for_selector(f"{killed}.is-dead")  # once gossip gives it up
    wait_until(lambda: f"replica-{KILLED} is dead" in page.inner_text("#announcement"), "the death to be announced")
    assert re.search(rf"\d replica-{KILLED} is (lost|dead)", " ".join(page.inner_text("#log").split()))


def test_shows_the_page_the_way_of_a_chunk_in_the_dark(page: Any, stage: Stage) -> None:
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("#maps .map:nth-child(4) canvas")
    page.click("#maps .map:nth-child(3) canvas", position={"x": 30, "y": 5})
    page.wait_for_selector("#tree li")
    wait_until(lambda: said(stage, page.get_attribute("#tree-twin", "href")[1:])["edges"], "an edge")
    chunk = int(page.input_value("#chunk"))
    digest = stage.seed.digest
    wait_until(lambda: len(said(stage, f"tree/{digest}/{chunk}")["edges"]) > 2, "the chunk to travel")
    page.click("#chunk-form button[type=submit]")
    page.wait_for_selector(".link.tree")
    edges = said(stage, f"tree/{digest}/{chunk}")["edges"]
    members = said(stage, "view")["members"]
    roots = [name for name, edge in edges.items() if edge["source"] is None]
    assert [members[root]["name"] for root in roots] == ["seed-0"]
    assert all(edge["source"] in members for edge in edges.values() if edge["source"])
    picture(page, "dark")
    assert faults(page) == []
    page.keyboard.press("Escape")
    page.wait_for_selector("#chunk-close", state="hidden")


def test_works_the_page_by_keyboard_alone(page: Any) -> None:
    page.wait_for_selector("#rows tr:nth-child(8)")
    page.focus("#ring .node[tabindex='0']")
    page.keyboard.press("Home")  # members that came later may stand before it
    first = page.evaluate("document.activeElement.dataset.node")
    page.keyboard.press("ArrowRight")
    second = page.evaluate("document.activeElement.dataset.node")
    assert first != second
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#rows tr.selected[data-key='{second}']")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.node") == first
    assert page.locator("#ring .node[tabindex='0']").count() == 1


def test_does_the_page_fit_a_narrow_screen(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_selector("#rows tr:nth-child(8)")
    page.wait_for_selector(f"{node(f'replica-{SLOW}')}.is-slow")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every((box) => box.scrollWidth <= box.clientWidth)")
    written = page.evaluate(BEYOND_THE_RING)
    assert written == []
    page.set_viewport_size({"width": 400, "height": 844})
    assert page.evaluate(CUT_HEADLINES) == []
    assert page.evaluate(OVERLAPPING_NAMES) == []
    picture(page, "narrow")
    assert faults(page) == []


def names(page: Any) -> list[str]:
    """Of the members in the table, in its order."""
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('#rows th button')].map((name) => name.textContent)"
    )
    return found


def test_does_the_table_filter_and_sort(page: Any) -> None:
    page.wait_for_selector("#rows tr:nth-child(9)")
    as_in_the_picture = names(page)
    page.fill("#filter", f"replica-{SLOW} swarm")
    page.wait_for_selector("#rows tr:nth-child(2)", state="detached")
    assert names(page) == [f"replica-{SLOW}"]
    assert page.inner_text("#filtered") == "1 of 9"
    page.fill("#filter", "")
    page.click("[data-sort=member]")
    page.wait_for_selector("th[aria-sort=ascending]")
    wait_until(lambda: names(page) == sorted(as_in_the_picture, key=str.lower), "names in order")
    page.click("[data-sort=member]")
    wait_until(lambda: names(page) == sorted(as_in_the_picture, key=str.lower, reverse=True), "names backwards")
    page.click("[data-sort=member]")
    wait_until(lambda: names(page) == as_in_the_picture, "the order of the picture")


def test_does_the_page_show_room_version_and_content_of_a_member(page: Any, stage: Stage) -> None:
    row = "#rows tr:has(button:text-is('seed-0'))"
    wait_until(lambda: re.search(r"\d [kMGT]?B", page.inner_text(f"{row} .room")), "room on the disk")
    said = page.inner_text(f"{row} .what-runs")
    assert stage.seed.digest[:12] in said
    assert re.search(r"^swarm \d", said)


def test_does_the_page_keep_throughput_and_events(page: Any) -> None:
    page.wait_for_selector("#throughput .flow-line", state="attached")
    assert re.search(r"at most .*B/s", page.inner_text("#throughput-now"))
    member = {"name": "m", "state": "alive", "banned_by": {}, "fetches": {}}
    fetch = {"model_id": "org/model", "running": True, "error": None, "seconds": None}
    done = {**fetch, "running": False, "seconds": 3.0}
    views = [
        {"members": {}, "warnings": {}},
        {"members": {"a": member}, "warnings": {}},
        {"members": {"a": {**member, "fetches": {"d": fetch}}}, "warnings": {}},
        {"members": {"a": {**member, "fetches": {"d": done}}}, "warnings": {}},
        {"members": {"a": {**member, "state": "dead", "fetches": {"d": done}}}, "warnings": {}},
    ]
    said = page.evaluate(
        """async (views) => {
          const { changes } = await import("/web/history.js");
          return views.slice(1).flatMap((view, n) => changes(views[n], view)).map((event) => event.text);
        }""",
        views,
    )
    assert said == ["m joined", "m fetches org/model", "m has org/model after 3.0 s", "m is dead"]


def test_is_the_seed_of_another_model_no_seed_of_this(page: Any) -> None:
    seed = {"state": "alive", "holds": {"b": {"fraction": 1}}, "fetches": {}}
    fetching = {
        **seed,
        "fetches": {"c": {"running": True, "model_id": "org/c", "eta_s": 1, "bytes": 1, "done_bytes": 0}},
    }
    said = page.evaluate(
        """async ([seed, fetching]) => {
          const { condition } = await import("/web/words.js");
          const asked = [[seed, "a"], [seed, "b"], [seed, null], [fetching, "a"], [fetching, "c"]];
          return asked.map(([member, digest]) => condition(member, digest));
        }""",
        [seed, fetching],
    )
    assert said == ["other", "seed", "seed", "other", "fetching"]


def test_goes_the_theme_where_it_is_told_to_and_stays(page: Any) -> None:
    page.select_option("#theme", "dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.reload()
    page.wait_for_selector("#rows tr")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.select_option("#theme", "light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.select_option("#theme", "")


def test_is_the_timeline_that_of_the_fetch(page: Any, stage: Stage) -> None:
    def victims() -> list[str]:
        """Nodes that have banned the liar and still run."""
        members = said(stage, "view")["members"]
        return [victim for m in members.values() for victim in m["banned_by"] if members[victim]["state"] == "alive"]

    victim = wait_until(victims, "somebody to ban the liar")[0]
    page.wait_for_selector("#lanes svg")
    page.select_option("#fetch", f"{victim}/{stage.seed.digest}")
    page.wait_for_selector(f"#timeline-twin[href*='{victim}']")
    found = said(stage, f"timeline/{stage.seed.digest}/of/{victim}")
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"], abs=0.01)
    assert sum(lane["bytes"] for lane in found["lanes"]) == found["received_bytes"]
    liar = next(lane for lane in found["lanes"] if lane["name"] == "Liar")
    assert liar["bytes"] == 0
    assert liar["rejected_chunks"] == len(liar["rejected_at_s"]) >= 3
    assert "wrong chunks" in liar["banned"]
    page.wait_for_selector("#lanes .lane-wrong")


def test_is_a_trace_shown_again_in_the_same_page(browser: Any, stage: Stage) -> None:
    wait_until(lambda: '"ChunkCorrupt"' in stage.trace.read_text(), "the trace to tell of the liar")
    replay = stage.machine.start("replay", stage.trace, "--web")
    replay.wait_for(" shows it again")
    url = re.findall(r"http://\S+", replay.out)[0]
    me = node(f"replica-{TRACED}")
    with opened_at(browser, url) as page:
        page.wait_for_selector("#replay:not([hidden])")
        page.click("#replay-play")
        page.wait_for_selector("#replay-play:text('Play')")
        stands = page.input_value("#replay-at")
        seek(page, 0)
        page.wait_for_selector(f"{me}:not(.is-fetching)")
        page.select_option("#replay-speed", "16")
        page.click("#replay-play")
        page.wait_for_selector(f"{me}.is-fetching")
        page.wait_for_selector(f"{node('Liar')}.is-wrong")
        page.wait_for_selector(".link .line")
        page.wait_for_selector("#replay-play:text('Play again')")
        assert float(page.input_value("#replay-at")) > float(stands)
        page.wait_for_selector("#lanes .lane-wrong")
        page.wait_for_selector("#maps .map:nth-child(4) canvas")
        assert faults(page) == []
        seek(page, 0)
        page.wait_for_selector(f"{node('Liar')}.is-wrong", state="detached")
    replay.send(signal.SIGTERM)
    assert replay.end().code == 0


def test_is_an_origin_a_node_of_its_own(browser: Any, machine: Machine, tmp_path: Path) -> None:
    me, hub, digest = NodeId("1" * 16), OriginNode(NodeId("a" * 16), "origin huggingface.co", "hf"), Digest("d" * 64)
    journal, path = Journal(), tmp_path / "trace"
    with tracing(journal, path):
        journal.record(1.0, "node", Opened(me, "replica-0", Address("127.0.0.1:7000")))
        journal.record(1.5, "node", OriginListed(hub, 0.2, "huggingface.co: 503 Service Unavailable"))
        journal.record(2.0, "node", OriginListed(hub, 0.2, None))
        journal.record(2.0, "node", FetchStarted(ModelId("org/model"), digest, 8_000_000, 0, 4))
        for chunk in range(3):
            journal.record(3.0 + chunk, hub.node, Received(hub.node, digest, chunk, 2_000_000))
    replay = machine.start("replay", path, "--web")
    replay.wait_for(" shows it again")
    with opened_at(browser, re.findall(r"http://\S+", replay.out)[0]) as page:
        page.click("#replay-play")
        seek(page, 4)
        origin = page.wait_for_selector(f"{node(hub.name)}.is-origin")
        assert re.search(r"MB read · 2 requests · 1 retry", origin.get_attribute("aria-label"))
        page.wait_for_selector(".link .line")
        assert "2 requests · 1 retry" in page.inner_text("#rows tr.is-origin")
        assert page.inner_text("#sums div:first-child dd") == "1", "an origin is no member"
        assert "did not" not in page.inner_text("#asked"), "it is not asked for a report"
        page.wait_for_selector(f"#lanes text:text('{hub.name[:12]}')")
        assert faults(page) == []
    replay.send(signal.SIGTERM)
    assert replay.end().code == 0


def seek(page: Any, at_s: float) -> None:
    """As whoever moves the slider and lets it go."""
    page.locator("#replay-at").fill(str(at_s))


def test_is_only_what_is_in_the_table_served(stage: Stage) -> None:
    for path in ("web/../server.py", "web/%2e%2e/server.py", "web/", "web/none.js", "tree/x/1", "timeline/../view"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(stage.url + path)
    with urllib.request.urlopen(stage.url) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
