"""A training step of a mixture's experts by frodctl, full fine-tuning and PEFT's LoRA: tokens per second, peak memory.

    python tests/bench/experts.py                   the table of docs/measurements.md, eight minutes on two cores
    python tests/bench/experts.py --quick           every method once on tiny matrices, to see that all works

A Qwen3-MoE with random weights, of 8 layers with 32 experts each, of which a token has 4; Adam. frodctl and LoRA (of
rank 4, by target_parameters) train as many numbers. "attention" leaves the experts frozen, and trains attention by
frodctl. A process takes one method: --steps steps, of which the median counts, after one to warm up. Processes are in
turns, --repeats of each, of which the median counts again.

"count" is the time of the experts' products alone by their operations, full fine-tuning's being 1
(`frodctl.method.step_cost`); PEFT's LoRA forms W + B A of every expert, and ∂L/∂W as full fine-tuning does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import machine
from process import Failed, printed

import frodctl
from frodctl.method.step_cost import Shape, full_flops, input_flops

RANK = 4
METHODS = ("full", "LoRA", "frodctl", "attention")
CONFIG: dict[str, int] = {
    "hidden_size": 512, "moe_intermediate_size": 192, "num_hidden_layers": 8, "num_experts": 32,
    "num_experts_per_tok": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
}  # fmt: skip
QUICK = CONFIG | {"hidden_size": 64, "moe_intermediate_size": 24, "num_hidden_layers": 2, "num_experts": 4}
STEPS = """
import contextlib, json, re, statistics, sys, time, torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
method, folder, basis, dtype, tokens, steps = sys.argv[1:7]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), experts_implementation="grouped_mm")
if method == "LoRA":
    from peft import LoraConfig, get_peft_model
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=[], target_parameters=names))
elif method == "full":
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".experts." in name)
else:
    import frodctl
    frodctl.attach(model, basis, target_modules=r".*self_attn.*" if method == "attention" else r".*experts.*")
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.Adam(trained, lr=1e-4)
ids = torch.randint(0, 1000, (max(1, int(tokens) // 256), min(int(tokens), 256)))
def step():
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
step()  # to warm up
with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")  # the peak begins anew
seconds = []
for _ in range(int(steps)):
    began = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - began)
with open("/proc/self/status") as status:
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024
print(json.dumps([statistics.median(seconds), peak, sum(p.numel() for p in trained)]))
""".replace("RANK", str(RANK))


def sparsity(config: dict[str, int]) -> float:
    """At which as many numbers are trained in an expert as LoRA has."""
    n, inner = config["hidden_size"], config["moe_intermediate_size"]
    numbers = RANK * ((2 * inner + n) + (n + inner))
    return (numbers - 2 * n - inner) / (2 * n * n + inner * inner)


def made(work: Path, config: dict[str, int]) -> tuple[Path, Path]:
    """The checkpoint and its basis."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).save_pretrained(work / "model")
    basis, share = work / "basis.safetensors", sparsity(config)
    frodctl.decompose(str(work / "model"), basis, target_modules="all-linear", sparsity=share)
    return work / "model", basis


def flops(method: str, config: dict[str, int], tokens: int) -> float:
    """Operations of a step in the experts of a layer."""
    n, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["num_experts"]
    routed = {"experts": experts, "chosen": config["num_experts_per_tok"]}
    into, out = Shape(inner, n, 0, **routed, in_rows=True), Shape(n, inner, 0, **routed, own_input=True)
    full = float(2 * full_flops(into, tokens) + full_flops(out, tokens))
    if method == "frodctl":
        share = sparsity(config)
        with_S = [shape._replace(positions=int(share * shape.n**2) + shape.n) for shape in (into, into, out)]
        return float(sum(input_flops(shape, tokens) for shape in with_S))
    formed = 6.0 * RANK * 3 * n * inner * experts  # B A, and the gradients of B and A
    return {"full": full, "LoRA": full + formed, "attention": full * 2 / 3}[method]


def shown(found: dict[str, list[list[float]]], config: dict[str, int], tokens: int) -> str:
    """The results in Markdown."""
    heads = ("trained", "numbers", "tokens/s, median (min–max)", "/ full", "/ LoRA", "count", "peak memory")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for method, turns in found.items():
        if not turns:
            continue
        rates = [tokens / seconds for seconds, _, _ in turns]
        ratios = []
        for other in ("full", "LoRA"):
            pairs = zip(turns, found[other], strict=True) if found.get(other) else ()
            values = [b[0] / a[0] for a, b in pairs]
            ratios.append(f"{statistics.median(values):.2f}×" if values else "–")
        peak = statistics.median(turn[1] for turn in turns)
        cells = (
            method,
            f"{turns[0][2] / 1e6:.2f} M",
            f"{statistics.median(rates):.0f} ({min(rates):.0f}–{max(rates):.0f})",
            *ratios,
            f"{flops(method, config, tokens) / flops('full', config, tokens):.2f}",
            f"{peak:.0f} MB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of a step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print(machine.description(), end="\n\n")
    with tempfile.TemporaryDirectory() as work:
        config = QUICK if arguments.quick else CONFIG
        model, basis = made(Path(work), config)
        for dtype in arguments.dtypes:
            for tokens in [64] if arguments.quick else arguments.tokens:
                found: dict[str, list[list[float]]] = {method: [] for method in arguments.methods}
                for _ in range(1 if arguments.quick else arguments.repeats):
                    for method in arguments.methods:
                        given = [method, str(model), str(basis), dtype, str(tokens), str(arguments.steps)]
                        try:
                            found[method].append(printed(STEPS, given))
                        except Failed as failure:
                            print(f"{method}: {failure}\n", flush=True)
                print(f"{tokens} tokens, {dtype}\n\n{shown(found, config, tokens)}\n", flush=True)


if __name__ == "__main__":
    main()
