"""Download and decomposition of a Hub model at once, against each alone, as whole processes.

    python tests/bench/streaming.py [--layers 30] [--shards 28] [--share 1.0] [--repeats 3]

A Hub on the loopback interface serves a checkpoint with SmolLM2-135M's shapes in bfloat16, cut into shards by role, so
that a category can start when its own are there, or by layer, as models are saved, where every category needs the last.
It sends no faster than the whole in the time that the decomposition takes, times --share: 1, the default, is the
hardest. Goal, by role: whole ≤ 1.15 × the longer of download and work. By layer the sums over a category's weights are
all that can be done ahead, and of one category only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoints import SMOLLM2_135M, make_llama
from process import run
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[2]))
from tests.hub_server import HubServer, Request

DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download("org/model", max_workers=2, cache_dir=sys.argv[1])
"""
DECOMPOSE = ["decompose", "org/model", "--target-modules", "all-linear", "--no-resume", "--force", "-q"]


class Throttle:
    """Waits so that all connections together send so many bytes a second."""

    def __init__(self, rate: float) -> None:
        self._seconds = 65536 / rate
        self._next = 0.0
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> None:
        if request.range == "bytes=0-99999":  # headers
            return
        with self._lock:
            self._next = max(self._next, time.monotonic()) + self._seconds
            left = self._next - time.monotonic()
        time.sleep(max(0.0, left))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--shards", type=int, default=28)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print("| shards | download | work | whole | whole / the longer | --stream |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        model = make_llama(Path(work, "model"), {**SMOLLM2_135M, "num_hidden_layers": arguments.layers})
        layers = {
            name: tensor
            for name, tensor in load_file(model / "model.safetensors").items()
            if ".layers." in name and tensor.ndim == 2
        }
        for how in ("role", "layer"):
            _save(Path(work, how), model, _shards(layers, how, arguments.shards))
            _measure(Path(work), how, arguments.share, arguments.repeats)


def _shards(tensors: Mapping[str, torch.Tensor], how: str, number: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors in so many files, in order of their roles or of their layers."""

    def key(name: str) -> tuple[str, int] | tuple[int, str]:
        layer, role = int(name.split(".")[2]), name.split(".", 3)[3]
        return (role, layer) if how == "role" else (layer, role)

    shards: dict[str, dict[str, torch.Tensor]] = {}
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())
    for name in sorted(tensors, key=key):
        shards.setdefault(f"part{done * number // total:02d}", {})[name] = tensors[name]
        done += tensors[name].nbytes
    return shards


def _save(folder: Path, model: Path, shards: Mapping[str, dict[str, torch.Tensor]]) -> None:
    folder.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text((model / "config.json").read_text())


def _measure(work: Path, how: str, share: float, repeats: int) -> None:
    size = sum(path.stat().st_size for path in (work / how).iterdir())
    with HubServer({"org/model": work / how}) as hub:
        env = hub.env(work / f"home-{how}", HF_HUB_OFFLINE="0", PYTHONPATH=str(Path(__file__).parents[2]))

        def seconds(*command: str) -> float:
            return run([sys.executable, *command], env).seconds

        def decompose(cache: Path, *flags: str) -> float:
            return seconds(
                "-m", "frodctl", *DECOMPOSE, "-o", f"{work}/out.safetensors", "--cache-dir", str(cache), *flags
            )

        decompose(work / f"{how}-full")
        results: dict[str, list[float]] = {name: [] for name in ("download", "work", "whole", "ratio", "stream")}
        for turn in range(repeats):
            hub.watch = lambda request: None
            results["work"].append(decompose(work / f"{how}-full"))
            hub.watch = Throttle(size / results["work"][-1] / share)
            results["download"].append(seconds("-c", DOWNLOAD, f"{work}/{how}-alone{turn}"))
            results["whole"].append(decompose(work / f"{how}-cache{turn}"))
            results["ratio"].append(results["whole"][-1] / max(results["work"][-1], results["download"][-1]))
        hub.watch = lambda request: None
        results["stream"].append(decompose(work / f"{how}-none", "--stream"))
    middle = {name: statistics.median(found) for name, found in results.items()}
    print(
        f"| by {how} | {middle['download']:.1f} s | {middle['work']:.1f} s | {middle['whole']:.1f} s "
        f"| {middle['ratio']:.2f} | {middle['stream']:.1f} s, not throttled |",
        flush=True,
    )


if __name__ == "__main__":
    main()
