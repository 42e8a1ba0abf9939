"""`swarm.fetch` and `swarm.serve` as users call them, with several nodes of one process beside one another."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import swarm
from swarm import Settings
from swarm.api import HUB_CACHE
from swarm.checkpoint import digest_cache
from swarm.cli.verify import verify
from swarm.content.manifest import Digest, Manifest, ModelId
from swarm.errors import (
    FetchTimeout,
    ManifestConflict,
    ManifestNotFound,
    SettingsError,
    Stalled,
    StoreConflict,
    StoreError,
)
from swarm.node.fetch import Fetched
from swarm.runtime import runtime
from swarm.store.directory import DirectoryStore

pytestmark = pytest.mark.usefixtures("brief")

MODEL = ModelId("org/model")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    """The seed's settings."""
    cache = tmp_path / "cache"
    return Settings(name="seed", mdns=False, cache=cache, find_timeout_s=5, stall_timeout_s=5, origin="none")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(100_000, dtype=torch.float32), "b": torch.ones(3, 5, dtype=torch.bfloat16)}


@pytest.fixture
def served(here: Settings, state: dict[str, torch.Tensor]) -> Iterator[swarm.Served]:
    with swarm.serve(state, model_id=MODEL, settings=here) as served:
        yield served


def beside(here: Settings, served: swarm.Served, *, name: str = "newcomer") -> Settings:
    """Settings of another node, which knows the seed's address."""
    return Settings(
        name=name,
        mdns=False,
        cache=here.cache,
        peers=(served.address,),
        find_timeout_s=5,
        stall_timeout_s=5,
        origin="none",
    )


@pytest.fixture
def there(here: Settings, served: swarm.Served) -> Settings:
    return beside(here, served)


def equal(weights: swarm.Weights, state: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == state.keys() and all(torch.equal(weights[name], state[name]) for name in state)


def nodes() -> int:
    """How many nodes of this process are open."""

    async def count() -> int:
        return len(runtime()._nodes)

    return runtime().run(count())


def test_are_tensors_fetched(there: Settings, state: dict[str, torch.Tensor]) -> None:
    with swarm.fetch(MODEL, settings=there) as weights:
        assert equal(weights, state)
        assert (len(weights), list(weights)) == (2, ["a", "b"])
        assert weights.path is None
        assert weights.fetched.sources == {"seed": weights.fetched.bytes}
        assert repr(weights) == f"<Weights org/model {weights.digest[:12]} 2 tensors>"


def test_is_nothing_logged_while_all_is_well(
    here: Settings, state: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with swarm.serve(state, model_id=MODEL, settings=here) as served:
        swarm.fetch(MODEL, settings=beside(here, served)).close()
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    opening = "no cluster key: listening on this machine only (--key-file opens the node to members)"
    choice = "transport=inproc to seed because both nodes are in this process; tcp also possible"
    assert said == [("INFO", line) for line in (opening, opening, choice)]


def test_are_tensors_fetched_into_those_of_the_caller(there: Settings, state: dict[str, torch.Tensor]) -> None:
    mine = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with swarm.fetch(MODEL, into=mine, settings=there) as weights:
        assert weights["a"] is mine["a"]
        assert equal(weights, state)


def test_is_a_directory_fetched_and_served_again(
    tmp_path: Path, here: Settings, served: swarm.Served, state: dict[str, torch.Tensor]
) -> None:
    there = beside(here, served)
    with swarm.fetch(MODEL, out=tmp_path / "out", settings=there) as weights:
        assert weights.path == tmp_path / "out"
        assert dict(weights) == {}
        assert (tmp_path / "out/model.safetensors").stat().st_size == weights.fetched.bytes
    with pytest.raises(SettingsError, match="offered as 'org/model'"):
        swarm.serve(tmp_path / "out", settings=here)
    served.close()
    with swarm.serve(tmp_path / "out", settings=here) as again:
        assert (again.model_id, again.digest) == ("out", served.digest)
        with swarm.fetch("out", settings=beside(here, again)) as weights:
            assert equal(weights, state)


def test_is_the_hub_cache_filled_and_served_from(here: Settings, there: Settings) -> None:
    with swarm.fetch(MODEL, out=swarm.HUB_CACHE, settings=there) as weights:
        assert weights.path is not None
        assert (weights.path / "model.safetensors").is_file()
    with swarm.serve(MODEL, settings=here) as again:
        assert (again.model_id, again.digest) == (MODEL, weights.digest)


def test_does_a_running_loop_go_on_meanwhile(there: Settings, state: dict[str, torch.Tensor]) -> None:
    async def scenario() -> None:
        fetching = asyncio.create_task(swarm.fetch_async(MODEL, settings=there))
        turns = 0
        while not fetching.done():
            turns += 1
            await asyncio.sleep(0.001)
        assert turns > 1
        weights = await fetching
        assert equal(weights, state)
        weights.close()

    asyncio.run(scenario())


def test_does_cancelling_give_the_node_back(here: Settings) -> None:
    async def scenario() -> None:
        fetching = asyncio.create_task(swarm.fetch_async("org/missing", settings=here))
        while not nodes():  # noqa: ASYNC110 - another loop opens the node; `wait_for` ends this
            await asyncio.sleep(0.005)
        fetching.cancel()
        await asyncio.gather(fetching, return_exceptions=True)
        while nodes():  # noqa: ASYNC110 - another loop's doing; `wait_for` ends this
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_do_threads_fetch_one_id_at_once_on_one_node(there: Settings, state: dict[str, torch.Tensor]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: swarm.fetch(MODEL, settings=there), range(4)))
    assert all(equal(weights, state) for weights in found)
    assert len({weights["a"].data_ptr() for weights in found}) == 4
    sent = [set(weights.fetched.sources) for weights in found]
    assert sorted(sent, key=str) == [{"newcomer"}, {"newcomer"}, {"newcomer"}, {"seed"}]
    for weights in found:
        weights.close()


def test_do_several_nodes_fetch_at_once(here: Settings, served: swarm.Served, state: dict[str, torch.Tensor]) -> None:
    with ThreadPoolExecutor(4) as pool:
        names = [f"newcomer-{number}" for number in range(4)]
        found = list(pool.map(lambda name: swarm.fetch(MODEL, settings=beside(here, served, name=name)), names))
    assert all(equal(weights, state) for weights in found)
    for weights in found:
        weights.close()


def test_is_what_this_process_serves_itself_copied(
    here: Settings, served: swarm.Served, state: dict[str, torch.Tensor]
) -> None:
    with swarm.fetch(MODEL, settings=here) as weights:
        assert equal(weights, state)
        assert weights["a"].data_ptr() != state["a"].data_ptr()
        assert weights.fetched.sources == {"seed": weights.fetched.bytes}


def test_does_closing_release_the_node(here: Settings, there: Settings, served: swarm.Served) -> None:
    assert nodes() == 1
    weights = swarm.fetch(MODEL, settings=there)
    assert nodes() == 2
    weights.close()
    weights.close()
    assert nodes() == 1
    served.close()
    served.close()
    assert nodes() == 0
    assert weights["a"].numel() == 100_000  # tensors stay valid


def test_is_what_was_fetched_served_on(here: Settings, served: swarm.Served, state: dict[str, torch.Tensor]) -> None:
    with swarm.fetch(MODEL, settings=beside(here, served, name="middle")):
        (middle,) = runtime().run(_addresses("middle"))
        served.close()
        last = Settings(name="last", mdns=False, cache=here.cache, peers=(middle,), find_timeout_s=5)
        with swarm.fetch(MODEL, settings=last) as weights:
            assert weights.fetched.sources == {"middle": weights.fetched.bytes}
            assert equal(weights, state)


async def _addresses(name: str) -> list[str]:
    return [shared.node.address for shared in runtime()._nodes.values() if shared.node.name == name]


def test_is_a_pinned_digest_held_to(
    here: Settings, served: swarm.Served, there: Settings, state: dict[str, torch.Tensor]
) -> None:
    with swarm.serve({"a": torch.zeros(3)}, model_id=MODEL, settings=here) as other:
        with pytest.raises(ManifestConflict, match=served.digest[:16]):
            swarm.fetch(MODEL, settings=there)
        with swarm.fetch(MODEL, digest=other.digest, settings=there) as weights:
            assert torch.equal(weights["a"], torch.zeros(3))
        with swarm.fetch(MODEL, digest=served.digest, settings=there) as weights:
            assert equal(weights, state)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"device": "tpu"}, "device: 'tpu' is not 'cpu', 'cuda' or"),
        ({"device": "cuda:0", "out": "out"}, "device: cannot be combined with out"),
        ({"device": "cuda:77"}, "device: 'cuda:77'"),
        ({"out": "out", "into": {}}, "out: cannot be combined with into"),
        ({"digest": "abc"}, "digest: 'abc' is not a digest"),
        ({"digest": "A" * 64}, "digest: "),
        ({"timeout_s": 0}, "timeout_s: 0 is not above zero"),
        ({"timeout_s": -1.5}, "timeout_s: -1.5 is not above zero"),
        ({"timeout_s": math.nan}, "timeout_s: nan is not above zero"),
    ],
)
def test_is_a_wrong_argument_told(here: Settings, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        swarm.fetch(MODEL, settings=here, **wrong)
    assert nodes() == 0


@pytest.mark.parametrize("model_id", ["../x", "a/b/c", ""])
def test_must_what_goes_to_the_hub_cache_be_a_model_of_the_hub(here: Settings, model_id: str) -> None:
    with pytest.raises(SettingsError, match="Hugging Face"):
        swarm.fetch(model_id, out=HUB_CACHE, settings=here)


def test_does_a_fetch_into_memory_without_torch_fail_at_once(here: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="need torch: pip install torch"):
        swarm.fetch(MODEL, settings=here)


@pytest.mark.parametrize(
    ("into", "says"),
    [
        ({"a": torch.zeros(100_000)}, "b"),
        ({"a": torch.zeros(5), "b": torch.zeros(3, 5, dtype=torch.bfloat16)}, "a"),
        ({"a": torch.zeros(100_000, dtype=torch.int32), "b": torch.zeros(3, 5, dtype=torch.bfloat16)}, "a"),
    ],
)
def test_are_tensors_that_do_not_match_refused(there: Settings, into: dict[str, torch.Tensor], says: str) -> None:
    with pytest.raises(StoreConflict, match=says):
        swarm.fetch(MODEL, into=into, settings=there)
    assert nodes() == 1


def test_is_a_file_in_place_of_the_directory_kept(tmp_path: Path, there: Settings) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreConflict, match="is not a directory"):
        swarm.fetch(MODEL, out=tmp_path / "out", settings=there)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_path_that_cannot_be_looked_at_is_an_error_with_its_name(there: Settings, tmp_path: Path) -> None:
    """Too long for any file system; a directory that the user may not enter is the same to `stat`."""
    path = str(tmp_path / ("x" * 300))
    for attempt in (
        lambda: swarm.serve(path, model_id=MODEL, settings=there),
        lambda: swarm.fetch(MODEL, out=path, settings=there),
        lambda: verify(path, revision=None, digest=None, settings=there),
    ):
        with pytest.raises(StoreError, match="xxx: File name too long"):
            attempt()


def test_does_a_cache_that_cannot_be_written_to_spoil_nothing(
    tmp_path: Path, served: swarm.Served, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no directory")
    there = Settings(mdns=False, peers=(served.address,), cache=tmp_path / "file" / "cache")
    with swarm.fetch(MODEL, out=tmp_path / "out", settings=there) as weights:
        assert weights.path == tmp_path / "out"
    assert "will know nothing of it" in caplog.text


def test_does_a_failure_after_the_fetch_stop_serving(there: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreError("the cache is broken")

    monkeypatch.setattr("swarm.checkpoint.hf_publish.CacheEntry.publish", fail)
    with swarm.fetch(MODEL, settings=Settings(**{**vars(there), "name": "newcomer"})):  # keeps the node open
        assert nodes() == 2
        with pytest.raises(StoreError, match="the cache is broken"):
            swarm.fetch(MODEL, out=HUB_CACHE, settings=there)
        assert runtime().run(_users("newcomer")) == [1]


async def _users(name: str) -> list[int]:
    found = [shared.node for shared in runtime()._nodes.values() if shared.node.name == name]
    return [share.users for node in found for share in node._shares.shares.values()]


def test_does_the_callers_deadline_hold_while_no_peer_is_found(here: Settings) -> None:
    with pytest.raises(ManifestNotFound, match="no peer was found"):
        swarm.fetch(MODEL, timeout_s=0.05, settings=here)
    assert nodes() == 0


def test_does_the_callers_deadline_hold_while_nothing_arrives(there: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.transfer.upload_driver.UploadDriver._handle", lambda *_: None)
    with pytest.raises(FetchTimeout, match=r"0% complete after the 0\.2 s allowed") as caught:
        swarm.fetch(MODEL, timeout_s=0.2, settings=there)
    assert (caught.value.timeout_s, caught.value.fraction) == (0.2, 0.0)
    assert nodes() == 1


def test_does_a_fetch_that_gets_nothing_stall(
    here: Settings, served: swarm.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarm.transfer.upload_driver.UploadDriver._handle", lambda *_: None)
    there = Settings(mdns=False, cache=here.cache, peers=(served.address,), stall_timeout_s=0.2)
    with pytest.raises(Stalled, match="run the same fetch again"):
        swarm.fetch(MODEL, settings=there)


def test_must_tensors_be_given_a_name(here: Settings, state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(SettingsError, match="model_id"):
        swarm.serve(state, settings=here)


def test_is_a_source_of_no_tensors_refused(here: Settings) -> None:
    with pytest.raises(SettingsError, match="tensors: there are none"):
        swarm.serve({}, model_id=MODEL, settings=here)
    assert nodes() == 0


@pytest.mark.parametrize("what", ["org/not-cached", "./missing", Path("missing")])
def test_is_something_that_is_not_there_told(here: Settings, what: str | Path) -> None:
    with pytest.raises(SettingsError, match="path: "):
        swarm.serve(what, settings=here)


def test_is_the_source_closed_when_the_node_cannot_open(
    here: Settings, served: swarm.Served, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[object] = []
    monkeypatch.setattr("swarm.store.tensor_source.TensorSource.close", lambda self: closed.append(self))
    with pytest.raises(SettingsError, match="in use"):
        swarm.serve(state, model_id=MODEL, settings=Settings(mdns=False, cache=here.cache, listen=served.address))
    assert len(closed) == 1


def test_is_a_rate_of_nothing_a_number() -> None:
    assert Fetched(MODEL, Digest(""), 10, 0.0, {}, 0, 0).rate_bytes_per_s == 0
    assert Fetched(MODEL, Digest(""), 10, 2.0, {}, 0, 4).rate_bytes_per_s == 3


@pytest.mark.parametrize("out", ["out", HUB_CACHE])
@pytest.mark.parametrize("processes", [False, True], ids=["one node", "a node each"])
def test_two_fetches_into_one_place_both_end_well(
    here: Settings, served: swarm.Served, out: Any, processes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = beside(here, served)
    other = beside(here, served, name="other") if processes else settings
    with ThreadPoolExecutor(4) as pool:
        every = (settings, other, settings, other)
        fetched = list(pool.map(lambda chosen: swarm.fetch(MODEL, out=out, settings=chosen), every))
    assert len({weights.path for weights in fetched}) == 1
    path = fetched[0].path
    assert path is not None
    assert [file.name for file in path.iterdir()] == ["model.safetensors"]
    assert sum(weights.fetched.sources.get("seed", 0) for weights in fetched) == fetched[0].fetched.bytes
    said = [record.getMessage() for record in caplog.records if "waiting for it" in record.getMessage()]
    assert len(said) <= 3
    for weights in fetched:
        weights.close()


def test_a_fetch_waits_for_a_place_until_its_deadline(there: Settings, served: swarm.Served, tmp_path: Path) -> None:
    with swarm.fetch(MODEL, out=tmp_path / "first", settings=there) as first:
        store = DirectoryStore(tmp_path / "out", manifest_of(tmp_path / "first", there.cache))
        assert store.manifest.digest == first.digest
        with pytest.raises(FetchTimeout, match=r"after the 0\.5 s allowed"):
            swarm.fetch(MODEL, out=tmp_path / "out", settings=there, timeout_s=0.5)
        store.close()
        swarm.fetch(MODEL, out=tmp_path / "out", settings=there, timeout_s=30).close()


def manifest_of(directory: Path, cache: Path) -> Manifest:
    manifest = digest_cache.recall(cache, directory)
    assert manifest is not None
    return manifest


def test_is_a_module_filled(there: Settings, state: dict[str, torch.Tensor]) -> None:
    module = torch.nn.Module()
    module.a = torch.nn.Parameter(torch.zeros(100_000))
    module.register_buffer("b", torch.zeros(3, 5, dtype=torch.bfloat16))
    with swarm.fetch(MODEL, into=module, settings=there) as weights:
        assert torch.equal(module.a, state["a"])
        assert torch.equal(module.b, state["b"])  # type: ignore[arg-type]
        assert weights["a"] is module.a
        assert module.a.requires_grad
    with pytest.raises(StoreConflict, match=r"2 missing: 'a', 'b'; 2 unexpected: 'weight', 'bias'"):
        swarm.fetch(MODEL, into=torch.nn.Linear(2, 2), settings=there)


def test_is_progress_told_in_the_thread_of_the_caller(there: Settings) -> None:
    seen: list[tuple[swarm.Progress, int]] = []
    with swarm.fetch(
        MODEL, settings=there, progress=lambda state: seen.append((state, threading.get_ident()))
    ) as weights:
        last, _ = seen[-1]
        assert (last.done, last.bytes_done, last.bytes_total, last.peers) == (True, *[weights.fetched.bytes] * 2, 1)
        assert {thread for _, thread in seen} == {threading.get_ident()}


def test_does_an_error_of_the_callback_end_the_fetch(here: Settings, there: Settings) -> None:
    def refuse(state: swarm.Progress) -> None:
        raise ZeroDivisionError(state)

    with pytest.raises(ZeroDivisionError):
        swarm.fetch(MODEL, settings=there, progress=refuse)
    with swarm.fetch(MODEL, settings=there) as weights:
        assert len(weights) == 2


def test_is_progress_told_to_coroutines_in_their_loop(there: Settings) -> None:
    seen: list[asyncio.AbstractEventLoop] = []

    async def main() -> swarm.Weights:
        weights = await swarm.fetch_async(
            MODEL, settings=there, progress=lambda _: seen.append(asyncio.get_running_loop())
        )
        assert set(seen) == {asyncio.get_running_loop()}
        return weights

    asyncio.run(main()).close()


def test_does_fetch_warn_inside_an_event_loop_and_name_the_other_call(there: Settings) -> None:
    async def main() -> None:
        with pytest.warns(RuntimeWarning, match=r"blocks the event loop.*fetch_async") as caught:
            weights = swarm.fetch(MODEL, settings=there)
        assert len(weights) == 2
        weights.close()
        assert caught[0].filename == __file__

    asyncio.run(main())
