"""What is trained, in a line for a person."""

from __future__ import annotations

from torch import nn

from frodctl.training.attachment import trainable_parameters


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many numbers are trained, how many the model has without its adapters, and the share in per cent.

    As PEFT's models do; the numbers are `trainable_parameters`'.
    """
    trained, total = trainable_parameters(model)
    share = 100 * trained / total if total else 0.0
    line = f"trainable params: {trained:,} || all params: {total:,} || trainable%: {share:.4f}"
    print(line)  # noqa: T201  (what the users of PEFT know)
