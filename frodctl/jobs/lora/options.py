"""What may be chosen about a LoRA adapter that a job writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from frodctl import values
from frodctl.checkpoint.records import MODEL_DTYPES
from frodctl.errors import UsageError
from frodctl.jobs.progress import Callback
from frodctl.jobs.push import PushOptions
from frodctl.values import Number, PathLike, option, optional

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OutputOptions(PushOptions):
    """Of every job that writes a folder."""

    dtype: str = option("auto", values.dtype("auto", *MODEL_DTYPES))  #: of what is written
    device: str = option("auto", values.device)
    verify: bool = option(True, values.flag)  #: read the result again before it gets its name


@dataclass(frozen=True)
class LoraOptions(OutputOptions):
    """Of the ranks: one for all layers is given, or found from the share of ‖ΔW‖² that each layer is to keep."""

    rank: int | None = option(None, optional(values.count))
    energy: float | None = option(None, optional(values.between(values.share, at_most=1, above=0)))
    max_rank: int = option(256, values.count)  #: whatever ``energy`` would take
    rank_pattern: bool = option(False, values.flag)  #: each layer has the rank that it needs, rather than all the same

    def require_rank(self) -> None:
        """`UsageError` unless it is said how large the adapter is to be."""
        if self.rank is not None and self.energy is not None:
            raise UsageError("`rank` and `energy` exclude each other")
        if self.rank is None and self.energy is None:
            raise UsageError("a LoRA adapter needs a rank: give `rank=64`, or `energy=95%` for what is to be kept")

    def refuse_rank(self, needs: str) -> None:
        """`UsageError` where a rank is given although no LoRA adapter is written, which takes ``needs``."""
        given = {"rank": self.rank is not None, "energy": self.energy is not None, "rank_pattern": self.rank_pattern}
        for name, there in given.items():
            if there:
                raise UsageError(f"`{name}` is of a LoRA adapter; it goes with {needs}")


class LoraKeywords(TypedDict, total=False):
    """`LoraOptions` and what else a function of Python takes by name with them, for its overloads."""

    progress: Callback
    profile: bool
    rank: int | str | None
    energy: Number | None
    max_rank: int | str
    rank_pattern: bool
    dtype: str | torch.dtype
    device: str | torch.device
    revision: str | None
    subfolder: str
    token: str | None
    cache_dir: PathLike | None
    offline: bool
    force: bool
    resume: bool
    verify: bool
    push_to_hub: str | None
    private: bool
