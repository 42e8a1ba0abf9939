"""huggingface_hub as writer and judge of caches, in an interpreter of its own: it imports huggingface_hub alone.

    PYTHON bench/hub_judge.py < requests

Each line of input is a request, each line of output its answer, both JSON. A request is done in a child process, so
that nothing which huggingface_hub keeps in memory hides what lies on the disk.

    {"do": "about"}                                         version, and which layouts this version writes
    {"do": "download", "cache": DIR, "layout": LAYOUT, ...} downloads as a user would, with the hub in reach
    {"do": "look", "cache": DIR, ...}                       the snapshot without a network, and the warnings of a scan
    {"do": "delete", "cache": DIR, "revision": COMMIT}      removes a revision; answers what is left
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MODEL = "org/model"


def about() -> dict[str, Any]:
    import huggingface_hub

    return {
        "version": huggingface_hub.__version__,
        "listing": find_spec("huggingface_hub._tree_cache") is not None,
        "shared": find_spec("huggingface_hub.utils._shared_blobs") is not None,
    }


def download(request: dict[str, Any]) -> dict[str, Any]:
    import huggingface_hub

    file_download: Any = huggingface_hub.file_download
    endpoint, layout = request["endpoint"], request["layout"]
    if layout == "copies":
        # Every version asks this function; Windows without developer mode, exFAT and HF_HUB_DISABLE_SYMLINKS answer no.
        file_download.are_symlinks_supported = lambda *_: False
    file_download.is_xet_available = lambda: layout == "shared"
    if layout == "shared":
        # hf_xet needs the hub's own store. Contents come over HTTP; all that is laid out is huggingface_hub's.
        def xet_get(*, incomplete_path: Path, xet_file_data: Any, **_: Any) -> None:
            with urllib.request.urlopen(f"{endpoint}/xet/{xet_file_data.file_hash}") as answer:
                Path(incomplete_path).write_bytes(answer.read())

        file_download.xet_get = xet_get
    where = {"local_dir": request["local_dir"]} if layout == "local_dir" else {}
    patterns = {"allow_patterns": request["allow"]} if request.get("allow") else {}
    found = huggingface_hub.snapshot_download(
        MODEL, cache_dir=request["cache"], endpoint=endpoint, revision=request.get("revision"), **where, **patterns
    )
    return {"path": found}


def look(request: dict[str, Any]) -> dict[str, Any]:
    import huggingface_hub

    where = {"local_dir": request["local_dir"]} if request.get("local_dir") else {}
    patterns = {"allow_patterns": request["allow"]} if request.get("allow") else {}
    path = huggingface_hub.snapshot_download(
        MODEL,
        cache_dir=request["cache"],
        revision=request.get("revision"),
        local_files_only=True,
        **where,
        **patterns,
    )
    # A download to a directory leaves a ref alone in the cache, which the scan of huggingface_hub itself complains of.
    scanned = [] if where else huggingface_hub.scan_cache_dir(request["cache"]).warnings
    return {"path": path, "warnings": [str(warning) for warning in scanned]}


def delete(request: dict[str, Any]) -> dict[str, Any]:
    import huggingface_hub

    huggingface_hub.scan_cache_dir(request["cache"]).delete_revisions(request["revision"]).execute()
    left = [path for path in Path(request["cache"]).rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {"left": sorted(path.relative_to(request["cache"]).as_posix() for path in left)}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer, from a child process."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as stream:
            text = stream.read()
        os.waitpid(child, 0)
        return dict(json.loads(text))
    os.close(reading)
    try:
        work = {"about": lambda _: about(), "download": download, "look": look, "delete": delete}
        found = work[request["do"]](request)
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    with os.fdopen(writing, "w") as stream:
        stream.write(json.dumps(found))
    os._exit(0)


def main() -> None:
    """Answers until the end of the input."""
    import huggingface_hub.file_download

    _ = huggingface_hub.snapshot_download, huggingface_hub.scan_cache_dir  # imported once, before the children
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
