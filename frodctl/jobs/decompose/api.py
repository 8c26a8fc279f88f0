"""``frodctl.decompose``, as Python calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from frodctl import values
from frodctl.jobs import profile as profiles
from frodctl.jobs.decompose.options import DecomposeOptions
from frodctl.jobs.decompose.plan import DecomposePlan, plan_decompose
from frodctl.jobs.decompose.run import DecomposeResult, run_decompose
from frodctl.jobs.progress import Callback, silent
from frodctl.values import Blocks, Names, Number, PathLike

if TYPE_CHECKING:
    import torch


@overload
def decompose(
    model: PathLike,
    output: PathLike | None = ...,
    *,
    dry_run: Literal[False] = ...,
    progress: Callback = ...,
    profile: bool = ...,
    target_modules: Names = ...,
    exclude_modules: Names | None = ...,
    layers: Blocks | None = ...,
    share_input: bool = ...,
    sparsity: Number | None = ...,
    budget: Number | None = ...,
    allocate: str = ...,
    alpha: Number = ...,
    seed: int | str = ...,
    device: str | torch.device = ...,
    precision: str = ...,
    dtype: str | torch.dtype = ...,
    cache_size: int | str = ...,
    memory_limit: int | str | None = ...,
    revision: str | None = ...,
    subfolder: str = ...,
    token: str | None = ...,
    cache_dir: PathLike | None = ...,
    offline: bool = ...,
    stream: bool = ...,
    force: bool = ...,
    resume: bool = ...,
    push_to_hub: str | None = ...,
    private: bool = ...,
) -> DecomposeResult: ...
@overload
def decompose(
    model: PathLike,
    output: PathLike | None = ...,
    *,
    dry_run: Literal[True],
    progress: Callback = ...,
    profile: bool = ...,
    target_modules: Names = ...,
    exclude_modules: Names | None = ...,
    layers: Blocks | None = ...,
    share_input: bool = ...,
    sparsity: Number | None = ...,
    budget: Number | None = ...,
    allocate: str = ...,
    alpha: Number = ...,
    seed: int | str = ...,
    device: str | torch.device = ...,
    precision: str = ...,
    dtype: str | torch.dtype = ...,
    cache_size: int | str = ...,
    memory_limit: int | str | None = ...,
    revision: str | None = ...,
    subfolder: str = ...,
    token: str | None = ...,
    cache_dir: PathLike | None = ...,
    offline: bool = ...,
    stream: bool = ...,
    force: bool = ...,
    resume: bool = ...,
    push_to_hub: str | None = ...,
    private: bool = ...,
) -> DecomposePlan: ...
def decompose(
    model: PathLike,
    output: PathLike | None = None,
    *,
    dry_run: bool = False,
    progress: Callback = silent,
    profile: bool = False,
    target_modules: Names = "default",
    exclude_modules: Names | None = None,
    layers: Blocks | None = None,
    share_input: bool = False,
    sparsity: Number | None = None,
    budget: Number | None = None,
    allocate: str = "uniform",
    alpha: Number = 1e-3,
    seed: int | str = 0,
    device: str | torch.device = "auto",
    precision: str = "auto",
    dtype: str | torch.dtype = "float32",
    cache_size: int | str = "1GB",
    memory_limit: int | str | None = None,
    revision: str | None = None,
    subfolder: str = "",
    token: str | None = None,
    cache_dir: PathLike | None = None,
    offline: bool = False,
    stream: bool = False,
    force: bool = False,
    resume: bool = True,
    push_to_hub: str | None = None,
    private: bool = False,
) -> DecomposeResult | DecomposePlan:
    """Compute the joint decomposition of a checkpoint and write it to a shared-basis file.

    Values are taken in the forms that the command line takes, too: ``budget="2%"``, ``cache_size="1GB"``.

    Parameters
    ----------
    model : str or path
        A local folder or file, a Hub id (``name``, ``org/name``, ``org/name@revision``) or one of the Hub's URLs
        (``hf://org/name@revision/folder``).
    output : path, optional
        The shared-basis file; by default ``./<model name>.frod.safetensors``.
    dry_run : bool
        Return the plan, made from headers alone: nothing is downloaded but headers, nothing is written.
    progress : callable, optional
        Called with a `frodctl.jobs.progress.Progress` as the work goes on.
    profile : bool
        Measure where the time goes: the result's ``profile``.
    target_modules : str or list of str
        ``default`` (PEFT's for the model type), ``all-linear``, names, or a regular expression for the whole path.
    exclude_modules : str or list of str, optional
        Names or a regular expression of modules to leave out.
    layers : str, int, range or list of int, optional
        Blocks to take: ``"0-11"``, ``"0,2,8-11"``, ``range(12)``.
    share_input : bool
        One basis for layers that read the same activations, as far as their names tell: the query, key and value of an
        attention, the gate and input of a feed-forward network. PEFT cannot load the file then.
    sparsity : float or str, optional
        Share of the n² positions of each layer that is trained; 0.01 unless there is a budget.
    budget : float or str, optional
        Share of the checkpoint's parameters to train, which sets the sparsity.
    allocate : {"uniform", "spectrum"}
        How a budget is spread: one sparsity, or in proportion to the RMS singular value of each category.
    alpha : float
        Regularisation of the joint decomposition, above 0.
    seed : int
        Of the sparse pattern, as torch takes it.
    device : str or torch.device
        "auto", "cpu", "cuda", "cuda:1".
    precision : {"auto", "float32", "float64"}
        Of the products with weights.
    dtype : {"float32", "bfloat16", "float16"}
        Of the stored V.
    cache_size : int or str
        Bytes for Gram matrices kept between passes.
    memory_limit : int or str, optional
        Bytes that the process may have resident at most: fewer Gram matrices are kept, and then matrices wait on disk
        beside the output while they are not needed.
    revision, subfolder, token, cache_dir, offline
        How the model is reached, as in huggingface_hub.
    stream : bool
        Read weights that the Hub's cache has not by HTTP ranges, anew at each pass over them, and keep none on disk:
        for models larger than the disk. The same file as without; no effect on what is on this machine.
    force : bool
        Replace an output that exists.
    resume : bool
        Take up what a killed run of the same job had finished.
    push_to_hub : str, optional
        A repository on the Hub, ``org/name``, that the result is sent to as well when it is finished and checked. Where
        something is there, ``force`` replaces it.
    private : bool
        Make that repository private, if it is made.

    Returns
    -------
    DecomposeResult
        With ``output``, the file; a `DecomposePlan` with ``dry_run``.

    Raises
    ------
    UsageError
        A parameter makes no sense, the output exists, or no module matches.
    InvalidInput
        The checkpoint is damaged, quantized, or holds NaN or Inf.
    OutOfResources
        Disk or memory will not do.
    FrodctlError
        The model cannot be found or fetched.

    Examples
    --------
    >>> import frodctl
    >>> plan = frodctl.decompose("examples/tiny-llama", target_modules="all-linear", budget="3%", dry_run=True)
    >>> plan.output.name, len(plan.categories)
    ('tiny-llama.frod.safetensors', 7)
    """
    options = DecomposeOptions.of(
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        layers=layers,
        share_input=share_input,
        sparsity=sparsity,
        budget=budget,
        allocate=allocate,
        alpha=alpha,
        seed=seed,
        device=device,
        precision=precision,
        dtype=dtype,
        cache_size=cache_size,
        memory_limit=memory_limit,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        stream=stream,
        force=force,
        resume=resume,
        push_to_hub=push_to_hub,
        private=private,
    )
    dry_run = values.flag(dry_run, "dry_run")
    measured = profiles.begin(profile, dry_run=dry_run)
    with measured.step("planning"):
        plan = plan_decompose(model, output, options, dry_run=dry_run, progress=progress)
    return plan if dry_run else run_decompose(plan, progress, measured).with_profile(measured)
