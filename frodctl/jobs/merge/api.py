"""``frodctl.merge``, as Python calls it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, overload

from frodctl import values
from frodctl.formats.basis_file import BasisFile
from frodctl.jobs import profile as profiles
from frodctl.jobs.merge.options import MergeOptions
from frodctl.jobs.merge.plan import MergePlan, plan_merge
from frodctl.jobs.merge.run import MergeResult, run_merge
from frodctl.jobs.progress import Callback, silent
from frodctl.values import Number, PathLike, Scaled

if TYPE_CHECKING:
    import torch


@overload
def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    dry_run: Literal[False] = ...,
    progress: Callback = ...,
    profile: bool = ...,
    basis: PathLike | BasisFile | None = ...,
    trust_basis: bool = ...,
    recompute_projection: bool = ...,
    projection_dtype: str | torch.dtype = ...,
    form: str = ...,
    scale: Number = ...,
    also: Scaled | Iterable[Scaled] = ...,
    adapter_name: str | None = ...,
    dtype: str | torch.dtype = ...,
    max_shard_size: int | str = ...,
    device: str | torch.device = ...,
    revision: str | None = ...,
    subfolder: str = ...,
    token: str | None = ...,
    cache_dir: PathLike | None = ...,
    offline: bool = ...,
    force: bool = ...,
    resume: bool = ...,
    verify: bool = ...,
) -> MergeResult: ...
@overload
def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    dry_run: Literal[True],
    progress: Callback = ...,
    profile: bool = ...,
    basis: PathLike | BasisFile | None = ...,
    trust_basis: bool = ...,
    recompute_projection: bool = ...,
    projection_dtype: str | torch.dtype = ...,
    form: str = ...,
    scale: Number = ...,
    also: Scaled | Iterable[Scaled] = ...,
    adapter_name: str | None = ...,
    dtype: str | torch.dtype = ...,
    max_shard_size: int | str = ...,
    device: str | torch.device = ...,
    revision: str | None = ...,
    subfolder: str = ...,
    token: str | None = ...,
    cache_dir: PathLike | None = ...,
    offline: bool = ...,
    force: bool = ...,
    resume: bool = ...,
    verify: bool = ...,
) -> MergePlan: ...
def merge(
    base: PathLike,
    adapter: PathLike,
    output: PathLike,
    *,
    dry_run: bool = False,
    progress: Callback = silent,
    profile: bool = False,
    basis: PathLike | BasisFile | None = None,
    trust_basis: bool = False,
    recompute_projection: bool = False,
    projection_dtype: str | torch.dtype = "auto",
    form: str = "auto",
    scale: Number = 1.0,
    also: Scaled | Iterable[Scaled] = (),
    adapter_name: str | None = None,
    dtype: str | torch.dtype = "auto",
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
) -> MergeResult | MergePlan:
    """Fold a trained adapter into its base and write an ordinary dense checkpoint.

    Values are taken in the forms that the command line takes, too: ``scale="50%"``, ``max_shard_size="2GB"``.

    Parameters
    ----------
    base : str or path
        The checkpoint that was fine-tuned: a local folder or file, or a Hub id; ``-`` for the one the adapter names.
    adapter : str or path
        The adapter: a local folder or weights file, or a Hub id.
    output : path
        The folder to make.
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
    form : {"auto", "delta", "reconstruct"}
        W + ΔW, or U (diag(λ') + S) Vᵀ as PEFT trains it; "auto" as it was trained.
    scale : float or str
        s of W + s (W' − W).
    also : adapter, (adapter, scale) pair, or a list of them
        Further adapters; ``"other:0.3"`` has its scale with it.
    adapter_name : str, optional
        Which of several adapters in the folder.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the result; "auto" keeps each tensor's.
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

    Returns
    -------
    MergeResult
        With ``output``, the folder; a `MergePlan` with ``dry_run``.

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
        basis=basis,
        trust_basis=trust_basis,
        recompute_projection=recompute_projection,
        projection_dtype=projection_dtype,
        form=form,
        scale=scale,
        also=also,
        adapter_name=adapter_name,
        dtype=dtype,
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
    )
    dry_run = values.flag(dry_run, "dry_run")
    measured = profiles.begin(profile, dry_run=dry_run)
    with measured.step("planning"):
        plan = plan_merge(base, adapter, output, options, dry_run=dry_run, progress=progress)
    return plan if dry_run else run_merge(plan, progress, measured).with_profile(measured)
