"""What URLs name, asked of the parser, and of the command against a Hub on the loopback interface."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from frodctl.checkpoint import hub_urls
from frodctl.checkpoint.records import Location
from frodctl.errors import UsageError
from tests.conftest import LLAMA_CONFIG, Run, llama_layers, save_checkpoint
from tests.hub_server import HubServer

TOKEN = "hf_loopbackSecretToken"


@pytest.mark.parametrize(
    ("url", "repo", "revision", "folder", "file"),
    [
        ("hf://org/name", "org/name", None, "", ""),
        ("HF://models/org/name@main/a/b", "org/name", "main", "a/b", ""),
        ("hf://gpt2@v1/a", "gpt2", "v1", "a", ""),
        ("hf://org/name@refs/pr/1/a", "org/name", "refs/pr/1", "a", ""),
        ("hf://org/name@feature%2Fx", "org/name", "feature/x", "", ""),
        ("hf://org/name/a/model.safetensors", "org/name", None, "a", "model.safetensors"),
        ("https://huggingface.co/org/name/", "org/name", None, "", ""),
        ("HTTP://hf.co/gpt2/tree/main", "gpt2", "main", "", ""),
        ("huggingface.co/models/org/name", "org/name", None, "", ""),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F1/a%20b?x=1#y", "org/name", "refs/pr/1", "a b", ""),
        ("https://huggingface.co/org/name/blob/v1/m.safetensors", "org/name", "v1", "", "m.safetensors"),
    ],
)
def test_what_a_url_names(url: str, repo: str, revision: str | None, folder: str, file: str) -> None:
    assert hub_urls.is_url(url)
    assert hub_urls.parse(url) == hub_urls.HubUrl(repo, revision, folder, file)


@pytest.mark.parametrize("uri", ["org/name", "org/name@v1/a/b", "models/org/name@refs/pr/2", "org/name@a%2Fb/c"])
def test_as_huggingface_hub_has_it(uri: str) -> None:
    utils = pytest.importorskip("huggingface_hub.utils")
    parse = getattr(utils, "parse_hf_uri", None) or pytest.skip("an older huggingface_hub")
    theirs, ours = parse(f"hf://{uri}"), hub_urls.parse(f"hf://{uri}")
    assert (ours.repo, ours.revision, ours.folder) == (theirs.id, theirs.revision, theirs.path_in_repo)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hf://", "names no model"),
        ("hf://org/name@", "names no model"),
        ("hf://org/na me", "names no model"),
        ("hf://org/name/../x", "names no model"),
        ("https://huggingface.co/org/name/discussions/1", "names no model"),
        ("https://huggingface.co/datasets/org/name", "one of the Hub's datasets"),
        ("hf://spaces/org/name", "one of the Hub's spaces"),
        ("https://evil.example/org/name", "that host is not the Hub"),
        ("https://huggingface.co.evil.example/org/name", "that host is not the Hub"),
        ("https://huggingface.co:444/org/name", "that host is not the Hub"),
        ("https://user:hf_secret@huggingface.co/org/name", "that host is not the Hub"),
        ("https://[::1/org/name", "the address in this URL is none"),
        ("s3://org/name", "URLs of this kind are not taken"),
    ],
)
def test_urls_that_are_refused(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        Location(url)
    assert "hf_secret" not in str(error.value)


def test_the_endpoint_is_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example:8000/mirror")
    assert hub_urls.parse("https://hub.example:8000/mirror/org/name").repo == "org/name"
    with pytest.raises(UsageError, match="not the Hub"):
        hub_urls.parse("https://hub.example/mirror/org/name")


@pytest.mark.parametrize(("parameter", "given"), [("revision", "v2"), ("subfolder", "other")])
def test_a_url_and_a_parameter_that_disagree(parameter: str, given: str) -> None:
    with pytest.raises(UsageError, match=f"`{parameter}` {given}: hf://org/name@v1/a says"):
        Location("hf://org/name@v1/a", **{parameter: given})
    same = Location("hf://org/name@v1/a", revision="v1", subfolder="a/")
    assert (same.model, same.revision, same.local_path()) == ("org/name", "v1", None)


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wget -x makes it; hf:// is never one."""
    monkeypatch.chdir(tmp_path)
    Path("huggingface.co/org/name").mkdir(parents=True)
    Path("org/name").mkdir(parents=True)
    assert Location("huggingface.co/org/name").local_path() == Path("huggingface.co/org/name")
    assert Location("hf://org/name").local_path() is None


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("repos")
    save_checkpoint(root / "main" / "inner", llama_layers(1), LLAMA_CONFIG)
    save_checkpoint(root / "v1" / "inner", llama_layers(1, seed=1), LLAMA_CONFIG)
    with HubServer({"org/name": root / "main"}, revisions={"org/name": {"v1": root / "v1"}}, token=TOKEN) as server:
        yield server


def test_commands_take_urls(frodctl: Run, hub: HubServer, tmp_path: Path) -> None:
    """A basis made by one URL is, in the repository, inspected by others; the last is offline."""
    env = {"HF_HUB_OFFLINE": "0", **hub.env(tmp_path / "home")}
    basis = hub.folders["org/name"]["v1"] / "basis.frod.safetensors"
    done = frodctl("decompose", "hf://org/name@v1/inner", "-o", basis, env=env)
    assert done.returncode == 0, done.stderr
    listed = frodctl(
        "inspect", f"{hub.url}/org/name/tree/v1/inner", f"{hub.url}/org/name/blob/v1/inner/model.safetensors",
        "hf://org/name@v1/basis.frod.safetensors", "--json", env=env,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    first, second, third = json.loads(listed.stdout)["targets"]
    assert first["summary"]["revision"] == second["summary"]["revision"] == hub.commit("org/name", "v1")
    assert first["tensors"] == second["tensors"]
    assert (third["kind"], third["summary"]["model"]) == ("basis", "org/name")
    again = frodctl("inspect", "hf://org/name@v1/basis.frod.safetensors", "--offline", "--json", env=env)
    assert json.loads(again.stdout)["targets"][0]["tensors"] == third["tensors"]


def test_no_other_host_is_asked(frodctl: Run, hub: HubServer, tmp_path: Path) -> None:
    """Not even with a token at hand, which is shown nowhere."""
    env = {"HF_HUB_OFFLINE": "0", **hub.env(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_ENDPOINT": "http://127.0.0.1:9"}
    hub.clear()
    done = frodctl("inspect", f"{hub.url}/org/name", env=env)
    assert done.returncode == 2
    assert "that host is not the Hub (http://127.0.0.1:9) and is not asked" in done.stderr
    assert not hub.requests
    assert TOKEN not in done.stdout + done.stderr
    assert os.listdir(tmp_path) == []
