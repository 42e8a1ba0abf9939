"""Fetches that cast: what arrives, what is served on, and other fetches beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import swarm
from swarm import Settings
from swarm.errors import SettingsError

MODEL = "org/model"
STATE = {
    "w": torch.linspace(-2, 2, 400_000).reshape(400, 1000),
    "half": torch.linspace(-2, 2, 50_000).to(torch.float16),
    "ids": torch.arange(200_000),
}


@pytest.fixture
def seed(tmp_path: Path) -> Iterator[swarm.Served]:
    here = Settings(name="seed", mdns=False, cache=tmp_path / "seed", chunk_bytes=64 << 10)
    with swarm.serve(STATE, model_id=MODEL, settings=here) as served:
        yield served


def newcomer(tmp_path: Path, seed: swarm.Served, name: str) -> Settings:
    cache = tmp_path / name
    return Settings(name=name, mdns=False, cache=cache, peers=(seed.address,), find_timeout_s=5, stall_timeout_s=10)


def test_is_a_model_cast_while_it_arrives_and_the_rest_served(tmp_path: Path, seed: swarm.Served) -> None:
    with swarm.fetch(MODEL, dtype="bfloat16", settings=newcomer(tmp_path, seed, "one")) as weights:
        assert weights["w"].dtype == weights["half"].dtype == torch.bfloat16
        assert weights["ids"].dtype == torch.int64
        assert torch.equal(weights["w"], STATE["w"].to(torch.bfloat16))
        assert torch.equal(weights["half"], STATE["half"].to(torch.bfloat16))
        assert torch.equal(weights["ids"], STATE["ids"])
        assert weights.fetched.bytes == sum(weights.fetched.sources.values())


def test_are_tensors_of_the_caller_filled_with_another_dtype(tmp_path: Path, seed: swarm.Served) -> None:
    mine = {"w": torch.zeros(400, 1000, dtype=torch.float16)}
    settings = newcomer(tmp_path, seed, "one")
    with swarm.fetch(MODEL, into=mine, tensors="w", dtype=torch.float16, settings=settings) as weights:
        assert torch.equal(mine["w"], STATE["w"].to(torch.float16))
        assert weights["w"] is mine["w"]


def test_do_fetches_that_cast_and_one_that_does_not_all_end(tmp_path: Path, seed: swarm.Served) -> None:
    async def main() -> list[swarm.Weights]:
        dtypes = (torch.bfloat16, None, torch.float64)
        return await asyncio.gather(
            *(
                swarm.fetch_async(MODEL, dtype=dtype, settings=newcomer(tmp_path, seed, f"n{number}"))
                for number, dtype in enumerate(dtypes)
            )
        )

    cast, plain, wide = asyncio.run(main())
    assert torch.equal(cast["w"], STATE["w"].to(torch.bfloat16))
    assert torch.equal(plain["w"], STATE["w"])
    assert torch.equal(wide["w"], STATE["w"].to(torch.float64))
    for weights in (cast, plain, wide):
        weights.close()


def test_do_two_casts_on_one_node_and_the_model_as_it_is_share_what_is_here(tmp_path: Path, seed: swarm.Served) -> None:
    settings = newcomer(tmp_path, seed, "one")
    with (
        swarm.fetch(MODEL, dtype=torch.float16, settings=settings) as first,
        swarm.fetch(MODEL, dtype=torch.bfloat16, settings=settings) as second,
        swarm.fetch(MODEL, settings=settings) as plain,
        swarm.fetch(MODEL, dtype=torch.float16, settings=settings) as again,
    ):
        assert torch.equal(first["w"], again["w"])
        assert torch.equal(second["w"], STATE["w"].to(torch.bfloat16))
        assert torch.equal(plain["w"], STATE["w"])
        assert second.fetched.sources["one"] > 0, "integers were here"
        assert set(again.fetched.sources) == {"one"}


def test_is_a_dtype_without_a_cast_the_plain_fetch(tmp_path: Path, seed: swarm.Served) -> None:
    with swarm.fetch(MODEL, tensors="ids", dtype=torch.float16, settings=newcomer(tmp_path, seed, "one")) as weights:
        assert torch.equal(weights["ids"], STATE["ids"])
    with pytest.raises(SettingsError, match="dtype"):
        swarm.fetch(MODEL, dtype="int8")
    with pytest.raises(SettingsError, match="dtype: cannot be combined with out"):
        swarm.fetch(MODEL, dtype="float16", out=tmp_path / "out")
