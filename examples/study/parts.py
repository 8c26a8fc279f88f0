"""Which runs a part of the study is made of, in an order in which it can be stopped anywhere and taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path

from frodctl.training.rates import relative_step

from .methods import FROD_RATE, METHODS, Method, at, frod, moving, no_scales, no_values, touched_scales
from .positions import DIRECTIONS, SCORES, STRUCTURES, chosen
from .tasks import TASKS, Checkpoint, Sizes, Task, load
from .training import Run, run

SEARCH_SEED = 100  # of the tries; the reported seeds are 0, 1, …
FEW = ("packages", "tagging", "code")
Key = tuple[str, str, str, str, int, int, str]


@dataclass
class Lab:
    """Runs what its file has not yet, and appends it."""

    file: Path
    checkpoints: dict[str, Checkpoint]
    sizes: Sizes
    steps: int
    seeds: Sequence[int]
    say: Callable[[str], None]
    rated: Sequence[str] = tuple(TASKS)  #: tasks whose rates are searched
    few: Sequence[str] = FEW  #: tasks for what differs less than methods do
    multiples: Sequence[float] = (0.5, 1, 2, 4)  #: of a method's rate, to try where ways of FRoD are compared
    _done: dict[Key, Run] = field(default_factory=dict)
    _tasks: dict[str, Task] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cut_to_whole_lines(self.file)
        self._done = {key(one): one for one in read(self.file)}

    def run(
        self, part: str, task: str, method: Method, rate: float, seed: int, held_out: str, steps: int | None = None
    ) -> Run:
        """A run, or its record."""
        steps = steps or self.steps
        wanted = (part, task, method.name, f"{rate:.6g}", seed, steps, held_out)
        found = self._done.get(wanted)
        if found is None:
            same = next((one for other, one in self._done.items() if other[1:] == wanted[1:]), None)
            if same is None:
                loaded = self.task(task)
                found = run(part, loaded, self.checkpoints[loaded.model], method, rate, seed, steps, held_out)
            else:
                found = replace(same, part=part)  # another part has it
            self._done[wanted] = found
            with self.file.open("a") as file:
                file.write(json.dumps(asdict(found)) + "\n")
            self.say(
                f"{part}, {task}, {method.name}, rate {rate:.2g}, seed {seed}: {held_out} loss {found.loss:.4f}, "
                f"{found.accuracy:.1%}, {found.training:.1f} s"
            )
        return found

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            self._tasks[name] = load(name, self.checkpoints, self.sizes)
        return self._tasks[name]

    def best_rate(self, part: str, task: str, method: Method) -> float:
        """The rule for every method's five tries: c/4, c and 4c, then half and twice the best of them."""
        centre = self.task(task).head_rate if method.rate is None else method.rate
        tries = {rate: self._try(part, task, method, rate) for rate in (centre / 4, centre, 4 * centre)}
        middle = min(tries, key=lambda rate: tries[rate])
        tries |= {rate: self._try(part, task, method, rate) for rate in (middle / 2, 2 * middle)}
        return min(tries, key=lambda rate: tries[rate])

    def _try(self, part: str, task: str, method: Method, rate: float) -> float:
        loss = self.run(part, task, method, rate, SEARCH_SEED, "validation").loss
        return loss if isfinite(loss) else inf

    def compare_few(self, part: str, methods: Iterable[Method]) -> None:
        """One after the other, on a few tasks, with a try at each multiple of a method's rate."""
        for method in methods:
            assert method.rate is not None
            for task in self.few:
                rates = [multiple * method.rate for multiple in self.multiples]
                tries = {rate: self._try(part, task, method, rate) for rate in rates}
                rate = min(tries, key=lambda rate: tries[rate])
                for seed in self.seeds:
                    self.run(part, task, method, rate, seed, "test")

    def compare(self, part: str, methods: Iterable[Method], tasks: Iterable[str]) -> None:
        """Search every method's rate on the validation split, and train all seeds at it."""
        for task in tasks:
            for method in methods:
                rate = self.best_rate(part, task, method)
                for seed in self.seeds:
                    self.run(part, task, method, rate, seed, "test")


def key(one: Run) -> Key:
    return (one.part, one.task, one.method, f"{one.rate:.6g}", one.seed, one.steps, one.held_out)


def read(file: Path) -> Iterator[Run]:
    """The runs of a file; a line that was cut off as it was written is none."""
    if file.exists():
        yield from (Run(**json.loads(line)) for line in file.read_text().splitlines(keepends=True) if line[-1] == "\n")


def cut_to_whole_lines(file: Path) -> None:
    """So that the next run's begins a line."""
    if file.exists():
        content = file.read_bytes()
        file.write_bytes(content[: content.rfind(b"\n") + 1])


def methods(lab: Lab) -> None:
    """Every method for every task."""
    lab.compare("methods", METHODS.values(), TASKS)


MIDDLE = 0.18  # of the search for ρ, times √steps
MULTIPLES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)


def middle(steps: int) -> float:
    """Of the search for ρ in a run of so many steps."""
    return float(MIDDLE / steps**0.5)


def tried(steps: int) -> list[float]:
    """Those of the search, and the one of `parameter_groups(steps=…)`."""
    return [*(multiple * middle(steps) for multiple in MULTIPLES), relative_step(steps)]


def rates(lab: Lab) -> None:
    """FRoD at many rates, in runs of several lengths."""
    lengths = (
        (max(1, lab.steps // 4), lab.rated), (lab.steps, lab.rated), (4 * lab.steps, lab.few), (2 * lab.steps, lab.few),
    )  # fmt: skip
    for seed in lab.seeds[:2]:
        for steps, tasks in lengths:
            for task in tasks:
                for rate in tried(steps):
                    lab.run("rates", task, METHODS["FRoD"], rate, seed, "validation", steps)


def positions(lab: Lab) -> None:
    """S at other positions than random ones; λ' or S alone."""
    ways = [Method(how, frod(chosen(how)), FROD_RATE) for how in (*SCORES, *STRUCTURES) if how != "S alone"]
    few = [Method(how, frod(chosen(how), touched_scales), FROD_RATE) for how in DIRECTIONS]
    split = [
        Method("S alone", frod(chosen("S alone"), no_scales), FROD_RATE),
        Method("λ' alone", frod(fix=no_values), FROD_RATE),
    ]
    lab.compare_few("positions", [METHODS["FRoD"], *few, *ways, *split])


SPARSITIES = (0.0025, 0.005, 0.01, 0.0172, 0.04)  # of n² positions


def sparsity(lab: Lab) -> None:
    """FRoD with fewer and with more values in S."""
    others = [Method(f"{100 * share:g} %", frod(at(share)), FROD_RATE) for share in SPARSITIES]
    lab.compare_few("sparsity", [METHODS["FRoD"], *others])


def reallocation(lab: Lab) -> None:
    """Positions that move in training."""
    often = Method("10 % every 4 steps", frod(), FROD_RATE, after_step=moving(10, 0.1))
    much = Method("30 % every 10 steps", frod(), FROD_RATE, after_step=moving(4, 0.3))
    lab.compare_few("reallocation", [METHODS["FRoD"], often, much])


def quantized(lab: Lab) -> None:
    """Over bases in fewer bits."""
    lora_too = [METHODS["FRoD"], METHODS["LoRA"]]
    others = [
        replace(method, name=f"{method.name} over {base}", quantization=quantization)
        for base, quantization in (("NF4", "nf4"), ("int8", "int8"))
        for method in lora_too
    ]
    lab.compare_few("quantized", [*lora_too, *others])


PARTS: dict[str, Callable[[Lab], None]] = {
    "methods": methods, "rates": rates, "positions": positions, "sparsity": sparsity, "reallocation": reallocation,
    "quantized": quantized,
}  # fmt: skip
