"""Learning rates for the scales and the sparse values that do not depend on the model's size."""

from __future__ import annotations

from math import log2
from typing import Any

from torch import nn

from frodctl import values
from frodctl.training.attached import every_update, require_attachment
from frodctl.training.rates import RHO, relative_step, unit_rates


def parameter_groups(
    model: nn.Module,
    *,
    rho_lambda: float | None = None,
    rho_sparse: float | None = None,
    steps: int | None = None,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    frod_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: scales and sparse values of each category, and the rest.

    The rates are such that Adam's first step changes every layer by the same share of its norm, ‖ΔW‖/‖W‖ = ρ_λ by its
    scales and ρ_S by its sparse values, whatever its size, its sparsity and the number of layers. Where the layers of a
    category are alike, λ is about 1/√N for N of them, a row of S has s n values, and that is::

        η_λ = ρ_λ/√N        η_S = ρ_S/√(s n N)

    Parameters
    ----------
    model : Module
        With an adapter attached; the active one's parameters are taken.
    rho_lambda, rho_sparse : float, optional
        ρ_λ and ρ_S; by default what ``steps`` makes of them.
    steps : int, optional
        Steps of the whole run, under a schedule that decays to 0: ρ = 0.25/√(steps + 30) for λ and S. Without it ρ is
        1e-3, a rate for runs of thousands of steps.
    lr, weight_decay : float
        Of everything else that is trained: modules trained as a whole.
    frod_weight_decay : float
        Of δ and S. It pulls towards the pretrained weight.

    Returns
    -------
    list of dict
        With ``params``, ``lr``, ``weight_decay`` and ``name``; no group is empty. Layers of a category whose rates
        differ by more than a few percent are in groups of one name.

    Raises
    ------
    UsageError
        Nothing is attached, a rate is no finite number that is at least 0, or ``steps`` no positive whole number.

    Examples
    --------
    In one's own loop, and with transformers' Trainer, whose own optimizer would have one rate for all:

    >>> optimizer = torch.optim.AdamW(frodctl.parameter_groups(model, steps=1000))  # doctest: +SKIP
    >>> Trainer(model, arguments, ..., optimizers=(optimizer, None))  # doctest: +SKIP
    """
    attachment = require_attachment(model)
    rho = RHO if steps is None else relative_step(values.count(steps, "steps"))
    rho_lambda, rho_sparse, lr, weight_decay, frod_weight_decay = (
        values.number(value, name, at_least=0)
        for name, value in (
            ("rho_lambda", rho if rho_lambda is None else rho_lambda),
            ("rho_sparse", rho if rho_sparse is None else rho_sparse),
            ("lr", lr),
            ("weight_decay", weight_decay),
            ("frod_weight_decay", frod_weight_decay),
        )
    )
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    taken = set()

    def add(name: str, rate: float, decay: float, parameter: nn.Parameter) -> None:
        if id(parameter) in taken:  # shared by layers that hold rows of one weight
            return
        taken.add(id(parameter))
        group = groups.setdefault((name, rate), {"params": [], "lr": rate, "weight_decay": decay, "name": name})
        group["params"].append(parameter)

    for update in every_update(model, attachment.active):
        category, unit = update.basis.category, unit_rates(update)
        add(f"lambda.{category}", rho_lambda * _rounded(unit.scales), frod_weight_decay, update.delta)
        if update.values.numel():
            add(f"sparse.{category}", rho_sparse * _rounded(unit.sparse), frod_weight_decay, update.values)
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in taken and parameter.numel():
            add("rest", lr, weight_decay, parameter)
    return list(groups.values())


def _rounded(rate: float) -> float:
    """To a power of the eighth root of 2, by at most 4.5 %: so that layers that are about alike share a group."""
    return float(2 ** (round(8 * log2(rate)) / 8)) if rate else 0.0
