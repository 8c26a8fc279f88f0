"""What users give is read alike from Python and the command line, or refused with the parameter's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frodctl import values
from frodctl.errors import UsageError

WRONG = [object(), b"x", 1j, {}, {"a": 1}, torch.ones(3), np.ones(2), lambda: None, int]


@pytest.mark.parametrize(
    ("read", "alike", "expected"),
    [
        (values.number, [0.5, "0.5", " 5e-1 ", Fraction(1, 2), np.float32(0.5)], 0.5),
        (values.share, [0.02, "2%", "0.02", " 2 % ", np.float64(0.02)], 0.02),
        (values.integer, [12, "12", " +12", np.int64(12)], 12),
        (values.size, [128_000_000, "128MB", "128 mb", "128000000", "0.128GB", "128M"], 128_000_000),
        (values.size, [2**31, "2GiB", "2 gib", "2048MiB", "2Gi"], 2**31),
        (values.names, ["a,b", " a , b ", ["a", "b"], ("a", "b"), (n for n in "ab")], ("a", "b")),
        (values.names, [{"a": 1, "b": 2}.keys()], ("a", "b")),
        (values.names, ["", [], ()], ()),
        (values.names, ["lm_head", ["lm_head"]], ("lm_head",)),
        (values.globs, ["*q_proj*", ["*q_proj*"]], ("*q_proj*",)),
        (values.globs, ["model.[0,1].*"], ("model.[0,1].*",)),
        (values.modules, ["q_proj,v_proj", ["q_proj", "v_proj"]], "q_proj,v_proj"),
        (values.modules, [r".*\.(q|v)_proj", [r".*\.(q|v)_proj"]], r".*\.(q|v)_proj"),
        (values.blocks, ["0,1,2", [0, 1, 2], range(3), np.arange(3)], "0,1,2"),
        (values.blocks, [5, np.int8(5), "5", [5]], "5"),
        (values.path, ["a/b", Path("a/b")], Path("a/b")),
        (values.path, ["~/b"], Path.home() / "b"),
        (values.model, ["org/name@rev", "org/name@rev"], "org/name@rev"),
        (values.device, ["cpu", torch.device("cpu")], "cpu"),
        (values.flag, [True, np.bool_(True)], True),
        (values.dtype("auto", "bfloat16"), ["bfloat16", "torch.bfloat16", torch.bfloat16], "bfloat16"),
        (values.number, [0.5, torch.tensor(0.5), np.array(0.5)], 0.5),
        (values.size, [5_000_000, 5e6, "5MB"], 5_000_000),
        (values.blocks, ["0,1", torch.tensor([0, 1])], "0,1"),
        (values.several_scaled, ["a:0.3", ["a:0.3"], [("a", 0.3)], ("a", 0.3), "a:30%", [("a", "30%")]], (("a", 0.3),)),
        (values.several_scaled, [["a", Path("b")]], (("a", 1.0), ("b", 1.0))),
        (values.several_scaled, ["C:a", ["C:a"]], (("C:a", 1.0),)),
        (values.models, [("T",), (["T"],), ([Path("T")],)], ("T",)),
    ],
)  # fmt: skip
def test_forms_that_are_read_alike(read: Callable[[Any, str], Any], alike: list[Any], expected: Any) -> None:
    for value in alike:
        found = read(value, "it")
        assert found == expected
        assert type(found) is type(expected)


@pytest.mark.parametrize(
    "read",
    [
        values.number, values.share, values.integer, values.seed, values.count, values.size, values.shard_size,
        values.flag, values.text, values.path, values.basis, values.model, values.choice("a", "b"), values.modules,
        values.device,
    ],
)  # fmt: skip
def test_a_wrong_type_names_the_parameter(read: Callable[[Any, str], Any]) -> None:
    for value in [*WRONG, None, [[]]]:
        with pytest.raises(UsageError, match=r"^`rate`"):
            read(value, "rate")


@pytest.mark.parametrize(
    ("read", "wrong"),
    [
        (values.number, [math.nan, math.inf, -math.inf, "nan", "1e999", "one", "", "1%", True, 10**400]),
        (values.share, [math.nan, "%", "nan%", "inf%", "a%", True]),
        (values.integer, [1.0, "1.0", "1e3", "", "٣", True, math.nan, "9" * 40]),
        (values.seed, [-1, 2**64, "-1"]),
        (values.count, [0, -1, "0"]),
        (values.size, [-1, 1.5, "1.5.5", "5XB", "MB", "-5MB", True, "9" * 30]),
        (values.shard_size, [0, 1, "1", "0GB", "999"]),
        (values.flag, [0, 1, "yes", "True", ""]),
        (values.text, ["", "  ", "\ud800", "a\0b"]),
        (values.path, ["", " ", "a\0b", b"a", 5000 * "x", 300 * "x", "/".join(["dir"] * 2000)]),
        (values.device, ["gpu", "cuda:x", "CPU", "cpu:", "tpu", 0]),
        (values.names, [[1], ["a", 1], 5, None, ["a", ""], "a,,b", ["\ud800"], b"ab", {"a": 1}, torch.tensor(1)]),
        (values.blocks, [[], True, [True], [-1], [1.5], ["a"], None, {}, 1.5]),
        (values.several_scaled, [[("a",)], [("a", math.nan)], [("a", "x")], [1], 5, "a:inf", [("a", 1, 2)]]),
        (values.models, [(), ([],), (1,), (None,), ("",), (b"T",)]),
        (values.choice("auto", "delta"), ["", "Auto", 1, ["auto"]]),
    ],
)  # fmt: skip
def test_what_is_refused(read: Callable[[Any, str], Any], wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(UsageError, match=r"^`it`"):
            read(value, "it")


@given(st.one_of(st.text(), st.binary(), st.floats(), st.integers(), st.lists(st.text()), st.none(), st.booleans()))
def test_whatever_is_given_is_read_or_refused_in_one_short_line(value: Any) -> None:
    for read in (
        values.number, values.share, values.integer, values.seed, values.size, values.flag, values.text, values.path,
        values.model, values.names, values.globs, values.modules, values.blocks, values.several_scaled, values.models,
    ):  # fmt: skip
        try:
            read(value, "it")
        except UsageError as error:
            text = str(error)
            assert text.isprintable()
            assert len(text) < 250


@given(st.floats(0, 1), st.sampled_from([1, 100]))
def test_per_cent_is_a_hundredth(number: float, factor: int) -> None:
    text = f"{number * factor!r}" + ("%" if factor == 100 else "")
    assert values.share(text, "it") == pytest.approx(number, rel=1e-15, abs=1e-300)
