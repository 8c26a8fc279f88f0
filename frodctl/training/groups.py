"""Learning rates for the scales and the sparse values that do not depend on the model's size."""

from __future__ import annotations

from typing import Any

from torch import nn

from frodctl import values
from frodctl.training.attached import every_update, require_attachment


def parameter_groups(
    model: nn.Module,
    *,
    rho_lambda: float = 1e-3,
    rho_sparse: float = 1e-3,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    frod_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: scales and sparse values of each category, and the rest.

    λ is about 1/√N for N layers, and a row of S has s n values, so steps of one relative size are::

        η_λ = ρ_λ/√N        η_S = ρ_S/√(s n N)

    The method's authors train at ρ_λ = 6e-4 … 2.5e-3 and ρ_S = 5e-4 … 2e-3 (Adam).

    Parameters
    ----------
    model : Module
        With an adapter attached; the active one's parameters are taken.
    rho_lambda, rho_sparse : float
        ρ_λ and ρ_S.
    lr, weight_decay : float
        Of everything else that is trained: modules trained as a whole.
    frod_weight_decay : float
        Of δ and S. It pulls towards the pretrained weight.

    Returns
    -------
    list of dict
        With ``params``, ``lr``, ``weight_decay`` and ``name``; no group is empty.

    Raises
    ------
    UsageError
        Nothing is attached, or a rate is no finite number that is at least 0.

    Examples
    --------
    In one's own loop, and with transformers' Trainer, whose own optimizer would have one rate for all:

    >>> optimizer = torch.optim.AdamW(frodctl.parameter_groups(model))  # doctest: +SKIP
    >>> Trainer(model, arguments, ..., optimizers=(optimizer, None))  # doctest: +SKIP
    """
    attachment = require_attachment(model)
    rho_lambda, rho_sparse, lr, weight_decay, frod_weight_decay = (
        values.number(value, name, at_least=0)
        for name, value in (
            ("rho_lambda", rho_lambda),
            ("rho_sparse", rho_sparse),
            ("lr", lr),
            ("weight_decay", weight_decay),
            ("frod_weight_decay", frod_weight_decay),
        )
    )
    groups: dict[str, dict[str, Any]] = {}
    taken = set()

    def add(name: str, rate: float, decay: float, parameter: nn.Parameter) -> None:
        if id(parameter) in taken:  # shared by layers that hold rows of one weight
            return
        taken.add(id(parameter))
        group = groups.setdefault(name, {"params": [], "lr": rate, "weight_decay": decay, "name": name})
        group["params"].append(parameter)

    for update in every_update(model, attachment.active):
        basis, nnz = update.basis, update.pattern.nnz
        add(f"lambda.{basis.category}", rho_lambda / basis.layers**0.5, frod_weight_decay, update.delta)
        if nnz:
            rate = rho_sparse / (nnz / basis.n * basis.layers) ** 0.5
            add(f"sparse.{basis.category}", rate, frod_weight_decay, update.values)
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in taken and parameter.numel():
            add("rest", lr, weight_decay, parameter)
    return list(groups.values())
