"""Time and memory of a decomposition by model and number of devices, by the cost model; and the model's own check.

    python tests/bench/scale.py                          the table, at the rates given
    python tests/bench/scale.py --measure CHECK.jsonl    measure what the model says, case by case (5 minutes)
    python tests/bench/scale.py --check CHECK.jsonl --plot docs/scale.png     what came of it

Every case is measured in a process of its own, in memory; a case that CHECK.jsonl has already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from process import printed

from frodctl.method import cost
from frodctl.method.ranks import divided

Shapes = list[tuple[int, int]]

#: hidden size, its MLP's, width of keys and values, layers.
MODELS = {
    "8B": (4096, 14336, 1024, 32),
    "70B": (8192, 28672, 1024, 80),
    "405B": (16384, 53248, 1024, 126),
}
DEVICES = (1, 2, 4, 8, 16, 32, 64)
#: (m, n) of the layers, and how many there are.
CASES = [
    *((n, n, N) for n in (512, 1024, 2048) for N in (4, 16, 32)),
    *((576, 1536, N) for N in (4, 16, 32)),
    *((4096, 4096, 4), (2048, 5632, 4)),
]
#: Prints seconds and peak bytes measured, and those of the model.
_MEASURED = """
import json, sys, time, tracemalloc
import numpy as np
from frodctl.method import cost
from frodctl.method.forecast import Rates, decompose_calls
from frodctl.method.joint_basis import joint_basis
from frodctl.method.kernels import kernels_of
m, n, count = map(int, sys.argv[1:])
class Layers:
    shapes = [(m, n)] * count
    def read(self, numbers):
        for number in numbers:
            yield weights[number % len(weights)]
rng = np.random.default_rng(0)
weights = [rng.standard_normal((m, n), dtype=np.float32) for _ in range(min(count, 8))]
kernels = kernels_of("cpu")
small = Layers()
tracemalloc.start()
began = time.perf_counter()
basis = joint_basis(small, kernels=kernels, cache_bytes=10**9)
seconds = time.perf_counter() - began
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
calls = list(decompose_calls(Layers.shapes, alpha=1e-3, precision="auto", dtype="float32", cache_bytes=10**9))
planned = Rates.of(kernels).seconds(calls) - Rates.of(kernels).seconds([])
print(json.dumps({
    "m": m, "n": n, "layers": count, "seconds": seconds, "planned_seconds": planned, "bytes": peak,
    "planned_bytes": cost.memory_bytes(Layers.shapes, 10**9, basis.precision), "flops": cost.flops(Layers.shapes),
}))
"""


def categories(model: str) -> dict[str, Shapes]:
    """A Llama's seven, by name."""
    hidden, inner, kv, layers = MODELS[model]
    heights = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    heights |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {name: [shape] * layers for name, shape in heights.items()}


def row(model: str, count: int, rate: float, eigen_rate: float, link: float) -> dict[str, Any]:
    """What the division gives: seconds of the last rank, and bytes of the one that takes the most."""
    groups = list(categories(model).values())

    def operations(shapes: Shapes, ranks: int) -> float:
        return cost.flops_of_ranks(shapes, min(ranks, len(shapes)))

    division = divided([lambda ranks, shapes=shapes: operations(shapes, ranks) for shapes in groups], count)  # type: ignore[misc]
    ends = [0.0] * count
    for i in sorted(range(len(groups)), key=lambda i: -operations(groups[i], len(division[i]))):
        members, n = division[i], groups[i][0][1]
        most = -(-len(groups[i]) // len(members))
        layers = sum(sum(cost.layer_flops(*shape)) for shape in groups[i][:most])
        messages = 28 * n * n / link if len(members) > 1 else 0.0
        end = max(ends[rank] for rank in members) + layers / rate + 20 * n**3 / eigen_rate + messages
        for rank in members:
            ends[rank] = end
    memory = max(
        cost.memory_bytes(shapes, 10**9, cost.working_dtype(shapes, "auto"), ranks=len(members))
        for shapes, members in zip(groups, division, strict=True)
    )
    divided_too = sum(len(members) > 1 for members in division)
    return {"model": model, "devices": count, "seconds": max(ends), "bytes": memory, "divided": divided_too}


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """In Markdown."""
    yield "| model | devices | time | memory of each | categories divided |"
    yield "|---|---|---|---|---|"
    for found in rows:
        cells = (
            found["model"],
            found["devices"],
            _time(found["seconds"]),
            f"{found['bytes'] / 1e9:.0f} GB",
            found["divided"],
        )
        yield f"| {' | '.join(map(str, cells))} |"


def checked(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Measurements beside the model, in Markdown."""
    yield "| m | n | layers | time | by the model | memory | by the model |"
    yield "|---|---|---|---|---|---|---|"
    for case in found:
        memory = (f"{case[key] / 1e6:.0f} MB" for key in ("bytes", "planned_bytes"))
        seconds = (f"{case[key]:.2f} s" for key in ("seconds", "planned_seconds"))
        yield f"| {case['m']} | {case['n']} | {case['layers']} | {' | '.join([*seconds, *memory])} |"


def measure(path: Path) -> None:
    """Every case that the file does not have yet, a line each."""
    known = {(case["m"], case["n"], case["layers"]) for case in read(path)}
    for case in CASES:
        if case not in known:
            found = printed(_MEASURED, [*map(str, case)])
            with open(path, "a") as file:
                file.write(json.dumps(found) + "\n")
            print(*checked([found]), sep="\n", file=sys.stderr)


def read(path: Path) -> list[dict[str, Any]]:
    """The measurements, if there are any."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Measured over modelled, time and memory."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
    for axis, key, unit, scale in zip(axes, ("seconds", "bytes"), ("time, s", "memory, GB"), (1.0, 1e9), strict=True):
        for n in sorted({case["n"] for case in found}):
            cases = [case for case in found if case["n"] == n]
            pairs = [(case[f"planned_{key}"] / scale, case[key] / scale) for case in cases]
            axis.loglog(*zip(*pairs, strict=True), "o", markersize=4, label=f"n = {n}")
        limits = axis.get_xlim()
        axis.loglog(limits, limits, color="grey", linewidth=0.8)
        axis.set(xlabel=f"{unit}, by the model", ylabel=f"{unit}, measured")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=90)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=30e12, help="Operations in a second of a device's products.")
    parser.add_argument("--eigen-rate", type=float, default=3e12, help="Of eigendecompositions, 20 n³ each.")
    parser.add_argument("--link", type=float, default=50e9, help="Bytes in a second between devices.")
    parser.add_argument("--measure", type=Path, metavar="FILE")
    parser.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    rates = arguments.rate, arguments.eigen_rate, arguments.link
    print(*table([row(model, count, *rates) for model in MODELS for count in DEVICES]), sep="\n")
    if arguments.check:
        found = read(arguments.check)
        print("", *checked(found), sep="\n")
        if arguments.plot:
            plot(found, arguments.plot)


if __name__ == "__main__":
    main()
