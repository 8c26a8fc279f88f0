"""Pictures of an inspection: spectra by role and layer, rank by depth, sharing of a basis."""

from __future__ import annotations

import html
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import IO, TYPE_CHECKING, Any

from frodctl.checkpoint import names, sink
from frodctl.cli.heat import heat_maps
from frodctl.cli.output import printable
from frodctl.errors import FrodctlError, UsageError
from frodctl.jobs.inspect import Row, TargetResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from frodctl.arrays import HostArray

_SUFFIXES = (".png", ".svg", ".html")
_COLUMNS = 4
_MOST_ROLES = 16
_LETTERS = 42  #: of a title, over one column
_SETTINGS: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}
_DASHES = ("-", "--", ":", "-.")
_HUES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")
#: What a picture shows of each kind of target.
_DRAWN = {
    "checkpoint": "singular values of W",
    "basis": "singular values of V, and how layers share it",
    "adapter": "singular values of W' − W",
    "comparison": "singular values of the difference",
}


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
        raise UsageError(f"`plot` {file}: the name must end with one of {', '.join(_SUFFIXES)}")
    sink.check_output_file(path, force=force)
    if estimate:
        raise UsageError("`plot` draws singular values, which `estimate` does not have; give `spectrum`")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise FrodctlError("`plot` needs matplotlib: pip install 'frodctl[plot]'") from None


@dataclass(frozen=True)
class _Curve:
    """A spectrum: of which target, of what in it, and at what depth."""

    source: int
    label: str  #: a category of a basis; empty where the depth tells curves apart
    depth: int | None
    row: Row
    sigma: HostArray  #: its singular values, (k,)


def draw(file: str, targets: Sequence[TargetResult], *, force: bool = False) -> None:
    """Draw `figure` into a file, which may exist with ``force``.

    Raises
    ------
    UsageError
        There is nothing to draw.
    """
    import matplotlib

    path = Path(file)
    kind = "png" if path.suffix == ".png" else "svg"
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        drawn = figure(targets)
        if drawn is None:
            hint = (
                "; of an adapter it draws the update, with `base`" if any(t.kind == "adapter" for t in targets) else ""
            )
            raise UsageError(f"`plot` {file}: no matrix among what was selected, so there is nothing to draw{hint}")
        data = BytesIO()
        drawn.savefig(data, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    title = ", ".join(target.target for target in targets)
    content = _page(title, data.getvalue()) if path.suffix == ".html" else data.getvalue()

    def write(out: IO[bytes]) -> None:
        out.write(content)

    sink.write_file(path, write, force=force)


def figure(targets: Sequence[TargetResult]) -> Figure | None:
    """The singular values of the targets' rows, role by role, their ranks by depth, the sharing of bases, and how far
    an adapter's experts moved.

    None where there is nothing to draw.
    """
    from matplotlib.figure import Figure

    panels = _panels(targets)
    sharing = _sharing(targets)
    wanted = dict(list(panels.items())[:_MOST_ROLES])
    by_depth = {role: curves for role, curves in wanted.items() if len({curve.depth for curve in curves} - {None}) > 1}
    maps = heat_maps(targets)
    count = len(wanted) + bool(by_depth) + bool(sharing) + len(maps)
    if not count:
        return None
    shown = shown_names(targets)
    styles = _Styles(wanted, [*by_depth, *(category for _, category, _ in sharing)], len(shown))
    columns = min(_COLUMNS, count)
    lines = -(-count // columns)
    drawn = Figure(figsize=(3.4 * columns, 2.7 * lines + 0.4), layout="constrained")
    free = iter(drawn.subplots(lines, columns, squeeze=False).flat)
    for role, curves in wanted.items():
        _draw_spectra(next(free), role, curves, styles)
    if by_depth:
        _draw_ranks(next(free), by_depth, styles)
    if sharing:
        _draw_sharing(next(free), sharing, styles)
    for map_ in maps:
        axis = next(free)
        map_.draw(axis)
        axis.set_title(_label(f"change of {_short(map_.role)}"))
    for axis in free:
        axis.set_visible(False)
    captions = [_title(shown, targets)]
    if by_depth:
        captions.append("the first layer dark, the last one light")
    if len(panels) > len(wanted):
        captions.append(f"{len(panels) - len(wanted)} roles of fewer layers are not shown")
    drawn.suptitle("\n".join(part for caption in captions for part in wrap(_label(caption), _LETTERS * columns)))
    if len(shown) > 1:
        handles = [styles.example(number) for number in range(len(shown))]
        labels = list(map(_label, shown))
        drawn.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(shown)), frameon=False)
    return drawn


def _panels(targets: Sequence[TargetResult]) -> dict[str, list[_Curve]]:
    """The curves of each role, of all targets; target by target, and from the first layer to the last."""
    panels: dict[str, list[_Curve]] = {}
    for number, target in enumerate(targets):
        for row in sorted(target.rows, key=lambda row: names.natural_key(row.values["name"])):
            sigma = row.singular_values
            if sigma is None or len(sigma) < 2 or not sigma[0] > 0:
                continue
            name = row.values["name"]
            if target.kind == "basis":
                curve = _Curve(number, row.values["category"], None, row, sigma)
                panels.setdefault("V of every category", []).append(curve)
                continue
            role = (row.values.get("role") or names.role(name)).removesuffix(".weight")
            panels.setdefault(role, []).append(_Curve(number, "", names.layer_index(name), row, sigma))
    return dict(sorted(panels.items(), key=lambda item: -len(item[1])))


def _sharing(targets: Sequence[TargetResult]) -> list[tuple[int, str, list[float]]]:
    """Of every target's every category the number of layers that share each direction."""
    return [
        (number, category["category"], category["sharing"])
        for number, target in enumerate(targets)
        for category in target.summary.get("categories", ())
        if category.get("sharing")
    ]


def shown_names(targets: Sequence[TargetResult]) -> list[str]:
    """A short name for each target, all of them different; that of a comparison is B − A."""
    pairs = [(target.summary.get("against"), target.target) for target in targets]
    short = _short_names(list(dict.fromkeys(name for pair in pairs for name in pair if name)))
    shown = [" − ".join(short[name] for name in pair if name) for pair in pairs]
    return [name if shown.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(shown, 1)]


def _short_names(targets: Sequence[str]) -> dict[str, str]:
    """The ends of different paths, as long as it takes to tell them apart."""
    paths = [[part for part in re.split(r"[/\\]", target) if part] or [target] for target in targets]
    for length in range(1, max(map(len, paths)) + 1):
        shown = ["/".join(path[-length:]) for path in paths]
        if len(set(shown)) == len(shown):
            return dict(zip(targets, shown, strict=True))
    return dict(zip(targets, targets, strict=True))


def _title(shown: Sequence[str], targets: Sequence[TargetResult]) -> str:
    """What is drawn of which targets."""
    of_kind: dict[str, list[str]] = {}
    for name, target in zip(shown, targets, strict=True):
        of_kind.setdefault(_DRAWN[target.kind], []).append(name)
    return "; ".join(f"{', '.join(found)}: {what}" for what, found in of_kind.items())


class _Styles:
    """How curves are told apart: layers by shade, targets by hue and dashes, categories and roles by colour."""

    def __init__(self, panels: Mapping[str, Sequence[_Curve]], labels: Sequence[str], count: int) -> None:
        self.several = count > 1
        self.depths: dict[int, list[int]] = {}
        for curve in (curve for curves in panels.values() for curve in curves):
            if curve.depth is not None:
                self.depths.setdefault(curve.source, []).append(curve.depth)
        every = (curve.label for curves in panels.values() for curve in curves)
        self.labels = list(dict.fromkeys([*labels, *filter(None, every)]))

    def of_layer(self, source: int, depth: int | None) -> dict[str, Any]:
        """For a curve among others of its role."""
        from matplotlib import colormaps

        depths = self.depths.get(source, [0])
        first, last = min(depths), max(depths)
        place = (depth - first) / (last - first) if depth is not None and last > first else 0.0
        if not self.several:
            return {"color": colormaps["viridis"](place), "lw": 0.8}
        hue = colormaps[_HUES[source % len(_HUES)]]
        return {"color": hue(0.95 - 0.6 * place), "lw": 0.8, "ls": self.dashes(source)}

    def of_label(self, label: str, source: int) -> dict[str, Any]:
        """For a category or a role among others."""
        from matplotlib import colormaps

        colours = colormaps["tab10" if len(self.labels) <= 10 else "tab20"]
        return {"color": colours(self.labels.index(label) % colours.N), "lw": 0.8, "ls": self.dashes(source)}

    def dashes(self, source: int) -> str:
        return _DASHES[source % len(_DASHES)]

    def example(self, source: int) -> Line2D:
        """A line for the legend of targets."""
        from matplotlib.lines import Line2D

        colour = self.of_layer(source, None)["color"] if source in self.depths else "0.3"
        return Line2D([], [], color=colour, ls=self.dashes(source))


def _draw_spectra(axis: Axes, role: str, curves: Sequence[_Curve], styles: _Styles) -> None:
    """Singular values in order, on a logarithmic scale."""
    from matplotlib import ticker

    for curve in curves:
        visible = curve.sigma[curve.sigma > 1e-9 * curve.sigma[0]]
        style = (
            styles.of_label(curve.label, curve.source) if curve.label else styles.of_layer(curve.source, curve.depth)
        )
        axis.plot(range(1, len(visible) + 1), visible, **style)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 100 * low:  # about a decade: powers of ten alone would be too few
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_title(_label(_short(role)))
    axis.set_xlabel("k")
    axis.set_ylabel("σ_k")
    _legend(axis, [curve.label for curve in curves if curve.label], styles)


def _draw_ranks(axis: Axes, panels: Mapping[str, Sequence[_Curve]], styles: _Styles) -> None:
    """Effective rank by layer, as a share of what it could be; of several matrices in a layer the mean."""
    for role, curves in panels.items():
        for source in dict.fromkeys(curve.source for curve in curves):
            shares: dict[int, list[float]] = {}
            for curve in curves:
                if curve.source == source and curve.depth is not None:
                    shares.setdefault(curve.depth, []).append(_rank_share(curve))
            means = [sum(found) / len(found) for _, found in sorted(shares.items())]
            axis.plot(sorted(shares), means, marker="o", ms=2.5, **styles.of_label(role, source))
    axis.set_ylim(0, 1)
    axis.set_title("rank by depth")
    axis.set_xlabel("layer")
    axis.set_ylabel("effective rank / min(m, n)")
    _legend(axis, list(panels), styles)


def _rank_share(curve: _Curve) -> float:
    values = curve.row.values
    keys = ("effective_rank", "delta_effective_rank", "difference_effective_rank")
    rank = next((values[key] for key in keys if key in values), None)
    return float(rank) / len(curve.sigma) if rank is not None else float("nan")


def _draw_sharing(axis: Axes, sharing: Sequence[tuple[int, str, list[float]]], styles: _Styles) -> None:
    """In how many layers each direction of a basis is used, in effect, in the order of τ."""
    for source, category, values in sharing:
        places = [k / max(1, len(values) - 1) for k in range(len(values))]
        axis.plot(places, values, **styles.of_label(category, source))
    axis.set_title("sharing of the basis")
    axis.set_xlabel("direction, in the order of τ")
    axis.set_ylabel("layers that share it, p_k")
    axis.set_ylim(bottom=0)
    _legend(axis, [category for _, category, _ in sharing], styles)


def _legend(axis: Axes, labels: Sequence[str], styles: _Styles) -> None:
    """Which colour stands for which role or category."""
    from matplotlib.lines import Line2D

    if labels:
        handles = {label: Line2D([], [], color=styles.of_label(label, 0)["color"]) for label in labels}
        axis.legend(handles.values(), [_label(_short(label)) for label in handles], fontsize=6, frameon=False)


def _label(name: str) -> str:
    """A name as a picture shows it: no formula, and not left out of a legend, as what begins with an underscore is."""
    text = printable(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _short(role: str) -> str:
    """The end of a role's path, which tells roles apart."""
    return ".".join(role.split(".")[-2:])


def _page(title: str, svg: bytes) -> bytes:
    text = svg.decode()
    text = text[text.index("<svg") :]
    heading = html.escape(printable(title))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{heading}</title>\n'
        "<style>body { margin: 1em auto; max-width: 90em; font-family: sans-serif } svg { width: 100%; height: auto }"
        f"</style></head>\n<body>\n{text}\n</body>\n</html>\n"
    ).encode()
