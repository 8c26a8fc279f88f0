"""Weights that come from a Hub while others are computed, and weights that are never kept.

The Hub is on the loopback interface; the client and the command are the real ones.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from frodctl.checkpoint import manifest
from frodctl.checkpoint.stream import digest
from frodctl.formats.basis_file import open_basis
from tests import forked
from tests.conftest import LLAMA_CONFIG, Run, llama_layers
from tests.hub_server import Cut, HubServer, Request

TOKEN = "hf_loopbackSecretToken"
ALL = ("--target-modules", "all-linear", "--json", "-o")
ROLES = ("down_proj", "up_proj", "k_proj", "q_proj")  # in the order of their categories: mlp before self_attn
Decompose = Callable[..., subprocess.CompletedProcess[str]]


def save_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    folder.mkdir(parents=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))


def digests_in(path: Path) -> dict[str, str]:
    return {name: digest(tensor.numpy()) for name, tensor in load_file(path).items()}


def by_role(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """A shard for each category, and one of embeddings and a head of the same bytes, which no config ties."""
    tensors = llama_layers(4, n=128, m=192, seed=seed)
    words = torch.randn(2000, 128, generator=torch.Generator().manual_seed(1))
    shards = {role: {name: t for name, t in tensors.items() if f".{role}." in name} for role in ROLES}
    return shards | {"words": {"model.embed_tokens.weight": words, "lm_head.weight": words.clone()}}


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repos")
    save_shards(root / "model", by_role())
    save_shards(root / "later", by_role(seed=3))
    tensors = {name: tensor for shard in by_role().values() for name, tensor in shard.items()}
    halves = {"a": dict(list(tensors.items())[::2]), "b": dict(list(tensors.items())[1::2])}
    save_shards(root / "nested" / "sub", halves)
    shutil.copytree(root / "model", root / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(tensors, root / "pickled" / "pytorch_model.bin")
    return root


@pytest.fixture
def hub(repos: Path) -> Iterator[HubServer]:
    with HubServer({f"org/{path.name}": path for path in repos.iterdir()}, token=TOKEN) as server:
        yield server


def environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **hub.env(home), **more}


@pytest.fixture
def decompose(frodctl: Run, hub: HubServer, tmp_path: Path) -> Decompose:
    def run(model: str, *arguments: Any, home: str = "home", **env: str) -> subprocess.CompletedProcess[str]:
        return frodctl("decompose", model, *arguments, env=environment(hub, tmp_path / home, **env))

    return run


def succeeded(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def weights(request: Request) -> str | None:
    """The shard whose content is asked for: beyond the header, of which the first bytes tell."""
    name = re.search(r"/resolve/.*/(\w+)\.safetensors$", request.path)
    return name[1] if name and request.method == "GET" and request.range != "bytes=0-99999" else None


def span(request: Request) -> tuple[int, str]:
    """The first byte that is asked for, and the last."""
    first, _, last = (request.range or "bytes=0-").removeprefix("bytes=").partition("-")
    return int(first), last


def folder_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.parametrize(
    "model",
    [("org/model", "--dtype", "bfloat16"), ("org/nested", "--subfolder", "sub", "--budget", "9%")],
    ids=["by role", "in a subfolder"],
)
def test_streamed_downloaded_and_cached_weights_give_the_same_bytes(
    decompose: Decompose, hub: HubServer, tmp_path: Path, model: tuple[str, ...]
) -> None:
    """So does the same model of which every file was there from the start."""
    succeeded(decompose(*model, "--stream", *ALL, "streamed.safetensors", home="streamed"))
    succeeded(decompose(*model, *ALL, "downloaded.safetensors"))
    hub.clear()
    succeeded(decompose(*model, "--stream", *ALL, "cached.safetensors"))
    assert {weights(request) for request in hub.requests} <= {None, "words"}  # which no download needs
    files = {name: (tmp_path / f"{name}.safetensors").read_bytes() for name in ("streamed", "downloaded", "cached")}
    assert len(set(files.values())) == 1
    assert not list((tmp_path / "streamed").rglob("*.safetensors"))


def test_the_budget_is_that_of_the_model_on_this_machine(
    decompose: Decompose, frodctl: Run, hub: HubServer, repos: Path
) -> None:
    """A head that has the embedding's bytes is no parameter, wherever the bytes are."""
    plans = [
        succeeded(decompose("org/model", "--budget", "9%", "--stream", *ALL, "streamed.safetensors")),
        succeeded(frodctl("decompose", repos / "model", "--budget", "9%", "--stream", *ALL, "local.safetensors")),
    ]
    assert plans[0]["parameters"] == plans[1]["parameters"]
    assert plans[0]["trainable_parameters"] == plans[1]["trainable_parameters"]


def test_only_shards_with_selected_weights_are_downloaded(decompose: Decompose, tmp_path: Path) -> None:
    succeeded(decompose("org/model", "--target-modules", "q_proj,up_proj", "--json"))
    shards = {path.name for path in (tmp_path / "home").rglob("*.safetensors")}
    assert shards == {"q_proj.safetensors", "up_proj.safetensors"}


def test_offline_what_was_fetched_is_enough(decompose: Decompose, tmp_path: Path) -> None:
    """The same bytes again; what needs another shard is refused, and so is a share of what nobody knows."""
    some = ("--target-modules", "q_proj,up_proj")
    succeeded(decompose("org/model", *some, "--json", "-o", "first.safetensors"))
    document = succeeded(decompose("org/model", *some, "--offline", "--json", "-o", "again.safetensors"))
    assert document["parameters"] is document["trainable_share"] is None
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    refused = {
        ("--target-modules", "q_proj,k_proj"): "k_proj.safetensors, which has model.layers.0.self_attn.k_proj.weight",
        ("--target-modules", "all-linear"): "not in the local cache; run without --offline",
        (*some, "--budget", "9%"): "nobody knows how many parameters",
    }
    for flags, text in refused.items():
        done = decompose("org/model", *flags, "--offline", "-o", "none.safetensors")
        assert done.returncode == 1
        assert text in done.stderr
    assert not (tmp_path / "none.safetensors").exists()


def test_streaming_keeps_no_tenth_of_the_model(
    decompose: Decompose, hub: HubServer, repos: Path, tmp_path: Path
) -> None:
    """Looked at before each piece of the weights is sent."""
    seen: list[int] = []
    hub.watch = lambda request: seen.append(folder_bytes(tmp_path / "home"))
    succeeded(decompose("org/model", "--stream", *ALL, "out.safetensors"))
    assert len(seen) > 20
    assert max(*seen, folder_bytes(tmp_path / "home")) < folder_bytes(repos / "model") / 10


def test_a_category_is_finished_before_the_last_shard_is_served(
    decompose: Decompose, hub: HubServer, tmp_path: Path
) -> None:
    """The Hub holds the last shard back until a category's part is in the staging folder."""
    finished = threading.Event()

    def hold(request: Request) -> None:
        while weights(request) == "q_proj" and not finished.wait(0.01):
            if list(tmp_path.glob("out.safetensors.partial/*/*.safetensors")):
                finished.set()

    hub.watch = hold
    succeeded(decompose("org/model", *ALL, "out.safetensors"))
    assert finished.is_set()
    hub.watch = lambda request: None
    succeeded(decompose("org/model", *ALL, "whole.safetensors"))
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_categories_whose_shards_are_there_go_first(decompose: Decompose, hub: HubServer, tmp_path: Path) -> None:
    succeeded(decompose("org/model", "--target-modules", "q_proj", "--json", "-o", "q.safetensors"))
    done = decompose("org/model", *ALL, "out.safetensors")
    assert [c["category"] for c in succeeded(done)["categories"]] == sorted(re.findall(r"^(\w+) \(", done.stderr, re.M))
    assert re.findall(r"^(\w+) \(", done.stderr, re.M)[0] == "self_attn_q_proj"


@pytest.mark.parametrize("flags", [(), ("--stream",)], ids=["download", "stream"])
class TestCut:
    def test_a_range_goes_on_where_its_connection_was_cut(
        self, decompose: Decompose, hub: HubServer, tmp_path: Path, flags: tuple[str, ...]
    ) -> None:
        """Each shard's first answer ends in its midst."""
        cut: dict[str, Request] = {}

        def watch(request: Request) -> None:
            shard = weights(request)
            if shard and shard not in cut and request.bytes_sent:
                cut[shard] = request
                raise Cut

        hub.watch = watch
        succeeded(decompose("org/model", *flags, *ALL, "cut.safetensors"))
        assert {"up_proj", "down_proj"} <= set(cut)
        for shard, request in cut.items() if flags else ():  # the client keeps nothing of a first 10 MB
            others = [other for other in hub.requests if weights(other) == shard and other is not request]
            begin, end = span(request)
            assert any(span(other)[0] > begin and span(other)[1] == end for other in others)
        hub.watch = lambda request: None
        succeeded(decompose("org/model", *flags, *ALL, "whole.safetensors", home="other"))
        assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

    def test_what_cannot_be_had_is_one_clear_line_and_what_is_finished_is_kept(
        self, decompose: Decompose, hub: HubServer, tmp_path: Path, flags: tuple[str, ...]
    ) -> None:
        place = f"GET /org/model/resolve/{hub.commit('org/model')}/k_proj.safetensors"

        def refuse(request: Request) -> None:
            if weights(request):  # the headers are read
                hub.broken = {place: 403}

        hub.meet = refuse
        done = decompose("org/model", *flags, *ALL, "out.safetensors")
        assert done.returncode == 1
        assert not done.stdout
        assert done.stderr.splitlines()[-1] == "Error: org/model: the Hub refused k_proj.safetensors (403)"
        hub.broken, hub.meet = {}, lambda request: None
        categories = succeeded(decompose("org/model", *flags, *ALL, "out.safetensors"))["categories"]
        assert [category["resumed"] for category in categories] == [True, True, False, False]
        succeeded(decompose("org/model", *flags, *ALL, "whole.safetensors", home="other"))
        assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

    def test_a_killed_run_is_taken_up(
        self, decompose: Decompose, hub: HubServer, tmp_path: Path, flags: tuple[str, ...]
    ) -> None:
        """And by either way of reading."""
        env = environment(hub, tmp_path / "home")
        words = ["decompose", "org/model", *flags, *ALL, "out.safetensors"]
        killed = forked.frodctl(words, tmp_path, env, moment=(1, "self_attn_k_proj"))
        assert killed.returncode == -9
        other = () if flags else ("--stream",)
        categories = succeeded(decompose("org/model", *other, *ALL, "out.safetensors"))["categories"]
        assert [category["resumed"] for category in categories] == [True, True, False, False]
        succeeded(decompose("org/model", *ALL, "whole.safetensors", home="other"))
        assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

    def test_an_interrupted_run_says_so_and_is_taken_up(
        self, decompose: Decompose, hub: HubServer, tmp_path: Path, flags: tuple[str, ...]
    ) -> None:
        env = environment(hub, tmp_path / "home")
        words = ["decompose", "org/model", *flags, *ALL, "out.safetensors"]
        moment = (1, "self_attn_q_proj") if flags else (3, "fetching")
        done = forked.frodctl(words, tmp_path, env, moment=moment, number=signal.SIGINT)
        assert done.returncode == 130
        assert done.stderr.endswith("Interrupted; the same command resumes.\n")
        categories = succeeded(decompose("org/model", *flags, *ALL, "out.safetensors"))["categories"]
        assert categories[0]["resumed"] is True

    def test_a_commit_in_between_mixes_nothing_in(
        self, decompose: Decompose, hub: HubServer, repos: Path, tmp_path: Path, flags: tuple[str, ...]
    ) -> None:
        commit = hub.commit("org/model")

        def push(request: Request) -> None:
            if weights(request):
                hub.folders["org/model"] = {"main": repos / "later", "before": repos / "model"}

        hub.watch = push
        succeeded(decompose("org/model", *flags, *ALL, "out.safetensors"))
        assert hub.commit("org/model") != commit
        assert open_basis(tmp_path / "out.safetensors").metadata.revision == commit
        succeeded(decompose("org/model@before", *flags, *ALL, "before.safetensors", home="other"))
        assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "before.safetensors").read_bytes()

    def test_weights_are_compared_with_the_digests_beside_them(
        self, decompose: Decompose, hub: HubServer, repos: Path, tmp_path: Path, flags: tuple[str, ...]
    ) -> None:
        """Those of a merged checkpoint, as `merge` writes them: of every tensor."""
        merged = shutil.copytree(repos / "model", tmp_path / "merged")
        shard = merged / "up_proj.safetensors"
        manifest.write(merged, "frodctl 0", {path.name: digests_in(path) for path in merged.glob("*.safetensors")})
        hub.folders["org/model"] = {"main": merged}
        succeeded(decompose("org/model", *flags, *ALL, "whole.safetensors", home="whole"))
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
        done = decompose("org/model", *flags, *ALL, "damaged.safetensors", home="damaged")
        assert done.returncode == 3
        assert re.search(r"up_proj\.safetensors: tensor \S+ is damaged: its digest is not the one in", done.stderr)
        assert not (tmp_path / "damaged.safetensors").exists()

    def test_the_token_goes_to_the_hub_alone(
        self, decompose: Decompose, hub: HubServer, repos: Path, tmp_path: Path, flags: tuple[str, ...]
    ) -> None:
        """Large files are in a store on another host, to which the Hub redirects."""
        hub.private = {"org/model"}
        with HubServer({"org/model": repos / "model"}) as store:
            hub.store = store.url
            succeeded(decompose("org/model", *flags, "--token", TOKEN, *ALL, "out.safetensors"))
            assert any(map(weights, store.requests))
            assert not any(request.authorization for request in store.requests)
        assert any(request.authorization == f"Bearer {TOKEN}" for request in hub.requests)


def test_pickled_weights_are_not_streamed(decompose: Decompose, tmp_path: Path) -> None:
    done = decompose("org/pickled", "--stream", *ALL, "out.safetensors")
    assert done.returncode == 1
    assert "pickled" in done.stderr
    assert not list((tmp_path / "home").rglob("*.bin"))


def test_streaming_changes_nothing_of_what_is_here(frodctl: Run, repos: Path, tmp_path: Path) -> None:
    for flags, name in (((), "1.safetensors"), (("--stream",), "2.safetensors")):
        succeeded(frodctl("decompose", repos / "model", *flags, *ALL, name))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


READS = """
import sys
from frodctl.checkpoint import remote
from frodctl.checkpoint.records import Location, TensorInfo
from frodctl.errors import FrodctlError
remote.WAITS = (0.0,) * 3
repository = remote.Repository(Location("org/model"), sys.argv[1])
infos = {info.name: info for info in repository.header("q_proj.safetensors")}
info = infos["model.layers.2.self_attn.q_proj.weight"]
buffer = bytearray(info.nbytes)
try:
    repository.read(info, memoryview(buffer))
except FrodctlError as error:
    print(type(error).__name__, error)
else:
    sys.stdout.write(bytes(buffer).hex())
"""


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([], None),
        ([500, 503, 408], None),
        ([Cut(), Cut(), 502], None),
        ([503] * 9, "FrodctlError org/model: the Hub refused q_proj.safetensors \\(503\\)"),
        ([Cut()] * 9, r"FrodctlError org/model: q_proj.safetensors was not fetched, the Hub is out of reach \(.*\)"),
        ([404], r"FrodctlError org/model: the Hub refused q_proj.safetensors \(404\)"),
        ([b"short"], "FrodctlError org/model/q_proj.safetensors: the Hub sends no ranges of it"),
    ],
    ids=["", "busy", "cut", "busy for ever", "cut for ever", "gone", "no ranges"],
)
def test_what_may_pass_is_tried_again_a_few_times(
    hub: HubServer, repos: Path, tmp_path: Path, answers: list[int | bytes | Cut], expected: str | None
) -> None:
    left = list(answers)

    def answer(request: Request) -> None:
        hub.broken = {}
        if weights(request) and left:
            kind = left.pop(0)
            if isinstance(kind, Cut):
                raise kind
            hub.broken = {"GET /org/model/resolve": kind}

    hub.meet = answer
    done = subprocess.run(
        [sys.executable, "-c", READS, hub.commit("org/model")], capture_output=True, text=True, check=True,
        env=hub.env(tmp_path / "home", HF_HUB_OFFLINE="0"),
    )  # fmt: skip
    if expected is None:
        weight = by_role()["q_proj"]["model.layers.2.self_attn.q_proj.weight"]
        assert bytes.fromhex(done.stdout) == weight.numpy().tobytes()
    else:
        assert re.match(expected, done.stdout), done.stdout
