"""Results pushed to a Hub on the loopback interface by the real client."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load

import frodctl as library
from tests.conftest import LLAMA_CONFIG, Run, llama_layers, save_checkpoint
from tests.hub_server import Cut, HubServer, Request

TOKEN = "hf_loopbackSecretToken"
ADDED_BY_THE_HUB = {".gitattributes"}
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tuned base, and a basis."""
    root = tmp_path_factory.mktemp("made")
    save_checkpoint(root / "base", llama_layers(2), LLAMA_CONFIG)
    save_checkpoint(root / "tuned", llama_layers(2, seed=1), LLAMA_CONFIG)
    library.decompose(root / "base", root / "basis.frod.safetensors")
    library.extract(root / "base", root / "tuned", root / "adapter", as_="frod", basis=root / "basis.frod.safetensors")
    return root


@pytest.fixture
def hub(made: Path, tmp_path: Path) -> Iterator[HubServer]:
    served = {"org/base": made / "base", "org/adapter": made / "adapter"}
    with HubServer(served, token=TOKEN, writes=tmp_path / "repositories") as server:
        yield server


@pytest.fixture
def command(frodctl: Run, hub: HubServer, tmp_path: Path) -> Command:
    """The command, which shows the token nowhere and leaves it nowhere."""

    def run(*arguments: Any, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
        done = frodctl(*arguments, env={**hub.env(tmp_path / "home"), **settings})
        assert TOKEN not in done.stdout + done.stderr
        assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        return done

    return run


def digests(folder: Path) -> dict[str, str]:
    """Of every file that was sent, by its path."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ADDED_BY_THE_HUB]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def merge(made: Path, *more: str) -> tuple[str, ...]:
    return ("merge", "org/base", "org/adapter", "out", "--basis", str(made / "basis.frod.safetensors"), *more)


def test_a_merge_is_pushed_whole(command: Command, hub: HubServer, made: Path, tmp_path: Path) -> None:
    """What is on the Hub is what is here; its card puts it below its base; it is read back as the same checkpoint."""
    done = command(*merge(made, "--push-to-hub", "org/merged", "--private", "--max-shard-size", "20KB", "--json"))
    assert done.returncode == 0, done.stderr
    assert f'"commit": "{hub.commit("org/merged")}"' in done.stdout
    assert "org/merged" in hub.private
    assert digests(hub.folders["org/merged"]["main"]) == digests(tmp_path / "out")
    card = metadata_load(hub.folders["org/merged"]["main"] / "README.md") or {}
    assert (card["base_model"], card["base_model_relation"]) == ("org/base", "finetune")
    assert card["frod"] == {"base_revision": hub.commit("org/base"), "adapters": ["org/adapter"]}
    against = command("inspect", "hf://org/merged", "--against", "out", "--check")
    assert against.returncode == 0, against.stderr


def test_a_basis_is_pushed_beside_others(command: Command, hub: HubServer, tmp_path: Path) -> None:
    """Its card is made where there is none, and never replaced; a file of its name is, with --force."""
    push = ("--push-to-hub", "org/bases")
    for name in ("a", "b"):
        assert command("decompose", "org/base", "-o", f"{name}.frod.safetensors", *push).returncode == 0
        (hub.folders["org/bases"]["main"] / "README.md").write_text("mine")
    there = digests(hub.folders["org/bases"]["main"])
    assert there["b.frod.safetensors"] == digests(tmp_path)["b.frod.safetensors"]
    assert sorted(there) == ["README.md", "a.frod.safetensors", "b.frod.safetensors"]
    shutil.move(tmp_path / "b.frod.safetensors", tmp_path / "first")
    again = ("decompose", "org/base", "-o", "b.frod.safetensors", "--seed", "1", *push)
    refused = command(*again)
    assert (refused.returncode, digests(hub.folders["org/bases"]["main"])) == (2, there)
    assert "has b.frod.safetensors on the Hub already; --force replaces it" in refused.stderr
    assert not (tmp_path / "b.frod.safetensors").exists()
    assert command(*again, "--force").returncode == 0
    now = digests(hub.folders["org/bases"]["main"])
    assert [path for path in there if now[path] != there[path]] == ["b.frod.safetensors"]


def test_a_repository_that_is_there(command: Command, hub: HubServer, made: Path, tmp_path: Path) -> None:
    """Refused before the work; with --force other weights go, and what is no part of the model stays."""
    hub.create("org/merged", private=False)
    folder = hub.folders["org/merged"]["main"]
    for name in ("model-00001-of-00002.safetensors", "LICENSE"):
        (folder / name).write_text("theirs")
    before = digests(folder)
    done = command(*merge(made, "--push-to-hub", "org/merged"))
    assert done.returncode == 2
    assert "on the Hub already; --force replaces it" in done.stderr
    assert not (tmp_path / "out").exists()
    done = command(*merge(made, "--push-to-hub", "org/merged", "--private", "--force"))
    assert done.returncode == 2
    assert "is there already, and public" in done.stderr
    assert digests(folder) == before
    done = command(*merge(made, "--push-to-hub", "org/merged", "--force"))
    assert done.returncode == 0, done.stderr
    assert digests(folder) == digests(tmp_path / "out") | {"LICENSE": before["LICENSE"]}


@pytest.mark.parametrize(("token", "said"), [("hf_wrongToken", "the token is not valid"), ("", "needs a token")])
def test_a_token_that_will_not_do(command: Command, made: Path, tmp_path: Path, token: str, said: str) -> None:
    """It is seen before the work, and nothing is left of it."""
    done = command(*merge(made, "--push-to-hub", "org/merged"), token=token)
    assert done.returncode == 1
    assert said in done.stderr
    assert "hf_wrong" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_cut_is_taken_up(command: Command, hub: HubServer, made: Path) -> None:
    """A connection lost in the middle of a file is tried again."""
    cut: list[str] = []

    def meet(request: Request) -> None:
        if request.method == "PUT" and not cut:
            cut.append(request.path)
            raise Cut

    hub.meet = meet
    done = command(*merge(made, "--push-to-hub", "org/merged"))
    assert done.returncode == 0, done.stderr
    assert [request.path for request in hub.requests if request.method == "PUT"].count(cut[0]) == 2


JOBS: dict[str, tuple[str, Callable[[Path], tuple[str, ...]]]] = {
    "merge": ("out", merge),
    "merge as lora": ("out", lambda made: merge(made, "--as", "lora", "--rank", "4")),
    "decompose": ("out.safetensors", lambda made: ("decompose", "org/base", "-o", "out.safetensors")),
}


@pytest.mark.parametrize("job", ["merge", "decompose", pytest.param("merge as lora", marks=pytest.mark.long)])
def test_what_is_cut_for_good(command: Command, hub: HubServer, made: Path, tmp_path: Path, job: str) -> None:
    """The repository is as it was, the output is whole, and the same command makes and sends nothing again."""

    def meet(request: Request) -> None:
        if "/commit/" in request.path:
            raise Cut

    output, given = JOBS[job]
    arguments = (*given(made), "--push-to-hub", "org/made", "--json")
    hub.meet = meet
    done = command(*arguments)
    assert done.returncode == 1
    assert "the connection was lost" in done.stderr
    assert f"hf upload org/made {output}" in done.stderr
    assert not digests(hub.folders["org/made"]["main"])
    first = digests(tmp_path / output) if job != "decompose" else {output: digests(tmp_path)[output]}
    hub.meet = lambda request: None
    hub.clear()
    for other in (arguments[:-3], (*arguments, "--no-resume"), (*arguments, "--dtype", "float16")):
        refused = command(*other)
        assert (refused.returncode, "exists; --force" in refused.stderr) == (2, True), refused.stderr
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.get("resumed_tensors") != 0 != found.get("resumed_layers")
    assert not [request for request in hub.requests if request.method == "PUT"]
    there = digests(hub.folders["org/made"]["main"])
    assert {path: digest for path, digest in there.items() if path in first} == first
    assert not (tmp_path / f"{output}.partial").exists()


def test_an_answer_that_was_lost(command: Command, hub: HubServer, made: Path, tmp_path: Path) -> None:
    """All is there, but the run was not told: the same command sees that it is; another one's is in the way."""

    def lose(request: Request) -> None:
        if "/commit/" in request.path:
            hub.lost = True

    arguments = merge(made, "--push-to-hub", "org/merged")
    hub.meet = lose
    assert command(*arguments).returncode == 1
    assert digests(hub.folders["org/merged"]["main"]) == digests(tmp_path / "out")
    hub.meet, hub.lost = (lambda request: None), False
    (hub.folders["org/merged"]["main"] / "LICENSE").write_text("theirs")
    assert "has LICENSE on the Hub already" in command(*arguments).stderr
    (hub.folders["org/merged"]["main"] / "LICENSE").unlink()
    before = hub.commit("org/merged")
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"]["commit"] == before == hub.commit("org/merged")


def test_offline_nothing_is_pushed(command: Command, hub: HubServer, made: Path) -> None:
    arguments = ("decompose", str(made / "base"), "-o", "b.safetensors", "--push-to-hub", "org/bases")
    assert "the Hub is off limits (--offline" in command(*arguments, "--offline").stderr
    assert "expected org/name" in command(*arguments[:-1], "bases").stderr
    assert "--private is of a repository that is made" in command(*arguments[:-2], "--private").stderr
    assert not hub.requests
