"""Several backward passes for one step of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from frodctl.errors import UsageError
from frodctl.training.attached import require_module
from frodctl.training.layer import Update


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Around all backward passes of an optimizer's step but the last one.

    Where a layer multiplies by its W', ∂L/∂W' then adds up, and is projected onto the trained numbers once, in the
    last backward pass, instead of in each one. The gradients are those of one large batch; until that last pass they
    have not arrived in ``.grad``. What an exception leaves unfinished is dropped, and so is what ``zero_grad`` throws
    away.

    transformers' Trainer and accelerate (``accelerator.accumulate``) need no such word: they say themselves which
    micro-batch is a step's last. With DistributedDataParallel it goes with its ``no_sync``. Under ``fully_shard`` and
    ``torch.compile`` each backward pass projects.

    Parameters
    ----------
    model : Module
        With an adapter attached, or what wraps such a one.

    Raises
    ------
    UsageError
        Nothing is attached; and from an optimizer's step, if the last backward pass was not outside.

    Examples
    --------
    >>> *others, last = micro_batches  # doctest: +SKIP
    >>> with frodctl.accumulating(model):  # doctest: +SKIP
    ...     for batch in others:
    ...         (model(**batch).loss / len(micro_batches)).backward()
    >>> (model(**last).loss / len(micro_batches)).backward()  # doctest: +SKIP
    >>> optimizer.step()  # doctest: +SKIP
    """
    require_module(model)
    waiting = [module.waiting for module in model.modules() if isinstance(module, Update)]
    if not waiting:
        raise UsageError(f"{type(model).__name__}: no adapter is attached; call frodctl.attach first")
    before = [each.accumulating for each in waiting]
    for each in waiting:
        each.accumulating = True
    try:
        yield
    except BaseException:
        for each in waiting:
            each.clear()
        raise
    finally:
        for each, value in zip(waiting, before, strict=True):
            each.accumulating = value
