"""vLLM engines as processes: started, waited for, compared and killed."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 300.0  # of a machine that does other things as well
LOOK_EVERY_S = 0.05
MODEL_ID = f"org/model-{secrets.token_hex(4)}"  # multicast DNS finds the engines of other runs on this machine, too
SWARM = (sys.executable, "-m", "swarm", "run", "--model-id", MODEL_ID)


@dataclass(frozen=True)
class Attempt:
    """What the log says of one tier."""

    tier: str
    taken: bool
    why: str


class Engine:
    """One engine. `cache` is what its machine would have: two engines of one host share it, of two hosts do not."""

    def __init__(
        self,
        model: Path,
        cache: Path,
        log: Path,
        *,
        nothing: bool = False,
        peers: str = "",
        environment: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        command = [sys.executable, "-m", "engine.generate", "--model", str(model)]
        if nothing:
            command = [*SWARM, "--", *command]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SWARM_", "HF_", "ENGINE_"))}
        cache.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                cwd=cache,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **kept,
                    "HF_HUB_OFFLINE": "1",
                    "HF_HOME": str(cache / "hf"),
                    "VLLM_NO_USAGE_STATS": "1",
                    "DO_NOT_TRACK": "1",
                    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",  # this tree, whichever is installed
                    "SWARM_CACHE": str(cache),
                    "SWARM_MODEL_ID": MODEL_ID,
                    "SWARM_FSYNC": "0",
                    **({"SWARM_PEERS": peers, "SWARM_MDNS": "0"} if peers else {}),
                    "ENGINE_EXTRA": json.dumps(dict(extra or {})),
                    "ENGINE_BEGAN": str(time.time()),
                    **(environment or {}),
                },
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str) -> Engine:
        """Returns once the log has these words; fails when the engine ends first, or takes too long."""
        return self.wait_until(lambda: words in self.said, repr(words))

    def wait_until(self, true: Callable[[], bool], what: str) -> Engine:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not true():
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no {what} from {self}, exit code {self._process.poll()}:\n{self.said[-6000:]}")
            time.sleep(LOOK_EVERY_S)
        return self

    def serves(self, tier: str = "loaded") -> Engine:
        """Returns once others can fetch."""
        words = {"loaded": "ready, serves", "checkpoint": "serves the files"}[tier]
        return self.wait_for(words)

    @property
    def report(self) -> dict[str, Any]:
        """What it printed when it had answered."""
        self.wait_for("ANSWERED ")
        self.wait_until(lambda: self.said.partition("ANSWERED ")[2].count("\n") > 0, "whole report")
        return dict(json.loads(self.said.partition("ANSWERED ")[2].splitlines()[0]))

    @property
    def tokens(self) -> list[list[int]]:
        found = self.report["tokens"]
        assert len(found) == 50
        assert len({tuple(one) for one in found}) > 10, "all prompts have the same answer: this compares nothing"
        return list(found)

    @property
    def address(self) -> str:
        """Of its node."""
        self.wait_until(lambda: re.search(r": node \S+ at \S+", self.said) is not None, "node")
        found = re.search(r": node \S+ at (\S+)", self.said)
        assert found
        return found[1]

    @property
    def attempts(self) -> list[Attempt]:
        """Every decision."""
        found = re.findall(r"rank \S+: (\w+) tier (taken in [0-9.]+ s|skipped): (.*)", self.said)
        return [Attempt(tier, verb != "skipped", why) for tier, verb, why in found]

    @property
    def taken(self) -> str:
        """The tier that brought the weights."""
        return next(attempt.tier for attempt in self.attempts if attempt.taken)

    def why(self, tier: str) -> str:
        return next(attempt.why for attempt in self.attempts if attempt.tier == tier)

    @property
    def started(self) -> int:
        """Process id."""
        return self._process.pid

    def end(self) -> int:
        """Its exit code, of its own accord."""
        return self._process.wait(START_TIMEOUT_S)

    def kill(self) -> None:
        """As `kill -9` does, with all its workers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        if self._process.stdin:
            self._process.stdin.close()

    def __repr__(self) -> str:
        return f"<Engine {self.log.stem}>"


class Server:
    """vLLM's API server, on a port that the system chose."""

    def __init__(self, model: Path, cache: Path, *, nothing: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        cache.mkdir()
        self._log = cache / "log"
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        words += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
        words += ["--max-num-seqs", "4", "--kv-cache-memory-bytes", str(64 << 20)]
        command = (
            [*SWARM, "--", *words] if nothing else [*words, "--load-format", "swarm", "--served-model-name", MODEL_ID]
        )
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SWARM_", "HF_"))}
        own = {"SWARM_CACHE": str(cache), "SWARM_MODEL_ID": MODEL_ID, "HF_HOME": str(cache / "hf")}
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                cwd=cache,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**kept, **own, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while words not in self.said:
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no {words!r} from the server:\n{self.said[-6000:]}")
            time.sleep(LOOK_EVERY_S)

    def answers(self, prompts: list[str], *, name: str) -> list[str]:
        """Greedy completions."""
        self.wait_for("Application startup complete")
        found = []
        for prompt in prompts:
            body = {"model": name, "prompt": prompt, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.port}/v1/completions",
                data=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                found.append(str(json.load(reply)["choices"][0]["text"]))
        return found

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
