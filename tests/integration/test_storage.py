"""`swarm storage` as the init container of replicas: one copy of the origin for all, and what a restart finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub import Hub, Model, read_files

from swarm.cli.demo import write_made_up

from .processes import MODEL, PORTS, QUICK, Machine, contents

pytestmark = pytest.mark.integration


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    root = tmp_path / "original"
    root.mkdir()
    write_made_up(root / "model.safetensors", [("a.weight", (3_000_000,))], rng=np.random.default_rng(5))
    (root / "config.json").write_text('{"model_type": "made up"}')
    return read_files(root)


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub({MODEL: Model(files)}, total=20e6) as made:
        yield made


def test_do_replicas_that_start_together_fill_their_directories_from_one_copy(
    machine: Machine, hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    ports = [next(PORTS) for _ in range(3)]
    peers = ",".join(f"127.0.0.1:{port}" for port in ports)
    commit = hub.models[MODEL].commit
    sources = [f"hf://{MODEL}", f"hf://{MODEL}:{commit}", MODEL]
    started = [
        machine.start(
            "storage", source, tmp_path / f"mnt{number}", "--no-mdns", "--listen", f"127.0.0.1:{port}",
            environment={
                "HF_ENDPOINT": hub.endpoint, "SWARM_PEERS": peers, "SWARM_CACHE": str(tmp_path / f"cache{number}"),
            },
        )
        for number, (source, port) in enumerate(zip(sources, ports, strict=True))
    ]  # fmt: skip
    for number, process in enumerate(started):
        ended = process.end()
        assert ended.code == 0, ended.err
        assert f"{tmp_path}/mnt{number}: complete, 6 MB" in ended.err
        assert contents(tmp_path / f"mnt{number}") == files
    assert hub.sent_bytes < 2 * sum(map(len, files.values()))


def test_does_a_restarted_container_keep_what_it_has_and_a_wrong_one_say_why(
    machine: Machine, hub: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    environment = {**QUICK, "HF_ENDPOINT": hub.endpoint, "STORAGE_ALLOW_PATTERNS": '["*.safetensors"]'}
    mount = tmp_path / "mnt"

    def storage(source: str) -> tuple[int, str]:
        ended = machine.run("storage", source, mount, "--no-mdns", environment=environment)
        return ended.code, ended.err

    code, said = storage(f"hf://{MODEL}")
    assert code == 0, said
    assert contents(mount) == {"model.safetensors": files["model.safetensors"]}
    sent = hub.sent_bytes
    code, said = storage(f"hf://{MODEL}")
    assert code == 0, said
    assert hub.sent_bytes - sent < 100_000  # its listing
    code, said = storage("hf://org/nothing")
    assert code == 3
    assert said.splitlines()[-1].startswith("swarm: no peer serves 'org/nothing'")
