"""What the promises are tested by: lists of cases, of which the short form takes some and the long form all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random

import frodctl
from frodctl.errors import InvalidInput
from tests.trust import drawn, faults, fuzz, power
from tests.trust.jobs import Content, Job, content, jobs, make_adapter, make_inputs

Case = Callable[[], object]
BATCH = 500  #: of fuzzed files in a process
GUIDED = 1000  #: of guided ones
_MOMENTS = ("before", "amid", "after")
_COPIED = ("config.json", "tokenizer.json", "frodctl.json")  # or no part of what a model means


@dataclass(frozen=True)
class Suite:
    """Cases of one kind."""

    cases: Callable[[Path], list[Case]]  #: those of a folder that is theirs
    every: int  #: which of them are of the short form; 0: none
    size: int = 1  #: what is tried in one case

    def short(self, count: int) -> range:
        """The numbers of the cases that are of the short form, of so many."""
        return range(0, count, self.every) if self.every else range(0)


def _jobs(folder: Path) -> tuple[dict[str, Job], Content]:
    home = folder / "inputs"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    make_inputs(home)
    return jobs(home), content(home)


def _operations(job: Job, work: Path) -> list[str]:
    job.prepare(work)
    return faults.names_of(lambda: job.run(work))


def injected(folder: Path) -> list[Case]:
    """Every operation of every job with every error, and every write and read that can be short."""
    made, inputs = _jobs(folder)
    work = folder / "work"
    cases: list[Case] = []
    for job in made.values():
        names = _operations(job, work)
        cases += [
            partial(faults.fail_once, job, work, inputs, at, e) for at in range(len(names)) for e in faults.ERRORS
        ]
        halves = [at for at, name in enumerate(names) if name in (*faults.WRITES, "read_into")]
        cases += [partial(_short, job, work, inputs, at) for at in halves]
    return cases


def _short(job: Job, work: Path, inputs: Content, at: int) -> None:
    job.prepare(work)
    with faults.around(faults.short(at)):
        job.run(work)
    assert faults.check_left(job, work, inputs)


def kills(folder: Path) -> list[Case]:
    """Every job ended before, amid and after every operation, and its second run ended too, somewhere."""
    made, inputs = _jobs(folder)
    work = folder / "work"
    chance = Random(0)
    cases: list[Case] = []
    for job in made.values():
        count = len(_operations(job, work))
        for at in range(count):
            cases += [partial(_kill, job, work, inputs, [(at, moment)]) for moment in _MOMENTS]
            again = [(at, "after"), (chance.randrange(count), chance.choice(_MOMENTS))]
            cases.append(partial(_kill, job, work, inputs, again))
    return cases


def _kill(job: Job, work: Path, inputs: Content, moments: list[tuple[int, str]]) -> None:
    job.prepare(work)
    whole = False
    for at, moment in moments:
        if not whole:
            faults.killed(lambda: job.run(work), at, moment)
            whole = faults.check_left(job, work, inputs)
    faults.check_rerun(job, work, whole=whole)


def power_losses(folder: Path, seeds: int = 8) -> list[Case]:
    """The power lost after every change of every job, each time with several choices of what got to the disk."""
    made, inputs = _jobs(folder)
    work = folder / "work"
    cases: list[Case] = []
    for job in made.values():
        job.prepare(work)
        recorder = power.Recorder(work)
        recorder.record(partial(job.run, work))
        for moment in range(len(recorder.changes) + 1):
            numbers = [seeds * moment + seed for seed in range(seeds)]
            cases += [partial(_lose_power, job, work, inputs, recorder, moment, number) for number in numbers]
    return cases


def _lose_power(job: Job, work: Path, inputs: Content, recorder: power.Recorder, moment: int, seed: int) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    recorder.leave(work, moment, seed)
    whole = faults.check_left(job, work, inputs)
    assert whole or moment < len(recorder.changes)  # what was said to be done is done
    faults.check_rerun(job, work, whole=whole)


def flipped_bits(folder: Path) -> list[Case]:
    """One bit changed of a base that frodctl wrote, a basis, an adapter or its config: refused, or without effect."""
    made, _ = _jobs(folder)
    home, base = folder / "inputs", folder / "damaged" / "base"
    made["merge"].run(folder)
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    shutil.copytree(folder / "out", base)
    frodctl.decompose(base, folder / "damaged" / "basis.safetensors", target_modules="all-linear", sparsity=0.1)
    make_adapter(folder / "damaged" / "adapter", folder / "damaged" / "basis.safetensors")
    shutil.rmtree(home)
    files = [path for path in sorted((folder / "damaged").rglob("*")) if path.suffix in (".safetensors", ".json")]
    files = [path for path in files if path.parent.name != "1_Pooling" and path.name not in _COPIED]
    expected = _merged(folder)
    assert isinstance(expected, dict)
    bits = [(path, bit) for path in files for bit in range(8 * path.stat().st_size)]
    return [partial(_flip, folder, *bit, expected) for bit in Random(0).sample(bits, 4000)]


def _merged(folder: Path) -> Content | InvalidInput:
    """The weights of a merge, or why there are none."""
    shutil.rmtree(folder / "merged", ignore_errors=True)
    given = folder / "damaged"
    try:
        frodctl.merge(given / "base", given / "adapter", folder / "merged", basis=given / "basis.safetensors")
    except InvalidInput as error:
        return error
    return {name: data for name, data in content(folder / "merged").items() if name.endswith(".safetensors")}


def _flip(folder: Path, path: Path, bit: int, expected: Content) -> None:
    data = path.read_bytes()
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        found = _merged(folder)
    finally:
        path.write_bytes(data)
    assert isinstance(found, InvalidInput) or found == expected, f"{path.name}: bit {bit}"


def fuzzed(folder: Path) -> list[Case]:
    """Every kind of file in many changed forms, a batch of one kind in each case."""
    fuzz.make(folder / "fuzzed")
    batches = [(number, target) for target, kind in fuzz.TARGETS.items() for number in range(kind.batches)]
    ranges = [(target, range(number * BATCH, (number + 1) * BATCH)) for number, target in sorted(batches)]
    return [partial(fuzz.batch, folder / "fuzzed", *pair) for pair in ranges]


def drawn_files(folder: Path) -> list[Case]:
    """Every kind of file as hypothesis draws it, and the work that runs take up, a batch of one kind in each case."""
    home = folder / "drawn"
    batches = [(number, kind) for kind in drawn.kinds(home).values() for number in range(kind.batches)]
    return [partial(drawn.batch, home, kind, number) for number, kind in sorted(batches, key=lambda pair: pair[0])]


def guided_files(folder: Path) -> list[Case]:
    """The same kinds by a fuzzer that looks for lines of frodctl that nothing has led to; none where it is not."""
    there = find_spec("atheris") is not None
    return [partial(_guided, kind) for kind in drawn.KINDS] if there else []


def _guided(kind: str) -> None:
    command = [sys.executable, "-m", "tests.trust.guided", kind, "--files", str(GUIDED)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]


SUITES = {
    "injected faults": Suite(injected, 149),
    "kills": Suite(kills, 131),
    "power losses": Suite(power_losses, 61),
    "flipped bits": Suite(flipped_bits, 97),
    "fuzzed files": Suite(fuzzed, 79, BATCH),
    "drawn files": Suite(drawn_files, 41, drawn.BATCH),
    "guided files": Suite(guided_files, 0, GUIDED),
}
