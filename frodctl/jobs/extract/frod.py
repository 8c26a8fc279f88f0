"""``extract --as frod``: the difference of two checkpoints as a FRoD adapter over a basis."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import frodctl
from frodctl.adapted import opening
from frodctl.checkpoint import files, manifest, names, sink
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import ADAPTER_FILES, Checkpoint
from frodctl.checkpoint.targets import Target, linear_layer
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats import adapter as adapter_format
from frodctl.formats.adapter import Provenance
from frodctl.formats.basis_file import BasisFile, ModuleRecord
from frodctl.jobs import SCHEMA_VERSION
from frodctl.jobs.cards import front_matter, is_hub_id, public_name
from frodctl.jobs.columns import Column
from frodctl.jobs.extract.options import ExtractOptions
from frodctl.jobs.extract.pairs import Pair, Pairs, paired
from frodctl.jobs.merge.key import state_of
from frodctl.jobs.profile import UNPROFILED, Unprofiled
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.push import Written, push_folder
from frodctl.jobs.resources import PROCESS_BYTES, measured_rates, memory_errors, take_device
from frodctl.jobs.staging import staging_of
from frodctl.method.budget import allocate, nnz
from frodctl.method.cost import Call
from frodctl.method.fidelity import Fidelity, together
from frodctl.pipeline import in_order
from frodctl.values import PathLike

if TYPE_CHECKING:
    from frodctl.arrays import HostArray
    from frodctl.method.fit import CategoryFit, Fit
    from frodctl.method.kernels import Kernels

_TREE = "tree"
_STEPS = 25  # of the iteration, for the estimate of the work


@dataclass(frozen=True)
class FrodPlan:
    """Everything that will be done, known from headers alone."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("module", "module", "text"),
        Column("category", "category", "text"),
        Column("m", "m"),
        Column("n", "n"),
        Column("nnz", "nnz"),
        Column("parameters", "parameters", "count"),
        Column("delta_norm", "‖ΔW‖", "figure", absent="–"),
        Column("kept", "kept", "figure", absent="–"),
        Column("distance", "‖Δ−ΔW‖/‖ΔW‖", "figure", absent="–"),
        Column("residual"),
    )

    pairs: Pairs = field(repr=False)  #: those of a category stand together
    records: Mapping[str, ModuleRecord] = field(repr=False)  #: of the basis, by module of the base
    basis: BasisFile = field(repr=False)
    options: ExtractOptions
    output: Path
    sparsity: Mapping[str, float]  #: by category
    warnings: tuple[str, ...]
    seconds_estimate: float | None = field(default=None, compare=False)

    def record(self, pair: Pair) -> ModuleRecord:
        return self.records[pair.target.module]

    def count(self, pair: Pair) -> int:
        """Positions of S in the pair's layer."""
        return nnz(pair.target.n, self.sparsity[self.record(pair).category])

    def check_output(self, key: str | None = None) -> None:
        """Raise `UsageError` where the output must not be written, by the job ``key`` or by any."""
        reads = [*self.pairs.files(), self.basis.path]
        sink.check_output_folder(self.output, reads, force=self.options.may_replace(self.output, key))

    @property
    def output_bytes(self) -> int:
        """Size of the numbers and the positions, about."""
        counts = {self.record(pair).category: self.count(pair) for pair in self.pairs.chosen}
        return 4 * self.trained_parameters + (16 * sum(counts.values()) if self.options.positions == "best" else 0)

    @property
    def trained_parameters(self) -> int:
        return sum(pair.target.n + self.count(pair) for pair in self.pairs.chosen)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak resident memory of the whole process, about."""
        shapes = [(pair.target.m, pair.target.n) for pair in self.pairs.chosen]
        work = max(96 * n * n + 48 * m * n for m, n in shapes)
        return PROCESS_BYTES + work + 8 * self.trained_parameters

    def calls(self) -> list[Call]:
        """What the arithmetic takes."""
        found = []
        for pair in self.pairs.chosen:
            m, n = pair.target.m, pair.target.n
            found += [Call("gemm", "float64", (m, n, n), 7)]
            found += [
                Call("gemm", "float64", (n, min(m, n), n), _STEPS),
                Call("csrmm", "float64", (self.count(pair) + n, min(m, n)), _STEPS),
            ]
        return found

    @property
    def flops(self) -> float:
        return sum(call.flops for call in self.calls())

    def rows(self) -> list[dict[str, Json]]:
        """Each layer as a line of a table; what is not known yet is None."""
        unknown = dict.fromkeys(("delta_norm", "kept", "distance", "residual"))
        return [
            {
                "module": pair.module,
                "category": self.record(pair).category,
                "m": pair.target.m,
                "n": pair.target.n,
                "nnz": self.count(pair),
                "parameters": pair.target.n + self.count(pair),
                **unknown,
            }
            for pair in self.pairs.chosen
        ]

    def as_dict(self) -> dict[str, Json]:
        """For JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "as": "frod",
            "base": self.pairs.base.model,
            "revision": self.pairs.base.revision,
            "tuned": self.pairs.tuned.model,
            "basis": str(self.basis.path),
            "output": str(self.output),
            "output_bytes": self.output_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "flops": self.flops,
            "seconds_estimate": self.seconds_estimate,
            "positions": self.options.positions,
            "sparsity": dict(self.sparsity),
            "trained_parameters": self.trained_parameters,
            "warnings": list(self.warnings),
            "layers": self.rows(),
        }


@dataclass(frozen=True)
class FrodResult(Written):
    """A finished extraction."""

    plan: FrodPlan
    output: Path
    output_bytes: int
    fidelities: tuple[Fidelity, ...]  #: of the layers, from the numbers as they are written
    residuals: tuple[float, ...]  #: of the layers' normal equations, relative to their right-hand sides
    device: str
    seconds: float

    @property
    def overall(self) -> Fidelity:
        """All layers together."""
        return together(list(self.fidelities))

    def rows(self) -> list[dict[str, Json]]:
        """Each layer as a line of a table."""
        found = zip(self.plan.rows(), self.fidelities, self.residuals, strict=True)
        return [row | near.as_dict() | {"residual": residual} for row, near, residual in found]

    def as_dict(self) -> dict[str, Json]:
        """For JSON: the plan's figures and what came of them."""
        return (
            self.profile_dict()
            | self.pushed_dict()
            | self.plan.as_dict()
            | self.overall.as_dict()
            | {
                "output_bytes": self.output_bytes,
                "device": self.device,
                "seconds": self.seconds,
                "layers": self.rows(),
            }
        )


def plan_frod(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    chosen: ExtractOptions,
    *,
    progress: Callback = silent,
    dry_run: bool = False,
) -> FrodPlan:
    """Settle what `extract` with ``as_="frod"`` would do. Parameters and errors are those of `extract`.

    With ``dry_run`` no weights are downloaded or read, so that what does not differ is among the layers.
    """
    if chosen.basis is None:
        raise UsageError("a FRoD adapter needs a `basis`: the file that frodctl decompose made of the base")
    basis = opening.opened(chosen.file_of(chosen.basis))
    records = {record.name: record for record in basis.metadata.modules}
    pairs = paired(base, tuned, output, chosen, partial(_targets, basis), progress=progress, dry_run=dry_run)
    ordered = sorted(pairs.chosen, key=lambda p: (records[p.target.module].category, names.natural_key(p.module)))
    pairs = replace(pairs, chosen=tuple(ordered))
    plan = FrodPlan(
        pairs, records, basis, chosen, pairs.output, _sparsity(pairs, records, basis, chosen), pairs.warnings()
    )
    if dry_run:
        rates = measured_rates(chosen.device)
        return replace(plan, seconds_estimate=rates.seconds(plan.calls()) if rates else None)
    plan.check_output()
    return plan


def _targets(basis: BasisFile, checkpoint: Checkpoint) -> list[Target]:
    """The weights that a basis was made from."""
    found = []
    for record in basis.metadata.modules:
        if record.name.endswith("]"):
            raise InvalidInput(
                f"{basis.path}: {record.name} is one of several experts in a tensor, which extract does not take; "
                "give a basis without them"
            )
        info = checkpoint.tensors.get(f"{record.name}.weight")
        if info is None:
            raise InvalidInput(
                f"{basis.path}: {checkpoint.model} has no {record.name}.weight; give the basis's own base"
            )
        target = replace(linear_layer(info, None, checkpoint), transposed=record.transposed)
        if target.n != basis.width(record.category):
            raise InvalidInput(
                f"{basis.path}: {record.name}.weight of {checkpoint.model} has {target.n} columns: another base?"
            )
        found.append(target)
    return found


def _sparsity(
    pairs: Pairs, records: Mapping[str, ModuleRecord], basis: BasisFile, chosen: ExtractOptions
) -> dict[str, float]:
    """The share of positions by category: as asked for, or the basis's own."""
    layers: dict[str, list[int]] = {}
    for pair in pairs.chosen:
        layers.setdefault(records[pair.target.module].category, []).append(pair.target.n)
    if chosen.positions == "basis" or (chosen.budget is None and chosen.sparsity is None):
        return {category: basis.metadata.sparsity[category] for category in layers}
    if chosen.budget is None:
        return dict.fromkeys(layers, chosen.sparsity or 0.0)
    widths = [(n[0], len(n)) for n in layers.values()]
    found = allocate(widths, [1.0] * len(widths), chosen.budget * pairs.base.parameters())
    return dict(zip(layers, found, strict=True))


def run_frod(plan: FrodPlan, progress: Callback = silent, profile: Unprofiled = UNPROFILED) -> FrodResult:
    """Carry out a plan of `plan_frod`. Errors are those of `extract`."""
    started = time.perf_counter()
    if plan.pairs.base.root is None or plan.pairs.tuned.root is None:
        raise UsageError(f"{plan.pairs.base.model}: planned from headers alone; plan again without `dry_run=True`")
    with profile.step("start and imports"):
        kernels = profile.kernels(take_device(plan.options.device, progress, plan.peak_memory_bytes))
    with staging_of(plan, _job_key(plan, kernels), progress) as staging:
        sink.require_disk(staging.folder, 8 * plan.trained_parameters)
        with memory_errors(kernels.name), profile.step("other arithmetic"):
            work = _Work(plan, kernels, progress, profile)
            for category in plan.sparsity:
                work.fit(category)
        with profile.step("writing"):
            tree = staging.begin_folder(_TREE, [])
            result = FrodResult(plan, plan.output, 0, tuple(work.fidelities), tuple(work.residuals), kernels.name, 0.0)
            provenance = _provenance(plan, work.positions)
            adapter_format.write_adapter(tree, work.tensors, _config(plan), provenance, _card(result))
            manifest.write(tree, f"frodctl {frodctl.__version__}")
            nbytes = files.stat(tree / ADAPTER_FILES[1]).st_size
            staging.publish_folder(_TREE, unsent=plan.options.pushes)
        result = replace(result, output_bytes=nbytes, seconds=time.perf_counter() - started)
        return push_folder(result, staging, plan.options, progress)


class _Work:
    """Fits category after category, and keeps the numbers."""

    def __init__(self, plan: FrodPlan, kernels: Kernels, progress: Callback, profile: Unprofiled) -> None:
        self.plan = plan
        self.kernels = kernels
        self.progress = progress
        self.profile = profile
        self.given = plan.basis.indices() if plan.options.positions == "basis" else {}
        self.positions: dict[str, HostArray] = {}
        self.tensors: dict[str, HostArray] = {}
        self.fidelities: list[Fidelity] = []
        self.residuals: list[float] = []

    def fit(self, category: str) -> None:
        """Find the positions and the numbers of one category's layers."""
        import numpy as np

        from frodctl.method.fit import CategoryFit, best_positions

        plan = self.plan
        V = plan.basis.tensor(f"V.{category}")
        fit = CategoryFit(V, self.kernels)
        numbers = [n for n, pair in enumerate(plan.pairs.chosen) if plan.record(pair).category == category]
        count = plan.count(plan.pairs.chosen[numbers[0]])
        if category in self.given:
            positions = self.given[category]
        elif count:
            total = np.zeros(V.shape)
            for _, U, change in self._layers(fit, numbers, "choosing positions"):
                total += fit.explained(U, change)
            positions = best_positions(total, count)
        else:
            positions = best_positions(V, 0)
        self.positions[category] = positions
        for pair, U, change in self._layers(fit, numbers, "fitting"):
            self._keep(pair, fit.fit(U, change, positions), partial(fit.update, U, indices=positions), change)
        if category not in self.given:
            self.tensors[adapter_format.indices_key(category)] = positions

    def _layers(
        self, fit: CategoryFit, numbers: Sequence[int], text: str
    ) -> Iterator[tuple[Pair, HostArray, HostArray]]:
        """Pairs with U and ΔW (m, n) in float64."""

        plan, kernels = self.plan, self.kernels
        reads = self.profile.waiting("waiting for weights", in_order([partial(plan.pairs.read, n) for n in numbers]))
        for (pair, W, tuned), digests in reads:
            self.progress(Progress(text))
            record = plan.record(pair)
            if digests.split()[0] != record.digest:
                raise InvalidInput(
                    f"{plan.pairs.base.model}: tensor {pair.target.tensor.name} is not the one that {plan.basis.path} "
                    "was made from (digests differ); give that base"
                )
            before, after = (kernels.put(X.T if pair.target.transposed else X, "float64") for X in (W, tuned))
            scales = plan.basis.tensor(f"lambda.{record.name}")
            yield pair, fit.directions(before, scales), after - before

    def _keep(self, pair: Pair, found: Fit, update: Callable[..., HostArray], change: HostArray) -> None:
        """Round a layer's numbers, and see how near they come."""
        import numpy as np

        scales = self.plan.basis.tensor(f"lambda.{self.plan.record(pair).name}").astype(np.float64)
        rounded = (scales + found.delta).astype(np.float32)
        values = found.values.astype(np.float32)
        self.tensors[adapter_format.lambda_key(pair.module)] = rounded
        self.tensors[adapter_format.values_key(pair.module)] = values
        near = update(rounded.astype(np.float64) - scales, values)
        self.fidelities.append(Fidelity.of(self.kernels.get(change), self.kernels.get(near)))
        self.residuals.append(found.residual)


def _provenance(plan: FrodPlan, positions: Mapping[str, HostArray]) -> Provenance:
    """What the adapter says of its base and its basis."""
    from frodctl.checkpoint.stream import digest

    basis = plan.basis.metadata
    categories = {pair.module: plan.record(pair).category for pair in plan.pairs.chosen}
    return Provenance(
        form="delta",
        V_digests={category: basis.V_digests[category] for category in positions},
        base_digests={pair.target.module: plan.record(pair).digest for pair in plan.pairs.chosen},
        seed=None,
        sparsity=dict(plan.sparsity),
        categories={module: c for module, c in categories.items() if c != names.peft_category(module)},
        pattern={category: digest(found) for category, found in positions.items()},
        dtype={},
        basis_file=plan.basis.path.name,
    )


def _config(plan: FrodPlan) -> dict[str, object]:
    """PEFT's fields."""
    basis, base = plan.basis.metadata, plan.pairs.base
    return {
        "base_model_name_or_path": base.model,
        "bias": "none",
        "fan_in_fan_out": any(pair.target.transposed for pair in plan.pairs.chosen),
        "inference_mode": True,
        "modules_to_save": None,
        "projection_prng_key": basis.seed,
        "regularization_alpha": basis.alpha,
        "revision": base.revision,
        "save_projection": True,
        "sparse_rate": max(plan.sparsity.values()),
        "target_modules": sorted((pair.module for pair in plan.pairs.chosen), key=names.natural_key),
        "task_type": None,
    }


def _card(result: FrodResult) -> str:
    """README.md, without any path of this machine."""
    plan, overall = result.plan, result.overall
    base = plan.pairs.base.model if is_hub_id(plan.pairs.base.model) else None
    shown = base or public_name(plan.pairs.base.model)
    kept = f"{overall.kept:.2%}" if overall.kept is not None else "all"
    origin = {"base_revision": plan.pairs.base.revision}
    lines = [
        *front_matter({}, base, library="frodctl", relation="adapter", origin=origin),
        "",
        f"# {plan.output.resolve().name}",
        "",
        f"A FRoD adapter for `{shown}`: the nearest to `{public_name(plan.pairs.tuned.model)}` over the shared basis",
        f"`{plan.basis.path.name}` and its positions. It has {kept} of the change's squared norm.",
        "",
        f"    frodctl merge {shown} ADAPTER OUT" + " --basis FILE",
        "",
        f"Made by frodctl {frodctl.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def _job_key(plan: FrodPlan, kernels: Kernels) -> str:
    """A digest of everything that the output's bytes depend on but the values of the tensors."""
    job = {
        "frodctl": frodctl.__version__,
        "arithmetic": kernels.identity(),
        "as": ["frod", plan.options.positions, dict(plan.sparsity)],
        "basis": [dict(plan.basis.metadata.V_digests), dict(plan.basis.metadata.digests)],
        "files": [state_of(path) for path in (*plan.pairs.base.files(), *plan.pairs.tuned.files())],
        "weights": [[pair.target.tensor.name, pair.tuned.name] for pair in plan.pairs.chosen],
    }
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]
