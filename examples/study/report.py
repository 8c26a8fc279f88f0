"""Makes the tables and plots of the study from the file of its runs.

    python -m examples.study.report examples/study/runs.jsonl --document docs/study.md

writes each table into the document, between `<!-- study: NAME -->` and `<!-- end -->`, and the plots beside it; without
--document the tables go to stdout.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from math import exp, log
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from frodctl.training.rates import relative_step

from .parts import read
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

    def names(self, part: str, what: str) -> list[Any]:
        """Tasks, methods … of a part, in the order in which they ran."""
        return list(dict.fromkeys(getattr(run, what) for run in self.of(part)))

    def by_method(self, part: str, show: Callable[[list[Run]], str], last: bool = True) -> list[list[str]]:
        """A row for each method, a column for each task, and at last how far the loss is from the reference's."""
        tasks = self.names(part, "task")
        rows = []
        for method in self.names(part, "method"):
            cells = [show(runs) if (runs := self.of(part, task=task, method=method)) else "–" for task in tasks]
            rows.append([method, *cells, *([self.beside(part, method, "loss")] if last else [])])
        return rows

    def beside(self, part: str, method: str, what: str) -> str:
        """By how many percent the loss is above the reference's: geometric mean over the tasks, error over seeds."""
        if method == REFERENCE:
            return "0"
        ratios: dict[int, list[float]] = {}
        for task in self.names(part, "task"):
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
    header = ["test loss", *study.names(part, "task"), f"beside {REFERENCE}, %"]
    return table(header, study.by_method(part, lambda runs: mean([run.loss for run in runs], 3)))


def accuracies(study: Study, part: str) -> str:
    rows = study.by_method(part, lambda runs: mean([100 * run.accuracy for run in runs], 1), last=False)
    return table(["accuracy, %", *study.names(part, "task")], rows)


def thirds(study: Study, part: str) -> str:
    """What a third of the steps is worth, and the steps until the training loss is the reference's at the end."""
    header = ["test loss after a third", *study.names(part, "task"), f"beside {REFERENCE}, %"]
    rows = study.by_method(part, lambda runs: mean([run.loss_at_a_third for run in runs], 3), last=False)
    return table(header, [[*row, study.beside(part, row[0], "loss_at_a_third")] for row in rows])


def costs(study: Study, part: str) -> str:
    """Medians; what does not depend on the task is shown of each model's first one."""
    rows = []
    for method in study.names(part, "method"):
        cells = []
        for task in study.names(part, "task"):
            runs = study.of(part, task=task, method=method)
            cells += [f"{median(1000 * run.training / run.steps for run in runs):.0f}"] if runs else ["–"]
        first = study.of(part, method=method)[0]
        rows.append([method, f"{first.trained:,}", f"{first.bytes / 1e6:.0f}", *cells])
    tasks = study.names(part, "task")
    return table(["", f"trained ({tasks[0]})", f"MB ({tasks[0]})", *(f"ms a step, {task}" for task in tasks)], rows)


def chosen(study: Study, part: str) -> str:
    rows = study.by_method(part, lambda runs: f"{runs[0].rate:.2g}", last=False)
    return table(["rate chosen", *study.names(part, "task")], rows)


def sensitivity(study: Study, part: str) -> str:
    """Validation losses at multiples of the rule's rate, and how far the rule's is from the best of them."""
    runs = study.of(part, held_out="validation")
    multiples = sorted({multiple(run) for run in runs})
    rows = []
    for task, steps in dict.fromkeys((run.task, run.steps) for run in runs):
        by_rate = losses_by_multiple([run for run in runs if (run.task, run.steps) == (task, steps)])
        best = min(map(fmean, by_rate.values()))
        cells = [mean(by_rate[one], 3) if one in by_rate else "–" for one in multiples]
        rows.append([task, str(steps), *cells, f"{100 * (fmean(by_rate[1.0]) / best - 1):.1f}"])
    return table(["validation loss at", "steps", *(f"{one:g} ρ" for one in multiples), "ρ above the best, %"], rows)


def multiple(run: Run) -> float:
    """Its rate beside the rule's."""
    return round(run.rate / relative_step(run.steps), 3)


def losses_by_multiple(runs: Iterable[Run]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for run in runs:
        found.setdefault(multiple(run), []).append(run.loss)
    return dict(sorted(found.items()))


TABLES = {
    "sensitivity": sensitivity,
    "losses": losses,
    "accuracies": accuracies,
    "thirds": thirds,
    "costs": costs,
    "rates": chosen,
}


# Plots


def curves(study: Study, file: Path) -> None:
    """Training loss by step, mean of the seeds and its standard error, each point the mean of a few steps."""
    import matplotlib.pyplot as plt

    tasks = study.names("methods", "task")
    figure, axes = plt.subplots(2, (len(tasks) + 1) // 2, figsize=(11, 6), layout="constrained", squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for method in study.names("methods", "method"):
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

    tasks, methods = study.names("methods", "task"), study.names("methods", "method")
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
    """Validation loss beside the best one of a search, by the rate beside the rule's."""
    import matplotlib.pyplot as plt

    runs = study.of("rates", held_out="validation")
    lengths = list(dict.fromkeys(run.steps for run in runs))
    figure, axes = plt.subplots(1, len(lengths), figsize=(11, 3.2), layout="constrained", squeeze=False, sharey=True)
    for axis, steps in zip(axes.flat, lengths, strict=True):
        for task in dict.fromkeys(run.task for run in runs if run.steps == steps):
            by_rate = losses_by_multiple(run for run in runs if (run.task, run.steps) == (task, steps))
            means = list(map(fmean, by_rate.values()))
            axis.plot(list(by_rate), [loss / min(means) for loss in means], marker="o", markersize=3, label=task)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.axhspan(1, 1.05, color="grey", alpha=0.2)
        axis.set_xscale("log", base=2)
        axis.set(title=f"{steps} steps", xlabel="rate / the rule's", ylim=(0.99, 1.4))
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
            for name, make in TABLES.items():
                if (name == "sensitivity") != (part == "rates"):
                    continue
                print(f"{part}: {name}\n\n{make(study, part)}\n")
        return
    arguments.document.write_text(written(arguments.document.read_text(), study))
    for name, (part, plot) in PLOTS.items():
        if study.ran(part):
            plot(study, arguments.document.with_name(name))


if __name__ == "__main__":
    main()
