"""Which runs a part of the study is made of, in an order in which it can be stopped anywhere and taken up again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import inf, isfinite
from pathlib import Path

from frodctl.training.rates import relative_step

from .methods import FROD_RATE, METHODS, Method, basis_of, frod
from .positions import SCORES, STRUCTURES, chosen
from .tasks import TASKS, Checkpoint, Learner, Sizes, Task, load
from .training import Run, run

SEARCH_SEED = 100  # of the tries; the reported seeds are 0, 1, …
FEW = ("packages", "tagging", "code")  # for what differs less than methods do
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
        found = self._done.get((part, task, method.name, f"{rate:.6g}", seed, steps, held_out))
        if found is None:
            loaded = self.task(task)
            checkpoint = self.checkpoints[loaded.model]
            found = run(part, loaded, checkpoint, method, rate, seed, steps, held_out)
            self._done[key(found)] = found
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

    def compare_few(self, part: str, methods: Sequence[Method], multiples: Sequence[float] = (0.5, 1, 2)) -> None:
        """Ways of FRoD on one task of each model and kind, each with a try at the rule's rate, half of it and twice."""
        for task in FEW:
            for method in methods:
                rates = [multiple * relative_step(self.steps) for multiple in multiples]
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


def rates(lab: Lab) -> None:
    """FRoD at multiples of the rate of `parameter_groups(steps=…)`, in runs of several lengths."""
    for seed in lab.seeds[:2]:
        for steps, tasks in ((lab.steps // 4 or 1, TASKS), (lab.steps, TASKS), (4 * lab.steps, FEW)):
            for task in tasks:
                for multiple in (1 / 4, 1 / 2, 1, 2, 4, 8):
                    rate = multiple * relative_step(steps)
                    lab.run("rates", task, METHODS["FRoD"], rate, seed, "validation", steps)


def positions(lab: Lab) -> None:
    """S at other positions than random ones."""
    others = [Method(how, frod(chosen(how)), FROD_RATE) for how in (*STRUCTURES, *SCORES)]
    lab.compare_few("positions", [METHODS["FRoD"], *others])


def sparsity(lab: Lab) -> None:
    """FRoD with fewer and with more numbers, as shares of LoRA's."""
    others = [Method(f"{share:g} times", frod(partial(of_share, share)), FROD_RATE) for share in (0.5, 2, 4)]
    lab.compare_few("sparsity", [METHODS["FRoD"], *others])


def of_share(share: float, model: Learner, checkpoint: Checkpoint) -> Path:
    return basis_of(checkpoint, share)


PARTS: dict[str, Callable[[Lab], None]] = {
    "methods": methods, "rates": rates, "positions": positions, "sparsity": sparsity,
}  # fmt: skip
