"""How much an adapter changed each expert, as a picture of layers by experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frodctl.checkpoint import names
from frodctl.checkpoint.experts import expert_number
from frodctl.jobs.inspect import TargetResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class HeatMap:
    """One role's experts of an adapter."""

    role: str
    of_base: bool  #: whether the changes are those of weights, ‖ΔW‖/‖W‖, or those of trained numbers, ‖M‖
    changes: Mapping[tuple[int, int], float]  #: by layer and expert

    def draw(self, axis: Axes) -> None:
        """An empty cell where there is no expert, or no figure of it."""
        layers = sorted({layer for layer, _ in self.changes})
        experts = range(max(expert for _, expert in self.changes) + 1)
        cells = [[self.changes.get((layer, expert), math.nan) for expert in experts] for layer in layers]
        image = axis.imshow(cells, aspect="auto", vmin=0, cmap="viridis")
        axis.set_yticks(range(len(layers)), list(map(str, layers)))
        axis.set_xlabel("expert")
        axis.set_ylabel("layer")
        axis.figure.colorbar(image, ax=axis, label="‖ΔW‖/‖W‖" if self.of_base else "‖S + diag(λ' − λ)‖")


def heat_maps(targets: Sequence[TargetResult]) -> list[HeatMap]:
    """One for each role of the experts of every adapter."""
    found = []
    for target in targets:
        by_role: dict[str, dict[tuple[int, int], float]] = {}
        of_base = any("relative_change" in row.values for row in target.rows)
        for row in target.rows if target.kind == "adapter" else ():
            layer, expert = names.layer_index(row.values["name"]), expert_number(row.values["name"])
            change = _change(row.values, of_base)
            if layer is not None and expert is not None and change is not None:
                by_role.setdefault(names.role(row.values["name"]), {})[layer, expert] = change
        found += [HeatMap(role, of_base, changes) for role, changes in by_role.items()]
    return found


def _change(values: Mapping[str, Any], of_base: bool) -> float | None:
    if of_base:
        return values["relative_change"]  # type: ignore[no-any-return]
    moved = values.get("scales_change_norm")
    return None if moved is None else math.hypot(moved, values["sparse_norm"])
