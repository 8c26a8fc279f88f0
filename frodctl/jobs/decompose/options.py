"""What may be chosen about a decomposition."""

from __future__ import annotations

from dataclasses import dataclass

from frodctl import values
from frodctl.checkpoint.records import MODEL_DTYPES
from frodctl.errors import UsageError
from frodctl.jobs.push import PushOptions
from frodctl.values import option, optional

MEGABYTE = 1_000_000
PRECISIONS = ("auto", "float32", "float64")
ALLOCATIONS = ("uniform", "spectrum")
_SPARSITY = 0.01


@dataclass(frozen=True)
class DecomposeOptions(PushOptions):
    """The parameters of `frodctl.decompose`, each in its one form; the command line has a flag for each."""

    target_modules: str = option("default", values.modules)  #: default, all-linear, names with commas, or a regex
    exclude_modules: str | None = option(None, optional(values.modules))  #: names or a regex
    layers: str | None = option(None, optional(values.blocks))  #: block numbers, such as "0-11"
    share_input: bool = option(False, values.flag)  #: one basis for layers that read the same activations
    #: share of the n² positions of each layer that is trained; None where a budget is given
    sparsity: float | None = option(None, optional(values.between(values.share, 0, 1)))
    #: instead of sparsity: share of the checkpoint's parameters to train
    budget: float | None = option(None, optional(values.between(values.share, above=0, at_most=1)))
    #: how a budget is spread: one sparsity, or by the RMS singular value of each category
    allocate: str = option("uniform", values.choice(*ALLOCATIONS))
    alpha: float = option(1e-3, values.between(values.number, above=0))  #: regularisation of the joint decomposition
    seed: int = option(0, values.seed)  #: of the sparse pattern
    device: str = option("auto", values.device)
    precision: str = option("auto", values.choice(*PRECISIONS))  #: of the products with weights
    dtype: str = option("float32", values.dtype(*MODEL_DTYPES))  #: of the stored V
    cache_size: int = option(1000 * MEGABYTE, values.size)  #: bytes for Gram matrices kept between passes
    memory_limit: int | None = option(None, optional(values.size))  #: bytes that the process may take at most
    stream: bool = option(False, values.flag)  #: read what the Hub has by ranges, and keep none of it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.sparsity is not None:
            raise UsageError("`sparsity` and `budget` exclude each other")
        if self.allocate != "uniform" and self.budget is None:
            raise UsageError(f"`allocate` {self.allocate}: needs a `budget`")
        if self.budget is None and self.sparsity is None:
            object.__setattr__(self, "sparsity", _SPARSITY)
