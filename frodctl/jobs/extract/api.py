"""``frodctl.extract``, as Python calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Unpack, overload

from frodctl import values
from frodctl.formats.basis_file import BasisFile
from frodctl.jobs import profile as profiles
from frodctl.jobs.extract.frod import FrodPlan, FrodResult, plan_frod, run_frod
from frodctl.jobs.extract.lora import plan_lora, run_lora
from frodctl.jobs.extract.options import ExtractOptions
from frodctl.jobs.lora.options import LoraKeywords
from frodctl.jobs.lora.plan import LoraPlan
from frodctl.jobs.progress import Callback, silent
from frodctl.values import Blocks, Names, Number, PathLike

if TYPE_CHECKING:
    import torch

    from frodctl.jobs.lora.run import LoraResult


class Keywords(LoraKeywords, total=False):
    """What `extract` takes by name, whatever it returns."""

    target_modules: Names
    exclude_modules: Names | None
    layers: Blocks | None
    basis: PathLike | BasisFile | None
    sparsity: Number | None
    budget: Number | None
    positions: str


@overload
def extract(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    *,
    as_: Literal["lora"] = ...,
    dry_run: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> LoraResult: ...
@overload
def extract(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    *,
    as_: Literal["lora"] = ...,
    dry_run: Literal[True],
    **options: Unpack[Keywords],
) -> LoraPlan: ...
@overload
def extract(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    *,
    as_: Literal["frod"],
    dry_run: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> FrodResult: ...
@overload
def extract(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    *,
    as_: Literal["frod"],
    dry_run: Literal[True],
    **options: Unpack[Keywords],
) -> FrodPlan: ...
def extract(
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    *,
    as_: str = "lora",
    target_modules: Names = "all-linear",
    exclude_modules: Names | None = None,
    layers: Blocks | None = None,
    basis: PathLike | BasisFile | None = None,
    sparsity: Number | None = None,
    budget: Number | None = None,
    positions: str = "best",
    rank: int | str | None = None,
    energy: Number | None = None,
    max_rank: int | str = 256,
    rank_pattern: bool = False,
    dry_run: bool = False,
    progress: Callback = silent,
    profile: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    subfolder: str = "",
    token: str | None = None,
    cache_dir: PathLike | None = None,
    offline: bool = False,
    force: bool = False,
    resume: bool = True,
    verify: bool = True,
    push_to_hub: str | None = None,
    private: bool = False,
) -> LoraResult | LoraPlan | FrodResult | FrodPlan:
    """Compress what a fine-tuning changed in a checkpoint to an adapter, LoRA's or FRoD's.

    Values are taken in the forms that the command line takes, too: ``energy="95%"``, ``layers="0-11"``.

    Parameters
    ----------
    base : str or path
        The checkpoint that was fine-tuned: a local folder or file, a Hub id or one of its URLs.
    tuned : str or path
        What came of it, of the same shapes.
    output : path
        The folder to make.
    as_ : {"lora", "frod"}
        PEFT's LoRA adapter over the base, each layer's change by the best approximation of a rank; or a FRoD adapter,
        the update that comes nearest over ``basis``.
    target_modules, exclude_modules, layers
        Which layers of a LoRA adapter, as for `frodctl.decompose`. A FRoD adapter has the basis's. Those that do not
        differ are left out.
    basis : path or BasisFile, optional
        Shared-basis file of the base, for a FRoD adapter.
    sparsity : float or str, optional
        Share of the n² positions of each layer that a FRoD adapter has; by default as many as the basis file's.
    budget : float or str, optional
        In place of ``sparsity``: share of the checkpoint's parameters, ``0.0172`` or ``"1.72%"``.
    positions : {"best", "basis"}
        Those at which a category's layers change most, which the adapter then holds; or those of the basis file.
    rank : int, optional
        Of the adapter; its α is the same.
    energy : float or str, optional
        In place of ``rank``: the share of ‖ΔW‖² that each layer is to keep, ``0.95`` or ``"95%"``.
    max_rank : int
        The rank is no larger, whatever ``energy`` would take.
    rank_pattern : bool
        Give each layer the rank that it needs, which PEFT reads and other programs do not, rather than all the largest.
    dry_run : bool
        Return the plan, made from headers alone: nothing is downloaded but headers, nothing is written.
    progress : callable, optional
        Called with a `frodctl.jobs.progress.Progress` as the work goes on.
    profile : bool
        Measure where the time goes: the result's ``profile``.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the adapter; "auto" is float32, as PEFT has it.
    device : str or torch.device
        "auto", "cpu", "cuda", "cuda:1".
    revision, subfolder, token, cache_dir, offline
        How the base is reached, as in huggingface_hub.
    force : bool
        Replace an output that exists.
    resume : bool
        Take up what a killed run of the same job had finished.
    verify : bool
        Read the result again before it gets its name.
    push_to_hub : str, optional
        A repository on the Hub, ``org/name``, that the result is sent to as well when it is finished and checked. Where
        something is there, ``force`` replaces it.
    private : bool
        Make that repository private, if it is made.

    Returns
    -------
    LoraResult or FrodResult
        With ``output``, the folder, and how near each layer comes; a `LoraPlan` or `FrodPlan` with ``dry_run``.

    Raises
    ------
    UsageError
        A parameter makes no sense, the output exists, or is, contains or lies in what is read.
    InvalidInput
        The checkpoints are not of one model, one of them is damaged, or nothing differs.
    OutOfResources
        Disk or memory will not do.
    FrodctlError
        Something cannot be found or fetched.

    Examples
    --------
    >>> import frodctl
    >>> result = frodctl.extract("my-base", "my-tuned", "adapter", rank=64)  # doctest: +SKIP
    """
    options = ExtractOptions.of(
        as_=as_,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers=layers,
        basis=basis,
        sparsity=sparsity,
        budget=budget,
        positions=positions,
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        rank_pattern=rank_pattern,
        dtype=dtype,
        device=device,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        force=force,
        resume=resume,
        verify=verify,
        push_to_hub=push_to_hub,
        private=private,
    )
    dry_run = values.flag(dry_run, "dry_run")
    measured = profiles.begin(profile, dry_run=dry_run)
    if options.as_ == "frod":
        with measured.step("planning"):
            frod = plan_frod(base, tuned, output, options, dry_run=dry_run, progress=progress)
        return frod if dry_run else run_frod(frod, progress, measured).with_profile(measured)
    with measured.step("planning"):
        plan = plan_lora(base, tuned, output, options, dry_run=dry_run, progress=progress)
    return plan if dry_run else run_lora(plan, progress, measured).with_profile(measured)
