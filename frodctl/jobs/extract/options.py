"""What may be chosen about an extraction."""

from __future__ import annotations

from dataclasses import dataclass

from frodctl import values
from frodctl.errors import UsageError
from frodctl.jobs.lora.options import LoraOptions
from frodctl.values import option, optional

RESULTS = ("lora", "frod")
POSITIONS = ("best", "basis")


@dataclass(frozen=True)
class ExtractOptions(LoraOptions):
    """The parameters of `frodctl.extract`, each in its one form; the command line has a flag for each."""

    as_: str = option("lora", values.choice(*RESULTS))  #: what is written
    target_modules: str = option("all-linear", values.modules)  #: default, all-linear, names with commas, or a regex
    exclude_modules: str | None = option(None, optional(values.modules))  #: names or a regex
    layers: str | None = option(None, optional(values.blocks))  #: block numbers, such as "0-11"
    basis: str | None = option(None, optional(values.basis))  #: of a FRoD adapter
    #: share of the n² positions of each of its layers; None for the basis's own, or where a budget is given
    sparsity: float | None = option(None, optional(values.between(values.share, 0, 1)))
    #: instead of sparsity: share of the checkpoint's parameters
    budget: float | None = option(None, optional(values.between(values.share, above=0, at_most=1)))
    positions: str = option("best", values.choice(*POSITIONS))  #: those that explain most, or the basis file's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_ == "frod":
            self.refuse_rank("`as_=lora`")
            if self.budget is not None and self.sparsity is not None:
                raise UsageError("`sparsity` and `budget` exclude each other")
            return
        for name in ("basis", "sparsity", "budget"):
            if getattr(self, name) is not None:
                raise UsageError(f"`{name}` is of a FRoD adapter; it goes with `as_=frod`")
