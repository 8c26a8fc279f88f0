"""What may be chosen about every job alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from frodctl import values
from frodctl.checkpoint import hub_urls
from frodctl.checkpoint.records import Location
from frodctl.errors import UsageError
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

    def file_of(self, name: str) -> Path:
        """The file of this name; one that a URL names is fetched into the cache first."""
        if not hub_urls.is_url(name):
            return Path(name)
        location = self.location_of_other(name)
        if not location.file:
            raise UsageError(f"{name}: names no file, as hf://org/name/basis.frod.safetensors does")
        from frodctl.checkpoint import hub

        return hub.fetch_file(location)
