"""Running the plan of a merge, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import frodctl
from frodctl.checkpoint import files, manifest, shards, sink
from frodctl.checkpoint.inputs import Json
from frodctl.errors import InvalidInput, UsageError
from frodctl.jobs.columns import Column
from frodctl.jobs.merge.card import model_card
from frodctl.jobs.merge.division import names_of_ranks
from frodctl.jobs.merge.key import part_key, source_key, state_of
from frodctl.jobs.merge.plan import MergePlan
from frodctl.jobs.profile import UNPROFILED, Unprofiled
from frodctl.jobs.progress import Callback, Progress, silent
from frodctl.jobs.push import Written, push_folder
from frodctl.jobs.ranks import BY_ITSELF, Launch, World, staged
from frodctl.jobs.resources import memory_errors, take_device
from frodctl.jobs.staging import staging_of

if TYPE_CHECKING:
    from frodctl.method.fidelity import Fidelity
    from frodctl.method.kernels import Kernels

_TREE = "tree"
_JOURNAL = "journal.jsonl"
_FIGURES = "figures.jsonl"
#: Of a layer's update: where less survives, it is said.
_ENOUGH = 0.9


_SURVIVAL = (
    Column("survival", "survives", "figure", absent="–"),
    Column("least_survival", "least", "figure", absent="–"),
    Column("survival_distance", "distance", "figure", absent="–"),
)


@dataclass(frozen=True)
class MergeResult(Written):
    """A finished merge."""

    plan: MergePlan
    output: Path
    output_bytes: int  #: of the weights' files
    unchanged: tuple[str, ...]  #: targeted weights whose bytes are the base's: nothing was trained there
    survival: Mapping[str, Fidelity]  #: how much of each update is in a weight in 8 bits, by its name
    resumed_tensors: int  #: taken from an earlier run
    verified: bool
    device: str
    seconds: float

    @property
    def columns(self) -> tuple[Column, ...]:
        """Of its rows: the plan's, and of a result in 8 bits what survives."""
        return (*self.plan.columns, *(_SURVIVAL if self.plan.quantization else ()))

    def rows(self) -> list[dict[str, Json]]:
        """Each category of each adapter as a line of a table."""
        groups: dict[tuple[int, str], list[Fidelity]] = {}
        for weight in self.plan.weights:
            found = self.survival.get(self.plan.name(weight))
            for part in weight.parts:
                key = self.plan.sources.index(part.source), part.trained.category
                groups.setdefault(key, []).extend([found] if found else [])
        rows = zip(self.plan.rows(), groups.values(), strict=True)
        return [row | _survival_of(found) for row, found in rows] if self.plan.quantization else self.plan.rows()

    @property
    def least(self) -> tuple[str, float] | None:
        """The weight of whose update least survives in 8 bits, and how much."""
        shares = [(name, found.kept) for name, found in self.survival.items() if found.kept is not None]
        return min(shares, key=lambda item: item[1], default=None)

    def warnings(self) -> list[str]:
        """What is lost in 8 bits."""
        if self.least is None or self.least[1] >= _ENOUGH:
            return []
        name, share = self.least
        module = name.removesuffix(".weight")
        return [
            f"{share:.1%} of the update of {module} survives in 8 bits: it is too small for them, "
            "so merge in 16 (`dtype`), or train further"
        ]

    def as_dict(self) -> dict[str, Json]:
        """For JSON: the plan's figures and what came of them."""
        return (
            self.profile_dict()
            | self.pushed_dict()
            | self.plan.as_dict()
            | {
                "output_bytes": self.output_bytes,
                "unchanged_tensors": list(self.unchanged),
                "survival": [
                    {"tensor": name, "survival": found.kept, "survival_distance": found.distance}
                    for name, found in self.survival.items()
                ],
                "categories": self.rows(),
                "resumed_tensors": self.resumed_tensors,
                "verified": self.verified,
                "device": self.device,
                "seconds": self.seconds,
            }
        )


def _survival_of(found: list[Fidelity]) -> dict[str, Json]:
    """How much of the updates of a category's layers is in the result, over all and where it is least."""
    from frodctl.method.fidelity import together

    overall = together(found)
    least = min((item.kept for item in found if item.kept is not None), default=None)
    return {"survival": overall.kept, "least_survival": least, "survival_distance": overall.distance}


def run_merge(
    plan: MergePlan,
    progress: Callback = silent,
    profile: Unprofiled = UNPROFILED,
    launch: Launch = BY_ITSELF,
) -> MergeResult:
    """Carry out a plan of `plan_merge`, as one of its ranks. Errors are those of `merge`."""
    started = time.perf_counter()
    with profile.step("start and imports"):
        from frodctl.jobs.merge.tensors import TensorMerger
        from frodctl.jobs.notes import Notes

    if plan.checkpoint.root is None:
        raise UsageError(f"{plan.checkpoint.model}: planned from headers alone; plan again without `dry_run=True`")
    with profile.step("start and imports"):
        kernels = profile.kernels(take_device(plan.options.device, progress, plan.peak_memory_bytes, launch))
    with profile.step("start and imports"):
        world = launch.world
    with staged(world, plan.output, lambda: _staging(plan, kernels, progress, profile)) as staging:
        tree = staging.path(_TREE)
        names = names_of_ranks(plan, world.count)[world.number]
        if isinstance(staging, sink.Staging):
            _begin(plan, staging)
        try:
            with profile.step("writing"), _writer(plan, staging, tree, world) as writer:
                resumed = len(writer.digests)
                with (
                    memory_errors(kernels.name),
                    profile.step("other arithmetic"),
                    Notes(staging.path(_name(_FIGURES, world.number))) as notes,
                ):
                    merger = TensorMerger(plan, names, writer, notes, kernels, progress, profile)
                    merger.run()
                digests = {name: digest for name, digest in writer.digests.items() if name not in writer.others}
        except InvalidInput:  # a rerun would come to the same
            if isinstance(staging, sink.Staging):
                files.rmtree(staging.folder)
            raise
        if plan.options.verify:
            progress(Progress("reading the result again"))
            with profile.step("checking the files"):
                shards.verify(tree, plan.shards, digests)
        unchanged = [name for each in world.gather(merger.unchanged) for name in each]
        known = {name: figures for each in world.gather(notes.known) for name, figures in each.items()}
        written = {name: digest for each in world.gather(digests) for name, digest in each.items()}
        if isinstance(staging, sink.Staging):
            with profile.step("writing"):
                _write_the_rest(plan, tree, written)
                staging.publish_folder(_TREE, unsent=plan.options.pushes)
        world.gather(None)
        result = MergeResult(
            plan=plan,
            output=plan.output,
            output_bytes=plan.output_bytes,
            unchanged=tuple(unchanged),
            survival={name: known[name] for name in map(plan.name, plan.weights) if name in known},
            resumed_tensors=resumed,
            verified=plan.options.verify,
            device=kernels.name,
            seconds=time.perf_counter() - started,
        )
        return push_folder(result, staging, plan.options, progress) if isinstance(staging, sink.Staging) else result


def _staging(plan: MergePlan, kernels: Kernels, progress: Callback, profile: Unprofiled) -> sink.Staging:
    with profile.step("digests"):
        key = _job_key(plan, kernels)
    return staging_of(plan, key, progress)


def _begin(plan: MergePlan, staging: sink.Staging) -> None:
    """Refuse what would fail at the end, and keep of an earlier run's files the weights."""
    model_card(plan)
    sink.require_disk(staging.folder, plan.output_bytes - staging.finished_bytes())
    staging.begin_folder(_TREE, [shard.file for shard in plan.shards])


def _writer(plan: MergePlan, staging: sink.Pieces, tree: Path, world: World) -> shards.ShardWriter:
    """What writes to the files, which the first rank makes; every rank has a journal."""
    from frodctl.jobs.merge.tensors import origin

    if world.number == 0:
        others = sorted(staging.folder.glob("journal-*.jsonl"))
        journal = staging.path(_JOURNAL)
        writer = shards.ShardWriter(tree, plan.shards, journal, partial(origin, plan), others=others)
        world.share([writer.digests])
        return writer
    [finished] = world.share(None)
    return shards.ShardWriter(tree, plan.shards, staging.path(_name(_JOURNAL, world.number)), finished=finished)


def _name(file: str, rank: int) -> str:
    """What a rank calls its own of such files."""
    return file if rank == 0 else f"{Path(file).stem}-{rank}{Path(file).suffix}"


def _write_the_rest(plan: MergePlan, tree: Path, digests: Mapping[str, str]) -> None:
    """The index, the configs and whatever else belongs to the model."""
    root = plan.checkpoint.root
    assert root is not None
    for name in plan.files:
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            files.mkdir(tree / parent)
        files.copy(root / name, tree / name)
    if len(plan.shards) > 1:
        _write_json(tree / shards.index_file(plan.shards), shards.index(plan.shards))
    if plan.config is not None:
        _write_json(tree / "config.json", plan.config)
    elif plan.checkpoint.config:
        files.copy(root / "config.json", tree / "config.json")
    files.write_text(tree / "README.md", model_card(plan))
    recorded = {
        shard.file: {piece.name: f"sha256:{digests[piece.name]}" for piece, _ in shard.pieces()}
        for shard in plan.shards
    }
    manifest.write(tree, f"frodctl {frodctl.__version__}", recorded)


def _write_json(path: Path, value: Mapping[str, Json]) -> None:
    files.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _job_key(plan: MergePlan, kernels: Kernels) -> str:
    """A digest of everything that the output's bytes depend on but the values of the base's tensors."""
    from frodctl.jobs.merge.tensors import origin

    assert plan.checkpoint.root is not None
    job = {
        "frodctl": frodctl.__version__,
        "arithmetic": kernels.identity(),
        "base": [
            state_of(plan.checkpoint.root / file)
            for file in sorted({part.file for info in plan.checkpoint.tensors.values() for part in info.parts})
        ],
        "sources": [source_key(source) for source in plan.sources],
        "shards": [[shard.file, [(s.name, s.dtype, s.shape) for s in shard.specs]] for shard in plan.shards],
        "weights": [
            [w.target.stored.name, w.target.transposed, [part_key(plan.sources, part) for part in w.parts]]
            for w in plan.weights
        ],
        "base_as": [plan.base_as.as_dict(), sorted(plan.base_as.tensors)] if plan.base_as else None,
        # V is computed from all of a category's weights
        "projected": [
            origin(plan, plan.name(w)) for w in plan.weights if any(part.source.recompute for part in w.parts)
        ],
        "replaced": [[name, plan.sources.index(source), info.name] for name, (source, info) in plan.replaced.items()],
    }
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()[:16]
