"""``frodctl.inspect``, as Python calls it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from frodctl import values
from frodctl.formats.basis_file import BasisFile
from frodctl.jobs import profile as profiles
from frodctl.jobs.inspect.options import InspectOptions
from frodctl.jobs.inspect.run import InspectResult, run_inspect
from frodctl.jobs.progress import Callback, silent
from frodctl.values import Names, PathLike

if TYPE_CHECKING:
    import torch


def inspect(
    *targets: PathLike | Iterable[PathLike],
    progress: Callback = silent,
    profile: bool = False,
    spectrum: bool = False,
    estimate: bool = False,
    against: PathLike | None = None,
    base: PathLike | None = None,
    merged: PathLike | None = None,
    basis: PathLike | BasisFile | None = None,
    trust_basis: bool = False,
    adapter_name: str | None = None,
    include: Names = (),
    exclude: Names = (),
    sort: str | None = None,
    top: int | str | None = None,
    seed: int | str = 0,
    device: str | torch.device = "auto",
    revision: str | None = None,
    subfolder: str = "",
    token: str | None = None,
    cache_dir: PathLike | None = None,
    offline: bool = False,
) -> InspectResult:
    """Find out what the targets are and report on their tensors.

    Parameters
    ----------
    *targets : str or path
        Checkpoints, shared-basis files or adapters: local folders or files, Hub ids or URLs; or lists.
    progress : callable, optional
        Called with a `frodctl.jobs.progress.Progress` as the work goes on.
    profile : bool
        Measure where the time goes: the result's ``profile``.
    spectrum : bool
        Exact figures of every matrix: norms, ranks, singular values.
    estimate : bool
        The same by randomised methods, with error bars.
    against : path, optional
        A checkpoint to compare with, tensor by tensor.
    base : path, optional
        The checkpoint that a basis or an adapter belongs to.
    merged : path, optional
        The checkpoint that an adapter was merged into, over ``base``: how much of the update survives there.
    basis : path or BasisFile, optional
        Shared-basis file of an adapter that does not hold V.
    trust_basis : bool
        Take V from it although the adapter does not say that it is the one.
    adapter_name : str, optional
        Which of several adapters in a folder.
    include, exclude : str or list of str
        Globs: a tensor's name must match one of the first, if there are any, and none of the second.
    sort : str, optional
        A row's key, the largest first; after a minus sign the smallest.
    top : int, optional
        So many rows.
    seed : int
        Of the randomised methods.
    device : str or torch.device
        "auto", "cpu", "cuda", "cuda:1".
    revision, subfolder, token, cache_dir, offline
        How the targets are reached, as in huggingface_hub.

    Returns
    -------
    InspectResult
        For each target its kind, a row for every tensor and a summary.

    Raises
    ------
    UsageError
        No target, options that do not go together, a sort key that no row has, or a pattern to include or exclude that
        matches no name.
    InvalidInput
        A target is damaged, or a matrix holds NaN or Inf.
    FrodctlError
        A target cannot be found or fetched.

    Examples
    --------
    >>> import frodctl
    >>> result = frodctl.inspect("examples/tiny-llama")
    >>> result.targets[0].kind
    'checkpoint'
    """
    options = InspectOptions.of(
        spectrum=spectrum,
        estimate=estimate,
        against=against,
        base=base,
        merged=merged,
        basis=basis,
        trust_basis=trust_basis,
        adapter_name=adapter_name,
        include=include,
        exclude=exclude,
        sort=sort,
        top=top,
        seed=seed,
        device=device,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
    )
    measured = profiles.begin(profile)
    return run_inspect(values.models(targets, "targets"), options, progress, measured)
