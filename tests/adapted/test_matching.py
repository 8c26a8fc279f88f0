"""The modules of a live model that a checkpoint's are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from frodctl.adapted.matching import live_paths

LAYERS = st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True)
ROLES = st.lists(st.sampled_from(("self_attn.q_proj", "mlp.down_proj", "mlp.gate")), min_size=1, unique=True)
PREFIXES = st.sampled_from(("", "model.", "base_model.model.", "module.model."))


@settings(deadline=None)
@given(layers=LAYERS, roles=ROLES, prefix=PREFIXES, strangers=st.lists(st.sampled_from(("head", "norm", "x.y"))))
def test_each_module_is_found_under_whatever_wraps_the_model(
    layers: list[int], roles: list[str], prefix: str, strangers: list[str]
) -> None:
    known = [f"layers.{layer}.{role}" for layer in layers for role in roles]
    paths = [f"{prefix}{name}" for name in known]
    assert live_paths([*strangers, *paths], known) == dict(zip(known, paths, strict=True))


@settings(deadline=None)
@given(layers=LAYERS, role=st.sampled_from(("self_attn.q_proj", "mlp.down_proj")))
def test_a_module_that_is_there_twice_is_not_guessed(layers: list[int], role: str) -> None:
    known = [f"layers.{layer}.{role}" for layer in layers]
    twice = [f"{tower}.{name}" for tower in ("student", "teacher") for name in known]
    assert live_paths(twice, known) == {}
