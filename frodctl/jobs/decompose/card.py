"""The model card that a shared-basis file gets on the Hub."""

from __future__ import annotations

import frodctl
from frodctl.jobs.cards import front_matter, is_hub_id, public_name
from frodctl.jobs.decompose.plan import DecomposePlan


def model_card(plan: DecomposePlan) -> str:
    """README.md: the base and its revision, without any path of this machine."""
    model, revision = plan.checkpoint.model, plan.checkpoint.revision
    base = model if revision or is_hub_id(model) else None
    at = f" at revision `{revision}`" if revision else ""
    lines = [
        *front_matter({}, base, library="frodctl", relation="adapter", origin={"base_revision": revision}),
        "",
        f"# {plan.output.name}",
        "",
        f"A shared basis of `{base or public_name(model)}`{at}, over which FRoD adapters are trained and merged.",
        "",
        f"Made by frodctl {frodctl.__version__}.",
    ]
    return "\n".join(lines) + "\n"
