"""``frodctl.merge``, as Python calls it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, Unpack, overload

from frodctl import values
from frodctl.formats.basis_file import BasisFile
from frodctl.jobs import profile as profiles
from frodctl.jobs.lora.options import LoraKeywords
from frodctl.jobs.lora.plan import LoraPlan
from frodctl.jobs.merge.lora import plan_lora, run_lora
from frodctl.jobs.merge.options import MergeOptions
from frodctl.jobs.merge.plan import MergePlan, plan_merge
from frodctl.jobs.merge.run import MergeResult, run_merge
from frodctl.jobs.progress import Callback, silent
from frodctl.values import Number, PathLike, Scaled

if TYPE_CHECKING:
    import torch

    from frodctl.jobs.lora.run import LoraResult


class Keywords(LoraKeywords, total=False):
    """What `merge` takes by name, whatever it returns."""

    basis: PathLike | BasisFile | None
    trust_basis: bool
    recompute_projection: bool
    projection_dtype: str | torch.dtype
    base_as: str
    form: str
    scale: Number
    also: Scaled | Iterable[Scaled]
    adapter_name: str | None
    fp8_scales: str
    max_shard_size: int | str


@overload
def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    as_: Literal["model"] = ...,
    dry_run: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> MergeResult: ...
@overload
def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    as_: Literal["model"] = ...,
    dry_run: Literal[True],
    **options: Unpack[Keywords],
) -> MergePlan: ...
@overload
def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    as_: Literal["lora"],
    dry_run: Literal[False] = ...,
    **options: Unpack[Keywords],
) -> LoraResult: ...
@overload
def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    as_: Literal["lora"],
    dry_run: Literal[True],
    **options: Unpack[Keywords],
) -> LoraPlan: ...
def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    as_: str = "model",
    rank: int | str | None = None,
    energy: Number | None = None,
    max_rank: int | str = 256,
    rank_pattern: bool = False,
    dry_run: bool = False,
    progress: Callback = silent,
    profile: bool = False,
    basis: PathLike | BasisFile | None = None,
    trust_basis: bool = False,
    recompute_projection: bool = False,
    projection_dtype: str | torch.dtype = "auto",
    base_as: str = "stored",
    form: str = "auto",
    scale: Number = 1.0,
    also: Scaled | Iterable[Scaled] = (),
    adapter_name: str | None = None,
    dtype: str | torch.dtype = "auto",
    fp8_scales: str = "channel",
    max_shard_size: int | str = "5GB",
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
) -> MergeResult | MergePlan | LoraResult | LoraPlan:
    """Fold a trained adapter into its base and write an ordinary dense checkpoint, or a LoRA adapter.

    Values are taken in the forms that the command line takes, too: ``scale="50%"``, ``max_shard_size="2GB"``.

    Parameters
    ----------
    base : str or path
        The checkpoint that was fine-tuned: a local folder or file, a Hub id or one of the Hub's URLs; ``-`` for the one
        that the adapter names.
    adapter : str or path
        The adapter: a local folder or weights file, a Hub id or URL.
    output : path
        The folder to make.
    as_ : {"model", "lora"}
        A dense checkpoint, or PEFT's LoRA adapter over the base: each layer's W' − W by the best approximation of a
        rank.
    rank : int, optional
        Of the LoRA adapter; its α is the same.
    energy : float or str, optional
        In place of ``rank``: the share of ‖W' − W‖² that each layer is to keep, ``0.95`` or ``"95%"``.
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
    basis : path or BasisFile, optional
        Shared-basis file, for an adapter that does not hold V. By default a file in the adapter's folder, in the one
        above, or where the adapter recorded it: the one that has the recorded digests, whatever its name.
    trust_basis : bool
        Take V from it although the adapter does not say that it is the one.
    recompute_projection : bool
        Run PEFT's own routine for the V of one of its adapters that was saved without.
    projection_dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the base as such an adapter was trained over it. "auto" takes what the adapter's tensors tell, or else the
        dtype that the base is stored in; a warning says which.
    base_as : {"stored", "auto", "nf4", "nf4-double", "fp4", "fp4-double", "int8", "llm-int8"}
        The base's weights as they are stored, or as bitsandbytes' 4 bits and LLM.int8() or torchao's weight-only int8
        make them; "auto" as the adapter says that it was trained.
    form : {"auto", "delta", "reconstruct"}
        W + ΔW, or U (diag(λ') + S) Vᵀ as PEFT trains it; "auto" as it was trained.
    scale : float or str
        s of W + s (W' − W).
    also : adapter, (adapter, scale) pair, or a list of them
        Further adapters; ``"other:0.3"`` has its scale with it.
    adapter_name : str, optional
        Which of several adapters in the folder.
    dtype : {"auto", "float32", "bfloat16", "float16", "float8_e4m3"}
        Of the result; "auto" keeps each tensor's, and writes a LoRA adapter in float32 as PEFT does. "float8_e4m3" is
        compressed-tensors' layout: the linear layers of the blocks in 8 bits, all else as it is.
    fp8_scales : {"channel", "block"}
        What has a scale in 8 bits: each row, or each block of 128 × 128.
    max_shard_size : int or str
        Bytes of tensors in one file.
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
    MergeResult or LoraResult
        With ``output``, the folder; a `MergePlan` or `LoraPlan` with ``dry_run``.

    Raises
    ------
    UsageError
        A parameter makes no sense, the output exists, or is, contains or lies in what is read.
    InvalidInput
        Base, adapter and basis do not belong together, one of them is damaged, or the result is not finite.
    OutOfResources
        Disk or memory will not do.
    FrodctlError
        Something cannot be found or fetched.

    Examples
    --------
    >>> import frodctl
    >>> result = frodctl.merge("my-base", "my-adapter", "merged")  # doctest: +SKIP
    """
    options = MergeOptions.of(
        as_=as_,
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        rank_pattern=rank_pattern,
        basis=basis,
        trust_basis=trust_basis,
        recompute_projection=recompute_projection,
        projection_dtype=projection_dtype,
        base_as=base_as,
        form=form,
        scale=scale,
        also=also,
        adapter_name=adapter_name,
        dtype=dtype,
        fp8_scales=fp8_scales,
        max_shard_size=max_shard_size,
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
    if options.as_ == "lora":
        with measured.step("planning"):
            lora = plan_lora(base, adapter, output, options, dry_run=dry_run, progress=progress)
        return lora if dry_run else run_lora(lora, progress, measured).with_profile(measured)
    with measured.step("planning"):
        plan = plan_merge(base, adapter, output, options, dry_run=dry_run, progress=progress)
    return plan if dry_run else run_merge(plan, progress, measured).with_profile(measured)
