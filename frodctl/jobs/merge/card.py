"""The model card that a merged checkpoint gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

import frodctl
from frodctl.checkpoint.manifest import MERGED_BY
from frodctl.jobs.merge.plan import MergePlan

#: What is taken over from the base's card.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)


def model_card(plan: MergePlan) -> str:
    """README.md of the result: base, revision, adapters, form and tool, without any path of this machine."""
    base = plan.checkpoint.model if plan.checkpoint.revision else plan.sources[0].adapter.base
    base = base if base and _is_hub_id(base) else None
    data: dict[str, Any] = {"library_name": "transformers", "tags": ["frod"], **_kept(plan)}
    if base:
        data |= {"base_model": base, "base_model_relation": "finetune"}
    revision = f" at revision `{plan.checkpoint.revision}`" if plan.checkpoint.revision else ""
    lines = [
        "---",
        yaml.safe_dump(data, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {plan.output.resolve().name}",
        "",
        f"`{base or _public_name(plan.checkpoint.model)}`{revision}, with FRoD adapters merged into its weights:",
        "",
        *(f"- `{_public_name(s.adapter.name)}` (form {s.form}, scale {s.scale:g})" for s in plan.sources),
        "",
        f"{MERGED_BY} {frodctl.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _public_name(name: str) -> str:
    """A Hub id as it is; of a local path only the last part."""
    return name if _is_hub_id(name) else Path(name).resolve().name


def _kept(plan: MergePlan) -> dict[str, Any]:
    path = plan.checkpoint.root / "README.md" if plan.checkpoint.root else None
    if path is None or not path.is_file():
        return {}
    found = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace"))
    try:
        data = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # a stranger's; the card is an extra
        return {}
    return {key: data[key] for key in _KEPT if key in data} if isinstance(data, dict) else {}
