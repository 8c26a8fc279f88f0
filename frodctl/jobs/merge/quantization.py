"""A result in 8 bits, as compressed-tensors lays it out: which weights, with which scales, and what its config says."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from frodctl.checkpoint import targets
from frodctl.checkpoint.codec import TensorSpec
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import Checkpoint
from frodctl.errors import UsageError
from frodctl.jobs.merge.config import usual_dtype

#: The dtype of the output that asks for it.
FLOAT8 = "float8_e4m3"
#: What has a scale: a row, which compressed-tensors calls a channel, or a block of so many rows and columns.
SCALES = ("channel", "block")
_BLOCK = 128
#: A language model's head, which need not be stored where it is tied.
_HEAD = "lm_head"


@dataclass(frozen=True)
class Quantization:
    """Which weights of a result are in 8 bits, and how."""

    scales: str  #: "channel" or "block"
    scales_dtype: str  #: the format's name
    weights: tuple[str, ...]  #: by their names in the result
    ignored: tuple[str, ...]  #: modules that may be linear layers and are kept as they are
    uneven: int = 0  #: how many of these are not made of whole blocks, which servers cannot multiply by

    @cached_property
    def scale_names(self) -> dict[str, str]:
        """What the scales of each weight are called."""
        return {name: f"{name}_scale" for name in self.weights}

    def block(self, n: int) -> tuple[int, int]:
        """Rows and columns that have one scale in a weight (m, n)."""
        return (1, n) if self.scales == "channel" else (_BLOCK, _BLOCK)

    def specs(self, specs: Sequence[TensorSpec]) -> Iterator[TensorSpec]:
        """The tensors as they are written, the scales beside their weights."""
        from frodctl.method.float8 import scales_shape

        for spec in specs:
            if spec.name not in self.scale_names:
                yield spec
                continue
            yield TensorSpec(spec.name, "F8_E4M3", spec.shape)
            shape = scales_shape(spec.shape, self.block(spec.shape[1]))
            yield TensorSpec(self.scale_names[spec.name], self.scales_dtype, shape)

    def warnings(self) -> list[str]:
        """What is not in 8 bits although it was asked for."""
        if not self.uneven:
            return []
        return [f"{self.uneven} weights stay as they are: their sides are not multiples of {_BLOCK}"]

    def config(self) -> dict[str, Json]:
        """The result's quantization_config: compressed-tensors' FP8_DYNAMIC, or FP8_BLOCK."""
        common: dict[str, Json] = {"num_bits": 8, "type": "float", "symmetric": True}
        weights: dict[str, Json]
        inputs: dict[str, Json]
        if self.scales == "channel":
            weights, inputs = {"strategy": "channel"}, {"strategy": "token"}
        else:
            weights = {"strategy": "block", "block_structure": [_BLOCK, _BLOCK]}
            inputs = {"strategy": "group", "group_size": _BLOCK}
        scheme = {
            "targets": ["Linear"],
            "weights": common | {"dynamic": False} | weights,
            "input_activations": common | {"dynamic": True} | inputs,
            "format": "float-quantized",
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": list(self.ignored),
        }

    def as_dict(self) -> dict[str, Json]:
        """For JSON."""
        return {"format": "float-quantized", "scales": self.scales, "tensors": len(self.weights)} | {
            "ignored": list(self.ignored)
        }


def quantization(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    kept: Collection[str],
    specs: Sequence[TensorSpec],
    scales: str,
) -> Quantization:
    """Choose every linear layer of the blocks, as `targets.select` knows them, that stores a matrix of its own.

    Parameters
    ----------
    checkpoint : Checkpoint
        The base.
    names : mapping
        Its tensors and what the result calls them.
    kept : collection of str
        Those of the result that are not to be chosen.
    specs : sequence of TensorSpec
        The result's tensors.
    scales : {"channel", "block"}
    """
    linear = [t for t in targets.select(checkpoint, "all-linear").targets if t.index is None and not t.transposed]
    whole = [t for t in linear if scales == "channel" or not (t.m % _BLOCK or t.n % _BLOCK)]
    if not linear:
        raise UsageError(f"`dtype` {FLOAT8}: {checkpoint.model} has no linear layers that store matrices of their own")
    if not whole:
        raise UsageError(f"`fp8_scales` block: no weight has sides that are multiples of {_BLOCK}; take channel")
    chosen = {names[target.tensor.name] for target in whole} - set(kept)
    matrices = {spec.name for spec in specs if len(spec.shape) == 2 and spec.name.endswith(".weight")}
    ignored = {name.removesuffix(".weight") for name in matrices - chosen if not targets.is_table(name)} | {_HEAD}
    dtype = "BF16" if usual_dtype(specs) == "BF16" else "F32"
    return Quantization(scales, dtype, tuple(sorted(chosen)), tuple(sorted(ignored)), len(linear) - len(whole))
