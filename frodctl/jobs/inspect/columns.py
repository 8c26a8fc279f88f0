"""What the rows of each kind of report hold, and what of them a person is shown."""

from __future__ import annotations

from dataclasses import dataclass

from frodctl.jobs.columns import Column, Table
from frodctl.jobs.inspect.options import InspectOptions

#: The figures of a spectrum, in the order of the columns.
FIGURES = (
    "spectral_norm", "frobenius_norm", "nuclear_norm", "stable_rank", "effective_rank", "numerical_rank",
    "condition_number", "energy_rank_90", "energy_rank_95", "energy_rank_99", "marchenko_pastur_edge", "above_edge",
    "power_law_alpha", "power_law_distance", "power_law_xmin",
)  # fmt: skip
_ESTIMATED = (
    "spectral_norm", "nuclear_norm", "stable_rank", "effective_rank", "energy_rank_90", "energy_rank_95",
    "energy_rank_99",
)  # fmt: skip
_FIRST = ("name", "shape", "dtype", "parameters")
_PLACE = ("role", "layer", "file", "bytes")
_SCALE_FIGURES = ("minimum", "median", "maximum", "reconstruction_error", "base_digest")
_CHANGES = (
    "scales_norm", "scales_change_norm", "scales_change_relative", "scales_change_median", "scales_change_p95",
    "sparse_norm", "sparse_median", "sparse_p95", "sparse_occupancy", "off_diagonal_energy", "relative_change",
)  # fmt: skip
_SURVIVAL = ("survival", "survival_distance")
_DIFFERENCES = ("other_name", "other_dtype", "status", "relative_difference", "cosine", "max_difference")


@dataclass(frozen=True)
class Columns:
    """The columns of a report."""

    keys: tuple[str, ...]  #: of its rows' values, in the order of separated values; estimates' errors among them
    tables: tuple[Table, ...]  #: what a person is shown


def of_checkpoint(options: InspectOptions) -> Columns:
    errors = ("estimated", *(f"{key}_error" for key in _ESTIMATED)) if options.estimate else ()
    keys = (*_FIRST, *_figures(options), *_PLACE, *errors)
    if options.headers_only:
        return Columns(keys, (Table(_TENSORS) if options.narrowed else Table(_ROLES, of="roles"),))
    spectrum = _spectrum()
    return Columns(keys, (Table((_NAME, _SHAPE, *(spectrum[1:4] if options.estimate else spectrum))),))


def of_basis(options: InspectOptions) -> Columns:
    keys = (*_FIRST, *_figures(options), "category", "layer", *_SCALE_FIGURES)
    if options.headers_only:
        return Columns(keys, (Table(_BASIS_CATEGORIES[:4], of="categories"),))
    scales = Table(_SCALES, only=lambda row: bool(row["name"].startswith("lambda.")))
    return Columns(keys, (Table(_BASIS_CATEGORIES, of="categories"), scales))


def of_adapter(options: InspectOptions) -> Columns:
    keys = (*_FIRST, "category", "layer", "nnz")
    if options.headers_only:
        return Columns(keys, (Table(_ADAPTER_CATEGORIES, of="categories"),))
    return Columns((*keys, *_CHANGES, *(f"delta_{key}" for key in FIGURES), *_SURVIVAL), (_of_updates(options),))


def _of_updates(options: InspectOptions) -> Table:
    """What a person is shown of an adapter: of its updates, where there is a base."""
    if options.base is None:
        return Table(_MODULES)
    survival = _SURVIVED if options.merged is not None else ()
    ranks = _RANKS if options.spectrum else ()
    return Table((*_DELTAS[:2], *survival, *ranks, *_DELTAS[2:]))


def of_comparison(options: InspectOptions) -> Columns:
    """Of equal tensors a person is shown only those that were asked for."""
    keys = (*_FIRST, *_DIFFERENCES, *(f"difference_{key}" for key in _figures(options)))
    columns = (*_COMPARED, *_spectrum("difference_")) if options.spectrum else _COMPARED
    return Columns(keys, (Table(columns, only=lambda row: options.narrowed or row["status"] != "equal"),))


def _figures(options: InspectOptions) -> tuple[str, ...]:
    return FIGURES if options.spectrum or options.estimate else ()


def _figure(key: str, title: str) -> Column:
    return Column(key, title, "figure", absent="–")


def _spectrum(prefix: str = "") -> tuple[Column, ...]:
    return (
        Column("profile", "spectrum", "profile"),
        _figure(f"{prefix}spectral_norm", "‖·‖₂"),
        _figure(f"{prefix}stable_rank", "stable"),
        _figure(f"{prefix}effective_rank", "effective"),
        Column(f"{prefix}numerical_rank", "rank", "exact", absent="–"),
        _figure(f"{prefix}condition_number", "cond"),
        _figure(f"{prefix}power_law_alpha", "α"),
    )


_NAME = Column("name", "name", "text")
_SHAPE = Column("shape", "shape")
_CATEGORY = Column("category", "category", "text")
_ROLES = (
    Column("role", "role", "text"),
    Column("tensors", "tensors"),
    Column("shapes", "shape", "shapes"),
    Column("dtypes", "dtype", "list"),
    Column("parameters", "parameters", "count"),
    Column("bytes", "bytes", "bytes"),
)
_TENSORS = (
    _NAME,
    _SHAPE,
    Column("dtype", "dtype"),
    Column("parameters", "parameters", "count"),
    Column("bytes", "bytes", "bytes"),
)
_BASIS_CATEGORIES = (
    _CATEGORY,
    Column("layers", "layers"),
    Column("n", "n"),
    Column("trainable_parameters", "trainable", "count", absent="–"),
    _figure("condition_number", "cond(V)"),
    Column("tau_min", "τ", "range"),
    Column("sharing_quantiles", "layers sharing, 5–95 %", "quantiles"),
)
_SCALES = (
    _NAME,
    _figure("minimum", "λ min"),
    _figure("median", "median"),
    _figure("maximum", "max"),
    _figure("reconstruction_error", "error"),
    Column("base_digest", "digest"),
)
_ADAPTER_CATEGORIES = (_CATEGORY, Column("layers", "layers"), Column("n", "n"), Column("nnz", "nnz"))
_MODULES = (
    _NAME,
    _figure("scales_change_relative", "‖Δλ‖/‖λ‖"),
    _figure("sparse_norm", "‖S‖"),
    _figure("off_diagonal_energy", "off-diag."),
)
_RANKS = tuple(Column(f"delta_energy_rank_{share}", f"{share} %", "exact", absent="–") for share in (90, 95, 99))
_SURVIVED = (_figure("survival", "survives"), _figure("survival_distance", "‖ΔŴ−ΔW‖/‖ΔW‖"))
_DELTAS = (_NAME, _figure("relative_change", "‖ΔW‖/‖W‖"), *_spectrum("delta_"), *_MODULES[1:])
_COMPARED = (
    _NAME,
    Column("status", "status", "text"),
    _figure("relative_difference", "‖B−A‖/‖A‖"),
    Column("cosine", "cosine", "exact", absent="–"),
    _figure("max_difference", "max |B−A|"),
)
