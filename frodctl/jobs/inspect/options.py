"""What may be asked of an inspection."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from frodctl import values
from frodctl.errors import UsageError
from frodctl.jobs.options import HubOptions
from frodctl.values import option, optional


@dataclass(frozen=True)
class InspectOptions(HubOptions):
    """The parameters of `frodctl.inspect`, each in its one form; the command line has a flag for each."""

    spectrum: bool = option(False, values.flag)  #: exact figures of every matrix
    estimate: bool = option(False, values.flag)  #: the same by randomised methods, with error bars
    against: str | None = option(None, optional(values.model))  #: a checkpoint, to compare with tensor by tensor
    base: str | None = option(None, optional(values.model))  #: the checkpoint that a basis or an adapter belongs to
    merged: str | None = option(None, optional(values.model))  #: how much of the adapter is in this checkpoint
    basis: str | None = option(None, optional(values.basis))  #: shared-basis file of an adapter without V
    trust_basis: bool = option(False, values.flag)
    adapter_name: str | None = option(None, optional(values.text))  #: which of several adapters in a folder
    include: tuple[str, ...] = option((), values.globs)  #: globs; a tensor's name must match one
    exclude: tuple[str, ...] = option((), values.globs)  #: globs; it must match none
    sort: str | None = option(None, optional(values.text))  #: a row's key: largest first; after a minus sign smallest
    top: int | None = option(None, optional(values.count))  #: so many rows
    seed: int = option(0, values.seed)  #: of the randomised methods
    device: str = option("auto", values.device)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spectrum and self.estimate:
            raise UsageError("`spectrum` and `estimate` exclude each other")
        if self.against is not None and self.estimate:
            raise UsageError("`against` takes `spectrum`, not `estimate`")

        if self.merged is not None and self.base is None:
            raise UsageError("`merged` goes with an adapter and its `base`")

    @property
    def headers_only(self) -> bool:
        """Whether no tensor's bytes are needed."""
        return not (self.spectrum or self.estimate or self.against or self.base)

    @property
    def narrowed(self) -> bool:
        """Whether certain rows are asked for."""
        return bool(self.include or self.exclude or self.sort or self.top)

    def selects(self, name: str) -> bool:
        """Whether a tensor of this name is wanted."""
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)
