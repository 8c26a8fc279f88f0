"""The joint basis against its definition, its identities, and every degenerate input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from frodctl.method.joint_basis import NonFiniteWeights, Unrepresentable
from frodctl.method.kernels import Kernels
from tests.devices import KERNELS
from tests.method import reference
from tests.method.reference import Basis, Layers

ALPHA = 1e-3
_current: list[Kernels] = []


@pytest.fixture(scope="module", autouse=True, params=KERNELS)
def _kernels(request: pytest.FixtureRequest) -> None:
    """All that is here holds for the CPU's kernels and for a device's."""
    _current[:] = [KERNELS[request.param]]


def joint_basis(layers: Layers, **options: Any) -> Basis:
    return reference.joint_basis(layers, kernels=_current[0], **options)


def random_weights(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def conditioned_weights(count: int, m: int, n: int, condition: float, seed: int = 0) -> list[torch.Tensor]:
    """Weights whose stack has singular values spread geometrically over ``condition``."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    right = (q * torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)) @ q.T
    return [(torch.randn(m, n, generator=generator, dtype=torch.float64) @ right).float() for _ in range(count)]


def check_full_rank(weights: list[torch.Tensor], basis: Basis, alpha: float = ALPHA, tolerance: float = 1e-5) -> None:
    """Every identity that holds where the stacked weights have full column rank."""
    n, count = weights[0].shape[1], len(weights)
    assert basis.rank == n
    expected = reference.tau(weights, alpha)
    assert np.abs(basis.tau.numpy() - expected).max() <= tolerance * expected[-1]
    assert (basis.tau.diff() >= 0).all()
    assert basis.tau[0] >= count / (1 + count * alpha) - tolerance * expected[-1]
    assert basis.tau[-1] <= (1 / (1 + alpha) + (count - 1) / alpha) / count * (1 + tolerance)
    assert reference.eigen_residual(weights, alpha, basis.V) <= 100 * tolerance
    squares = sum(scale.double().square() for scale in basis.scales)
    assert (squares - 1).abs().max() <= tolerance
    fourth = sum(scale.double() ** 4 for scale in basis.scales)
    assert (1 / fourth >= 1 - 1e-4).all()
    assert (1 / fourth <= count * (1 + 1e-4)).all()
    check_any(weights, basis)


def check_any(weights: list[torch.Tensor], basis: Basis) -> None:
    """What holds always: the weights come back, shapes and signs are canonical."""
    assert max(reference.reconstruction_errors(weights, basis.V, basis.scales)) <= 1e-5
    n = weights[0].shape[1]
    assert basis.V.shape == (n, n)
    assert basis.tau.dtype == torch.float64
    assert all(scale.dtype == torch.float32 for scale in basis.scales)
    peaks = basis.V.gather(0, basis.V.abs().argmax(dim=0, keepdim=True))
    assert (peaks > 0).all()


@pytest.mark.parametrize("precision", ["auto", "float32", "float64"])
@pytest.mark.parametrize("m", [20, 64, 150], ids=["wide", "square", "tall"])
def test_matches_the_definition(m: int, precision: str) -> None:
    weights = random_weights(*[(m, 64)] * 5)
    check_full_rank(weights, joint_basis(Layers(weights), precision=precision))


def test_layers_of_different_heights_share_a_basis() -> None:
    weights = random_weights((100, 48), (10, 48), (48, 48), (47, 48))
    check_full_rank(weights, joint_basis(Layers(weights)))


@settings(max_examples=30, deadline=None)
@given(
    heights=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    n=st.integers(1, 24),
    seed=st.integers(0, 1000),
    alpha=st.sampled_from([1e-4, 1e-3, 0.1]),
)
def test_any_shapes(heights: list[int], n: int, seed: int, alpha: float) -> None:
    weights = random_weights(*((m, n) for m in heights), seed=seed)
    basis = joint_basis(Layers(weights), alpha=alpha)
    assert basis.rank == min(n, sum(heights))
    check_any(weights, basis)
    if sum(heights) > n + 2:  # nearer to square the reference itself is ill conditioned
        check_full_rank(weights, basis, alpha)


@pytest.mark.parametrize("condition", [10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("m", [24, 48, 96])
def test_badly_conditioned_stacks(m: int, condition: float) -> None:
    weights = conditioned_weights(4, m, 48, condition)
    basis = joint_basis(Layers(weights))
    expected = reference.tau(weights, ALPHA)
    assert np.abs(basis.tau.numpy() - expected).max() <= 1e-5 * expected[-1]
    assert reference.eigen_residual(weights, ALPHA, basis.V) <= 1e-3
    assert basis.condition == pytest.approx(np.linalg.cond(torch.cat(weights).double().numpy()), rel=0.1)
    check_any(weights, basis)


def test_auto_takes_float64_where_float32_would_not_do() -> None:
    def chosen(m: int, condition: float, alpha: float = ALPHA) -> str:
        return joint_basis(Layers(conditioned_weights(4, m, 48, condition)), alpha=alpha).precision

    assert chosen(m=20, condition=3.0) == "float32"
    assert chosen(m=100, condition=3.0) == "float32"
    assert chosen(m=20, condition=200.0) == "float64"
    assert chosen(m=100, condition=30.0) == "float64"
    assert chosen(m=20, condition=20.0, alpha=1e-5) == "float64"
    assert chosen(m=40, condition=3.0) == "float64"


def test_columns_are_pefts_up_to_sign() -> None:
    from peft.tuners.frod.model import _projection_from_weights

    weights = random_weights(*[(40, 32)] * 6)
    basis = joint_basis(Layers(weights))
    theirs = _projection_from_weights([w.double() for w in weights], ALPHA)
    ours = torch.nn.functional.normalize(basis.V.double(), dim=0)
    cosines = (ours * torch.nn.functional.normalize(theirs, dim=0)).sum(dim=0).abs()
    gaps = torch.minimum(
        torch.cat([basis.tau.diff(), torch.tensor([torch.inf])]),
        torch.cat([torch.tensor([torch.inf]), basis.tau.diff()]),
    )
    sines = (1 - cosines.square()).clamp(min=0).sqrt()
    assert (sines <= 1e-4 * basis.tau[-1] / gaps).all()


@pytest.mark.parametrize("m", [30, 64, 200])
def test_cached_gram_matrices_change_nothing_but_rounding(m: int) -> None:
    weights = random_weights(*[(m, 64)] * 4)
    without = joint_basis(Layers(weights), precision="float64", cache_bytes=0)
    with_some = joint_basis(Layers(weights), precision="float64", cache_bytes=2 * 8 * 64 * 64)
    torch.testing.assert_close(with_some.V, without.V, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(with_some.scales), torch.stack(without.scales), rtol=1e-5, atol=1e-6)


def test_two_runs_give_the_same_bytes() -> None:
    weights = random_weights((70, 64), (20, 64), (64, 64))
    first, second = (joint_basis(Layers([w.clone() for w in weights])) for _ in range(2))
    assert torch.equal(first.V, second.V)
    assert torch.equal(first.tau, second.tau)
    assert all(map(torch.equal, first.scales, second.scales))


@pytest.mark.parametrize("scale", [1e-12, 1e9])
def test_scale_of_the_weights_only_scales_v(scale: float) -> None:
    weights = random_weights(*[(20, 32)] * 4)
    plain, scaled = joint_basis(Layers(weights)), joint_basis(Layers([w * scale for w in weights]))
    torch.testing.assert_close(scaled.V / scale, plain.V, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scaled.tau, plain.tau, rtol=1e-5, atol=0)


def test_bfloat16_and_float16_weights_are_taken_exactly() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weights = [w.to(dtype) for w in random_weights(*[(40, 32)] * 4)]
        check_full_rank(weights, joint_basis(Layers(weights)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_fit_the_stored_basis(dtype: torch.dtype) -> None:
    weights = random_weights(*[(40, 32)] * 4)
    basis = joint_basis(Layers(weights), dtype=dtype)
    assert basis.V.dtype == dtype
    check_any(weights, basis)


# Scales: of a whole category, and of layers within it


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.sampled_from([1, 2, 6, 12, 23, 24, 27, 48, 72]), st.floats(-6, 6)), min_size=2, max_size=5
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cache_bytes=st.sampled_from([0, 1 << 20]),
    seed=st.integers(0, 1000),
)
@example(
    layers=[(6, 6), (6, 0), (6, -6), (6, 0)], dtype=torch.float32, cache_bytes=0, seed=0
)  # none shares a direction
@example(layers=[(64, 0), (64, -6), (64, 0)], dtype=torch.float32, cache_bytes=1 << 20, seed=0)
@example(layers=[(2, 6), (72, -6)], dtype=torch.bfloat16, cache_bytes=0, seed=0)
def test_layers_of_any_scales(layers: list[tuple[int, float]], dtype: torch.dtype, cache_bytes: int, seed: int) -> None:
    """Every layer comes back to rounding of its own, however small it is beside the others.

    What rounding of V to float32 does to ‖W_i d_k‖ is up to ε ‖diag(λ_i) Vᵀ‖ ‖d_k‖.
    """
    n = 24
    plain = random_weights(*((m, n) for m, _ in layers), seed=seed)
    weights = [(w * 10**exponent).to(dtype) for w, (_, exponent) in zip(plain, layers, strict=True)]
    basis = joint_basis(Layers(weights), cache_bytes=cache_bytes)
    assert basis.rank == min(n, sum(m for m, _ in layers))
    assert (basis.tau.diff() >= 0).all()
    errors = reference.reconstruction_errors(weights, basis.V, basis.scales)
    V, D = basis.V.double(), torch.linalg.inv(basis.V.double()).T
    total, blurred = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for w, scale, error in zip(weights, basis.scales, errors, strict=True):
        exact = (w.double() @ D).norm(dim=0)
        size = max((scale * V.norm(dim=0)).norm(), w.double().norm())
        assert error * w.double().norm() <= 1e-5 * size
        rounding = 1e-6 * size * D.norm(dim=0)
        assert ((exact - scale).abs() <= 1e-5 * exact + rounding).all()
        assert scale.any()
        assert not scale[basis.rank :].any()
        total += scale.double().square()
        blurred += rounding * (2 * scale + rounding)
    assert ((total - 1).abs() <= 1e-5 + blurred)[: basis.rank].all()


@pytest.mark.parametrize("m", [20, 64, 150], ids=["wide", "square", "tall"])
@pytest.mark.parametrize("factor", [1e-3, 1e-6, 1e-7, 1e-12, 1e-30])
def test_the_scales_of_a_small_layer(m: int, factor: float) -> None:
    """Each is right relative to itself, and none is 0: every row of S can be trained."""
    weights = random_weights(*[(m, 64)] * 5)
    weights[1] = weights[1] * factor
    basis = joint_basis(Layers(weights), cache_bytes=1 << 20)
    D = torch.linalg.inv(basis.V.double()).T
    for w, scale in zip(weights, basis.scales, strict=True):
        exact = (w.double() @ D).norm(dim=0)
        assert (scale > 0).all()
        assert ((scale - exact).abs() <= 2e-5 * exact).all()


def test_the_scales_of_a_layer_that_is_badly_conditioned_by_itself() -> None:
    """Its Gram matrix, though it is kept, does not have them: λ² would be a difference of large numbers."""
    weights = random_weights(*[(150, 64)] * 4)
    weights[2] = conditioned_weights(1, 150, 64, 1e4)[0]
    basis = joint_basis(Layers(weights), cache_bytes=1 << 20)
    assert basis.precision == "float32"
    exact = (weights[2].double() @ torch.linalg.inv(basis.V.double()).T).norm(dim=0)
    assert ((basis.scales[2] - exact).abs() <= 1e-4 * exact).all()


@pytest.mark.parametrize("exponents", [(0, 0, 0), (-5, 0, 4)])
def test_scales_are_zero_where_a_layer_has_nothing(exponents: tuple[int, ...]) -> None:
    """Three layers on columns of their own: every direction is one layer's, and the others' λ are 0 exactly."""
    weights = random_weights(*[(20, 24)] * 3)
    for i, (w, exponent) in enumerate(zip(weights, exponents, strict=True)):
        kept = w[:, 8 * i : 8 * (i + 1)] * 10.0**exponent
        w.zero_()[:, 8 * i : 8 * (i + 1)] = kept
    basis = joint_basis(Layers(weights))
    scales = torch.stack(basis.scales)
    assert ((scales > 0).sum(dim=0) == 1).all()
    torch.testing.assert_close(scales.amax(dim=0), torch.ones(24), rtol=1e-5, atol=0)


@pytest.mark.parametrize("m", [20, 64, 150], ids=["wide", "square", "tall"])
@pytest.mark.parametrize("exponent", [-95, -60, 60, 115])
def test_a_power_of_two_scales_v_and_nothing_else(m: int, exponent: int) -> None:
    """Exactly: squares and products neither over- nor underflow anywhere between."""
    weights = random_weights(*[(m, 64)] * 4)
    plain = joint_basis(Layers(weights), cache_bytes=1 << 20)
    scaled = joint_basis(Layers([w * 2.0**exponent for w in weights]), cache_bytes=1 << 20)
    assert torch.equal(scaled.V * 2.0**-exponent, plain.V)
    assert torch.equal(scaled.tau, plain.tau)
    assert all(map(torch.equal, scaled.scales, plain.scales))
    assert scaled.precision == plain.precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-20, 1e20, 1e30, 1e36])
def test_weights_of_any_size(dtype: torch.dtype, scale: float) -> None:
    weights = [(w.double() * scale).to(dtype) for w in random_weights(*[(20, 24)] * 3, (50, 24))]
    check_full_rank(weights, joint_basis(Layers(weights)))
    check_full_rank(weights, joint_basis(Layers(weights), precision="float64"))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e-7, 1e-6, 1e6, 1e30])
def test_a_basis_that_does_not_fit_float16_is_refused(scale: float) -> None:
    weights = [w * scale for w in random_weights((40, 32), (40, 32))]
    with pytest.raises(Unrepresentable, match="does not fit float16; give `dtype=float32` or `dtype=bfloat16`"):
        joint_basis(Layers(weights), dtype=torch.float16)
    for dtype in (torch.float32, torch.bfloat16):  # as it says
        check_any(weights, joint_basis(Layers(weights), dtype=dtype))


def test_one_small_column_suffices() -> None:
    """The other columns of V fit; the last, which a small layer has to itself, would be lost."""
    weights = random_weights((40, 32), (4, 32))
    weights[0][:, 30:] = 0
    weights[1] *= 1e-7
    with pytest.raises(Unrepresentable, match="does not fit float16"):
        joint_basis(Layers(weights), dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-300, 1e-42, 1e-40, 1e39, 1e300])
def test_weights_that_no_dtype_can_stand_for(dtype: torch.dtype, scale: float) -> None:
    weights = [w.double() * scale for w in random_weights((40, 32), (40, 32))]
    with pytest.raises(Unrepresentable, match="no dtype can store it; rescale the weights"):
        joint_basis(Layers(weights), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_basis_that_rounding_makes_another_is_refused(dtype: torch.dtype) -> None:
    weights = conditioned_weights(4, 40, 32, 1e6)
    with pytest.raises(Unrepresentable, match=r"too badly conditioned for b?float16; give `dtype=float32`"):
        joint_basis(Layers(weights), dtype=dtype)
    check_any(weights, joint_basis(Layers(weights)))


def test_scales_that_float32_cannot_hold_are_refused() -> None:
    weights = random_weights(*[(40, 32)] * 3)
    weights[0], weights[2] = weights[0] * 1e20, weights[2] * 1e-21
    with pytest.raises(Unrepresentable, match="so much smaller than others") as caught:
        joint_basis(Layers(weights))
    assert caught.value.layer == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    for m in (20, 32, 100):
        weights = random_weights(*[(m, 32)] * 3)
        weights[1][3, 5] = bad
        with pytest.raises(NonFiniteWeights):
            joint_basis(Layers(weights))


# Null space


def check_null(weights: list[torch.Tensor], basis: Basis, rank: int) -> None:
    assert basis.rank == rank
    null = basis.V[:, rank:].double()
    lengths = basis.V[:, :rank].double().norm(dim=0)
    rms = lengths.square().mean().sqrt()
    torch.testing.assert_close(null.T @ null / rms**2, torch.eye(null.shape[1], dtype=torch.float64), rtol=0, atol=1e-6)
    stacked = torch.cat(weights).double()
    assert (stacked @ null).norm() <= 1e-5 * stacked.norm() * rms
    assert (basis.tau[rank:] == 1 / ALPHA).all()
    assert all((scale[rank:] == 0).all() for scale in basis.scales)
    squares = sum(scale[:rank].double().square() for scale in basis.scales)
    assert (squares - 1).abs().max() <= 1e-5
    check_any(weights, basis)


def test_fewer_stacked_rows_than_columns() -> None:
    weights = random_weights(*[(5, 32)] * 4)
    basis = joint_basis(Layers(weights))
    check_null(weights, basis, 20)
    check_is_svd(weights, basis)


def test_dead_columns() -> None:
    weights = random_weights(*[(40, 32)] * 4)
    for weight in weights:
        weight[:, [3, 17]] = 0
    check_null(weights, joint_basis(Layers(weights)), 30)


def test_duplicate_columns() -> None:
    weights = random_weights(*[(40, 32)] * 4)
    for weight in weights:
        weight[:, 5] = weight[:, 9]
    check_null(weights, joint_basis(Layers(weights)), 31)


def test_wide_layers_with_dead_columns() -> None:
    weights = random_weights(*[(12, 32)] * 6)
    for weight in weights:
        weight[:, 0] = 0
    check_null(weights, joint_basis(Layers(weights)), 31)


def test_all_weights_zero() -> None:
    basis = joint_basis(Layers([torch.zeros(8, 16)] * 3))
    assert basis.rank == 0
    torch.testing.assert_close(basis.V.T @ basis.V, torch.eye(16))
    assert not torch.stack(basis.scales).any()


def test_a_zero_layer() -> None:
    weights = [*random_weights((40, 32), (40, 32)), torch.zeros(40, 32)]
    basis = joint_basis(Layers(weights))
    check_full_rank(weights, basis)
    assert not basis.scales[2].any()


# Ties: T is a multiple of I, and the rotation is that of the plain SVD


def check_is_svd(weights: list[torch.Tensor], basis: Basis) -> None:
    values = np.linalg.svd(torch.cat(weights).double().numpy(), compute_uv=False)[: basis.rank]
    lengths = basis.V[:, : basis.rank].double().norm(dim=0).numpy()
    np.testing.assert_allclose(lengths, values, rtol=1e-5)
    unit = torch.nn.functional.normalize(basis.V.double(), dim=0)
    torch.testing.assert_close(unit.T @ unit, torch.eye(len(unit), dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("m", [40, 32, 20], ids=["tall", "square", "wide"])
def test_one_layer(m: int) -> None:
    weights = random_weights((m, 32))
    basis = joint_basis(Layers(weights))
    check_is_svd(weights, basis)
    check_any(weights, basis)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("m", [100, 40, 32, 20], ids=["very tall", "tall", "square", "wide"])
def test_identical_layers(m: int, cache_bytes: int) -> None:
    weights = random_weights((m, 32)) * 3
    basis = joint_basis(Layers(weights), cache_bytes=cache_bytes)
    check_is_svd(weights, basis)
    check_any(weights, basis)


def test_exactly_as_many_stacked_rows_as_columns() -> None:
    weights = random_weights(*[(8, 32)] * 4)
    basis = joint_basis(Layers(weights))
    check_is_svd(weights, basis)
    check_any(weights, basis)


def test_ties_within_part_of_the_spectrum() -> None:
    """Two layers that differ in two directions only: the others are one cluster, orthogonal within itself."""
    common = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    q, _ = torch.linalg.qr(common.double())
    first = (q * torch.linspace(1, 4, 16)).float()
    second = first.clone()
    second[:, :2] *= 3
    basis = joint_basis(Layers([first, second]))
    check_full_rank([first, second], basis)
    cluster = [k for k in range(16) if abs(basis.tau[k] - basis.tau.median()) < 1e-6 * basis.tau[k]]
    assert len(cluster) == 14
    unit = torch.nn.functional.normalize(basis.V[:, cluster].double(), dim=0)
    torch.testing.assert_close(unit.T @ unit, torch.eye(14, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("count", "m", "n"), [(3, 24, 64), (4, 140, 512), (5, 60, 256)])
def test_directions_that_one_layer_has_to_itself_are_one_cluster(count: int, m: int, n: int) -> None:
    """The other layers' rows do not span them, so all their τ are the largest possible, and equal."""
    weights = random_weights(*[(m, n)] * count)
    basis = joint_basis(Layers(weights))
    check_full_rank(weights, basis)
    own = basis.tau > (1 - 1e-4) * basis.tau[-1]
    assert own.sum() >= count * (n - (count - 1) * m)
    unit = torch.nn.functional.normalize(basis.V[:, own].double(), dim=0)
    torch.testing.assert_close(unit.T @ unit, torch.eye(int(own.sum()), dtype=torch.float64), rtol=0, atol=1e-5)


def test_progress_adds_up_to_the_estimate() -> None:
    from frodctl.method.cost import flops, layer_flops

    weights = random_weights((40, 32), (20, 32), (33, 32))
    done: list[float] = []
    joint_basis(Layers(weights), advance=done.append)
    assert sum(done) == sum(sum(layer_flops(*shape)) for shape in Layers(weights).shapes)
    assert sum(done) < flops(Layers(weights).shapes)


def test_callers_settings_for_speed_do_not_reach_the_products() -> None:
    weights = random_weights(*[(20, 64)] * 5)
    expected = joint_basis(Layers(weights))
    torch.set_float32_matmul_precision("medium")
    try:
        basis = joint_basis(Layers(weights))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(basis.V, expected.V)


def test_the_newer_settings_for_speed_are_left_alone_too() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        joint_basis(Layers(random_weights((20, 64), (20, 64), (20, 64), (20, 64))))
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
