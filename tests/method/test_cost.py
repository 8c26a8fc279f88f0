"""What the cost model counts from shapes is what the kernels are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from frodctl.arrays import HostArray
from frodctl.method.cost import joint_basis_calls
from frodctl.method.joint_basis import joint_basis
from frodctl.method.kernels import kernels_of
from frodctl.method.profile import Profile


@dataclass
class Weights:
    shapes: Sequence[tuple[int, int]]

    def read(self, numbers: Sequence[int]) -> Iterator[HostArray]:
        for number in numbers:
            yield np.random.default_rng(number).standard_normal(self.shapes[number]).astype(np.float32)


def asked_for(shapes: Sequence[tuple[int, int]], precision: str, cache_bytes: int) -> Counter[tuple[str, str]]:
    """Operations by routine and dtype, but for products with single vectors."""
    profile = Profile()
    kernels = profile.kernels(kernels_of("cpu"))
    joint_basis(Weights(shapes), precision=precision, kernels=kernels, cache_bytes=cache_bytes)
    found = Counter[tuple[str, str]]()
    for step in profile.finish():
        found[step.name, step.dtype] += step.flops  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
@pytest.mark.parametrize(
    ("shapes", "work", "regular"),
    [
        ([(300, 150)] * 4, "float32", True),
        ([(200, 150)] * 4, "float32", True),  # nearly square: their Gram matrices are float64
        ([(64, 150)] * 8, "float32", True),
        ([(150, 150), (64, 150), (64, 150), (180, 150), (60, 150)], "float64", True),
        ([(40, 150)] * 3, "float64", False),  # fewer rows than columns
        ([(100, 150)] * 2, "float64", True),  # directions that are one layer's own
    ],
    ids=["tall", "nearly square", "wide", "mixed", "short", "tied"],
)
def test_operations_are_those_of_the_joint_basis(
    shapes: list[tuple[int, int]], work: str, regular: bool, cache_bytes: int
) -> None:
    found = asked_for(shapes, "auto", cache_bytes)
    counted = Counter[tuple[str, str]]()
    for call in joint_basis_calls(shapes, work=work, regular=regular, cache_bytes=cache_bytes):
        counted[call.routine, call.dtype] += call.flops  # type: ignore[assignment]
    n = shapes[0][1]
    known = {key for key, flops in counted.items() if flops}
    assert known == {key for key, flops in found.items() if flops}
    for key in known:
        assert found[key] == pytest.approx(counted[key], rel=0.01, abs=60 * n**2), key
