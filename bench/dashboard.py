"""Cost and delay of the dashboard: `python bench/dashboard.py [--members 200] [--minutes 10]`.

The feed: a real page in headless Chromium shows simulated members that fetch, end and start again, through the view,
feed and HTTP of a real node; memory is read every 15 s. The delays (`--delays N`): a real swarm of eight processes and
a liar (tests/integration/stage.py), N times; how long after a replica starts, after wrong chunks went out and after
`kill -9` the page shows it. Needs playwright and Chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from children import ROOT, host
from playwright.sync_api import Browser, Page, sync_playwright

from swarm.content.manifest import Digest, ModelId
from swarm.dashboard.collector import MemberAnswer
from swarm.dashboard.member_report import CELLS_MAX, FetchSummary, Held, KnownPeer, MemberReport, PeerFlow
from swarm.dashboard.server import ASSETS, asset
from swarm.dashboard.sse import EventStream
from swarm.dashboard.swarm_view import Json, SwarmView
from swarm.net.http_pages import EventPage
from swarm.net.link import Link
from swarm.net.listener import Listener
from swarm.net.websocket import HttpLinks
from swarm.observe.fetch_record import FetchRecord
from swarm.protocol.messages import NodeId

ORG_MODEL = ModelId("org/model")

CHROMIUM = "/usr/bin/chromium"
RESULTS = ROOT / "bench" / "results"
DIGEST = Digest("d" * 64)
SIZE = 16_000_000_000
CHUNKS = 1024
SEEDS_PART = 40  # members for each seed
SOURCES = 4
FETCH_S = 60.0
SAMPLE_EVERY_S = 15.0
FRAMES = """
  window.frames = []; window.drawn = [];
  let last = performance.now();
  const tick = (now) => { window.frames.push(now - last); last = now; requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
  const wanted = window.requestAnimationFrame.bind(window);
  window.requestAnimationFrame = (callback) => wanted((now) => {
    const began = performance.now(); callback(now); window.drawn.push(performance.now() - began);
  });
"""
SHOWN = """(selector) => new Promise((done) => {
  const look = () => document.querySelector(selector) ? done(Date.now() / 1000) : requestAnimationFrame(look);
  look();
})"""


class Crowd:
    """Members that fetch at rates of their own, over and over."""

    def __init__(self, members: int) -> None:
        dice = random.Random(1)
        self.ids = [f"{number:016x}" for number in range(1, members + 1)]
        self.seeds = set(self.ids[::SEEDS_PART])
        self._speed = {node: dice.uniform(0.5, 1.5) for node in self.ids}
        self._phase = {node: dice.uniform(0, FETCH_S) for node in self.ids}
        self._order = {node: dice.sample(range(CELLS_MAX), CELLS_MAX) for node in self.ids}
        self._sources = {
            node: dice.sample([other for other in self.ids if other != node], SOURCES) for node in self.ids
        }
        self._viewer = SwarmView()
        self._rng = dice

    def view(self) -> Json:
        """The view of a node that has a report of every member."""
        now = time.monotonic()
        told = {node: MemberAnswer(self._own(node, now), now) for node in self.ids}
        mine = told[self.ids[0]].report
        assert mine is not None
        return self._viewer.view(self._report(), mine, told, now)

    def timeline(self) -> Json:
        """Of a fetch that brought a chunk every fifth of a second from each source in turn."""
        fetch = FetchRecord(ORG_MODEL, DIGEST, SIZE, 0, 0.0, 0.0, 0.0, 0.0)
        for chunk in range(300):
            node = self.ids[chunk % SOURCES]
            fetch.receive(fetch.source(NodeId(node), node, chunk / 5), chunk / 5, chunk, SIZE // CHUNKS)
        fetch.end(FETCH_S, None)
        return fetch.timeline(FETCH_S)

    def _own(self, node: str, now: float) -> MemberReport:
        total = self._speed[node] * (now + self._phase[node]) / FETCH_S
        part = 1.0 if node in self.seeds else min(1.0, total % 1.15)
        rate = 0 if part == 1.0 else round(self._speed[node] * SIZE / FETCH_S * self._rng.uniform(0.9, 1.1))
        digits = ["0"] * CELLS_MAX
        for cell in self._order[node][: int(part * CELLS_MAX)]:
            digits[cell] = "9"
        fetch = FetchSummary(
            ORG_MODEL, DIGEST, SIZE, int(part * SIZE), rate, rate, (1 - part) * SIZE / rate if rate else None,
            FETCH_S, SOURCES, rate > 0, None,
        )  # fmt: skip
        flows = tuple(
            PeerFlow(DIGEST, "down", NodeId(source), int(part * SIZE) // SOURCES, rate // SOURCES)
            for source in self._sources[node]
        )
        peers = tuple(KnownPeer(NodeId(source), source[-4:], "127.0.0.1:1") for source in self._sources[node])
        held = (Held(DIGEST, int(part * CHUNKS), CHUNKS, "".join(digits)),)
        number = int(node, 16)
        fetches = () if node in self.seeds else (fetch,)
        return MemberReport(
            NodeId(node), f"host-{number // 4}", f"rack-{number // 40}", peers, flows, fetches, held, ()
        )

    def _report(self) -> dict[str, Any]:
        facts = {"state": "alive", "transport": None, "host": None, "rack": None, "uploads": 3, "slots": 8}
        members = [
            {"id": node, "name": f"replica-{int(node, 16)}", "address": f"10.0.0.{int(node, 16)}:7000", **facts}
            for node in self.ids
        ]
        names, nodes = ({member[key]: 1.0 for member in members} for key in ("name", "id"))
        artifact = {
            "model_id": "org/model", "digest": DIGEST, "tier": "checkpoint", "bytes": SIZE, "members": names,
            "nodes": nodes,
        }  # fmt: skip
        node = {"id": self.ids[0], "name": "replica-1", "address": "10.0.0.1:7000"}
        return {"node": node, "members": members, "artifacts": [artifact], "origins": [], "transfers": []}


class Server:
    """Serves the page of a crowd from a thread; counts bytes to browsers and its own processor time."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.sent_bytes = 0
        self.events = 0
        self.cpu_s = 0.0
        self.url = ""

    def __enter__(self) -> Server:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        feed = EventStream(self._crowd.view, self._over.wait)  # type: ignore[arg-type]
        pages: dict[str, Any] = {"/": asset("index.html"), **{f"/web/{name}": asset(name) for name in ASSETS}}
        pages["/timeline/{digest}/of/{node}"] = lambda digest, node: self._crowd.timeline()
        links = HttpLinks({**pages, "/events": EventPage(lambda: self._counted(feed))})
        listener = await Listener.open("127.0.0.1", 0)
        await links.open(_nobody)
        listener.serve({}, links.adopt)
        self.url = "http://{}:{}/".format(*listener.address)
        self._ready.set()
        await self._over.wait()
        await listener.close()
        await links.close()

    async def _counted(self, feed: EventStream) -> AsyncGenerator[bytes]:
        async for event in feed.watch():
            self.sent_bytes += len(event)
            self.events += 1
            self.cpu_s = time.thread_time()
            yield event


async def _nobody(link: Link) -> None:
    await link.close()


def feed(browser: Browser, *, members: int, minutes: float) -> dict[str, Any]:
    """Measures the feed of a crowd."""
    with Server(Crowd(members)) as server:
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.add_init_script(FRAMES)
        probe = page.context.new_cdp_session(page)
        probe.send("Performance.enable")
        page.goto(server.url)
        page.wait_for_selector(f".node:nth-child({members})")
        began, sent, cpu_s = time.monotonic(), server.sent_bytes, server.cpu_s
        samples = []
        while True:
            samples.append(sample(page, probe, time.monotonic() - began))
            print(json.dumps(samples[-1]), flush=True)
            if time.monotonic() - began >= minutes * 60:
                break
            page.wait_for_timeout(min(SAMPLE_EVERY_S, minutes * 60) * 1000)
        seconds = time.monotonic() - began
        found = {
            "members": members,
            "seconds": round(seconds, 1),
            "bytes_per_s": round((server.sent_bytes - sent) / seconds),
            "server_cpu_part": round((server.cpu_s - cpu_s) / seconds, 4),
            "draw_ms_median": statistics.median(s["draw_ms_median"] for s in samples[1:]),
            "draw_ms_max": max(s["draw_ms_max"] for s in samples[1:]),
            "frame_ms_p99": max(s["frame_ms_p99"] for s in samples[1:]),
            "heap_mb_first": samples[1]["heap_mb"],
            "heap_mb_last": samples[-1]["heap_mb"],
            "dom_nodes_first": samples[1]["dom_nodes"],
            "dom_nodes_last": samples[-1]["dom_nodes"],
            "console_errors": errors,
            "samples": samples,
        }
        page.screenshot(path=str(Path(tempfile.gettempdir()) / "dashboard-crowd.png"), full_page=False)
        page.close()
        return found


def sample(page: Page, probe: Any, at_s: float) -> dict[str, Any]:
    """Frames since the last sample, and memory in use after a collection."""
    frames, drawn = page.evaluate("[window.frames.splice(0), window.drawn.splice(0)]")
    drawn = [ms for ms in drawn if ms > 0.5] or [0.0]  # the others are those that only count frames
    probe.send("HeapProfiler.collectGarbage")
    metrics = {m["name"]: m["value"] for m in probe.send("Performance.getMetrics")["metrics"]}
    frames.sort()
    return {
        "at_s": round(at_s, 1),
        "frames": len(frames),
        "frame_ms_median": round(statistics.median(frames), 2) if frames else None,
        "frame_ms_p99": round(frames[int(len(frames) * 0.99)], 1) if frames else 0.0,
        "frame_ms_max": round(frames[-1], 1) if frames else 0.0,
        "draws": len(drawn),
        "draw_ms_median": round(statistics.median(drawn), 2),
        "draw_ms_max": round(max(drawn), 1),
        "heap_mb": round(metrics["JSHeapUsedSize"] / 1e6, 2),
        "dom_nodes": int(metrics["Nodes"]),
    }


def delays(browser: Browser) -> dict[str, float]:
    """Seconds until the page shows each of three things that happen in a real swarm."""
    sys.path.insert(0, str(ROOT / "tests"))
    from integration.stage import staged

    with tempfile.TemporaryDirectory() as folder, staged(Path(folder), size=96_000_000, rate="5MB/s") as stage:
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(stage.url)
        wrong_at_s = page.evaluate(SHOWN, ".node.is-wrong")
        assert stage.liar.lied_at_s is not None
        page.wait_for_selector("#rows tr.is-fetching:nth-child(8)")
        page.wait_for_timeout(random.uniform(0, 2000))  # the page changes at its own pace: not in step with it
        killed_at_s = time.time()
        stage.replicas[2].kill()
        silent_at_s = page.evaluate(SHOWN, ".node.is-silent, .node.is-dead")
        dead_at_s = page.evaluate(SHOWN, ".node.is-dead")
        page.wait_for_timeout(random.uniform(0, 2000))
        began_at_s = time.time()
        stage.machine.fetch(
            Path(folder) / "late", "--upload-limit", "5MB/s", peers=[stage.seed.address],
            environment={"SWARM_NAME": "late", "SWARM_NETWORK": "local"},
        )  # fmt: skip
        late_at_s = page.evaluate(SHOWN, "[aria-label^='late:']")
        page.close()
    return {
        "wrong_chunk_s": round(wrong_at_s - stage.liar.lied_at_s, 2),
        "killed_no_answer_s": round(silent_at_s - killed_at_s, 2),
        "killed_dead_s": round(dead_at_s - killed_at_s, 2),
        "newcomer_started_s": round(late_at_s - began_at_s, 2),  # the start of its process included
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--delays", type=int, default=0, metavar="N", help="measure delays N times instead")
    parser.add_argument("--out", type=Path, help="where the raw numbers go")
    options = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        report: dict[str, Any] = {"host": host(), "command": sys.argv[1:], "chromium": browser.version}
        if options.delays:
            rounds = []
            for _ in range(options.delays):
                rounds.append(delays(browser))
                print(json.dumps(rounds[-1]), flush=True)
            report["rounds"] = rounds
            report["median"] = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            report["worst"] = {name: max(r[name] for r in rounds) for name in rounds[0]}
            print(json.dumps({"median": report["median"], "worst": report["worst"]}, indent=1))
        else:
            report["feed"] = feed(browser, members=options.members, minutes=options.minutes)
            print(json.dumps({name: value for name, value in report["feed"].items() if name != "samples"}, indent=1))
        browser.close()
    kind = "delays" if options.delays else "feed"
    out = options.out or RESULTS / f"dashboard-{time.strftime('%Y-%m-%d')}-{kind}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
