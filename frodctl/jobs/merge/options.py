"""What may be chosen about a merge."""

from __future__ import annotations

from dataclasses import dataclass

from frodctl import values
from frodctl.checkpoint.records import MODEL_DTYPES
from frodctl.jobs.lora.options import LoraOptions
from frodctl.values import option, optional

FORMS = ("auto", "delta", "reconstruct")
RESULTS = ("model", "lora")


@dataclass(frozen=True)
class MergeOptions(LoraOptions):
    """The parameters of `frodctl.merge`, each in its one form; the command line has a flag for each."""

    as_: str = option("model", values.choice(*RESULTS))  #: a dense model, or a LoRA adapter
    basis: str | None = option(None, optional(values.basis))  #: for an adapter without V; None: found near it
    #: take V from it although the adapter does not say that it is the one
    trust_basis: bool = option(False, values.flag)
    #: run PEFT's routine for the V of an adapter without one
    recompute_projection: bool = option(False, values.flag)
    #: of the base as a PEFT adapter without V was trained over it; auto: as the adapter tells, or as it is stored
    projection_dtype: str = option("auto", values.dtype("auto", *MODEL_DTYPES))
    form: str = option("auto", values.choice(*FORMS))
    scale: float = option(1.0, values.share)  #: s of W + s (W' − W)
    also: tuple[tuple[str, float], ...] = option((), values.several_scaled)  #: further adapters, each with its scale
    adapter_name: str | None = option(None, optional(values.text))  #: which of several adapters in the folder
    max_shard_size: int = option(5_000_000_000, values.shard_size)  #: bytes of tensors in one file

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_ == "lora":
            self.require_rank()
        else:
            self.refuse_rank("`as_=lora`")
