"""Which base, and which V, an adapter stands over. What is refused, and by whom: tests/formats/test_adapter.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from frodctl.adapted.opening import find_base, open_source
from frodctl.checkpoint.records import Location, TensorInfo
from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter, TrainedModule


def adapter(scales: str = "F32", **config: Any) -> Adapter:
    """One of PEFT's, of one layer, without V."""
    info = TensorInfo("lambda", scales, (8,), "adapter_model.safetensors", 0)
    module = TrainedModule("model.q_proj", "q_proj", info, None, None, None, None)
    return Adapter("a", Path("a"), config, None, (module,), {}, {}, {}, {}, {})


class TestBase:
    GIVEN = Location("-", subfolder="sub", token="t", cache_dir="cache", offline=True)

    @pytest.mark.parametrize("asked", [None, "v2"])
    @pytest.mark.parametrize("own", [None, "v1", 7])
    def test_the_one_that_the_adapter_names(self, own: Any, asked: str | None) -> None:
        found, warnings = find_base(
            replace(self.GIVEN, revision=asked), adapter(base_model_name_or_path="org/base", revision=own)
        )
        expected = asked or (own if isinstance(own, str) else None)
        assert found == replace(self.GIVEN, model="org/base", revision=expected)
        assert warnings == []

    def test_it_names_none(self) -> None:
        with pytest.raises(InvalidInput, match="does not name its base"):
            find_base(self.GIVEN, adapter())

    @pytest.mark.parametrize(
        ("given", "warned"), [("org/base", False), ("other/base@main", False), ("org/another", True)]
    )
    def test_another_than_it_names(self, given: str, warned: bool) -> None:
        location = replace(self.GIVEN, model=given)
        found, warnings = find_base(location, adapter(base_model_name_or_path="org/base@v1"))
        assert found == location
        assert warnings == (["the adapter was trained on org/base@v1, not on org/another"] if warned else [])


class TestV:
    def test_only_who_offers_a_choice_advises_it(self) -> None:
        said = {}
        for asked in (None, False):
            with pytest.raises(InvalidInput) as error:
                open_source(adapter(), recompute=asked)
            said[asked] = str(error.value)
        assert "recompute_projection" not in said[None]
        assert said[False] == f"{said[None]}, or `recompute_projection=True` for what PEFT computes on this machine"

    @pytest.mark.parametrize(("scales", "told"), [("F32", None), ("BF16", "BF16"), ("F16", "F16")])
    @pytest.mark.parametrize("given", [None, "F32", "F16"])
    def test_its_dtype_in_training(self, scales: str, told: str | None, given: str | None) -> None:
        source = open_source(adapter(scales), recompute=True, projection_dtype=given)
        assert (source.recompute, source.form, source.basis) == (True, "reconstruct", None)
        assert source.projection_dtype == (given or told)
