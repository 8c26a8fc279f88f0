"""A training step by full fine-tuning, LoRA, PEFT's FRoD and frodctl in its forms: tokens per second and peak memory.

    python tests/bench/train.py                            the cells of docs/measurements.md, an hour on two cores
    python tests/bench/train.py --hidden 768 --dtypes float32 --tokens 4 --micro-batches 1 4 --methods full weight
    python tests/bench/train.py --quick                    every method once on tiny matrices, to see that all works

Llamas with random weights, every linear layer of the blocks trained, FRoD at sparsity 0.01, LoRA at rank 16; Adam. A
process makes one model by one method, and takes its cells one after another: so many steps each, of which the median
counts, after one to warm up. Processes are in turns, --repeats of each, of which the median counts again.

Tokens are those of a micro-batch, in units of n. "count" is the time by operations, full fine-tuning's being 1; those
of the trained layers, as `frodctl.training.step_costs` counts them, are all that differs. "share" is the measured speed
beside full fine-tuning's, over the one that the count gives: 100 % is as many operations per second as full fine-tuning
reaches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import machine
from checkpoints import SMOLLM2_135M, TINYLLAMA_1B, make_llama
from process import Failed, printed

import frodctl
from frodctl.method import step_cost

METHODS = ("full", "LoRA", "PEFT FRoD", "auto", "input", "weight", "weight+U")
FEWER = ("full", "LoRA", "PEFT FRoD", "weight", "weight+U")
SPARSITY, RANK = 0.01, 16
#: The model of each hidden size: as many layers as two cores bear.
MODELS = {
    768: {"intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 4},
    2048: {"intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 1},
    64: {"intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
}
STEPS = """
import contextlib, json, re, statistics, sys, time, torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
method, folder, basis, dtype = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
accumulating = lambda model: contextlib.nullcontext()
if method == "PEFT FRoD":
    from frodctl.training.peft import get_peft_model
    model = get_peft_model(model, basis)
elif method == "LoRA":
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
elif method != "full":
    import frodctl
    from frodctl import accumulating
    frodctl.attach(model, basis, form=method)
model.train()
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)
def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024
def step(tokens, micro_batches):
    length = min(tokens, 256)
    ids = torch.randint(0, 1000, (tokens // length, length), generator=torch.Generator().manual_seed(0))
    for number in range(micro_batches):
        with accumulating(model) if number < micro_batches - 1 else contextlib.nullcontext():
            (model(input_ids=ids, labels=ids).loss / micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()
results = []
for number, (tokens, micro_batches, steps) in enumerate(json.loads(sys.argv[5])):
    step(tokens, 1)  # to warm up
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak begins anew
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step(tokens, micro_batches)
        seconds.append(time.perf_counter() - began)
    results.append([statistics.median(seconds), peak()])
print(json.dumps(results))
"""


class Cell(NamedTuple):
    """Steps of one size."""

    tokens: int  #: of a micro-batch
    micro_batches: int
    steps: int


@dataclass(frozen=True)
class Table:
    """What is measured of one model in one dtype."""

    hidden: int
    dtype: str
    cells: tuple[Cell, ...]
    methods: tuple[str, ...] = METHODS

    def cells_of(self, method: str) -> list[Cell]:
        """PEFT's FRoD does the same for each micro-batch, so that several say nothing new."""
        return [cell for cell in self.cells if method != "PEFT FRoD" or cell.micro_batches == 1]


def cells(hidden: int, tokens: Iterable[int], micro_batches: Sequence[int], steps: int) -> tuple[Cell, ...]:
    """Of these many tokens, in units of the hidden size; fewer steps where they are long."""
    return tuple(
        Cell(count * hidden, parts, max(1, steps // (count * parts))) for parts in micro_batches for count in tokens
    )


DEFAULT = (
    Table(768, "float32", cells(768, (1, 4), (1, 4), 4), tuple(method for method in METHODS if method != "input")),
    Table(768, "bfloat16", cells(768, (1, 4), (1, 4), 4), FEWER),
    Table(2048, "float32", cells(2048, (1, 4), (1,), 1), FEWER),
    Table(2048, "bfloat16", cells(2048, (1, 4), (1,), 1), FEWER),
)


def flops(method: str, config: dict[str, Any], cell: Cell) -> float:
    """Operations of a step in the trained layers."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    tokens = cell.tokens * cell.micro_batches
    total = 0.0
    for m, n in shapes:
        shape = step_cost.Shape(m, n, int(SPARSITY * n * n) + n)
        by_input, by_weight = step_cost.input_flops(shape, tokens), step_cost.weight_flops(shape, tokens)
        total += {
            "full": step_cost.full_flops(shape, tokens),
            "LoRA": step_cost.lora_flops(shape, tokens, RANK),
            "PEFT FRoD": 4.0 * (m + n) * n * tokens,  # U (…) Vᵀ x
            "auto": min(by_input, by_weight),
            "input": by_input,
            "weight": by_weight,
            "weight+U": step_cost.weight_flops(shape, tokens, keeps_U=True),
        }[method]
    return total * config["num_hidden_layers"]


def measure(table: Table, config: dict[str, Any], work: Path, repeats: int) -> dict[str, list[list[list[float]]]]:
    """By method and turn the seconds and the peak of each of its cells; nothing for a method that fails."""
    model = make_llama(work / f"model-{table.hidden}", config)
    basis = work / f"basis-{table.hidden}.safetensors"
    if not basis.exists():
        frodctl.decompose(str(model), basis, target_modules="all-linear", sparsity=SPARSITY)
    found: dict[str, list[list[list[float]]]] = {method: [] for method in table.methods}
    failed = set()
    for _ in range(repeats):
        for method in table.methods:
            if method not in failed:
                arguments = [method, str(model), str(basis), table.dtype, json.dumps(table.cells_of(method))]
                try:
                    found[method].append(printed(STEPS, arguments))
                    print(
                        f"n = {table.hidden}, {table.dtype}, {method}: {found[method][-1]}", file=sys.stderr, flush=True
                    )
                except Failed as failure:
                    failed.add(method)
                    found[method] = []
                    print(f"{method}, n = {table.hidden}, {table.dtype}: {failure}\n", flush=True)
    return found


def shown(table: Table, config: dict[str, Any], found: dict[str, list[list[list[float]]]]) -> str:
    """The results in Markdown."""
    heads = ("tokens × micro-batches", "method", "tokens/s, median (min–max)", "/ full", "/ LoRA", "/ PEFT's FRoD")
    lines = [f"| {' | '.join((*heads, 'count', 'share', 'peak memory'))} |", f"|{'---|' * 9}"]
    for cell in table.cells:
        turns = {
            method: [turn[table.cells_of(method).index(cell)] for turn in found[method]]
            for method in table.methods
            if cell in table.cells_of(method) and found[method]
        }
        tokens = cell.tokens * cell.micro_batches
        for method, results in turns.items():
            rates = [tokens / seconds for seconds, _ in results]
            ratios = {other: _ratio(turns, method, other) for other in ("full", "LoRA", "PEFT FRoD")}
            count = flops(method, config, cell) / flops("full", config, cell)
            share = "–" if ratios["full"] is None else f"{ratios['full'] * count:.0%}"
            cells_shown = (
                f"{cell.tokens} × {cell.micro_batches}",
                method,
                f"{statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f})",
                *("–" if ratio is None else f"{ratio:.2f}×" for ratio in ratios.values()),
                f"{count:.2f}",
                share,
                f"{statistics.median(peak for _, peak in results):.0f} MB",
            )
            lines.append(f"| {' | '.join(cells_shown)} |")
    return "\n".join(lines)


def _ratio(turns: dict[str, list[list[float]]], method: str, other: str) -> float | None:
    """Median over the turns of the speed beside another method's."""
    if other not in turns:
        return None
    return statistics.median(b[0] / a[0] for a, b in zip(turns[method], turns[other], strict=True))


def chosen(arguments: argparse.Namespace) -> list[Table]:
    """The default's tables, or those of the cells that were asked for."""
    if arguments.quick:
        quick = cells(64, (1, 4), (1, 2), 1)
        return [Table(64, "float32", quick), Table(64, "bfloat16", quick, ("full", "weight"))]
    given = (arguments.tokens, arguments.micro_batches)
    tables = [] if any(given) else [*DEFAULT]
    if any(given):
        units, parts = arguments.tokens or [1, 4], arguments.micro_batches or [1]
        tables = [
            Table(hidden, dtype, cells(hidden, units, parts, arguments.steps))
            for hidden in arguments.hidden or (768, 2048)
            for dtype in arguments.dtypes or ("float32", "bfloat16")
        ]
    return [
        Table(t.hidden, t.dtype, t.cells, tuple(m for m in (arguments.methods or t.methods)))
        for t in tables
        if t.hidden in (arguments.hidden or MODELS) and t.dtype in (arguments.dtypes or ("float32", "bfloat16"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, nargs="+", choices=[768, 2048], help="n of the models")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, nargs="+", help="of a micro-batch, in units of n")
    parser.add_argument("--micro-batches", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=4, help="of a cell of n tokens; longer ones get fewer")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rates = machine.gemm_rates(512 if arguments.quick else 2048)["torch"]
    print(machine.description(), end="\n\n")
    print("torch's products, GFLOP/s:", ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in rates.items()), end="\n\n")
    with tempfile.TemporaryDirectory() as work:
        for table in chosen(arguments):
            base = TINYLLAMA_1B if table.hidden == 2048 else SMOLLM2_135M
            config = base | MODELS[table.hidden] | {"hidden_size": table.hidden, "vocab_size": 1024}
            config |= {"tie_word_embeddings": True}
            found = measure(table, config, Path(work), 1 if arguments.quick else arguments.repeats)
            layers = config["num_hidden_layers"]
            print(f"n = {table.hidden}, {layers} layer{'s' * (layers > 1)}, {table.dtype}\n")
            print(shown(table, config, found), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
