"""Two real vLLM engines: does the one that takes its weights from the other answer as it does, whatever happens?"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock
from unittest.mock import create_autospec

import pytest

from swarm.checkpoint import digest_cache, manifest_builder

from .engines import MODEL_ID, Engine, Server
from .models import PROMPTS, bigger, dense, write

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; .ci/run installs it"),
]

Models: TypeAlias = "Callable[[str], Path]"
Start: TypeAlias = "Callable[..., Engine]"

DTYPE = {"fp32": "float32", "bf16": "bfloat16", "int8": "bfloat16"}


def options(kind: str, **more: str) -> dict[str, Any]:
    return {"environment": {"ENGINE_DTYPE": DTYPE[kind.rpartition("-")[2]], **more}}


def nothing(tmp_path: Path) -> Path:
    """A model directory of a machine that has none: it holds neither weights nor config."""
    path = tmp_path / "nothing"
    path.mkdir(exist_ok=True)
    return path


def remember(model: Path, cache: Path) -> None:
    """Hashes a model, as a machine that has served it before has."""
    with mock.patch.object(digest_cache, "RACY_NS", 0):  # the files are younger than a cache trusts
        manifest_builder.checkpoint(model, cache_dir=cache)


@pytest.mark.parametrize(
    "kind",
    [
        "dense-fp32",
        pytest.param("dense-bf16", marks=pytest.mark.matrix),
        pytest.param("tied-bf16", marks=pytest.mark.matrix),
        pytest.param("tied-fp32", marks=pytest.mark.matrix),
        "mistied-fp32",
        "w8a8-int8",
        pytest.param("moe-bf16", marks=pytest.mark.matrix),
        pytest.param("mla-bf16", marks=pytest.mark.matrix),
    ],
)
def test_do_both_tiers_give_the_tokens_of_the_source(kind: str, models: Models, engine: Start, tmp_path: Path) -> None:
    a = engine("a", models(kind), **options(kind)).serves()
    b = engine("b", nothing(tmp_path), nothing=True, **options(kind))  # found by multicast DNS
    c = engine("c", nothing(tmp_path), nothing=True, extra={"tiers": "checkpoint"}, peers=a.address, **options(kind))
    assert a.taken == "disk"
    assert b.tokens == a.tokens
    assert b.taken == "loaded", b.attempts
    assert c.tokens == a.tokens
    assert c.taken == "checkpoint", c.attempts
    assert c.why("loaded") == "turned off"


def test_does_another_version_take_the_files_and_say_what_differs(
    models: Models, engine: Start, tmp_path: Path
) -> None:
    kind = "dense-fp32"
    a = engine("a", models(kind), **options(kind)).serves()
    b = engine(
        "b", nothing(tmp_path), nothing=True, peers=a.address, **options(kind, ENGINE_PRETENDS="0.99.0")
    ).wait_for("ANSWERED ")
    assert b.tokens == a.tokens
    assert b.taken == "checkpoint"
    assert "engine_version is 0.99.0 here and 0.32.0 there" in b.why("loaded")


def test_is_another_model_of_the_same_name_refused_and_named(models: Models, engine: Start, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write(ours, dense("float32", tied=False), seed=1)
    write(theirs, dense("float32", tied=False), seed=2)
    a = engine("a", theirs, **options("dense-fp32")).serves()
    alone = engine("alone", ours, environment={"ENGINE_FORMAT": "auto", "ENGINE_DTYPE": "float32"})
    remember(ours, tmp_path / "cache-b")
    b = engine("b", ours, peers=a.address, **options("dense-fp32"))
    assert b.tokens == alone.tokens
    assert b.tokens != a.tokens
    assert b.taken == "disk"
    assert "other content under the same name is refused" in b.why("loaded")
    assert a.address in b.why("loaded")


def test_is_a_newcomer_told_that_two_models_have_its_name(models: Models, engine: Start, tmp_path: Path) -> None:
    a = engine("a", write(tmp_path / "one", dense("float32", tied=False), seed=1), **options("dense-fp32"))
    c = engine("c", write(tmp_path / "two", dense("float32", tied=False), seed=2), **options("dense-fp32"))
    a.serves()
    c.serves()
    b = engine("b", nothing(tmp_path), nothing=True, peers=f"{a.address},{c.address}", **options("dense-fp32"))
    assert b.end() != 0
    assert "is served with 2 different contents" in b.said
    assert a.address in b.said
    assert c.address in b.said


@pytest.mark.parametrize("left", ["twin", pytest.param("files here", marks=pytest.mark.matrix)])
def test_does_a_newcomer_go_on_when_its_source_is_killed(left: str, engine: Start, tmp_path: Path) -> None:
    """A sends so slowly that most is missing when it dies; another instance goes on, or the files of B's own disk."""
    model = write(tmp_path / "model", bigger())
    brief = {"SWARM_STALL_TIMEOUT_S": "3", "SWARM_IDLE_TIMEOUT_S": "1"}
    slow = {"upload_limit": "1MB/s"}
    a = engine("a", model, extra=slow, **options("dense-fp32")).serves()
    expected, peers, where = a.tokens, a.address, model
    if left == "twin":
        c = engine("c", model, extra={"tiers": "", **slow}, peers=a.address, **options("dense-fp32")).serves()
        peers, where = f"{a.address},{c.address}", nothing(tmp_path)
    else:
        remember(model, tmp_path / "cache-b")
    b = engine("b", where, nothing=left == "twin", peers=peers, **options("dense-fp32", **brief))
    b.wait_for("fetches loaded tensors")
    a.kill()
    assert b.tokens == expected
    assert b.taken == ("loaded" if left == "twin" else "disk"), b.attempts


@pytest.mark.matrix
def test_does_a_source_outlive_a_newcomer_that_is_killed_and_is_it_forgotten(
    models: Models, engine: Start, tmp_path: Path
) -> None:
    """B is killed while it loads; C, which knew of B, starts as if there had never been any."""
    kind = "dense-fp32"
    a = engine("a", models(kind), extra={"upload_limit": "100kB/s"}, **options(kind)).serves()
    b = engine("b", nothing(tmp_path), nothing=True, peers=a.address, **options(kind))
    b.wait_for("fetches loaded tensors")
    stale = b.address
    b.kill()
    c = engine("c", nothing(tmp_path), nothing=True, peers=f"{stale},{a.address}", **options(kind))
    assert c.tokens == a.tokens
    assert c.taken == "loaded"


def test_is_a_corrupted_source_found_out(models: Models, engine: Start, tmp_path: Path) -> None:
    """A changes a tensor that it serves behind everybody's back: whoever fetches it notices, and takes another tier."""
    kind = "dense-fp32"
    a = engine("a", models(kind), **options(kind, ENGINE_CORRUPTS="1")).wait_for("CORRUPTED")
    brief = {"SWARM_STALL_TIMEOUT_S": "3"}
    b = engine("b", nothing(tmp_path), nothing=True, peers=a.address, **options(kind, **brief))
    assert b.tokens == a.tokens  # those that it gave before
    assert b.taken == "checkpoint"
    assert "failed" in b.why("loaded")


@pytest.mark.matrix
def test_do_three_newcomers_that_start_at_once_feed_each_other(models: Models, engine: Start, tmp_path: Path) -> None:
    kind = "dense-fp32"
    a = engine("a", models(kind), **options(kind)).serves()
    newcomers = [
        engine(f"n{number}", nothing(tmp_path), nothing=True, peers=a.address, **options(kind)) for number in range(3)
    ]
    for one in newcomers:
        assert one.tokens == a.tokens
        assert one.taken == "loaded"


@pytest.mark.matrix
def test_do_ranks_find_their_twins(models: Models, engine: Start, tmp_path: Path) -> None:
    """Two ranks each: every one takes what its twin holds, and the files are for the checkpoint tier, once a host."""
    two = {"ENGINE_TP": "2", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    kind = "dense-fp32"
    a = engine("a", models(kind), **options(kind, **two))
    a.wait_until(lambda: a.said.count("ready, serves") == 2, "two ranks that serve")
    b = engine("b", nothing(tmp_path), nothing=True, peers=a.address, **options(kind, **two))
    assert b.tokens == a.tokens
    assert [attempt.tier for attempt in b.attempts if attempt.taken] == ["loaded", "loaded"]
    a.kill()
    b.kill()
    c = engine("c", models(kind), **options(kind))
    c.serves()
    d = engine(
        "d", nothing(tmp_path), nothing=True, peers=c.address, extra={"tiers": "checkpoint"}, **options(kind, **two)
    )
    assert d.tokens == a.tokens
    assert [attempt.tier for attempt in d.attempts if attempt.taken] == ["checkpoint", "checkpoint"]


@pytest.mark.parametrize("told", ["reset_weights", pytest.param("reload_weights", marks=pytest.mark.matrix)])
def test_does_an_engine_that_changes_its_weights_stop_serving_them(
    told: str, models: Models, engine: Start, tmp_path: Path
) -> None:
    kind = "dense-fp32"
    a = engine("a", models(kind), **options(kind, ENGINE_TOLD=f"{told} sleep wake_up")).wait_for("TOLD wake_up")
    assert f"until the engine starts anew: the engine was told to {told.replace('_', ' ')}" in a.said
    b = engine("b", nothing(tmp_path), nothing=True, peers=a.address, **options(kind))
    assert b.tokens == a.tokens
    assert b.taken == "checkpoint"
    assert "no twin" in b.why("loaded")


def test_does_an_engine_that_slept_serve_again(models: Models, engine: Start, tmp_path: Path) -> None:
    kind = "dense-fp32"
    a = engine("a", models(kind), **options(kind, ENGINE_TOLD="sleep wake_up"))
    a.wait_until(lambda: a.said.count("ready, serves") == 2, "serving before and after")
    assert "served no longer, until they are back: the engine was told to sleep" in a.said
    b = engine("b", nothing(tmp_path), nothing=True, peers=a.address, **options(kind))
    assert b.tokens == a.tokens
    assert b.taken == "loaded", b.attempts


def test_are_updated_weights_given_to_who_asks_for_their_version_alone(
    models: Models, engine: Start, tmp_path: Path
) -> None:
    kind, plain = "dense-fp32", {"ENGINE_PLAIN": "1"}
    trained = write(tmp_path / "trained", dense("float32", tied=False), seed=2)
    a = engine("a", models(kind), **options(kind, ENGINE_UPDATES=str(trained), **plain))
    a.wait_until(lambda: a.said.count("ready, serves") == 2, "serving before and after")
    b = engine(
        "b", nothing(tmp_path), nothing=True, peers=a.address, **options(kind, SWARM_WEIGHT_VERSION="v1", **plain)
    )
    assert b.tokens == a.tokens
    assert b.taken == "loaded", b.attempts
    b.kill()
    c = engine("c", nothing(tmp_path), nothing=True, peers=a.address, **options(kind, **plain))
    assert c.tokens != a.tokens
    assert c.taken == "checkpoint"
    assert "weight_version is (not said) here and v1 there" in c.why("loaded")
    c.kill()
    d = engine("d", models(kind), peers=a.address, **options(kind, SWARM_WEIGHT_VERSION="v2", **plain))
    assert d.end() != 0
    assert "no tier is left to load weight version 'v2' from" in d.said
    assert "v2 here and v1 there" in d.said


@pytest.mark.matrix
def test_are_updated_weights_not_served_that_processing_has_packed(
    models: Models, engine: Start, tmp_path: Path
) -> None:
    trained = write(tmp_path / "trained", dense("float32", tied=False), seed=2)
    a = engine("a", models("dense-fp32"), **options("dense-fp32", ENGINE_UPDATES=str(trained)))
    a.wait_for("ANSWERED ")
    assert "weight version 'v1' is not served: processing changed" in a.said
    assert a.said.count("ready, serves") == 1


class RecordingServer:
    """A tensor server that records the calls of the hooks."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *words: self.calls.append(" ".join([name, *words[:1]]))


@pytest.mark.filterwarnings("ignore")  # of what vLLM imports
@pytest.mark.parametrize(
    ("method", "arguments", "call"),
    [
        ("sleep", {"level": 1}, "pause the engine was told to sleep"),
        ("wake_up", {"tags": None}, "resume"),
        ("wake_up", {"tags": ["weights"]}, "resume"),
        ("wake_up", {"tags": ["kv_cache"]}, None),
        ("discard", {"tags": ("kv_cache",)}, None),
        ("discard", {"tags": ("weights",)}, "begin_change the engine was told to discard its weights"),
        ("reload_weights", {}, "begin_change the engine was told to reload weights"),
        ("reset_weights", {}, "begin_change the engine was told to reset weights"),
        ("start_weight_update", {}, "begin_change the engine was told to start weight update"),
        ("start_draft_weight_update", {}, "begin_change the engine was told to start draft weight update"),
        ("update_weights", {"update_info": {}}, "begin_change the engine was told to update weights"),
        ("finish_weight_update", {}, "end_change"),
        (
            "elastic_ep_execute",
            {"execute_method": "load_model"},
            "begin_change the engine was told to elastic ep execute",
        ),
    ],
)
def test_which_calls_does_a_tensor_server_get_for_a_call_of_the_worker(
    method: str, arguments: dict[str, Any], call: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrapper and the names of its methods are vLLM's own; the worker behind it does nothing."""
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from swarm.engines import vllm, vllm_loader

    vllm.register()
    server, done = RecordingServer(), []
    entry: Any = SimpleNamespace(loader=SimpleNamespace(server=server), lost="")
    monkeypatch.setattr(vllm_loader.models, "entries", [entry])
    wrapper = WorkerWrapperBase()
    wrapper.worker = create_autospec(Worker, instance=True)
    getattr(wrapper.worker, method).side_effect = lambda **given: done.append((given, list(server.calls)))
    getattr(wrapper, method)(**arguments)
    ((given, before),) = done
    assert given == arguments
    assert server.calls == [*([call] if call else []), *(["end_change"] if method == "reload_weights" else [])]
    assert before == ([] if method in ("wake_up", "finish_weight_update") else server.calls[:1])


@pytest.mark.filterwarnings("ignore")  # of what vLLM imports
def test_is_compiled_code_named_alike_wherever_the_model_lies(models: Models, tmp_path: Path) -> None:
    """The hash is vLLM's own."""
    from vllm.engine.arg_utils import EngineArgs

    from swarm.engines import vllm

    vllm.register()
    one = models("dense-fp32")
    other = tmp_path / "elsewhere"
    shutil.copytree(one, other)

    def named(place: Path, load_format: str, dtype: str = "float32") -> str:
        arguments = EngineArgs(model=str(place), load_format=load_format, dtype=dtype, skip_tokenizer_init=True)
        return str(arguments.create_engine_config().compute_hash())

    assert named(one, "swarm") == named(other, "swarm")
    assert named(one, "swarm") != named(one, "swarm", "bfloat16")
    assert named(one, "auto") != named(other, "auto")


@pytest.mark.matrix
def test_do_two_api_servers_answer_alike(models: Models, tmp_path: Path) -> None:
    """Servers as users start them: the second one by `swarm run`, on a machine that has nothing."""
    with Server(models("dense-fp32"), tmp_path / "a", nothing=False) as a:
        a.wait_for("ready, serves")
        with Server(nothing(tmp_path), tmp_path / "b", nothing=True) as b:
            b.wait_for("ready, serves")
            assert b.answers(PROMPTS[:10], name=str(nothing(tmp_path))) == a.answers(PROMPTS[:10], name=MODEL_ID)
            assert "loaded tier taken" in b.said
