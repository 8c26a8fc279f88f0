"""Checkpoints from a Hub on the loopback interface, through the real client and the real command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from frodctl.formats.basis_file import open_basis
from tests.conftest import LLAMA_CONFIG, Run, llama_layers, save_checkpoint
from tests.hub_server import HubServer

TOKEN = "hf_loopbackSecretToken"
Decompose = Callable[..., subprocess.CompletedProcess[str]]


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The checkpoint in two shards with an index, beside files that nobody needs."""
    folder.mkdir(parents=True)
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    for name in ("README.md", "modeling_evil.py", "pytorch_model.bin", "tokenizer.json", "consolidated.safetensors"):
        (folder / name).write_bytes(bytes(100))


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repos")
    sharded(root / "sharded", llama_layers(2, n=64, m=96))
    save_checkpoint(root / "plain", llama_layers(1), LLAMA_CONFIG)
    save_checkpoint(root / "plain-v1", llama_layers(1, seed=1), LLAMA_CONFIG)
    save_checkpoint(root / "nested" / "text_encoder", llama_layers(1, seed=2), LLAMA_CONFIG)
    (root / "nested" / "model_index.json").write_text("{}")
    save_checkpoint(root / "corrupt", llama_layers(1), LLAMA_CONFIG)
    (root / "corrupt" / "model.safetensors").write_bytes(b"\xff" * 4096)
    shutil.copytree(root / "sharded", root / "escaping")
    weight_map = {"a": "../../secret.safetensors"}
    (root / "escaping" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (root / "pickled").mkdir()
    torch.save(llama_layers(1), root / "pickled" / "pytorch_model.bin")
    (root / "pickled" / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    return root


@pytest.fixture
def hub(repos: Path) -> Iterator[HubServer]:
    names = ("sharded", "plain", "nested", "corrupt", "escaping", "pickled")
    served = {f"org/{name}": repos / name for name in names} | {"org/gated": repos / "plain"}
    revisions = {"org/plain": {"v1": repos / "plain-v1", "refs/pr/1": repos / "plain-v1"}}
    with HubServer(served, revisions=revisions, gated={"org/gated"}, token=TOKEN) as server:
        yield server


@pytest.fixture
def decompose(frodctl: Run, hub: HubServer, tmp_path: Path) -> Decompose:
    def run(model: str, *arguments: Any, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        environment = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **hub.env(tmp_path / "home"), **(env or {})}
        return frodctl("decompose", model, *arguments, env=environment)

    return run


def downloaded(hub: HubServer) -> set[str]:
    """Names of the files whose content was sent."""
    sent = [request.path for request in hub.requests if request.method == "GET" and request.status in (200, 206)]
    return {path.rsplit("/", 1)[-1] for path in sent if "/resolve/" in path}


def error_of(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line of a failed run."""
    assert done.returncode == code, done.stderr
    assert not done.stdout
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    assert "unexpected" not in line
    assert all(other.startswith("fetching ") for other in done.stderr.strip().splitlines()[:-1])
    assert TOKEN not in line
    return line


def test_fetched_once_then_reused(decompose: Decompose, hub: HubServer, tmp_path: Path) -> None:
    """Only what is needed is fetched; the second run downloads nothing, and offline nothing is asked for."""
    done = decompose("org/sharded", "--target-modules", "all-linear", "-o", "1.safetensors")
    assert done.returncode == 0, done.stderr
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert downloaded(hub) == {"config.json", "model.safetensors.index.json", *shards}
    assert open_basis(tmp_path / "1.safetensors").metadata.revision == hub.commit("org/sharded")
    assert open_basis(tmp_path / "1.safetensors").metadata.model == "org/sharded"
    hub.clear()
    assert decompose("org/sharded", "-o", "2.safetensors", "-q").returncode == 0
    assert not downloaded(hub)
    hub.clear()
    offline = {"HF_HUB_OFFLINE": "1"}
    done = decompose("org/sharded", "--target-modules", "all-linear", "-o", "3.safetensors", env=offline)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "3.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert decompose("org/sharded", "--dry-run", "--offline").returncode == 0
    assert not hub.requests


def test_a_dry_run_downloads_headers_only(decompose: Decompose, hub: HubServer, repos: Path, tmp_path: Path) -> None:
    done = decompose("org/sharded", "--target-modules", "all-linear", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    from_hub = json.loads(done.stdout)
    weights = [request for request in hub.requests if ".safetensors" in request.path and "index" not in request.path]
    assert all(request.range for request in weights if request.method == "GET")
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    local = json.loads(decompose(repos / "sharded", "--target-modules", "all-linear", "--dry-run", "--json").stdout)
    for key in ("modules", "categories", "left_out", "parameters", "trainable_parameters", "peak_memory_bytes"):
        assert from_hub[key] == local[key]
    assert from_hub["revision"] == hub.commit("org/sharded")


def test_a_dry_run_of_a_large_checkpoint_transfers_little(decompose: Decompose, hub: HubServer, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "large", llama_layers(8, n=512, m=1024), LLAMA_CONFIG)
    hub.folders["org/large"] = {"main": tmp_path / "large"}
    assert decompose("org/large", "--dry-run").returncode == 0
    assert hub.bytes_sent < 300_000 < (tmp_path / "large" / "model.safetensors").stat().st_size / 100


def test_a_revision_is_fetched_and_found_again(decompose: Decompose, hub: HubServer, tmp_path: Path) -> None:
    done = decompose("org/plain@v1")
    assert done.returncode == 0, done.stderr
    metadata = open_basis(tmp_path / "plain.frod.safetensors").metadata
    assert metadata.revision == hub.commit("org/plain", "v1") != hub.commit("org/plain")
    done = decompose("org/plain", "--revision", "v1", "--offline", "--dry-run", "--json")
    assert json.loads(done.stdout)["revision"] == metadata.revision


@pytest.mark.parametrize("model", [("org/plain", "--revision", "v1"), ("org/plain@refs/pr/1",), ("org/plain@{}",)])
def test_a_revision_is_a_branch_a_pull_request_or_a_commit(
    decompose: Decompose, hub: HubServer, model: tuple[str, ...]
) -> None:
    commit = hub.commit("org/plain", "v1")
    done = decompose(model[0].format(commit), *model[1:], "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == commit


def test_a_subfolder(decompose: Decompose, hub: HubServer) -> None:
    assert decompose("org/nested", "--subfolder", "text_encoder", "--dry-run").returncode == 0
    done = decompose("org/nested", "--subfolder", "text_encoder", "-o", "out.safetensors")
    assert done.returncode == 0, done.stderr
    assert downloaded(hub) == {"config.json", "model.safetensors"}
    assert decompose("org/nested", "--subfolder", "text_encoder", "--dry-run", "--offline").returncode == 0
    for flags, said in (((), "but in text_encoder: choose one with --subfolder"), (("--subfolder", "unet"), "neither")):
        assert f"no weights here, {said}" in error_of(decompose("org/nested", *flags, "-o", "none.safetensors"), 3)


def test_a_cache_of_ones_own(decompose: Decompose, hub: HubServer, tmp_path: Path) -> None:
    assert decompose("org/plain", "--cache-dir", "cache", "-o", "1.safetensors").returncode == 0
    assert list((tmp_path / "cache").rglob("model.safetensors"))
    assert not list((tmp_path / "home").rglob("model.safetensors"))
    hub.clear()
    assert decompose("org/plain", "--cache-dir", "cache", "--dry-run", "--offline").returncode == 0
    assert not hub.requests


def test_a_pickled_repository(decompose: Decompose) -> None:
    assert "pickled" in error_of(decompose("org/pickled", "--dry-run"))
    assert decompose("org/pickled", "-o", "out.safetensors").returncode == 0


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_what_goes_wrong_is_one_clear_line(decompose: Decompose, flags: tuple[str, ...], tmp_path: Path) -> None:
    assert "no such model on the Hub" in error_of(decompose("org/missing", *flags))
    assert "no revision 'v9'" in error_of(decompose("org/plain@v9", *flags))
    assert "gated" in error_of(decompose("org/gated", *flags))
    assert "token is not valid" in error_of(decompose("org/plain", *flags, "--token", "hf_wrong"))
    message = error_of(decompose("org/plain", *flags, "--offline"))
    assert "no such local file or folder, not in the local cache, and the Hub is off limits (--offline" in message
    assert "plain: no such local file or folder, not in" in error_of(decompose("plain", *flags, "--offline"))
    assert "not a Hub id" in error_of(decompose("no such thing", *flags))
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


@pytest.mark.parametrize("flags", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_invalid_files_on_the_hub_exit_3(decompose: Decompose, flags: tuple[str, ...]) -> None:
    assert "model.safetensors" in error_of(decompose("org/corrupt", "-q", *flags), 3)
    assert "outside the folder" in error_of(decompose("org/escaping", "-q", *flags), 3)


def test_a_dry_run_leaves_no_half_checkpoint_for_offline(decompose: Decompose) -> None:
    """The config that a dry run caches is no checkpoint: offline says that it is not in the cache."""
    assert decompose("org/plain", "--dry-run").returncode == 0
    assert "not in the local cache" in error_of(decompose("org/plain", "--offline"))


def test_a_half_fetched_checkpoint_is_not_in_the_cache(decompose: Decompose, tmp_path: Path) -> None:
    assert decompose("org/plain", "-o", "1.safetensors").returncode == 0
    (weights,) = (tmp_path / "home").rglob("model.safetensors")
    weights.unlink()
    assert "not in the local cache" in error_of(decompose("org/plain", "--offline", "-o", "2.safetensors"))


def test_no_server_is_one_clear_line(decompose: Decompose) -> None:
    """Nothing listens on port 1."""
    for flags in ((), ("--dry-run",)):
        for model in ("org/plain", "plain", "plain@v1"):
            message = error_of(decompose(model, *flags, env={"HF_ENDPOINT": "http://127.0.0.1:1"}))
            assert f"{model.partition('@')[0]}: no such local file or folder, and the Hub is out of reach" in message


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_a_token_opens_and_appears_nowhere(decompose: Decompose, hub: HubServer, how: str, tmp_path: Path) -> None:
    flags = ("--token", TOKEN) if how == "flag" else ()
    env = {"HF_TOKEN": TOKEN} if how == "environment" else {}
    for more in (("--dry-run", "--json"), ("-o", "out.safetensors", "--debug"))[: 2 if flags else 1]:
        done = decompose("org/gated", *flags, *more, env=env)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
    assert any(request.authorization == f"Bearer {TOKEN}" for request in hub.requests)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "out.safetensors" in written) == (how == "flag")
    assert not any(re.search(TOKEN.encode(), path.read_bytes()) for path in written)
    hub.token = "hf_another"
    done = decompose("org/gated", *flags, "-o", "2.safetensors", "--debug", env=env)
    assert done.returncode == 1
    assert TOKEN not in done.stdout + done.stderr


def test_a_local_folder_comes_before_the_hub(decompose: Decompose, hub: HubServer, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "org" / "plain", llama_layers(2), LLAMA_CONFIG)
    assert decompose("org/plain", "--dry-run").returncode == 0
    assert not hub.requests


def listing(siblings: Any = (), sha: Any = "0" * 40) -> bytes:
    return json.dumps({"id": "org/x", "sha": sha, "siblings": siblings}).encode()


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


NONSENSE = "the Hub's answer is not what it should be"
#: What may be answered in place of a repository's listing, and what is then said.
LISTINGS: dict[str, tuple[bytes, str]] = {
    "no-json-listing": (b"<html>", NONSENSE),
    "cut-json-listing": (b'{"id": "org/', NONSENSE),
    "null-listing": (b"null", NONSENSE),
    "list-listing": (b"[]", NONSENSE),
    "number-listing": (b"5", NONSENSE),
    "empty-listing": (b"{}", NONSENSE),
    "no-files-listing": (listing(None), "no weights here"),
    "null-file-listing": (listing([None]), NONSENSE),
    "number-file-listing": (listing([{"rfilename": 5}]), NONSENSE),
    "outside-file-listing": (listing([{"rfilename": "../../x.safetensors"}]), "files outside the repository"),
    "no-commit-listing": (listing(sha=None), "names no commit"),
    "number-commit-listing": (listing(sha=5), NONSENSE),
    "path-commit-listing": (listing(sha="../../.."), "names no commit"),
}
#: The same in place of a shard.
SHARDS: dict[str, int | bytes] = {
    "403": 403,
    "404": 404,
    "500": 500,
    "no-bytes": b"",
    "null-header": header(b"null"),
    "list-header": header(b"[]"),
    "number-tensor": header(b'{"a":5}'),
    "odd-shape": header(b'{"a":{"dtype":"F32","shape":[[]],"data_offsets":[0,0]}}'),
}
IN_ONE_PROCESS = """
import sys
from frodctl.checkpoint import remote
from frodctl.cli.main import main
remote.WAITS = (0.0,)
for model in sys.argv[1:]:
    for flags in ([], ["--dry-run"]):
        print("code", main(["decompose", model, "-o", "out.safetensors", *flags]), model, *flags, file=sys.stderr)
"""


def test_answers_that_are_none_are_one_clear_line(hub: HubServer, repos: Path, tmp_path: Path) -> None:
    """Every one of them, to both ways of reading."""
    raw = (repos / "plain" / "model.safetensors").read_bytes()
    shards = {**SHARDS, "short": raw[:-9], "long": raw + bytes(9)}
    models = [f"org/{name}" for name in (*LISTINGS, *shards)]
    hub.folders.update({model: {"main": repos / "plain"} for model in models})
    hub.broken.update({f"GET /api/models/org/{name}": body for name, (body, _) in LISTINGS.items()})
    places = {name: f"/org/{name}/resolve/{hub.commit(f'org/{name}')}/model.safetensors" for name in shards}
    hub.broken.update({f"GET {places[name]}": body for name, body in shards.items()})
    hub.broken.update({f"HEAD {places[name]}": int(name) for name in ("403", "404")})
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, *models], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=hub.env(tmp_path / "home", HF_HUB_OFFLINE="0"),
    )  # fmt: skip
    *runs, rest = re.split(r"^code (.*)$", done.stderr, flags=re.MULTILINE)
    assert not rest.strip()
    assert len(runs) == 2 * 2 * len(models)
    for output, ended in zip(runs[::2], runs[1::2], strict=True):
        code, model, *flags = ended.split()
        name = model.removeprefix("org/")
        if flags and name in ("short", "long"):  # the header is whole
            assert code == "0"
            continue
        line = output.strip().splitlines()[-1]
        assert line.startswith(f"Error: {model}"), ended
        assert (LISTINGS[name][1] if name in LISTINGS else "model.safetensors") in line
        assert not name.isdigit() or f"({name})" in line, line
        assert "unexpected" not in line
        assert code in ("1", "3")
