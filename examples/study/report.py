"""Makes the tables and plots of the study from the file of its runs.

    python -m examples.study.report examples/study/runs.jsonl --document docs/study.md

writes each table into the document, between `<!-- study: NAME -->` and `<!-- end -->`, and the plots beside it; without
--document the tables go to stdout.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import exp, log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from frodctl.training.rates import relative_step

from .parts import MULTIPLES, middle, read, tried
from .training import Run

REFERENCE = "FRoD"
WIDTH = 5  # steps of a point of a curve


class Study:
    """All runs, by what is asked of them."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)

    def of(self, part: str, held_out: str = "test", **wanted: Any) -> list[Run]:
        """Those with these values, by seed."""
        found = [run for run in self.runs if (run.part, run.held_out) == (part, held_out)]
        found = [run for run in found if all(getattr(run, name) == value for name, value in wanted.items())]
        return sorted(found, key=lambda run: run.seed)

    def ran(self, part: str) -> bool:
        return any(run.part == part for run in self.runs)

    def tasks(self, part: str) -> list[str]:
        """Those that a part has come through with, its reference too."""
        return list(dict.fromkeys(run.task for run in self.of(part, method=REFERENCE)))

    def methods(self, part: str) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(run.method for run in self.of(part)))

    def by_method(self, part: str, show: Callable[[list[Run]], str], last: bool = True) -> list[list[str]]:
        """A row for each method, a column for each task, and at last how far the loss is from the reference's."""
        tasks = self.tasks(part)
        rows = []
        for method in self.methods(part):
            cells = [show(runs) if (runs := self.of(part, task=task, method=method)) else "–" for task in tasks]
            rows.append([method, *cells, *([self.beside(part, method, "loss")] if last else [])])
        return rows

    def beside(self, part: str, method: str, what: str) -> str:
        """By how many percent the loss is above the reference's: geometric mean over the tasks, error over seeds."""
        if method == REFERENCE:
            return "0"
        ratios: dict[int, list[float]] = {}
        for task in self.tasks(part):
            others = {run.seed: run for run in self.of(part, task=task, method=REFERENCE)}
            for run in self.of(part, task=task, method=method):
                if run.seed in others:
                    ratios.setdefault(run.seed, []).append(log(getattr(run, what) / getattr(others[run.seed], what)))
        return mean([100 * (exp(fmean(logs)) - 1) for logs in ratios.values()], 1, sign="+")


def mean(values: Sequence[float], digits: int, sign: str = "") -> str:
    """With its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.{digits}f}{error}" if values else "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (header, ["---", *["---:"] * (len(header) - 1)], *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# Tables


def losses(study: Study, part: str) -> str:
    header = ["test loss", *study.tasks(part), f"beside {REFERENCE}, %"]
    return table(header, study.by_method(part, lambda runs: mean([run.loss for run in runs], 3)))


def picked(study: Study, part: str) -> str:
    """Losses, and those of the method that does best on each task's validation split."""
    runs = list(study.runs)
    for task in study.tasks(part):
        tries = [run for run in study.of(part, held_out="validation", task=task) if run.method != REFERENCE]
        best = min(tries, key=lambda run: run.loss).method
        runs += [replace(run, method="picked by validation") for run in study.of(part, task=task, method=best)]
    return losses(Study(runs), part)


def merged(study: Study, part: str) -> str:
    """Losses, and those of what was trained over quantized bases in the full-precision one."""
    found = [(run, run.merged) for run in study.of(part)]
    moved = [replace(run, method=f"{run.method}, merged", loss=loss) for run, loss in found if loss is not None]
    return losses(Study([*study.runs, *moved]), part)


def accuracies(study: Study, part: str) -> str:
    rows = study.by_method(part, lambda runs: mean([100 * run.accuracy for run in runs], 1), last=False)
    return table(["accuracy, %", *study.tasks(part)], rows)


def thirds(study: Study, part: str) -> str:
    """What a third of the steps is worth, and the steps until the training loss is the reference's at the end."""
    header = ["test loss after a third", *study.tasks(part), f"beside {REFERENCE}, %"]
    rows = study.by_method(part, lambda runs: mean([run.loss_at_a_third for run in runs], 3), last=False)
    return table(header, [[*row, study.beside(part, row[0], "loss_at_a_third")] for row in rows])


def costs(study: Study, part: str) -> str:
    """Seconds of the run that was disturbed least; numbers and bytes of the first task."""
    rows = []
    for method in study.methods(part):
        cells = []
        for task in study.tasks(part):
            runs = study.of(part, task=task, method=method)
            cells += [f"{min(1000 * run.training / run.steps for run in runs):.0f}"] if runs else ["–"]
        first = study.of(part, method=method)[0]
        rows.append([method, f"{first.trained:,}", f"{first.bytes / 1e6:.0f}", *cells])
    tasks = study.tasks(part)
    return table(["", f"trained ({tasks[0]})", f"MB ({tasks[0]})", *(f"ms a step, {task}" for task in tasks)], rows)


def chosen(study: Study, part: str) -> str:
    rows = study.by_method(part, lambda runs: f"{runs[0].rate:.2g}", last=False)
    return table(["rate chosen", *study.tasks(part)], rows)


def sensitivity(study: Study, part: str) -> str:
    """Validation losses at the rates of a search, and how far the rule's is above the best of them."""
    rows = []
    for (task, steps), runs in curves_of_rates(study, part).items():
        by_rate = losses_by_rate(runs)
        cells = [mean(by_rate[one * middle(steps)], 3) for one in MULTIPLES]
        ruled = by_rate[relative_step(steps)]
        rows.append([task, str(steps), *cells, mean(ruled, 3), f"{excess(by_rate, steps):.1f}"])
    header = ["validation loss at", "steps", *(f"{one:g} c" for one in MULTIPLES), "the rule's", "above the best, %"]
    return table(header, rows)


def curves_of_rates(study: Study, part: str) -> dict[tuple[str, int], list[Run]]:
    """By task and steps, the shortest runs first, those that all rates were tried for."""
    found: dict[tuple[str, int], list[Run]] = {}
    for run in study.of(part, held_out="validation"):
        if run.rate in tried(run.steps):
            found.setdefault((run.task, run.steps), []).append(run)
    through = {key: runs for key, runs in found.items() if {run.rate for run in runs} == set(tried(key[1]))}
    return dict(sorted(through.items(), key=lambda item: item[0][1]))


def losses_by_rate(runs: Iterable[Run]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for run in runs:
        found.setdefault(run.rate, []).append(run.loss)
    return dict(sorted(found.items()))


def excess(by_rate: dict[float, list[float]], steps: int) -> float:
    """By how many percent the rule's loss is above the best rate's."""
    means = {rate: fmean(losses) for rate, losses in by_rate.items()}
    return 100 * (means[relative_step(steps)] / min(means.values()) - 1)


TABLES = {
    "sensitivity": sensitivity,
    "losses": losses,
    "picked": picked,
    "merged": merged,
    "accuracies": accuracies,
    "thirds": thirds,
    "costs": costs,
    "rates": chosen,
}
SHOWN = {
    "methods": ("losses", "accuracies", "thirds", "costs", "rates"),
    "rates": ("sensitivity",),
    "sparsity": ("picked", "rates"),
    "quantized": ("merged", "rates", "costs"),
}


# Plots


def curves(study: Study, file: Path) -> None:
    """Training loss by step, mean of the seeds and its standard error, each point the mean of a few steps."""
    import matplotlib.pyplot as plt

    tasks = study.tasks("methods")
    figure, axes = plt.subplots(2, (len(tasks) + 1) // 2, figsize=(11, 6), layout="constrained", squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for method in study.methods("methods"):
            courses = [smooth(run.course) for run in study.of("methods", task=task, method=method)]
            points = list(zip(*courses, strict=True))
            steps = [WIDTH * (number + 1) for number in range(len(points))]
            means = [fmean(point) for point in points]
            errors = [stdev(point) / len(point) ** 0.5 if len(point) > 1 else 0.0 for point in points]
            (line,) = axis.plot(steps, means, label=method)
            low, high = zip(*((m - e, m + e) for m, e in zip(means, errors, strict=True)), strict=True)
            axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        axis.set(title=task, xlabel="step", ylabel="training loss")
    axes.flat[0].legend(fontsize="small")
    figure.savefig(file, dpi=80, metadata={"Software": None})
    plt.close(figure)


def smooth(course: Sequence[float]) -> list[float]:
    width = min(WIDTH, len(course))
    return [fmean(course[at : at + width]) for at in range(0, len(course) - width + 1, width)]


def worth(study: Study, file: Path) -> None:
    """Every method's test loss beside the reference's, by task."""
    import matplotlib.pyplot as plt

    tasks, methods = study.tasks("methods"), study.methods("methods")
    figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        heights, errors = [], []
        for task in tasks:
            reference = fmean(run.loss for run in study.of("methods", task=task, method=REFERENCE))
            ratios = [run.loss / reference for run in study.of("methods", task=task, method=method)]
            heights.append(fmean(ratios))
            errors.append(stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0)
        places = [place + (number - len(methods) / 2 + 0.5) * width for place in range(len(tasks))]
        axis.bar(places, heights, width, yerr=errors, label=method)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set(ylabel=f"test loss / {REFERENCE}'s", ylim=(0.6, None))
    axis.axhline(1, color="black", linewidth=0.8)
    axis.legend(fontsize="small", ncols=3)
    figure.savefig(file, dpi=80, metadata={"Software": None})
    plt.close(figure)


def sensitivities(study: Study, file: Path) -> None:
    """Validation loss beside the best one of a search, by rate, with the rule's rate marked."""
    import matplotlib.pyplot as plt

    found = curves_of_rates(study, "rates")
    lengths = sorted({steps for _, steps in found})
    colours = {task: f"C{number}" for number, task in enumerate(dict.fromkeys(task for task, _ in found))}
    figure, axes = plt.subplots(1, len(lengths), figsize=(11, 3.2), layout="constrained", squeeze=False, sharey=True)
    for (task, steps), runs in found.items():
        axis = axes.flat[lengths.index(steps)]
        means = {rate: fmean(losses) for rate, losses in losses_by_rate(runs).items()}
        heights = [loss / min(means.values()) for loss in means.values()]
        axis.plot(list(means), heights, marker="o", markersize=3, label=task, color=colours[task])
    for axis, steps in zip(axes.flat, lengths, strict=True):
        axis.axvline(relative_step(steps), color="black", linewidth=0.8)
        axis.axhspan(1, 1.05, color="grey", alpha=0.2)
        axis.set_xscale("log")
        axis.set(title=f"{steps} steps", xlabel="ρ", ylim=(0.99, 1.4))
    axes.flat[0].set_ylabel("validation loss / the best")
    axes.flat[0].legend(fontsize="small")
    figure.savefig(file, dpi=80, metadata={"Software": None})
    plt.close(figure)


PLOTS = {
    "study-rates.png": ("rates", sensitivities),
    "study-curves.png": ("methods", curves),
    "study-worth.png": ("methods", worth),
}


def written(text: str, study: Study) -> str:
    """The document with its tables made anew; those of parts that did not run stay as they are."""

    def made(match: re.Match[str]) -> str:
        part, name = match["part"], match["name"]
        inside = f"\n{TABLES[name](study, part)}\n" if study.ran(part) else match["inside"]
        return f"<!-- study: {part} {name} -->\n{inside}\n<!-- end -->"

    return re.sub(
        r"<!-- study: (?P<part>\w+) (?P<name>\w+) -->\n(?P<inside>.*?)\n?<!-- end -->", made, text, flags=re.DOTALL
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the file that python -m examples.study wrote")
    parser.add_argument("--document", type=Path)
    arguments = parser.parse_args()
    study = Study(read(arguments.runs))
    if arguments.document is None:
        for part in dict.fromkeys(run.part for run in study.runs):
            for name in SHOWN.get(part, ("losses", "rates")):
                print(f"{part}: {name}\n\n{TABLES[name](study, part)}\n")
        return
    arguments.document.write_text(written(arguments.document.read_text(), study))
    for name, (part, plot) in PLOTS.items():
        if study.ran(part):
            plot(study, arguments.document.with_name(name))


if __name__ == "__main__":
    main()
