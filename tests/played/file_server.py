"""A server that reads the files of a model before it answers, as inference engines do: `file_server.py DIRECTORY`."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    root = Path(sys.argv[1])
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and ".swarm" not in path.parts]
    assert files, f"{root} is empty"
    body = json.dumps({str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in ("/health", "/files") else 404)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    ThreadingHTTPServer(("0.0.0.0", 8000), Handler).serve_forever()


main()
