"""Bytes transferred for each layout that huggingface_hub writes: serve, fetch, fetch again, verify, another revision.

    python bench/cache_layouts.py [--python PATH ...] [--json]

Layouts: links into `blobs` (0.30 on), blobs that link into the cache-wide store (`shared`, 1.x on), plain files where
symbolic links are impossible (`copies`), a download to a directory (`local_dir`). huggingface_hub itself writes each
of them, from a stand-in for the hub (tests/hub.py), and judges each cache that swarm filled: what it finds without a
network, what a scan says, how many bytes it still wants from the hub, what it leaves when it deletes a revision.
`--python`: interpreters with other versions of huggingface_hub; default is this one. Exits with 1 if a step is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import swarm
from swarm.cli.verify import verify
from swarm.errors import SwarmError

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))
from hub import Hub, Model  # noqa: E402 - the stand-in is beside the tests

MODEL = "org/model"
FILES = {
    "README.md": b"# model\n",
    "config.json": b'{"hidden_size": 8}',
    "pytorch_model.bin": bytes(range(256)) * 12_000,
    "tokenizer/vocab.txt": b"a\nb\n",
}
NEWER = FILES | {"config.json": b'{"hidden_size": 16}'}
WEIGHTS = "pytorch_model.bin"
DAMAGED = FILES[WEIGHTS].swapcase()
MODEL_BYTES = sum(len(data) for path, data in FILES.items() if path != "README.md")
STEPS: dict[str, int | str] = {
    "serve": MODEL_BYTES,  # to an empty cache
    "then the hub sends": 0,
    "fetch": 0,
    "fetch again": 0,
    "verify": 0,
    "revision": len(NEWER["config.json"]),
    "the hub's revision": len(NEWER["config.json"]),
    "deleted": 0,
    "rest of a part": MODEL_BYTES - len(FILES["config.json"]),
    "verify damaged": 1,
    "damaged": len(FILES[WEIGHTS]),
    "from the hub": MODEL_BYTES,
}


class Judge:
    """huggingface_hub in an interpreter; see hub_judge.py."""

    def __init__(self, python: str, home: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        quiet = {"HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self._process = subprocess.Popen(
            [python, str(ROOT / "bench" / "hub_judge.py")],
            env={**kept, **quiet, "NO_PROXY": "*"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.about: dict[str, Any] = self.ask("about")

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises RuntimeError with what huggingface_hub said."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the judge has no pipes")
        self._process.stdin.write(json.dumps({"do": what, **request}, default=str) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the judge has ended"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return dict(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=20)

    @property
    def layouts(self) -> list[str]:
        """Those that this version writes."""
        return ["links", *(["shared"] if self.about["shared"] else []), "copies", "local_dir"]


class Row:
    """The steps of one layout, each in caches of its own below `root`."""

    def __init__(self, judge: Judge, layout: str, root: Path, hubs: tuple[Hub, Hub]) -> None:
        self._judge, self._layout, self._root = judge, layout, root
        self._one, self._two = hubs
        self._peers: tuple[str, ...] = ()

    def steps(self) -> dict[str, int | str]:
        """Bytes by step, or what is wrong."""
        served, (one, two) = self._layout, (self._one, self._two)
        with contextlib.ExitStack() as open_:
            self._peers = (open_.enter_context(self._served("served", one, served)),)
            newer = open_.enter_context(self._served("newer", two, "links"))
            work: dict[str, Callable[[], int | str]] = {
                "serve": lambda: self._fetched("empty", FILES, layout="links"),
                "then the hub sends": lambda: self._completed("empty", one, FILES),
                "fetch": lambda: self._written("same", one) or self._fetched("same", FILES),
                "fetch again": lambda: self._fetched("same", FILES),
                "verify": lambda: self._verified("same"),
                "revision": lambda: self._from(newer, lambda: self._fetched("same", NEWER)),
                "the hub's revision": lambda: self._completed("empty", two, NEWER),
                "deleted": lambda: self._deleted("empty"),
                "rest of a part": lambda: self._written("part", one, ["*.json"]) or self._fetched("part", FILES),
                "verify damaged": lambda: self._damaged("damaged", one) or self._verified("damaged"),
                "damaged": lambda: self._mended("damaged"),
                "from the hub": lambda: self._cold("cold", one),
            }
            return {name: _told(work[name]) for name in self._wanted()}

    def wrong(self, steps: dict[str, int | str]) -> list[str]:
        """Names of the steps that did not end as wanted."""
        return [name for name, value in self._wanted().items() if not _is_as(value, steps[name])]

    def _wanted(self) -> dict[str, int | str]:
        wanted = dict(STEPS)
        if self._layout == "local_dir":  # a directory: without revisions, and nothing of it is in the cache
            for name in ("revision", "the hub's revision", "deleted", "from the hub"):
                del wanted[name]
            wanted["damaged"] = "exists with other content; move it away"  # a file of the user is never replaced
        if self._layout == "copies" and not self._judge.about["listing"]:
            # Nothing on this machine says what a plain file should hold: it is kept, and the line says so.
            wanted |= {"verify damaged": 0, "damaged": "differs; remove it, or fetch with --out DIR"}
        if self._layout == "copies":  # without links huggingface_hub gets each revision anew
            wanted["the hub's revision"] = sum(map(len, NEWER.values()))
        return wanted

    def _written(self, name: str, hub: Hub, allow: list[str] | None = None, layout: str | None = None) -> int:
        """A cache that huggingface_hub fills."""
        self._judge.ask(
            "download", cache=self._cache(name), local_dir=self._directory(name), layout=layout or self._layout,
            endpoint=hub.endpoint, allow=allow,
        )  # fmt: skip
        return 0

    @contextlib.contextmanager
    def _served(self, name: str, hub: Hub, layout: str) -> Iterator[str]:
        self._written(name, hub, layout=layout)
        what: Any = self._directory(name) if layout == "local_dir" else MODEL
        with self._at(name) as settings, swarm.serve(what, model_id=MODEL, settings=settings) as served:
            yield served.address

    def _fetched(self, name: str, files: dict[str, bytes], *, layout: str | None = None) -> int | str:
        """Bytes that travelled into a cache or directory, which huggingface_hub then finds whole without a network."""
        directory = self._directory(name) if (layout or self._layout) == "local_dir" else None
        with self._at(name, peers=self._peers) as settings:
            out: Any = directory or swarm.HUB_CACHE
            weights = swarm.fetch(MODEL, out=out, settings=settings, timeout_s=60, progress=False)
            weights.close()
        allow = [path for path in files if path != "README.md"] if directory else None
        found = self._judge.ask("look", cache=self._cache(name), local_dir=directory, allow=allow)
        if found["warnings"]:
            return f"a scan says {found['warnings']}"
        if Path(found["path"]).resolve() != Path(weights.path or "").resolve():
            return f"huggingface_hub finds {found['path']}, not {weights.path}"
        wrong = [path for path in files if _bytes(Path(found["path"]) / path) != files[path]]
        if wrong and not (directory and wrong == ["README.md"]):  # a directory gets the model alone
            return f"wrong: {wrong}"
        return weights.fetched.bytes - weights.fetched.resumed_bytes

    def _completed(self, name: str, hub: Hub, files: dict[str, bytes]) -> int | str:
        """Bytes that huggingface_hub still gets from the hub."""
        before = hub.sent_bytes
        layout = "links" if self._layout == "local_dir" else self._layout
        found = self._judge.ask("download", cache=self._cache(name), layout=layout, endpoint=hub.endpoint)
        wrong = [path for path in files if _bytes(Path(found["path"]) / path) != files[path]]
        return f"wrong: {wrong}" if wrong else hub.sent_bytes - before

    def _deleted(self, name: str) -> int | str:
        """0 if huggingface_hub can remove one revision and then the other, and keeps what a revision needs."""
        commits = [hub.models[MODEL].commit for hub in (self._one, self._two)]
        self._judge.ask("delete", cache=self._cache(name), revision=commits[0])
        found = self._judge.ask("look", cache=self._cache(name))
        if wrong := [path for path in NEWER if _bytes(Path(found["path"]) / path) != NEWER[path]]:
            return f"lost with the other revision: {wrong}"
        left = self._judge.ask("delete", cache=self._cache(name), revision=commits[1])["left"]
        left = [path for path in left if path not in ("CACHEDIR.TAG", "version.txt")]
        return f"left behind: {left}" if left else 0

    def _damaged(self, name: str, hub: Hub) -> int:
        """A cache with wrong bytes in the weights, of the same size."""
        self._written(name, hub)
        place = self._cache(name) / f"models--org--model/snapshots/{hub.models[MODEL].commit}"
        weights = (self._directory(name) if self._layout == "local_dir" else place) / WEIGHTS
        weights.resolve().chmod(0o644)
        weights.resolve().write_bytes(DAMAGED)
        return 0

    def _mended(self, name: str) -> int | str:
        done = self._fetched(name, FILES)
        kept = [path for path in self._cache(name).rglob("*") if _bytes(path) == DAMAGED]
        return f"kept damaged: {kept[0]}" if kept else done

    def _verified(self, name: str) -> int:
        """The exit code of `swarm verify`."""
        what = str(self._directory(name)) if self._layout == "local_dir" else MODEL
        with self._at(name) as settings, contextlib.redirect_stdout(io.StringIO()):
            return verify(what, revision=None, digest=None, settings=settings)

    def _cold(self, name: str, hub: Hub) -> int | str:
        """Bytes that a fetch without any peer reads from the hub."""
        before = hub.sent_bytes
        peers, self._peers = self._peers, ()
        with _environment(HF_ENDPOINT=hub.endpoint):
            done = self._fetched(name, {path: data for path, data in FILES.items() if path != "README.md"})
        self._peers = peers
        return done if isinstance(done, str) else hub.sent_bytes - before

    def _from(self, peer: str, work: Callable[[], int | str]) -> int | str:
        peers, self._peers = self._peers, (peer,)
        done = work()
        self._peers = peers
        return done

    def _cache(self, name: str) -> Path:
        return self._root / name / "hub"

    def _directory(self, name: str) -> Path:
        return self._root / name / "directory"

    @contextlib.contextmanager
    def _at(self, name: str, *, peers: tuple[str, ...] = ()) -> Iterator[swarm.Settings]:
        """A machine: its cache of the hub, and settings of its node."""
        given = {"cache": self._root / name / "swarm", "mdns": False, "peers": peers, "listen": "127.0.0.1:0"}
        plain = {"links": "0", "shared": "0", "local_dir": "0"}.get(self._layout, "1")
        with _environment(HF_HUB_CACHE=str(self._cache(name)), HF_HUB_DISABLE_SYMLINKS=plain):
            yield swarm.Settings.load(given)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _told(work: Callable[[], int | str]) -> int | str:
    try:
        return work()
    except (SwarmError, RuntimeError) as error:
        return str(error)


def _is_as(wanted: int | str, found: int | str) -> bool:
    return wanted in found if isinstance(wanted, str) and isinstance(found, str) else wanted == found


def _hub(model: Model) -> Hub:
    # As at the real hub, contents come from another host: a client follows no redirect to it when it asks for names.
    return Hub({MODEL: model}, store_host="127.0.0.2")


def rows(python: str) -> Iterator[dict[str, Any]]:
    """A row for each layout that the huggingface_hub of an interpreter writes."""
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(python, Path(folder))
        try:
            for layout in judge.layouts:
                models = [Model(files, xet=layout == "shared") for files in (FILES, NEWER)]
                with _hub(models[0]) as one, _hub(models[1]) as two:
                    row = Row(judge, layout, Path(folder, layout), (one, two))
                    steps = row.steps()
                    wrong = row.wrong(steps)
                    yield {"huggingface_hub": judge.about["version"], "layout": layout, **steps, "wrong": wrong}
        finally:
            judge.close()


def main() -> int:
    """Prints a row for each layout of each version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters with huggingface_hub")
    options = parser.parse_args()
    found = []
    if not options.json:
        print(f"Python {platform.python_version()}, swarm {swarm.__version__}; a model of {MODEL_BYTES} bytes\n")
        names = ["huggingface_hub", "layout", *STEPS]
        print("| " + " | ".join(names) + " |\n| " + " | ".join("---" for _ in names) + " |")
    for python in options.python:
        for row in rows(python):
            found.append(row)
            if not options.json:
                print("| " + " | ".join(str(row.get(name, "-")) for name in names) + " |", flush=True)
    if options.json:
        print(json.dumps(found))
    return 1 if any(row["wrong"] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
