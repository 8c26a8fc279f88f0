"""The model cards of what jobs write: their front matter, and names without any path of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from frodctl.checkpoint.bounds import MAX_CARD_BYTES
from frodctl.checkpoint.inputs import Json, open_input

#: What is taken over from a base's card.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(\r\n|\n|$)", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def front_matter(
    fields: dict[str, Json],
    base: str | None,
    *,
    library: str = "transformers",
    relation: str = "finetune",
    origin: Mapping[str, Json] | None = None,
) -> list[str]:
    """The lines that the Hub reads: ``fields`` as they are, and what the result is.

    ``base`` and ``relation`` put it into the Hub's tree of models; ``origin`` is what else is known of it.
    """
    from huggingface_hub import ModelCardData

    tags = ["frod", "lora"] if library == "peft" else ["frod"]
    data = ModelCardData(library_name=library, tags=tags, base_model=base, **fields)
    if base:
        data["base_model_relation"] = relation
    known = {key: value for key, value in (origin or {}).items() if value}
    if known:
        data["frod"] = known
    return ["---", data.to_yaml(), "---"]


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one on the Hub, rather than a path."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def public_name(name: str) -> str:
    """A Hub id as it is; of a local path only the last part."""
    return name if is_hub_id(name) else Path(name).resolve().name


def kept_fields(readme: Path) -> dict[str, Json]:
    """What is taken over from the card of a base: the fields that are text, or lists of it, as the Hub has them."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(readme) if _is_plain(readme) else None
    except Exception:  # of whatever kind: the card is a stranger's, and an extra
        return {}
    return {key: value for key, value in (found or {}).items() if key in _KEPT and _is_text(value)}


def _is_plain(readme: Path) -> bool:
    """Whether a card has front matter of no more content than its length: YAML's merge keys can double each other."""
    if not readme.is_file():
        return False
    with open_input(readme) as file:
        text = file.read(MAX_CARD_BYTES).decode("utf-8-sig", "replace")
    found = _FRONT_MATTER.match(text)
    return found is not None and re.search(r"<<|!!|!<|%TAG", found[1]) is None


def _is_text(value: object) -> bool:
    """Whether it is text, or a list of it, that YAML writes as it reads it."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and item.replace("\n", "").isprintable() for item in items)
