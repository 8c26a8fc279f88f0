"""The modules of a live model that a checkpoint's are, and the tensors that were trained as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frodctl.adapted.matching import live_paths, whole_tensors
from frodctl.checkpoint.records import TensorInfo
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter

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


def adapter(shapes: dict[str, tuple[int, ...]], **config: Any) -> Adapter:
    """One that trained tensors of these shapes as a whole."""
    infos = {name: TensorInfo(f"base_model.model.{name}", "F32", shape, "f", 0) for name, shape in shapes.items()}
    return Adapter("a", Path("a"), config, None, (), {}, {}, {}, infos, {})


class TestWhatWasTrainedAsAWhole:
    HEAD = adapter({"model.norm.weight": (4,), "score.weight": (2, 4)}, modules_to_save=["score"])
    LABELS = adapter({"score.weight": (2, 4)}, modules_to_save=["score"], task_type="SEQ_CLS")

    @pytest.mark.parametrize("prefix", ["", "model.", "base.model."])
    @pytest.mark.parametrize("new_head", [True, False])
    def test_found_under_another_prefix(self, prefix: str, new_head: bool) -> None:
        shapes = {f"{prefix}norm.weight": (4,), "score.weight": (2, 4), "other": (3,)}
        found = whole_tensors(self.HEAD, shapes, "there", new_head=new_head)
        assert {name: info.shape for name, info in found.items()} == {
            f"{prefix}norm.weight": (4,),
            "score.weight": (2, 4),
        }

    def test_a_head_may_be_new_in_a_checkpoint_alone(self) -> None:
        shapes = {"norm.weight": (4,)}
        assert set(whole_tensors(self.HEAD, shapes, "there", new_head=True)) == {"norm.weight", "score.weight"}
        with pytest.raises(InvalidInput, match=r"a: tensor .*\.score\.weight matches nothing, .* in there"):
            whole_tensors(self.HEAD, shapes, "there")
        with pytest.raises(InvalidInput, match=r"norm\.weight matches nothing"):
            whole_tensors(self.HEAD, {"score.weight": (2, 4)}, "there", new_head=True)

    @pytest.mark.parametrize("shape", [(3, 4), (2, 5), (2,), ()])
    def test_of_another_shape(self, shape: tuple[int, ...]) -> None:
        """Only labels may be others, and only in a checkpoint."""
        for one, new_head in ((self.LABELS, True), (self.LABELS, False), (self.HEAD, True)):
            shapes = {"norm.weight": (4,), "score.weight": shape}
            if one is self.LABELS and new_head and shape == (3, 4):
                assert set(whole_tensors(one, shapes, "there", new_head=True)) == {"score.weight"}
                continue
            with pytest.raises(InvalidInput, match=r"score\.weight is \[2, 4\], but score\.weight of there is \["):
                whole_tensors(one, shapes, "there", new_head=new_head)

    def test_two_of_one(self) -> None:
        twice = adapter({"a.norm.weight": (4,), "b.norm.weight": (4,)})
        with pytest.raises(InvalidInput, match=r"a\.norm\.weight and .*b\.norm\.weight are both norm\.weight"):
            whole_tensors(twice, {"norm.weight": (4,)}, "there")

    def test_a_head_without_a_weight_of_its_own(self) -> None:
        head = adapter({"lm_head.weight": (6, 4)})
        with pytest.raises(InvalidInput, match=r"there has no lm_head\.weight of its own; .* tied"):
            whole_tensors(head, {"model.embed_tokens.weight": (6, 4)}, "there")
