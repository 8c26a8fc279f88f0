"""Module names, against PEFT's own functions."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.tuners.frod.model import _category_from_key, _layer_index_from_key

from frodctl.checkpoint import names

PATHS = st.lists(st.sampled_from("layers h 1 12 attention output dense".split()), min_size=1, max_size=6).map(".".join)
SIMILAR = st.lists(st.sampled_from("a b a_b b_a 1 2 32".split()), min_size=1, max_size=4).map(".".join)
WIDTHS = st.dictionaries(SIMILAR, st.sampled_from([32, 48]), min_size=1, max_size=8)


@settings(max_examples=500)
@given(PATHS)
def test_category_and_layer_are_pefts(path: str) -> None:
    assert names.peft_category(path) == _category_from_key(path)
    assert names.layer_index(path) == (None if (index := _layer_index_from_key(path, -1)) == -1 else index)


@given(st.text("ab.01²é", max_size=12))
@example("1" * 5000)
@example("layers.²")
def test_no_name_crashes(name: str) -> None:
    names.layer_index(name)
    names.natural_key(name)
    names.role(name)
    names.in_block(name)
    names.categories({name: 4})


@given(st.lists(st.integers(0, 10**17), min_size=2, max_size=6))
def test_numbers_sort_by_value(numbers: list[int]) -> None:
    paths = [f"layers.{number}.q" for number in numbers]
    assert sorted(paths, key=names.natural_key) == [f"layers.{number}.q" for number in sorted(numbers)]


@given(st.lists(st.text("ab.01é²", max_size=6), unique=True, max_size=8))
def test_any_names_have_one_order(strings: list[str]) -> None:
    ordered = sorted(strings, key=names.natural_key)
    assert ordered == sorted(reversed(strings), key=names.natural_key)


@settings(max_examples=500)
@given(WIDTHS)
def test_a_category_holds_one_role_and_one_width(widths: dict[str, int]) -> None:
    labels, collisions = names.categories(widths)
    assert labels.keys() == widths.keys()
    kinds: dict[str, set[tuple[str, int]]] = {}
    for module, label in labels.items():
        kinds.setdefault(label, set()).add((names.role(module), widths[module]))
    assert all(len(kind) == 1 for kind in kinds.values())
    peft = {(_category_from_key(module), names.role(module), width) for module, width in widths.items()}
    assert len(kinds) == len(peft)  # nor is anything split that PEFT keeps together
    for module, label in labels.items():
        assert label == _category_from_key(module) or _category_from_key(module) in collisions


@given(WIDTHS)
def test_category_names_do_not_depend_on_the_order_of_the_modules(widths: dict[str, int]) -> None:
    assert names.categories(widths) == names.categories(dict(reversed(widths.items())))


@given(WIDTHS)
def test_pefts_name_is_kept_just_where_it_stands_for_one_role_and_width(widths: dict[str, int]) -> None:
    labels, collisions = names.categories(widths)
    kinds: dict[str, set[tuple[str, int]]] = {}
    for module, width in widths.items():
        kinds.setdefault(_category_from_key(module), set()).add((names.role(module), width))
    assert set(collisions) == {base for base, kind in kinds.items() if len(kind) > 1}
    assert all(labels[m] == _category_from_key(m) for m in widths if _category_from_key(m) not in collisions)


def test_experts_of_a_fused_tensor_share_the_category_of_the_tensor() -> None:
    modules = [f"model.layers.{i}.mlp.experts.gate_up_proj[{e}]" for i in range(2) for e in range(3)]
    labels, collisions = names.categories(dict.fromkeys(modules, 32))
    assert set(labels.values()) == {"experts_gate_up_proj"}
    assert not collisions
    assert names.layer_index(modules[-1]) == 1


def test_blocks_are_numbered_parts_around_a_module() -> None:
    assert names.in_block("h.0.attn")
    assert names.in_block("blocks.0.to_out.0")
    assert not names.in_block("classifier.0")
    assert not names.in_block("lm_head")


@pytest.mark.parametrize(
    ("path", "known", "found"),
    [
        ("model.layers.0.q", ["model.layers.0.q", "layers.0.q", "x.model.layers.0.q"], "model.layers.0.q"),
        ("transformer.h.0.attn", ["h.0.attn", "h.1.attn"], "h.0.attn"),
        ("h.0.attn", ["transformer.h.0.attn"], "transformer.h.0.attn"),
        ("model.language_model.layers.0.q", ["language_model.model.layers.0.q"], "language_model.model.layers.0.q"),
        ("layers.0.q", ["encoder.layers.0.q", "decoder.layers.0.q"], None),
        ("decoder.layers.0.q", ["encoder.layers.0.q"], None),
        ("a.0.1.q", ["a.1.0.q"], None),
        ("model.layers.0.q", ["model.layers.1.q", "q"], None),
        ("q", ["model.layers.1.q"], None),
        ("q", [], None),
    ],
)
def test_live_names_among_a_checkpoints(path: str, known: list[str], found: str | None) -> None:
    assert names.match([path, "somewhere.else"], known)[path] == found


def test_the_live_prefix() -> None:
    assert names.live_prefix({"bert.encoder.0": "encoder.0", "bert.pooler": "pooler"}) == "bert."
    assert names.live_prefix({"bert.encoder.0": "encoder.0", "pooler": "pooler"}) == ""
    assert names.live_prefix({"encoder.0": "bert.encoder.0"}) == ""
    assert names.live_prefix({"encoder.0": None}) == ""
