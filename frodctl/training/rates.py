"""Learning rates by the size of a step: how far Adam's first step takes a layer's weight, beside the weight's own norm.

Adam moves every trained number by its rate η, up or down. A step in λ_k changes W by a multiple of u_k v_kᵀ and one in
S[r, c] by one of u_r v_cᵀ, whose norms are those of V's columns, as U's are of norm 1. With signs that do not know of
each other the squares add up::

    ‖ΔW‖² = η_λ² Σ_k ‖v_k‖² + η_S² Σ_(r,c) ‖v_c‖²        ‖W‖² = Σ_k λ_k² ‖v_k‖²

over k and r with λ ≠ 0. (The last is exact in the sum over a category's layers, as V Vᵀ = Σ W_iᵀ W_i.) Where layers and
columns are alike, that is ‖ΔW‖/‖W‖ = η_λ √N by λ, and η_S √(s n N) by S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from frodctl.training.layer import Update

#: Models train well at a step of ‖ΔW‖/‖W‖ = ``REACH / √(steps + SHORTEST)`` (docs/study.md): steps go to and fro, so
#: that their sum grows like √steps; and of however few none may go so far that its gradient no longer holds.
REACH, SHORTEST = 0.25, 30
#: ‖ΔW‖/‖W‖ of a step where the number of steps is not known: that of runs of thousands.
RHO = 1e-3


def relative_step(steps: int) -> float:
    """ρ, the ‖ΔW‖/‖W‖ of a step by λ and by S each, for a run of so many steps."""
    return float(REACH / (steps + SHORTEST) ** 0.5)


class Rates(NamedTuple):
    """Learning rates of a layer's λ' and S."""

    scales: float
    sparse: float


@torch.no_grad()
def unit_rates(update: Update) -> Rates:
    """The rates at which Adam's first step has ‖ΔW‖ = ‖W‖, by λ alone and by S alone.

    Of a stack of weights, for the root mean square over them. 0 where nothing can move: no λ, or no S.
    """
    squares = update.basis.V.double().square().sum(dim=0)
    scales = update.base_scales.double().view(-1, len(squares))
    alive = (scales > 0).double()
    rows, columns = update.pattern.indices().to(squares.device)
    by_row = torch.zeros_like(squares).index_add_(0, rows, squares[columns])
    norm = (scales.square() @ squares).sum()
    by_scales, by_sparse = (alive @ squares).sum(), (alive @ by_row).sum()
    return Rates(*(float((norm / moved).sqrt()) if moved else 0.0 for moved in (by_scales, by_sparse)))
