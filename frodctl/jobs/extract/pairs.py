"""Two checkpoints of one model: which weights were tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from frodctl import values
from frodctl.checkpoint import names, sink, stream
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import Checkpoint, TensorInfo
from frodctl.checkpoint.targets import Target
from frodctl.checkpoint.ties import same_bytes
from frodctl.errors import InvalidInput
from frodctl.jobs.extract.options import ExtractOptions
from frodctl.jobs.progress import Callback, Progress
from frodctl.jobs.resources import choose_device
from frodctl.values import PathLike

if TYPE_CHECKING:
    from frodctl.arrays import HostArray


@dataclass(frozen=True)
class Pair:
    """A weight of the base, and what it was tuned to."""

    target: Target
    tuned: TensorInfo

    @property
    def module(self) -> str:
        """Its path in the tuned model, which has the names of the live one."""
        return self.tuned.name.removesuffix(".weight")


@dataclass(frozen=True)
class Pairs:
    """The weights of a base that are extracted."""

    base: Checkpoint
    tuned: Checkpoint
    output: Path
    chosen: tuple[Pair, ...]
    elsewhere: tuple[str, ...]  #: tensors that differ too and are not extracted; not known from headers alone

    def files(self) -> list[Path]:
        """The files and folders that are read, as far as they are here."""
        roots = [checkpoint.path or checkpoint.root for checkpoint in (self.base, self.tuned)]
        return [*(root for root in roots if root), *self.base.files(), *self.tuned.files()]

    def warnings(self) -> tuple[str, ...]:
        """What is lost."""
        if not self.elsewhere:
            return ()
        more = f" and {len(self.elsewhere) - 1} more tensors" if len(self.elsewhere) > 1 else ""
        return (f"{self.elsewhere[0]}{more}: different too, but not in the adapter",)

    def read(self, number: int) -> tuple[tuple[Pair, HostArray, HostArray], str]:
        """A pair with its weights as they are stored, and a digest of both."""
        pair = self.chosen[number]
        weights = []
        for checkpoint, info in ((self.base, pair.target.tensor), (self.tuned, pair.tuned)):
            assert checkpoint.root is not None
            found = stream.read_tensor(checkpoint.root, info)
            stream.check_finite(found, info.name, str(checkpoint.root / info.file))
            weights.append(found)
        W, tuned = weights
        return (pair, W, tuned), f"{stream.digest(W)} {stream.digest(tuned)}"


def paired(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    chosen: ExtractOptions,
    targets: Callable[[Checkpoint], Sequence[Target]],
    *,
    progress: Callback,
    dry_run: bool,
) -> Pairs:
    """Open both checkpoints and find which of the base's ``targets`` differ.

    Raises
    ------
    UsageError
        The output must not be written, or the targets match nothing.
    InvalidInput
        A targeted weight is not in the tuned model, or of another shape there; experts are in one tensor; none differs.
    """
    output = values.path(output, "output")
    output = output if output.name not in ("", "..") else output.resolve()
    locations = chosen.location(values.model(base, "base")), chosen.location_of_other(values.model(tuned, "tuned"))
    if not dry_run:
        local = [path for location in locations if (path := location.local_path()) is not None]
        sink.check_output_folder(output, local, force=chosen.may_replace(output))
        choose_device(chosen.device)  # before a download, not after it
        chosen.check_destination(output)
    first, second = (
        open_checkpoint(location, headers_only=dry_run, progress=lambda text: progress(Progress(text)))
        for location in locations
    )
    for checkpoint in (first, second):
        refuse_quantized(checkpoint)
    matched = names.match(first.tensors, second.tensors)
    pairs = [_pair(target, matched[target.tensor.name], first, second) for target in targets(first)]
    found = Pairs(first, second, output, tuple(pairs), ())
    return found if dry_run else _those_that_differ(found, matched, progress)


def _pair(target: Target, name: str | None, base: Checkpoint, tuned: Checkpoint) -> Pair:
    info = tuned.tensors.get(name or "")
    if target.index is not None:
        raise InvalidInput(
            f"{base.model}: tensor {target.tensor.name} holds several experts, for which PEFT's adapters have no "
            "layers; leave it out (`exclude_modules`)"
        )
    if info is None:
        raise InvalidInput(f"{tuned.model}: has no {target.tensor.name}; is it tuned from {base.model}?")
    if info.shape != target.tensor.shape or info.dtype not in FLOAT_DTYPES:
        there, own = f"{info.dtype} {list(info.shape)}", f"{target.tensor.dtype} {list(target.tensor.shape)}"
        raise InvalidInput(f"{tuned.model}: tensor {info.name} is {there}, and in {base.model} {own}")
    return Pair(target, info)


def _those_that_differ(found: Pairs, matched: dict[str, str | None], progress: Callback) -> Pairs:
    """Without the weights whose bytes are the same in both, and with what else differs."""
    progress(Progress("comparing the checkpoints"))
    base, tuned = found.base, found.tuned
    assert base.source is not None
    assert tuned.source is not None
    differing = []
    for name, info in base.tensors.items():
        theirs = tuned.tensors.get(matched[name] or "")
        if theirs is None or theirs.shape != info.shape or not same_bytes(base.source, info, tuned.source, theirs):
            differing.append(name)
    chosen = tuple(pair for pair in found.chosen if pair.target.tensor.name in set(differing))
    if not chosen:
        raise InvalidInput(
            f"{tuned.model}: none of the targeted weights differs from {base.model}'s; nothing to extract"
        )
    extracted = {pair.target.tensor.name for pair in chosen}
    new = set(tuned.tensors) - set(matched.values())
    elsewhere = sorted([name for name in differing if name not in extracted] + list(new), key=names.natural_key)
    return Pairs(base, tuned, found.output, chosen, tuple(elsewhere))
