"""Pictures of an inspection: spectra by role and layer, rank by depth, sharing of a basis."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from frodctl.checkpoint import names, sink
from frodctl.errors import FrodctlError, UsageError
from frodctl.jobs.inspect import Row

_SUFFIXES = (".png", ".svg", ".html")
_COLUMNS = 4
_MOST_ROLES = 16


def check_request(file: str, *, estimate: bool, force: bool) -> None:
    """Refuse, before any work, a picture that cannot be drawn.

    Raises
    ------
    UsageError
        Of its name or folder, because it exists, or because an estimate has no singular values.
    FrodctlError
        matplotlib is not installed.
    """
    path = Path(file)
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"--plot {file}: the name must end with one of {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"--plot {file}: no such folder, or a folder itself")
    if path.exists() and not force:
        raise UsageError(f"--plot {file}: exists; use --force to replace it, or name another")
    if estimate:
        raise UsageError("--plot draws singular values, which --estimate does not have; say --spectrum")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FrodctlError("--plot needs matplotlib: pip install 'frodctl[plot]'") from None


def draw(file: str, title: str, rows: Sequence[Row], summaries: Sequence[Mapping[str, Any]]) -> None:
    """Draw the singular values of the rows and the sharing of the bases in the summaries, into one file.

    Raises
    ------
    UsageError
        There is nothing to draw.
    """
    path = Path(file)
    title = title.encode(errors="replace").decode()  # a path need not be UTF-8, a picture's text must
    groups = _by_role(rows)
    sharing = {
        category["category"]: category["sharing"]
        for summary in summaries
        for category in summary.get("categories", ())
        if category.get("sharing")
    }
    if not groups and not sharing:
        raise UsageError(f"--plot {file}: no matrix among what was selected, so there is nothing to draw")
    kind = "png" if path.suffix == ".png" else "svg"
    picture = _figure(groups, sharing, title, kind)
    sink.replace_file(path, _page(title, picture) if path.suffix == ".html" else picture)


def _by_role(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that have singular values, by role, those of the most layers first; never more than fit a page."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.singular_values is not None and len(row.singular_values) > 1 and row.singular_values[0] > 0:
            name = row.values["name"]
            role = row.values.get("role") or names.role(name)
            groups.setdefault(role.removesuffix(".weight"), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return dict(ordered[:_MOST_ROLES])


def _figure(groups: Mapping[str, list[Row]], sharing: Mapping[str, list[float]], title: str, kind: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_depth = {role: rows for role, rows in groups.items() if len(rows) > 1}
    count = len(groups) + bool(by_depth) + bool(sharing)
    columns = min(_COLUMNS, count)
    lines = -(-count // columns)
    plain = {"text.parse_math": False}  # names may hold dollar signs
    lines_only = {"axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context({"font.size": 9, "svg.hashsalt": "0", **lines_only, **plain}):
        figure, axes = pyplot.subplots(
            lines, columns, figsize=(3.4 * columns, 2.7 * lines + 0.4), squeeze=False, layout="constrained"
        )
        try:
            free = iter(axes.flat)
            for role, rows in groups.items():
                _draw_spectra(next(free), role, rows)
            if by_depth:
                _draw_ranks(next(free), by_depth)
            if sharing:
                _draw_sharing(next(free), sharing)
            for axis in free:
                axis.set_visible(False)
            figure.suptitle(f"{title}\nthe first layer dark, the last one light")
            data = BytesIO()
            figure.savefig(data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
        finally:
            pyplot.close(figure)
    return data.getvalue()


def _draw_spectra(axis: Any, role: str, rows: Sequence[Row]) -> None:
    """Singular values in order, on a logarithmic scale; the first layers dark, the last light."""
    from matplotlib import colormaps, ticker

    colours = colormaps["viridis"]
    for number, row in enumerate(rows):
        sigma = row.singular_values
        visible = sigma[sigma > 1e-9 * sigma[0]]
        axis.plot(range(1, len(visible) + 1), visible.numpy(), color=colours(number / max(1, len(rows) - 1)), lw=0.8)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 100 * low:  # about a decade: powers of ten alone would be too few
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_title(_short(role))
    axis.set_xlabel("k")
    axis.set_ylabel("σ_k")


def _draw_ranks(axis: Any, groups: Mapping[str, Sequence[Row]]) -> None:
    """Effective rank by layer, as a share of what it could be."""
    for role, rows in groups.items():
        points = [
            (row.values.get("layer") if row.values.get("layer") is not None else number, _rank_share(row))
            for number, row in enumerate(rows)
        ]
        axis.plot(*zip(*points, strict=True), marker="o", ms=2.5, lw=0.8, label=_short(role))
    axis.set_ylim(0, 1)
    axis.set_title("rank by depth")
    axis.set_xlabel("layer")
    axis.set_ylabel("effective rank / min(m, n)")
    axis.legend(fontsize=6, frameon=False)


def _rank_share(row: Row) -> float:
    rank = row.values.get(
        "effective_rank", row.values.get("delta_effective_rank", row.values.get("difference_effective_rank"))
    )
    return float(rank) / len(row.singular_values) if rank is not None else float("nan")


def _draw_sharing(axis: Any, sharing: Mapping[str, Sequence[float]]) -> None:
    """In how many layers each direction of a basis is used, in effect, in the order of τ."""
    for category, values in sharing.items():
        axis.plot([k / max(1, len(values) - 1) for k in range(len(values))], values, lw=0.8, label=category)
    axis.set_title("sharing of the basis")
    axis.set_xlabel("direction, in the order of τ")
    axis.set_ylabel("layers that share it, p_k")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=6, frameon=False)


def _short(role: str) -> str:
    """The end of a role's path, which tells roles apart."""
    return ".".join(role.split(".")[-2:])


def _page(title: str, svg: bytes) -> bytes:
    text = svg.decode()
    text = text[text.index("<svg") :]
    heading = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{heading}</title>\n'
        "<style>body { margin: 1em auto; max-width: 90em; font-family: sans-serif } svg { width: 100%; height: auto }"
        f"</style></head>\n<body>\n{text}\n</body>\n</html>\n"
    ).encode()
