"""What may be chosen about a merge."""

from __future__ import annotations

from dataclasses import dataclass

from frodctl import values
from frodctl.adapted.requantized import KINDS
from frodctl.checkpoint.records import MODEL_DTYPES
from frodctl.errors import UsageError
from frodctl.jobs.lora.options import LoraOptions
from frodctl.jobs.merge.base_as import AUTO, STORED
from frodctl.jobs.merge.quantization import FLOAT8, SCALES
from frodctl.values import option, optional

FORMS = ("auto", "delta", "reconstruct")
RESULTS = ("model", "lora")


def _dtype(value: object, parameter: str) -> str:
    """One of the dtypes by name, or torch's own, whose name for 8 bits is longer."""
    same = str(value).removeprefix("torch.") == f"{FLOAT8}fn"
    return values.dtype("auto", *MODEL_DTYPES, FLOAT8)(FLOAT8 if same else value, parameter)


@dataclass(frozen=True)
class MergeOptions(LoraOptions):
    """The parameters of `frodctl.merge`, each in its one form; the command line has a flag for each."""

    dtype: str = option("auto", _dtype)  #: of what is written
    as_: str = option("model", values.choice(*RESULTS))  #: a dense model, or a LoRA adapter
    basis: str | None = option(None, optional(values.basis))  #: for an adapter without V; None: found near it
    #: take V from it although the adapter does not say that it is the one
    trust_basis: bool = option(False, values.flag)
    #: run PEFT's routine for the V of an adapter without one
    recompute_projection: bool = option(False, values.flag)
    #: of the base as a PEFT adapter without V was trained over it; auto: as the adapter tells, or as it is stored
    projection_dtype: str = option("auto", values.dtype("auto", *MODEL_DTYPES))
    #: the base's weights as they are stored, or as the model that was trained held them
    base_as: str = option(STORED, values.choice(STORED, AUTO, *KINDS))
    form: str = option("auto", values.choice(*FORMS))
    scale: float = option(1.0, values.share)  #: s of W + s (W' − W)
    also: tuple[tuple[str, float], ...] = option((), values.several_scaled)  #: further adapters, each with its scale
    adapter_name: str | None = option(None, optional(values.text))  #: which of several adapters in the folder
    fp8_scales: str = option("channel", values.choice(*SCALES))  #: of a result in 8 bits: by rows or blocks
    max_shard_size: int = option(5_000_000_000, values.shard_size)  #: bytes of tensors in one file

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_ == "lora":
            self.require_rank()
            if self.dtype == FLOAT8:
                raise UsageError(f"`dtype` {FLOAT8}: a LoRA adapter is written in float32, bfloat16 or float16")
            if self.base_as != STORED:
                raise UsageError("`base_as` is of a dense result: a LoRA adapter is loaded over any base")
        else:
            self.refuse_rank("`as_=lora`")
        if self.fp8_scales != "channel" and self.dtype != FLOAT8:
            raise UsageError(f"`fp8_scales` goes with `dtype={FLOAT8}`")
