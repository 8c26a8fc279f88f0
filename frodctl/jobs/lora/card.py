"""The model card of a LoRA adapter: what it was made of, and how much of it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import frodctl
from frodctl.checkpoint.inputs import Json
from frodctl.formats import lora
from frodctl.jobs.cards import front_matter, is_hub_id, public_name
from frodctl.jobs.lora.plan import LoraPlan
from frodctl.method.fidelity import Fidelity

_TABLE_HEAD = ("| layer | rank | kept | distance |", "|---|---|---|---|")


def model_card(plan: LoraPlan, rows: Sequence[Mapping[str, Json]], overall: Fidelity) -> str:
    """README.md: base, origin, ranks and the error of every layer, without any path of this machine."""
    base = plan.setting.base if is_hub_id(plan.setting.base) else None
    rank = max(row["rank"] for row in rows)
    refusals = [f"{text[0].upper()}{text[1:]}." for text in plan.refusals(rank)]
    lines = [
        *front_matter({}, base, library="peft", relation="adapter", origin={"base_revision": plan.revision}),
        "",
        f"# {plan.output.resolve().name}",
        "",
        f"A LoRA adapter of rank {rank} for `{base or public_name(plan.base)}`: the nearest to {plan.described}.",
        f"It has {_share(overall.kept)} of the change's squared norm, at a distance of {_share(overall.distance)}.",
        "",
        " ".join(["PEFT loads it (`PeftModel.from_pretrained`).", *(refusals or [_others(rank)])]),
        "",
        *_TABLE_HEAD,
        *(f"| {r['module']} | {r['rank']} | {_share(r['kept'])} | {_share(r['distance'])} |" for r in rows),
        "",
        f"Made by frodctl {frodctl.__version__}.",
    ]
    return "\n".join(lines) + "\n"


def _others(rank: int) -> str:
    return f"So do vLLM, with max_lora_rank {lora.served_rank(rank)}, and llama.cpp, by convert_lora_to_gguf.py."


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
