"""Nodes with different files of a commit: do they serve one artifact together, and what if one leaves?"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import pytest
from sim.content import BytesStore

from swarm.content.commit import part_name
from swarm.content.manifest import Chunk, ChunkEntry, Digest, FileEntry, HashScheme, Manifest, ModelId
from swarm.errors import ManifestConflict, ManifestNotFound, StoreError
from swarm.hashing.cpu import chunk_digests
from swarm.node import commit_parts
from swarm.node.node import Node
from swarm.node.resolve import resolve
from swarm.protocol.messages import Origin
from swarm.store import IsRight
from swarm.store.part import PartSource, narrowed

from .test_node import Swarm, play

MODEL = ModelId("org/model")
ORIGIN = Origin("c0" * 20, {})
SCHEME = HashScheme(leaf_bytes=1024)
FILES = {"a.bin": b"a" * 90, "b.bin": b"b" * 150, "c.bin": b"c" * 10, "config.json": b"{}"}
NEEDED = {"a.bin", "b.bin", "config.json"}


def manifest_of(files: Mapping[str, bytes], chunk_bytes: int) -> Manifest:
    entries = []
    for path, data in sorted(files.items()):
        parts = [data[at : at + chunk_bytes] for at in range(0, len(data), chunk_bytes)]
        entries.append(FileEntry(path, len(data), "", tuple(ChunkEntry(len(p), digest_of(p)) for p in parts)))
    return Manifest(1, "checkpoint", "", SCHEME, chunk_bytes, tuple(entries))


def digest_of(data: bytes) -> str:
    return chunk_digests(SCHEME, [data]).xxh3.hex()


class Files:
    """Files of a commit in memory. NEEDED are those without which it is no model."""

    def __init__(
        self, paths: Iterable[str], *, chunk_bytes: int = 60, changed: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        self.files = {path: FILES[path] for path in paths} | dict(changed)
        self.manifest = manifest_of(self.files, chunk_bytes)
        self.missing = "" if self.would_be_whole(self.files) else "incomplete"

    def spans(self, chunk: Chunk) -> Iterator[memoryview]:
        data = self.files[self.manifest.files[chunk.file].path]
        yield memoryview(data)[chunk.offset : chunk.offset + chunk.size]

    def read(self, chunk: Chunk) -> Iterator[memoryview]:
        return self.spans(chunk)

    def demand_unchanged(self, _: IsRight) -> None:
        pass

    def would_be_whole(self, paths: Iterable[str]) -> bool:
        return set(paths) >= NEEDED

    def part_of(self, whole: Manifest) -> PartSource | None:
        part = Files(())
        part.files, part.manifest = self.files, narrowed(whole, set(self.files))
        wrong = [c for c in part.manifest.chunks if not c.has(chunk_digests(SCHEME, part.spans(c)))]
        return None if wrong or len(part.manifest.files) < len(self.files) else PartSource(whole, part)

    def close(self) -> None:
        pass


def give(node: Node, files: Files, *, origin: Origin | None = ORIGIN) -> None:
    commit_parts.serve(node, MODEL, files, origin=origin)


async def fetched(node: Node) -> dict[str, bytes]:
    manifest, origin = await resolve(node, MODEL, digest=None, find_timeout_s=10.0)
    store = BytesStore(manifest)
    await node.fetch(MODEL, store, origin=origin)
    return {file.path: bytes(data) for file, data in zip(manifest.files, store.files, strict=True)}


def ids(node: Node) -> dict[Digest, ModelId]:
    return {share.manifest.digest: share.model_id for share in node._shares.shares.values()}


def named(node: Node) -> list[Digest]:
    return [digest for digest, model_id in ids(node).items() if model_id == MODEL]


@pytest.mark.parametrize("second_grid", [60, 7], ids=["same grid", "another grid"])
def test_do_two_halves_give_a_whole(second_grid: int) -> None:
    async def scenario(swarm: Swarm) -> None:
        one, two = await swarm.node("one"), await swarm.node("two")
        give(one, Files(["a.bin", "config.json"]))
        give(two, Files(["b.bin", "config.json"], chunk_bytes=second_grid))
        newcomer = await swarm.node("newcomer")
        assert await fetched(newcomer) == {path: FILES[path] for path in NEEDED}
        assert named(one) == named(two) == named(newcomer)
        last = await swarm.node("last")
        await one.close()
        await two.close()
        assert await fetched(last) == {path: FILES[path] for path in NEEDED}

    play(scenario)


def test_is_half_a_model_never_fetched_as_a_model() -> None:
    async def scenario(swarm: Swarm) -> None:
        one, newcomer = await swarm.node("one"), await swarm.node("newcomer")
        give(one, Files(["a.bin", "c.bin"]))
        assert set(ids(one).values()) == {part_name(MODEL)}
        with pytest.raises(ManifestNotFound, match="serves org/model#part"):
            await resolve(newcomer, MODEL, digest=None, find_timeout_s=3.0)

    play(scenario)


def test_has_a_part_no_chunk_of_another_file() -> None:
    whole = Files(FILES).manifest
    part = Files(["a.bin"]).part_of(whole)
    assert part is not None
    assert {whole.files[whole.chunks[index].file].path for index in part.held} == {"a.bin"}
    (other,) = [chunk for chunk in whole.chunks if whole.files[chunk.file].path == "c.bin"]
    with pytest.raises(StoreError, match=r"c\.bin is not in the part"):
        next(part.spans(other))


def test_does_a_holder_of_fewer_files_serve_its_part_of_the_whole() -> None:
    async def scenario(swarm: Swarm) -> None:
        all_, some = await swarm.node("all"), await swarm.node("some")
        give(all_, whole := Files(FILES))
        give(some, fewer := Files(NEEDED, chunk_bytes=13))
        newcomer = await swarm.node("newcomer")
        assert await fetched(newcomer) == FILES
        await swarm.until(lambda: named(some) == [whole.manifest.digest])
        assert ids(some)[fewer.manifest.digest] == part_name(MODEL)
        held = some.holdings()[whole.manifest.digest]
        assert 0 < len(held) < held.length
        assert "some" in (await (await swarm.node("third")).fetch(MODEL, BytesStore(whole.manifest))).sources

    play(scenario)


def test_is_a_whole_model_fetched_when_the_holder_of_more_has_left() -> None:
    async def scenario(swarm: Swarm) -> None:
        all_, some = await swarm.node("all"), await swarm.node("some")
        give(all_, whole := Files(FILES))
        give(some, fewer := Files(NEEDED))
        await swarm.until(lambda: named(some) == [whole.manifest.digest])
        await all_.close()
        await swarm.until(lambda: named(some) == [fewer.manifest.digest])
        assert await fetched(await swarm.node("newcomer")) == {path: FILES[path] for path in NEEDED}
        all_again = await swarm.node("all again")
        give(all_again, Files(FILES))
        await swarm.until(lambda: named(some) == [whole.manifest.digest])

    play(scenario)


def test_do_three_parts_that_come_one_by_one_become_one() -> None:
    async def scenario(swarm: Swarm) -> None:
        nodes = [await swarm.node(name) for name in ("one", "two", "three")]
        for node, paths in zip(nodes, (["a.bin", "config.json"], ["b.bin"], ["c.bin", "config.json"]), strict=True):
            give(node, Files(paths))
            await asyncio.sleep(5)
        await swarm.until(lambda: len({tuple(named(node)) for node in nodes}) == 1 and named(nodes[0]))
        assert await fetched(await swarm.node("newcomer")) == FILES
        assert len(ids(nodes[0])) == 3, "a newcomer may have chosen the whole of two parts"
        await swarm.until(lambda: all(len(ids(node)) == 2 for node in nodes))

    play(scenario)


def test_are_other_contents_in_files_of_one_commit_a_conflict(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(swarm: Swarm) -> None:
        one, two = await swarm.node("one"), await swarm.node("two")
        give(one, Files(NEEDED))
        give(two, Files(FILES, changed={"a.bin": b"A" * 90}))
        with pytest.raises(ManifestConflict):
            await fetched(await swarm.node("newcomer"))
        assert len(ids(one)) == len(ids(two)) == 1

    play(scenario)


def test_are_other_contents_under_another_grid_found_by_hashing(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(swarm: Swarm) -> None:
        one, two = await swarm.node("one"), await swarm.node("two")
        give(one, Files(NEEDED))
        give(two, Files([*NEEDED, "c.bin"], chunk_bytes=13, changed={"a.bin": b"A" * 90}))
        await swarm.until(lambda: "has other contents in them than are here" in caplog.text)
        assert len(ids(one)) == 1

    play(scenario)


@pytest.mark.parametrize("origin", [None, Origin("d1" * 20, {}), Origin("", {}, ("v1",))])
def test_are_other_commits_left_alone(origin: Origin | None) -> None:
    async def scenario(swarm: Swarm) -> None:
        one, two = await swarm.node("one"), await swarm.node("two")
        give(one, Files(NEEDED))
        give(two, Files(FILES), origin=origin)
        newcomer = await swarm.node("newcomer")
        with pytest.raises(ManifestConflict):
            await fetched(newcomer)
        assert len(ids(one)) == len(ids(two)) == 1
        manifest, _ = await resolve(newcomer, MODEL, digest=None, find_timeout_s=5.0, revision="c0" * 20)
        assert {file.path for file in manifest.files} == NEEDED

    play(scenario)


def test_is_nothing_left_when_a_part_is_withdrawn() -> None:
    async def scenario(swarm: Swarm) -> None:
        all_, some = await swarm.node("all"), await swarm.node("some")
        give(all_, Files(FILES))
        give(some, fewer := Files(NEEDED))
        await swarm.until(lambda: len(ids(some)) == 2)
        some.release(fewer.manifest.digest)
        await swarm.until(lambda: not ids(some))

    play(scenario)


@pytest.mark.parametrize("joins", [False, True], ids=["in memory", "in files"])
def test_does_a_node_that_fetched_a_model_count_as_a_holder_of_its_files(joins: bool) -> None:
    async def scenario(swarm: Swarm) -> None:
        seed, some, other = await swarm.node("seed"), await swarm.node("some"), await swarm.node("other")
        give(seed, files := Files(NEEDED))
        assert await fetched(some) == {path: FILES[path] for path in NEEDED}
        if joins:
            commit_parts.join(some, MODEL, Files(NEEDED), origin=ORIGIN)
        await seed.close()
        give(other, Files(["c.bin", "config.json"]))
        await swarm.until(lambda: len(ids(other)) == 2)  # its own files, and the whole of both
        if joins:
            await swarm.until(lambda: named(some) == named(other) != [files.manifest.digest])
        wanted = FILES if joins else {path: FILES[path] for path in NEEDED}
        assert await fetched(await swarm.node("newcomer")) == wanted
        some.release(files.manifest.digest)
        await swarm.until(lambda: not ids(some))

    play(scenario)
