"""What is trained and what that costs, in lines for a person."""

from __future__ import annotations

from torch import nn

from frodctl.training.attachment import trainable_parameters
from frodctl.training.plan import step_costs


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many numbers are trained, how many the model has without its adapters, and the share in per cent.

    As PEFT's models do; the numbers are `trainable_parameters`'.
    """
    trained, total = trainable_parameters(model)
    share = 100 * trained / total if total else 0.0
    line = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}"
    print(line)  # noqa: T201  (what the users of PEFT know)


def print_step_cost(model: nn.Module, tokens: int | str, *, micro_batches: int | str = 1) -> None:
    """Print what an optimizer step of the adapter's layers costs in each form, beside LoRA and full fine-tuning.

    Operations, and their number beside full fine-tuning's; memory in MB of 10⁶ bytes, beside the base's weights. See
    `step_costs`.
    """
    costs = step_costs(model, tokens, micro_batches=micro_batches)
    full = costs[-1].flops
    heads = ("form", "GFLOP", "of full", "V, D", "W'", "U", "dL/dW'", "trained", "inputs", "MB")
    rows = []
    for cost in costs:
        held = (cost.basis_bytes, cost.weight_bytes, cost.dual_bytes, cost.waiting_bytes)
        nbytes = (*held, cost.trained_bytes, cost.input_bytes, cost.nbytes)
        numbers = (f"{cost.flops / 1e9:.1f}", f"{cost.flops / full:.2f}")
        rows.append((cost.way, *numbers, *(f"{count / 1e6:.1f}" for count in nbytes)))
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for first, *others in (heads, *rows):
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        print(first.ljust(widths[0]), *cells, sep="  ")  # noqa: T201
