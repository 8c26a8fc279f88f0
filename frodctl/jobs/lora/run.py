"""Writing a LoRA adapter, one layer at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import frodctl
from frodctl.arrays import DTYPES
from frodctl.checkpoint import files, manifest, shards, sink, stream
from frodctl.checkpoint.inputs import Json
from frodctl.errors import InvalidInput
from frodctl.formats import lora
from frodctl.jobs.lora.card import model_card
from frodctl.jobs.lora.plan import LoraPlan
from frodctl.jobs.notes import Notes
from frodctl.jobs.profile import UNPROFILED, Unprofiled
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.push import Written, push_folder
from frodctl.jobs.resources import memory_errors
from frodctl.jobs.staging import staging_of
from frodctl.method.fidelity import Fidelity, together
from frodctl.method.lowrank import energies, energy_rank, fidelity, truncated
from frodctl.pipeline import in_order

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.method.kernels import Kernels

_TREE, _JOURNAL, _FIGURES = "tree", "journal.jsonl", "figures.jsonl"


class Changes(Protocol):
    """ΔW of a plan's layers, by their numbers there."""

    def read(self, number: int) -> tuple[Any, str]:
        """What a layer's ΔW is computed from, and the digest of that; called in other threads."""
        ...

    def compute(self, read: Any) -> HostArray:
        """ΔW (m, n) in float64, in nn.Linear's orientation, from what `read` gave."""
        ...


@dataclass(frozen=True)
class LoraResult(Written):
    """A finished LoRA adapter."""

    plan: LoraPlan
    output: Path
    output_bytes: int
    ranks: tuple[int, ...]  #: of the layers
    fidelities: tuple[Fidelity, ...]  #: of the layers, from the factors as they are written
    resumed_layers: int  #: taken from an earlier run
    verified: bool
    device: str
    seconds: float

    @property
    def overall(self) -> Fidelity:
        """All layers together."""
        return together(list(self.fidelities))

    def rows(self) -> list[dict[str, Json]]:
        """Each layer as a line of a table."""
        return [
            row | {"rank": rank, "parameters": layer.parameters(rank)} | found.as_dict()
            for row, layer, rank, found in zip(
                self.plan.rows(), self.plan.layers, self.ranks, self.fidelities, strict=True
            )
        ]

    def as_dict(self) -> dict[str, Json]:
        """For JSON: the plan's figures and what came of them."""
        return (
            self.profile_dict()
            | self.pushed_dict()
            | self.plan.as_dict()
            | {
                "output_bytes": self.output_bytes,
                "rank": max(self.ranks),
                **self.overall.as_dict(),
                "resumed_layers": self.resumed_layers,
                "verified": self.verified,
                "device": self.device,
                "seconds": self.seconds,
                "layers": self.rows(),
            }
        )


def run_lora(
    plan: LoraPlan,
    changes: Changes,
    key: str,
    kernels: Kernels,
    progress: Callback = silent,
    profile: Unprofiled = UNPROFILED,
) -> LoraResult:
    """Carry out a plan.

    Parameters
    ----------
    plan : LoraPlan
    changes : Changes
        Of its layers.
    key : str
        A digest of everything that the output's bytes depend on but the values of the base's tensors.
    kernels : Kernels
        Where to compute.
    progress, profile
        As for `frodctl.merge`, and so are the errors.
    """
    started = time.perf_counter()
    with staging_of(plan, key, progress) as staging:
        sink.require_disk(staging.folder, plan.output_bytes - staging.finished_bytes())
        tree = staging.begin_folder(_TREE, [lora.WEIGHTS_FILE])
        work = _Work(plan, changes, kernels, progress, profile)
        origin = partial(_origin, plan, changes)
        try:
            with memory_errors(kernels.name), profile.step("other arithmetic"):
                ranks = work.ranks()
                shard = plan.shard(ranks)
                with shards.ShardWriter(tree, [shard], staging.path(_JOURNAL), origin) as writer:
                    resumed, found = work.write(writer, ranks, Notes(staging.path(_FIGURES)))
                    digests = dict(writer.digests)
        except InvalidInput:  # a rerun would come to the same
            files.rmtree(staging.folder)
            raise
        result = LoraResult(
            plan, plan.output, shard.nbytes, tuple(ranks), tuple(found), resumed, plan.options.verify, kernels.name, 0.0
        )
        with profile.step("writing"):
            _write_the_rest(result, tree)
        if plan.options.verify:
            progress(Progress("reading the result again"))
            with profile.step("checking the files"):
                shards.verify(tree, [shard], digests)
        with profile.step("writing"):
            staging.publish_folder(_TREE, unsent=plan.options.pushes)
        result = replace(result, seconds=time.perf_counter() - started)
        return push_folder(result, staging, plan.options, progress)


class _Work:
    """The layers of a plan: read ahead, computed, written."""

    def __init__(
        self, plan: LoraPlan, changes: Changes, kernels: Kernels, progress: Callback, profile: Unprofiled
    ) -> None:
        self.plan = plan
        self.changes = changes
        self.kernels = kernels
        self.progress = progress
        self.profile = profile

    def ranks(self) -> list[int]:
        """The layers' ranks: given, or found from their spectra."""
        share = self.plan.options.energy
        limits = self.plan.rank_limits()
        if share is None:
            return limits
        found = []
        for number, delta, _ in self._deltas(range(len(limits)), "spectra"):
            needed = energy_rank(energies(self.kernels.put(delta), self.kernels), share)
            found.append(min(limits[number], needed))
        return found if self.plan.options.rank_pattern else [max(found)] * len(found)

    def write(self, writer: shards.ShardWriter, ranks: Sequence[int], notes: Notes) -> tuple[int, list[Fidelity]]:
        """Write all that is not finished; how many layers were, and how near all come to their ΔW."""
        modules = [layer.module for layer in self.plan.layers]
        keys = [lora.factor_keys(module) for module in modules]
        finished = [n for n, pair in enumerate(keys) if writer.digests.keys() >= {*pair} and modules[n] in notes.known]
        found = {n: notes.known[modules[n]] for n in finished}
        for whole in self.plan.wholes:
            if whole.key not in writer.digests:
                writer.write(whole.key, [stream.tensor_bytes(whole.read())])
        waiting = [n for n in range(len(ranks)) if n not in found]
        with notes:
            for number, delta, digest in self._deltas(waiting, "truncating"):
                (A, B), found[number] = self._truncated(number, delta, ranks[number])
                with self.profile.step("writing"):
                    for key, factor in zip(keys[number], (A, B), strict=True):
                        writer.write(key, [stream.tensor_bytes(factor)], partial(str, digest))
                notes.add(modules[number], found[number])
        return len(finished), [found[n] for n in range(len(ranks))]

    def _deltas(self, numbers: Sequence[int], text: str) -> Iterator[tuple[int, HostArray, str]]:
        """ΔW of these layers, checked, and the digest of what it is computed from."""
        tasks = [partial(self._read, number) for number in numbers]
        reads = self.profile.waiting("waiting for weights", in_order(tasks))
        for done, (number, (read, digest)) in enumerate(zip(numbers, reads, strict=True)):
            self.progress(Progress(text, done, len(numbers)))
            delta = self.changes.compute(read)
            if not np.isfinite(delta).all():
                module = self.plan.layers[number].module
                raise InvalidInput(f"{module}: its change holds NaN or Inf; base or adapter is damaged")
            yield number, delta, digest
        self.progress(Progress(text, len(numbers), len(numbers)))

    def _read(self, number: int) -> tuple[Any, str]:
        with self.profile.step("reading and digests"):
            return self.changes.read(number)

    def _truncated(self, number: int, delta: HostArray, rank: int) -> tuple[tuple[HostArray, HostArray], Fidelity]:
        """A and B as they are written, and how near they come."""
        kernels, dtype = self.kernels, DTYPES[self.plan.dtype]
        X = kernels.put(delta)
        B, A = (_rounded(kernels.get(factor), dtype) for factor in truncated(X, rank, kernels))
        if not (np.isfinite(A).all() and np.isfinite(B).all()):
            raise InvalidInput(f"{self.plan.layers[number].module}: its change is too large for {dtype.name}")
        return (A, B), fidelity(X, kernels.put(B, "float64"), kernels.put(A, "float64"), kernels)


@np.errstate(over="ignore")  # infinity is looked for
def _rounded(factor: HostArray, dtype: np.dtype[Any]) -> HostArray:
    return np.ascontiguousarray(factor, dtype)


def _origin(plan: LoraPlan, changes: Changes, key: str) -> str:
    """The digest of what a factor is computed from, now; "" of a tensor that stays whole."""
    numbers = {key: n for n, layer in enumerate(plan.layers) for key in lora.factor_keys(layer.module)}
    return changes.read(numbers[key])[1] if key in numbers else ""


def _write_the_rest(result: LoraResult, tree: Path) -> None:
    plan = result.plan
    ranks = {layer.module: rank for layer, rank in zip(plan.layers, result.ranks, strict=True)}
    text = json.dumps(lora.config(ranks, plan.setting), indent=2, ensure_ascii=False) + "\n"
    files.write_text(tree / lora.CONFIG_FILE, text)
    files.write_text(tree / "README.md", model_card(plan, result.rows(), result.overall))
    manifest.write(tree, f"frodctl {frodctl.__version__}")
