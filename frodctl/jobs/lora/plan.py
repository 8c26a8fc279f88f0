"""The plan of a LoRA adapter: which layers, of which shapes and ranks, and what goes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from frodctl.checkpoint import codec, sink
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import MODEL_DTYPES
from frodctl.checkpoint.shards import Shard
from frodctl.formats import lora
from frodctl.jobs import SCHEMA_VERSION
from frodctl.jobs.columns import Column
from frodctl.jobs.lora.options import LoraOptions
from frodctl.jobs.resources import PROCESS_BYTES
from frodctl.method.cost import Call

if TYPE_CHECKING:
    from frodctl.arrays import HostArray


@dataclass(frozen=True)
class Layer:
    """A layer that gets a pair of factors."""

    module: str  #: its path in the live model
    m: int  #: out_features
    n: int  #: in_features

    def parameters(self, rank: int) -> int:
        """Numbers in its factors."""
        return rank * (self.m + self.n)


@dataclass(frozen=True)
class Whole:
    """A tensor that was trained as a whole, and stays one."""

    key: str  #: its name in the file
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], HostArray]


@dataclass(frozen=True)
class LoraPlan:
    """Everything that will be done, known from headers alone."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("module", "module", "text"),
        Column("m", "m"),
        Column("n", "n"),
        Column("rank", "rank", absent="–"),
        Column("parameters", "parameters", "count"),
        Column("delta_norm", "‖ΔW‖", "figure", absent="–"),
        Column("kept", "kept", "figure", absent="–"),
        Column("distance", "‖BA−ΔW‖/‖ΔW‖", "figure", absent="–"),
    )

    base: str  #: as its user named it
    revision: str | None
    output: Path
    options: LoraOptions
    layers: tuple[Layer, ...] = field(repr=False)
    wholes: tuple[Whole, ...] = field(repr=False)
    setting: lora.Setting = field(repr=False)
    made_of: Mapping[str, Json]  #: what ΔW comes from, as JSON has it
    described: str  #: the same in words, without any path of this machine
    reads: tuple[Path, ...] = field(repr=False)  #: what must not be written over
    work_bytes: int  #: memory that computing ΔW takes, beside it
    calls: tuple[Call, ...] = field(repr=False)  #: what computing every ΔW takes
    warnings: tuple[str, ...]
    seconds_estimate: float | None = field(default=None, compare=False)  #: of a dry run, whose device was measured

    def check_output(self, key: str | None = None) -> None:
        """Raise `UsageError` where the output must not be written, by the job ``key`` or by any."""
        sink.check_output_folder(self.output, self.reads, force=self.options.may_replace(self.output, key))

    @property
    def dtype(self) -> str:
        """Of the factors, the format's name: float32 as PEFT trains them, unless another is asked for."""
        return MODEL_DTYPES[self.options.dtype] if self.options.dtype != "auto" else "F32"

    def refusals(self, rank: int | None = None) -> list[str]:
        """Who will not read the adapter: with the largest rank that it has, or may have."""
        rank = rank or max(self.rank_limits())
        others = [whole.key for whole in self.wholes]
        return lora.refusals(rank, several_ranks=self.options.rank_pattern, others=others)

    def rank_limits(self) -> list[int]:
        """The ranks of the layers, as far as they are known beforehand: at most these."""
        most, sides = self.options.rank or self.options.max_rank, [min(layer.m, layer.n) for layer in self.layers]
        if self.options.rank_pattern:
            return [min(most, side) for side in sides]
        return [most if self.options.rank else min(most, max(sides))] * len(sides)

    def shard(self, ranks: list[int]) -> Shard:
        """The file of weights with layers of these ranks."""
        specs = []
        for layer, rank in zip(self.layers, ranks, strict=True):
            A, B = lora.factor_keys(layer.module)
            specs += [
                codec.TensorSpec(A, self.dtype, (rank, layer.n)),
                codec.TensorSpec(B, self.dtype, (layer.m, rank)),
            ]
        specs += [codec.TensorSpec(whole.key, whole.dtype, whole.shape) for whole in self.wholes]
        return Shard(lora.WEIGHTS_FILE, tuple(codec.layout(specs)))

    @property
    def output_bytes(self) -> int:
        """Size of the weights' file, at most."""
        return self.shard(self.rank_limits()).nbytes

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident memory of the whole process, about."""
        work = max(
            (
                24 * layer.m * layer.n + 24 * min(layer.m, layer.n) ** 2 + 24 * layer.parameters(rank)
                for layer, rank in zip(self.layers, self.rank_limits(), strict=True)
            ),
            default=0,
        )
        return PROCESS_BYTES + self.work_bytes + work

    def truncation_calls(self) -> list[Call]:
        """What the truncations take."""
        calls = []
        for layer, rank in zip(self.layers, self.rank_limits(), strict=True):
            k = min(layer.m, layer.n)
            calls.append(Call("syrk", "float64", (max(layer.m, layer.n), k), 2 if self.options.energy else 1))
            calls += [Call("eigvalsh", "float64", (k,))] if self.options.energy else []
            calls.append(Call("syevr", "float64", (k, min(k, rank))))
            calls.append(Call("gemm", "float64", (layer.m, layer.n, rank), 3))
        return calls

    @property
    def flops(self) -> float:
        passes = 2 if self.options.energy else 1
        return passes * sum(call.flops for call in self.calls) + sum(call.flops for call in self.truncation_calls())

    def rows(self) -> list[dict[str, Json]]:
        """Each layer as a line of a table; what is not known yet is None."""
        known = self.options.rank is not None
        return [
            {
                "module": layer.module,
                "m": layer.m,
                "n": layer.n,
                "rank": rank if known else None,
                "parameters": layer.parameters(rank) if known else None,
                "delta_norm": None,
                "kept": None,
                "distance": None,
            }
            for layer, rank in zip(self.layers, self.rank_limits(), strict=True)
        ]

    def as_dict(self) -> dict[str, Json]:
        """For JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "as": "lora",
            "base": self.base,
            "revision": self.revision,
            **self.made_of,
            "output": str(self.output),
            "output_bytes": self.output_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "flops": self.flops,
            "seconds_estimate": self.seconds_estimate,
            "dtype": self.options.dtype,
            "rank": self.options.rank,
            "energy": self.options.energy,
            "max_rank": self.options.max_rank,
            "rank_pattern": self.options.rank_pattern,
            "whole_tensors": [whole.key for whole in self.wholes],
            "warnings": list(self.warnings),
            "layers": self.rows(),
        }
