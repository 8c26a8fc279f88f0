"""``merge --as lora``: what adapters make of a base, as one LoRA adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import frodctl
from frodctl.adapted.matching import Match, Weight
from frodctl.adapted.opening import Source
from frodctl.checkpoint.records import MODEL_DTYPES, TensorInfo
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats import lora
from frodctl.formats.adapter import replaced_key
from frodctl.jobs.cards import public_name
from frodctl.jobs.lora.plan import Layer, LoraPlan, Whole
from frodctl.jobs.merge.key import part_key, source_key, state_of
from frodctl.jobs.merge.options import MergeOptions
from frodctl.jobs.merge.plan import adapters_as_json, files_of, opened, update_calls, update_memory_bytes, warnings
from frodctl.jobs.profile import UNPROFILED, Unprofiled
from frodctl.jobs.progress import Callback, silent
from frodctl.jobs.resources import measured_rates, take_device
from frodctl.values import PathLike

if TYPE_CHECKING:
    from frodctl.adapted.updates import Task, WeightUpdates
    from frodctl.arrays import HostArray
    from frodctl.jobs.lora.run import LoraResult
    from frodctl.method.kernels import Kernels


@dataclass(frozen=True)
class MergeLoraPlan(LoraPlan):
    """With what is merged."""

    found: Match = field(repr=False, kw_only=True)


def plan_lora(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    chosen: MergeOptions,
    *,
    progress: Callback = silent,
    dry_run: bool = False,
) -> MergeLoraPlan:
    """Settle what `merge` with ``as_="lora"`` would do; as `plan_merge`."""
    output, found = opened(base, adapter, output, chosen, progress=progress, dry_run=dry_run)
    checkpoint, sources = found.checkpoint, found.sources
    replaced = found.replaced()
    checkpoint.ties.require_kept(
        [weight.target.tensor.name for weight in found.weights] + list(replaced), checkpoint.model
    )
    layers = _layers(found)
    wholes, saved, bias = _wholes(found, {layer.module for layer in layers}, chosen.dtype)
    first = sources[0].adapter
    plan = MergeLoraPlan(
        base=checkpoint.model,
        revision=checkpoint.revision,
        output=output,
        options=chosen,
        layers=layers,
        wholes=wholes,
        setting=lora.Setting(
            base=checkpoint.model if checkpoint.revision else first.base_model or checkpoint.model,
            revision=checkpoint.revision,
            task=first.task,
            auto_mapping=first.config.get("auto_mapping"),
            fan_in_fan_out=any(weight.target.transposed for weight in found.weights),
            modules_to_save=tuple(saved),
            bias=bias,
        ),
        made_of={"adapters": adapters_as_json(sources)},
        described=" and ".join(
            f"the FRoD adapter `{public_name(s.adapter.name)}` (scale {s.scale:g})" for s in sources
        ),
        reads=tuple(files_of(checkpoint, sources)),
        work_bytes=update_memory_bytes(found.weights),
        calls=tuple(update_calls(found.weights)),
        warnings=(*found.warnings, *warnings(sources, replaced)),
        found=found,
    )
    plan = replace(plan, warnings=(*plan.warnings, *plan.refusals()))
    if dry_run:
        rates = measured_rates(chosen.device)
        return replace(plan, seconds_estimate=rates.seconds([*plan.calls, *plan.truncation_calls()]) if rates else None)
    plan.check_output()  # now that it is known what will be read
    return plan


def run_lora(plan: MergeLoraPlan, progress: Callback = silent, profile: Unprofiled = UNPROFILED) -> LoraResult:
    """Carry out a plan of `plan_lora`. Errors are those of `merge`."""
    with profile.step("start and imports"):
        from frodctl.adapted.updates import WeightUpdates
        from frodctl.jobs.lora import run

    if plan.found.checkpoint.root is None:
        raise UsageError(f"{plan.base}: planned from headers alone; plan again without `dry_run=True`")
    with profile.step("start and imports"):
        kernels = profile.kernels(take_device(plan.options.device, progress, plan.peak_memory_bytes))
    with profile.step("digests"):
        key = _job_key(plan, kernels)
    updates = WeightUpdates(plan.found.checkpoint, plan.found.weights, kernels)
    return run.run_lora(plan, _Changes(updates, plan.found.weights), key, kernels, progress, profile)


class _Changes:
    """See `frodctl.jobs.lora.run.Changes`."""

    def __init__(self, updates: WeightUpdates, weights: Sequence[Weight]) -> None:
        self.updates = updates
        self.weights = weights

    def read(self, number: int) -> tuple[Task, str]:
        task = self.updates.read(self.weights[number])
        return task, "" if task.stored is None else self.updates.digest(task)

    def compute(self, read: Task) -> HostArray:
        import numpy as np

        target = read.weight.target
        delta = np.zeros((target.m, target.n))
        if read.stored is not None:
            W = read.stored.T if target.transposed else read.stored
            for rows, block in self.updates.changes(W, read):
                delta[rows] = block
        return delta


def _layers(found: Match) -> tuple[Layer, ...]:
    """The layers by their names in the live model, in the order of the match."""
    for adapter in (source.adapter for source in found.sources):
        if adapter.provenance is not None and adapter.provenance.live_prefix is not None:
            raise InvalidInput(
                f"{adapter.name}: its modules have the checkpoint's names, and transformers calls some otherwise as it "
                "loads them: PEFT would find no layers for a LoRA adapter; merge into dense weights (`as_=model`)"
            )
    layers = []
    for weight in found.weights:
        target = weight.target
        if target.index is not None or len(target.tensor.shape) != 2:
            raise InvalidInput(
                f"{target.module}: several experts in one tensor, for which no LoRA adapter has factors that others "
                "read; merge into dense weights (`as_=model`)"
            )
        layers.append(Layer(weight.parts[0].trained.module, target.m, target.n))
        for part in weight.parts[1:]:
            if part.trained.module != layers[-1].module:
                raise InvalidInput(
                    f"{part.source.adapter.name}: has {part.trained.module} where the first adapter has "
                    f"{layers[-1].module}; adapters of models with other names make no LoRA adapter together"
                )
    return tuple(layers)


def _wholes(found: Match, targeted: set[str], dtype: str) -> tuple[tuple[Whole, ...], list[str], str]:
    """The tensors that were trained as a whole; PEFT's ``modules_to_save`` and ``bias`` for them."""
    wholes, biases, saved = [], [], list[str]()
    for source, info in found.replaced().values():
        adapter = source.adapter
        live = next(name for name, own in adapter.replaced.items() if own is info)
        is_saved = adapter.is_saved_module(live)
        stored = MODEL_DTYPES[dtype] if dtype != "auto" else info.dtype
        key = replaced_key(live) if is_saved else info.name
        wholes.append(Whole(key, stored, info.shape, partial(_read, source, info, stored)))
        if is_saved:
            saved += [name for name in adapter.modules_to_save if name not in saved]
        else:
            biases.append(live.removesuffix(".bias"))
    bias = "none" if not biases else "lora_only" if targeted >= set(biases) else "all"
    return tuple(wholes), saved, bias


def _read(source: Source, info: TensorInfo, dtype: str) -> HostArray:
    import numpy as np

    from frodctl.arrays import DTYPES

    with np.errstate(over="ignore"):  # infinity is looked for
        found = np.ascontiguousarray(source.adapter.tensor(info), DTYPES[dtype])
    if not np.isfinite(found).all():
        raise InvalidInput(f"{source.adapter.name}: tensor {info.name} is too large for {dtype}")
    return found


def _job_key(plan: MergeLoraPlan, kernels: Kernels) -> str:
    """A digest of everything that the output's bytes depend on but the values of the base's tensors."""
    from frodctl.checkpoint import stream

    found, chosen = plan.found, plan.options
    root = found.checkpoint.root
    assert root is not None
    projected = [w for w in found.weights if any(part.source.recompute for part in w.parts)]
    job = {
        "frodctl": frodctl.__version__,
        "arithmetic": kernels.identity(),
        "as": ["lora", chosen.rank, chosen.energy, chosen.max_rank, chosen.rank_pattern, chosen.dtype],
        "base": [state_of(path) for path in found.checkpoint.files()],
        "sources": [source_key(source) for source in found.sources],
        "weights": [
            [w.target.tensor.name, w.target.transposed, [part_key(found.sources, part) for part in w.parts]]
            for w in found.weights
        ],
        # V is computed from all of a category's weights
        "projected": [stream.digest(stream.read_tensor(root, w.target.tensor)) for w in projected],
        "wholes": [[whole.key, whole.dtype] for whole in plan.wholes],
    }
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]
