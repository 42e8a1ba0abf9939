"""Bytes transferred for each layout of the Hugging Face cache: a fetch, the same again, another revision, a mending.

    python bench/cache_layouts.py [--json]

Each layout is one that huggingface_hub writes: links into `blobs` (0.30 on), blobs that link into the cache-wide store
(2.0 on), plain copies (no symbolic links, with and without the listing of hub 2). huggingface_hub itself judges the
cache after each step: `snapshot_download(local_files_only=True)` and `scan_cache_dir`. Exits with 1 if a step is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ONE, TWO = "1" * 40, "2" * 40
DEADLINE_S = 60.0
MODEL = "org/model"
FILES = {
    "README.md": b"# model\n",
    "config.json": b'{"hidden_size": 8}',
    "pytorch_model.bin": bytes(range(256)) * 12_000,
    "tokenizer/vocab.txt": b"a\nb\n",
}
NEWER = FILES | {"config.json": b'{"hidden_size": 16}'}
LAYOUTS = ["links", "shared", "copies", "copies and listing"]
JUDGE = """
import sys, huggingface_hub
hub = sys.argv[1]
assert not huggingface_hub.scan_cache_dir(hub).warnings, huggingface_hub.scan_cache_dir(hub).warnings
print(huggingface_hub.snapshot_download("org/model", cache_dir=hub, local_files_only=True))
"""


def name_of(path: str, data: bytes) -> str:
    """The hub's name of a content."""
    if path.endswith(".bin"):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lay_out(home: Path, files: dict[str, bytes], commit: str, layout: str) -> None:
    """A snapshot as huggingface_hub writes it."""
    hub = home / "hub"
    folder = hub / "models--org--model"
    for path, data in files.items():
        place, blob = folder / "snapshots" / commit / path, folder / "blobs" / name_of(path, data)
        place.parent.mkdir(parents=True, exist_ok=True)
        if layout.startswith("copies"):
            place.write_bytes(data)
            continue
        blob.parent.mkdir(exist_ok=True)
        if layout == "shared" and path.endswith(".bin"):
            xet = hashlib.sha256(b"xet" + data).hexdigest()
            store = hub / "blobs" / xet[:2] / xet
            store.parent.mkdir(parents=True, exist_ok=True)
            (hub / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
            store.write_bytes(data)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        elif not blob.exists():
            blob.write_bytes(data)
        place.symlink_to(os.path.relpath(blob, place.parent))
    if layout == "copies and listing":
        listed = {p: {"size": len(d), "blob_id": name_of("", d)} | large(p, d) for p, d in files.items()}
        (folder / "trees").mkdir(exist_ok=True)
        (folder / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


def large(path: str, data: bytes) -> dict[str, Any]:
    """What a listing says of a file in large file storage."""
    return {"lfs_sha256": name_of(path, data), "lfs_size": len(data)} if path.endswith(".bin") else {}


class Machine:
    """Runs `swarm` with a cache of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seeds: list[subprocess.Popen[str]] = []

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that uses this Hugging Face home."""
        cache = self.root / f"cache-{home.name}"
        return {**os.environ, "HF_HOME": str(home), "SWARM_CACHE": str(cache), "SWARM_MDNS": "false"}

    def serve(self, home: Path) -> str:
        """The address of a seed of the cached model."""
        log = (self.root / f"{home.name}.log").open("w+")
        command = [sys.executable, "-m", "swarm", "serve", MODEL]
        self.seeds.append(subprocess.Popen(command, env=self.environment(home), stdout=log, stderr=log, text=True))
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            text = Path(log.name).read_text()
            if " ready: " in text:
                return next(line.split()[0] for line in text.splitlines() if " ready: " in line)
            time.sleep(0.05)
        raise RuntimeError(f"no seed in time: {text}")

    def fetched(self, home: Path, peer: str, files: dict[str, bytes]) -> int | str:
        """Bytes that a fetch transferred, or what is wrong."""
        command = [sys.executable, "-m", "swarm", "fetch", MODEL, "--json", "--no-seed", "--peer", peer]
        ended = subprocess.run(command, env=self.environment(home), capture_output=True, text=True, timeout=DEADLINE_S)
        if ended.returncode:
            return ended.stderr.splitlines()[-1]
        judged = subprocess.run([sys.executable, "-c", JUDGE, home / "hub"], capture_output=True, text=True, timeout=60)
        if judged.returncode:
            return judged.stderr.splitlines()[-1]
        snapshot = Path(judged.stdout.strip())
        if wrong := [path for path, data in files.items() if (snapshot / path).read_bytes() != data]:
            return f"wrong: {wrong}"
        report = json.loads(ended.stdout)
        return int(report["bytes"] - report["resumed_bytes"])

    def verified(self, home: Path) -> int:
        """The exit code of `swarm verify`."""
        command = [sys.executable, "-m", "swarm", "verify", MODEL]
        return subprocess.run(command, env=self.environment(home), capture_output=True, timeout=DEADLINE_S).returncode

    def close(self) -> None:
        """Ends the seeds."""
        for seed in self.seeds:
            seed.terminate()
            seed.wait(DEADLINE_S)


def row(layout: str, root: Path) -> dict[str, Any]:
    """The steps of one layout. Numbers are bytes, texts say what is wrong."""
    machine = Machine(root)
    try:
        lay_out(root / "old", FILES, ONE, layout)
        lay_out(root / "new", NEWER, TWO, "links")
        old, new = machine.serve(root / "old"), machine.serve(root / "new")
        model = sum(len(data) for path, data in FILES.items() if path != "README.md")
        steps: dict[str, Any] = {"empty cache": machine.fetched(root / "empty", old, FILES)}
        lay_out(root / "same", FILES, ONE, layout)
        steps["cache of this layout"] = machine.fetched(root / "same", old, FILES)
        steps["again"] = machine.fetched(root / "same", old, FILES)
        steps["verify"] = machine.verified(root / "same")
        steps["other revision"] = machine.fetched(root / "same", new, NEWER)
        lay_out(root / "damaged", FILES, ONE, layout)
        (weights,) = (root / "damaged").rglob("snapshots/*/pytorch_model.bin")
        weights.resolve().write_bytes(FILES["pytorch_model.bin"].swapcase())
        names = layout != "copies"  # without a listing nothing says what a plain copy should hold
        steps["verify damaged"] = machine.verified(root / "damaged") if names else 1
        steps["damaged"] = machine.fetched(root / "damaged", old, FILES) if names else len(FILES["pytorch_model.bin"])
        wanted = {
            "empty cache": model, "cache of this layout": 0, "again": 0, "verify": 0,
            "other revision": len(NEWER["config.json"]), "verify damaged": 1,
            "damaged": len(FILES["pytorch_model.bin"]),
        }  # fmt: skip
        return {"layout": layout, **steps, "right": steps == wanted}
    finally:
        machine.close()


def main() -> int:
    """Prints a row for each layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    rows = []
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(layout, Path(folder)))
        if not as_json:
            print("   ".join(f"{name}: {value}" for name, value in rows[-1].items()), flush=True)
    if as_json:
        print(json.dumps(rows))
    return 0 if all(found["right"] for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
