"""What the cost model says from shapes, of memory and of operations, is what is allocated and done."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from frodctl.arrays import NAMED, HostArray
from frodctl.method import cost
from frodctl.method.joint_basis import JointBasis, in_memory
from frodctl.method.joint_basis import joint_basis as decompose
from frodctl.method.kernels import kernels_of
from frodctl.method.profile import Profile
from frodctl.method.update import CategoryUpdate
from tests.method.reference import Arrays

N = 384
SHAPES = {
    "wide": [(150, N)] * 6,
    "square": [(450, N)] * 4,
    "tall": [(1050, N)] * 4,
    "tall and square": [(450, N), (1050, N)] * 2,
    "nearly square and wide": [(300, N)] * 4,
    "fewer rows": [(150, N)] * 2,
    "wide and square": [(150, N)] * 4 + [(450, N)] * 2,
}


def weights(shapes: list[tuple[int, int]]) -> list[HostArray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def traced(layers: Arrays, **options: object) -> tuple[JointBasis, int]:
    """The basis, and the most memory that numpy and scipy have had at a time."""
    tracemalloc.start()
    try:
        basis = decompose(layers, kernels=kernels_of("cpu"), **options)  # type: ignore[arg-type]
        return basis, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_of_matrices_that_are_large_beside_the_weights() -> None:
    """There it is the eigendecomposition's."""
    shapes = [(100, 1000)] * 14
    decompose(Arrays(weights([(20, 8)] * 3)), kernels=kernels_of("cpu"))  # whatever is loaded on first use
    basis, peak = traced(Arrays(weights(shapes)))
    assert basis.precision == "float32"
    planned = cost.memory_bytes(shapes, 0, "float32")
    assert 24 * 1000**2 < planned < 34 * 1000**2
    assert 0.95 * planned <= peak <= 1.05 * planned


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cache", [0, 5, 100])
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_memory_is_what_the_plan_says(shapes: list[tuple[int, int]], cache: int, precision: str) -> None:
    layers = Arrays(weights(shapes))
    decompose(Arrays(weights([(20, 8)] * 3)), kernels=kernels_of("cpu"))  # whatever is loaded on first use
    cache_bytes = cache * 8 * N * N
    basis, peak = traced(layers, cache_bytes=cache_bytes, precision=precision)
    assert basis.precision == cost.working_dtype(shapes, precision)
    planned = cost.memory_bytes(shapes, cache_bytes, basis.precision)
    assert 0.9 * planned <= peak <= 1.1 * planned


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("precision", ["auto", "float64"])
def test_matrices_that_wait_elsewhere_change_no_byte(shapes: list[tuple[int, int]], precision: str) -> None:
    layers = Arrays(weights(shapes))
    waiting: list[bytes] = []

    def park(matrix: HostArray) -> Callable[[], HostArray]:
        waiting.append(matrix.tobytes())
        kept, dtype, shape = waiting[-1], matrix.dtype, matrix.shape
        matrix[:] = np.nan  # whoever goes on using it shows
        return lambda: np.frombuffer(bytearray(kept), dtype).reshape(shape)

    plain = decompose(layers, kernels=kernels_of("cpu"), precision=precision, park=in_memory)
    parked = decompose(layers, kernels=kernels_of("cpu"), precision=precision, park=park)
    assert parked.V.tobytes() == plain.V.tobytes()
    assert parked.tau.tobytes() == plain.tau.tobytes()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(parked.scales, plain.scales, strict=True))
    assert len(waiting) == (0 if sum(m for m, _ in shapes) < N else 2)


def asked_for(shapes: list[tuple[int, int]], precision: str, cache_bytes: int) -> Counter[tuple[str, str]]:
    """Operations by routine and dtype, but for products with single vectors."""
    profile = Profile()
    kernels = profile.kernels(kernels_of("cpu"))
    decompose(Arrays(weights(shapes)), precision=precision, kernels=kernels, cache_bytes=cache_bytes)
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
    for call in cost.joint_basis_calls(shapes, work=work, regular=regular, cache_bytes=cache_bytes):
        counted[call.routine, call.dtype] += call.flops  # type: ignore[assignment]
    n = shapes[0][1]
    known = {key for key, flops in counted.items() if flops}
    assert known == {key for key, flops in found.items() if flops}
    for key in known:
        assert found[key] == pytest.approx(counted[key], rel=0.01, abs=60 * n**2), key


UPDATES = {
    "PEFT's": cost.UpdateCase("bfloat16", "bfloat16", "float32"),
    "PEFT's, float32": cost.UpdateCase("float32", "float32", "float64"),
    "PEFT's, in float32 over bfloat16": cost.UpdateCase("bfloat16", "float32", "float64"),
    "ours": cost.UpdateCase("bfloat16", "float32", "float64", "float32", from_scales=True),
    "ours, trained in bfloat16": cost.UpdateCase("bfloat16", "float32", "float64", "bfloat16", from_scales=True),
    "ours, a float64 basis": cost.UpdateCase("bfloat16", "float64", "float64", from_scales=True),
}


@pytest.mark.parametrize("case", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("m", [200, 700, 2500])
def test_memory_of_an_update_is_what_the_plan_says(case: cost.UpdateCase, m: int) -> None:
    n, rng = 600, np.random.default_rng(0)
    V = (np.linalg.qr(rng.standard_normal((n, n)))[0] * np.linspace(1, 2, n)).astype(NAMED[case.stored])
    W = rng.standard_normal((m, n)).astype(NAMED[case.weights])
    indices = np.stack([np.arange(3600) // 6, rng.integers(0, n, 3600)])
    scales = np.ones(n, np.float32)
    values = 1e-3 * rng.standard_normal(indices.shape[1]).astype(np.float32)

    def update() -> None:
        category = CategoryUpdate(V.copy(), indices, kernels_of("cpu"), case.held_in)
        assert category.precision == case.inverse or case.from_scales
        given = (W, scales, values)
        for _, block in category.delta(*given, 1.001 * scales) if case.from_scales else category.reconstruct(*given):
            block += 1

    update()  # whatever is loaded on first use
    tracemalloc.start()
    try:
        update()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    planned = cost.update_memory_bytes(m, n, case._replace(nnz=indices.shape[1]))
    assert 0.9 * planned <= peak <= 1.1 * planned
