"""What may be chosen about every job alike."""

from __future__ import annotations

from dataclasses import dataclass

from frodctl import values
from frodctl.checkpoint.records import Location
from frodctl.values import option, optional


@dataclass(frozen=True)
class HubOptions(values.Options):
    """How models are reached, as in huggingface_hub."""

    revision: str | None = option(None, optional(values.text))
    subfolder: str = option("", values.text_or_nothing)
    token: str | None = option(None, optional(values.text), repr=False)
    cache_dir: str | None = option(None, optional(values.model))
    offline: bool = option(False, values.flag)

    def location(self, model: str) -> Location:
        """The model, the base or the target as these options reach it."""
        return Location(model, self.revision, self.subfolder, self.token, self.cache_dir, self.offline)

    def location_of_other(self, model: str) -> Location:
        """What else is read with it: a revision can only be in its name."""
        return Location(model, token=self.token, cache_dir=self.cache_dir, offline=self.offline)
