"""The hub's API as text: which request is meant, and does huggingface_hub read the answers as it reads the hub's?"""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import hf_api

from swarm.agent import hub_api
from swarm.agent.hub_api import HubRequest, byte_range, file_headers, gguf, model_info, parse, paths_info, tree
from swarm.agent.revisions import HubFile, Revision, environment_of
from swarm.content.manifest import ModelId

# They have no types.
ModelInfo: Any = hf_api.ModelInfo
RepoFile: Any = hf_api.RepoFile
RepoFolder: Any = hf_api.RepoFolder

SHA256, SHA1 = "a" * 64, "b" * 40
FILES = {
    path: HubFile(path, size, name)
    for path, size, name in (
        ("config.json", 10, SHA1),
        ("model.safetensors", 1000, SHA256),
        ("onnx/deep/model.onnx", 500, SHA256),
        ("onnx/readme.md", 5, SHA1),
    )
}
REVISION = Revision(ModelId("org/model"), "c" * 40, "main", FILES)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/org/m/resolve/main/config.json", HubRequest("file", "org/m", "main", "config.json")),
        ("/gpt2/resolve/v1.0/a/b.txt", HubRequest("file", "gpt2", "v1.0", "a/b.txt")),
        ("/org/m/resolve/refs%2Fpr%2F1/a%20b", HubRequest("file", "org/m", "refs/pr/1", "a b")),
        ("/api/models/org/m", HubRequest("model", "org/m")),
        ("/api/models/gpt2", HubRequest("model", "gpt2")),
        ("/api/models/gpt2/refs", HubRequest("refs", "gpt2")),
        ("/api/models/org/m/refs", HubRequest("refs", "org/m")),
        ("/api/models/org/m/revision/v1", HubRequest("model", "org/m", "v1")),
        ("/api/models/org/m/tree/main", HubRequest("tree", "org/m", "main")),
        ("/api/models/org/m/tree/main/a/b", HubRequest("tree", "org/m", "main", "a/b")),
        ("/api/models/org/m/paths-info/main", HubRequest("paths", "org/m", "main")),
        ("/v2/org/m/manifests/Q4_K_M", HubRequest("gguf", "org/m", tag="Q4_K_M")),
        ("/org/m/resolve/main/../../etc/passwd", None),
        ("/org/m/resolve/main/%2e%2e/x", None),
        ("/org/m/resolve/../x", None),
        ("/org/m/resolve/main/", None),
        ("/a--b/c/resolve/main/x", None),
        ("/datasets/org/d/resolve/main/x", None),
        ("/api/datasets/org/d", None),
        ("/", None),
    ],
)
def test_which_request_is_a_path(path: str, expected: HubRequest | None) -> None:
    assert parse(path) == expected


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, (0, 100)), ("bytes=0-", (0, 100)), ("bytes=10-19", (10, 20)), ("bytes=90-200", (90, 100)),
        ("bytes=-10", (90, 100)), ("bytes=-200", (0, 100)), ("bytes=100-", None), ("bytes=-0", None),
        ("bytes=5-4", (0, 100)), ("bytes=0-1,3-4", (0, 100)), ("lines=1-2", (0, 100)), ("bytes=x", (0, 100)),
        ("bytes=" + "9" * 30 + "-", (0, 100)),
    ],
)  # fmt: skip
def test_which_bytes_are_a_range(header: str | None, expected: tuple[int, int] | None) -> None:
    assert byte_range(header, 100) == expected


def test_has_an_empty_file_no_range() -> None:
    assert byte_range("bytes=0-", 0) is None
    assert byte_range(None, 0) == (0, 0)


def test_does_the_client_read_the_model() -> None:
    info = ModelInfo(**model_info(REVISION, blobs=True))
    assert (info.id, info.sha, info.private) == ("org/model", "c" * 40, False)
    assert {s.rfilename: s.size for s in info.siblings or ()} == {path: file.size for path, file in FILES.items()}
    lfs = {s.rfilename: s.lfs.sha256 for s in info.siblings or () if s.lfs}
    assert lfs == {"model.safetensors": SHA256, "onnx/deep/model.onnx": SHA256}
    assert all(s.size is None for s in ModelInfo(**model_info(REVISION, blobs=False)).siblings or ())


def entries(found: list[dict[str, Any]]) -> list[str]:
    return [RepoFile(**e).path if e.pop("type") == "file" else RepoFolder(**e).path + "/" for e in found]


def test_does_the_client_read_the_tree() -> None:
    assert entries(tree(REVISION, "", recursive=False, start=0)[0]) == ["onnx/", "config.json", "model.safetensors"]
    below = ["onnx/", "onnx/deep/", "config.json", "model.safetensors", "onnx/deep/model.onnx", "onnx/readme.md"]
    assert entries(tree(REVISION, "", recursive=True, start=0)[0]) == below
    assert entries(tree(REVISION, "onnx", recursive=False, start=0)[0]) == ["onnx/deep/", "onnx/readme.md"]
    assert tree(REVISION, "nothing", recursive=True, start=0) == ([], None)


def test_is_a_tree_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_api, "PAGE", 4)
    first, following = tree(REVISION, "", recursive=True, start=0)
    assert following == 4
    second, end = tree(REVISION, "", recursive=True, start=following)
    assert (len(first), len(second), end) == (4, 2, None)


def test_which_paths_are_told() -> None:
    assert entries(paths_info(REVISION, ["onnx", "config.json", "nothing", "onnx"])) == ["onnx/", "config.json"]


def test_are_headers_those_of_a_file_without_redirect() -> None:
    headers = file_headers(REVISION, FILES["model.safetensors"])
    assert (headers["ETag"], headers["X-Repo-Commit"]) == (f'"{SHA256}"', "c" * 40)
    assert (headers["X-Linked-ETag"], headers["X-Linked-Size"]) == (f'"{SHA256}"', "1000")


@pytest.mark.parametrize(
    ("tag", "expected"),
    [("Q4_K_M", "m-Q4_K_M.gguf"), ("latest", "m-Q4_K_M.gguf"), ("q8_0", "m-q8_0.gguf"), ("Q4", None), ("Q5_0", None)],
)
def test_which_quantization_does_llama_cpp_get(tag: str, expected: str | None) -> None:
    names = ["m-Q4_K_M.gguf", "m-q8_0.gguf", "mmproj-f16.gguf", "README.md"]
    revision = Revision(ModelId("org/m"), "c" * 40, "main", {name: HubFile(name, 1, SHA256) for name in names})
    found = gguf(revision, tag)
    assert (found and found["ggufFile"]["rfilename"]) == expected
    assert found is None or found["mmprojFile"]["rfilename"] == "mmproj-f16.gguf"


def test_does_the_token_of_a_program_replace_that_of_the_agent() -> None:
    environment = {"HF_TOKEN": "agent", "HF_ENDPOINT": "http://127.0.0.1:7080", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    own = environment_of(None, environment, own="127.0.0.1:7080")
    assert own == {"HF_TOKEN": "agent", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, "it does not ask itself"
    with_token = environment_of("program", environment, own="127.0.0.1:7081")
    assert with_token == {"HF_TOKEN": "program", "HF_ENDPOINT": "http://127.0.0.1:7080"}
