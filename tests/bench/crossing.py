"""From how many tokens on W' is the cheaper form of one layer: as it is counted, and by the clock.

    python tests/bench/crossing.py [--width 768] [--dtype float32]

Forward and backward of one layer by its input and by its weight, on one thread, for numbers of tokens around the one at
which the counts are equal; processor time, the least of five. Printed is the time by the input over that by W': the
crossing is where it passes 1.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from frodctl.arrays import from_torch
from frodctl.method.step_cost import Shape, input_flops, weight_flops
from frodctl.training.layer import Basis, FrodLinear, Pattern, Update

FACTORS = (0.25, 0.5, 1, 2, 4)  #: of the tokens at which the counts are equal
SPARSITY = 0.01


def layer_of(m: int, n: int, dtype: torch.dtype) -> FrodLinear:
    cpu = torch.device("cpu")
    V = torch.linalg.qr(torch.randn(n, n))[0]
    positions = torch.randperm(n * n - n)[: int(SPARSITY * n * n)]
    rows, columns = positions // (n - 1), positions % (n - 1)
    pattern = Pattern(from_torch(torch.stack([rows, columns + (columns >= rows)])), n, cpu)
    layer = FrodLinear(nn.Linear(n, m, bias=False, dtype=dtype).requires_grad_(False))
    layer.adapters["a"] = Update(Basis(from_torch(V), "c", "", 1, dtype, cpu), pattern, torch.ones(n))
    layer.active = "a"
    return layer


def equal_counts(shape: Shape) -> float:
    """Tokens at which both forms take as many operations; infinity where it is always fewer by the input."""
    once = weight_flops(shape, 0)
    per_token = input_flops(shape, 1) - (weight_flops(shape, 1) - once)
    return once / per_token if per_token > 0 else float("inf")


def seconds(layer: FrodLinear, form: str, x: torch.Tensor, repeats: int = 5) -> float:
    """Of a step with other numbers than before."""
    update, found = layer.update(), []
    assert update is not None
    update.form = form
    for _ in range(repeats + 1):
        with torch.no_grad():
            update.delta.add_(1e-3)
        began = time.process_time()
        y = layer(x)
        y.backward(torch.ones_like(y))
        found.append(time.process_time() - began)
    return min(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    n, dtype = arguments.width, getattr(torch, arguments.dtype)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"| layer (m × n) | tokens T at equal counts | {' | '.join(f'{factor:g} T' for factor in FACTORS)} |")
    print(f"|---|---|{'---|' * len(FACTORS)}")
    for m, width in ((n // 3, n), (n, n), (8 * n // 3, n), (n, 8 * n // 3)):
        tokens = equal_counts(Shape(m, width, int(SPARSITY * width * width) + width))
        layer, ratios = layer_of(m, width, dtype), []
        for factor in FACTORS:
            x = torch.randn(int(factor * tokens), width).to(dtype).requires_grad_()
            ratios.append(seconds(layer, "input", x) / seconds(layer, "weight", x))
        print(f"| {m} × {width} | {tokens:.0f} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
