"""``extract --as lora``: the difference of two checkpoints as a LoRA adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import frodctl
from frodctl.checkpoint.records import Checkpoint
from frodctl.checkpoint.targets import Target, select
from frodctl.errors import UsageError
from frodctl.formats import lora
from frodctl.jobs.cards import public_name
from frodctl.jobs.extract.options import ExtractOptions
from frodctl.jobs.extract.pairs import Pair, Pairs, paired
from frodctl.jobs.lora.plan import Layer, LoraPlan
from frodctl.jobs.merge.key import state_of
from frodctl.jobs.profile import UNPROFILED, Unprofiled
from frodctl.jobs.progress import Callback, silent
from frodctl.jobs.resources import measured_rates, take_device
from frodctl.method.cost import Call
from frodctl.values import PathLike

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.jobs.lora.run import LoraResult
    from frodctl.method.kernels import Kernels


@dataclass(frozen=True)
class ExtractLoraPlan(LoraPlan):
    """With the two checkpoints."""

    pairs: Pairs = field(repr=False, kw_only=True)


def plan_lora(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    chosen: ExtractOptions,
    *,
    progress: Callback = silent,
    dry_run: bool = False,
) -> ExtractLoraPlan:
    """Settle what `extract` with ``as_="lora"`` would do. Parameters and errors are those of `extract`.

    With ``dry_run`` no weights are downloaded or read, so that what does not differ is among the layers.
    """
    chosen.require_rank()

    def targets(checkpoint: Checkpoint) -> Sequence[Target]:
        return select(checkpoint, chosen.target_modules, chosen.exclude_modules, chosen.layers).targets

    pairs = paired(base, tuned, output, chosen, targets, progress=progress, dry_run=dry_run)
    checkpoint = pairs.base
    plan = ExtractLoraPlan(
        base=checkpoint.model,
        revision=checkpoint.revision,
        output=pairs.output,
        options=chosen,
        layers=tuple(Layer(pair.module, pair.target.m, pair.target.n) for pair in pairs.chosen),
        wholes=(),
        setting=lora.Setting(
            base=checkpoint.model,
            revision=checkpoint.revision,
            fan_in_fan_out=any(pair.target.transposed for pair in pairs.chosen),
        ),
        made_of={"tuned": pairs.tuned.model},
        described=f"the fine-tuned `{public_name(pairs.tuned.model)}`",
        reads=tuple(pairs.files()),
        work_bytes=max(8 * pair.target.nbytes + 8 * pair.target.m * pair.target.n for pair in pairs.chosen),
        calls=tuple(Call("move", "", (pair.target.nbytes + pair.tuned.nbytes,), 8) for pair in pairs.chosen),
        warnings=pairs.warnings(),
        pairs=pairs,
    )
    plan = replace(plan, warnings=(*plan.warnings, *plan.refusals()))
    if dry_run:
        rates = measured_rates(chosen.device)
        return replace(plan, seconds_estimate=rates.seconds([*plan.calls, *plan.truncation_calls()]) if rates else None)
    plan.check_output()  # now that it is known what will be read
    return plan


def run_lora(plan: ExtractLoraPlan, progress: Callback = silent, profile: Unprofiled = UNPROFILED) -> LoraResult:
    """Carry out a plan of `plan_lora`. Errors are those of `extract`."""
    if plan.pairs.base.root is None or plan.pairs.tuned.root is None:
        raise UsageError(f"{plan.base}: planned from headers alone; plan again without `dry_run=True`")
    with profile.step("start and imports"):
        from frodctl.jobs.lora import run

        kernels = profile.kernels(take_device(plan.options.device, progress, plan.peak_memory_bytes))
    return run.run_lora(plan, _Changes(plan.pairs), _job_key(plan, kernels), kernels, progress, profile)


class _Changes:
    """See `frodctl.jobs.lora.run.Changes`."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def read(self, number: int) -> tuple[tuple[Pair, HostArray, HostArray], str]:
        return self.pairs.read(number)

    def compute(self, read: tuple[Pair, HostArray, HostArray]) -> HostArray:
        import numpy as np

        pair, W, tuned = read
        delta = tuned.astype(np.float64)
        delta -= W.astype(np.float64)
        return np.ascontiguousarray(delta.T) if pair.target.transposed else delta


def _job_key(plan: ExtractLoraPlan, kernels: Kernels) -> str:
    """A digest of everything that the output's bytes depend on but the values of the tensors."""
    chosen, pairs = plan.options, plan.pairs
    job = {
        "frodctl": frodctl.__version__,
        "arithmetic": kernels.identity(),
        "as": ["lora", chosen.rank, chosen.energy, chosen.max_rank, chosen.rank_pattern, chosen.dtype],
        "files": [state_of(path) for path in (*pairs.base.files(), *pairs.tuned.files())],
        "weights": [[pair.target.tensor.name, pair.tuned.name, pair.target.transposed] for pair in pairs.chosen],
    }
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]
