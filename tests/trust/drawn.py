"""Files of `tests.trust.structures` before what reads them: commands, the header's reader beside the safetensors
library's own, and runs that take unfinished work up."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from frodctl.checkpoint import codec
from frodctl.errors import InvalidInput
from tests.checkpoint.test_codec import BEYOND, no_mappings
from tests.trust import faults, fuzz, structures
from tests.trust.jobs import Job, content, jobs, make_inputs

BATCH = 100  #: files in a process
_BASIS = "made.safetensors"


@dataclass(frozen=True)
class Kind:
    """What is drawn in place of a file, from its valid bytes, and what is tried with it, given the file's path."""

    file: str
    drawn: Callable[[bytes], st.SearchStrategy[bytes]]
    attempt: Callable[[Path, bytes], None]
    batches: int  #: in the long form


def by(*commands: str) -> Callable[[Path, bytes], None]:
    """The commands that read it, and may write a basis."""

    def attempt(path: Path, data: bytes) -> None:
        fuzz.by_commands(path, commands, data)
        Path(_BASIS).unlink(missing_ok=True)

    return attempt


def beside_the_library(path: Path, data: bytes) -> None:
    """What the library refuses is refused; what is refused beyond that, is for a reason of `BEYOND`; else all is read.

    A file that cannot be mapped, whose header the library does not see, is judged as one that can.
    """
    path.write_bytes(data)
    ours, refusal = _read(path)
    with no_mappings():
        assert _read(path)[0] == ours
    try:
        theirs = {name: (it["dtype"], it["shape"], it["data"]) for name, it in deserialize(data)}
    except (SafetensorError, UnicodeDecodeError):
        assert ours is None
        return
    if ours is None:
        assert any(re.search(words, refusal) for words in BEYOND.values()), refusal
    else:
        places = {name: (spec, data[at : at + spec.nbytes]) for name, (spec, at) in ours.tensors.items()}
        assert {name: (spec.dtype, list(spec.shape), raw) for name, (spec, raw) in places.items()} == theirs


def _read(path: Path) -> tuple[codec.Header | None, str]:
    """The header, or why there is none."""
    try:
        return codec.read_header(path), ""
    except InvalidInput as error:
        return None, str(error)


def resumed(job: Job, path: Path, data: bytes) -> None:
    """A run that finds such a file in its unfinished work comes to the same bytes, and leaves nothing else."""
    left = next(folder for folder in path.parents if folder.name == job.name)
    work = left.with_name("work")
    shutil.copytree(left, work)
    try:
        (work / path.relative_to(left)).write_bytes(data)
        with chdir(work):  # where nothing is called as the model is
            job.run(work)
        assert content(work / job.output) == job.expected
        assert [entry.name for entry in work.iterdir()] == [job.output]
    finally:
        shutil.rmtree(work)


_INSPECT = by("inspect base", "inspect base --spectrum")
_DECOMPOSE = f"decompose base -o {_BASIS} --target-modules all-linear"
_MERGE = "merge base adapter out --basis basis.safetensors --dry-run"
_ADAPTER = by("inspect adapter", _MERGE)
KINDS = {
    "headers": Kind("base/model.safetensors", structures.safetensors, _INSPECT, 20),
    "weights": Kind("base/model.safetensors", structures.safetensors, by(_DECOMPOSE), 10),
    "configs": Kind("base/config.json", structures.configs, by("inspect base"), 10),
    "plans": Kind("base/config.json", structures.configs, by(f"{_DECOMPOSE} --dry-run"), 1),
    "indices": Kind("sharded/model.safetensors.index.json", structures.indices, by("inspect sharded"), 10),
    "manifests": Kind("sharded/frodctl.json", structures.documents, by("inspect sharded --spectrum"), 6),
    "bases": Kind("basis.safetensors", structures.rewritten, by("inspect basis.safetensors --spectrum", _MERGE), 16),
    "adapters": Kind("adapter/adapter_model.safetensors", structures.rewritten, _ADAPTER, 10),
    "adapters' configs": Kind("adapter/adapter_config.json", structures.documents, _ADAPTER, 12),
    "archives": Kind("old/pytorch_model.bin", structures.archives, by("inspect old", "inspect old --spectrum"), 16),
    "GGUFs": Kind("base/model.safetensors", structures.ggufs, by("inspect base"), 4),
    "GGUFs by name": Kind("model.gguf", structures.ggufs, by("inspect model.gguf"), 2),
    "headers beside the library": Kind("beside.safetensors", structures.safetensors, beside_the_library, 50),
    "bytes beside the library": Kind("base/model.safetensors", structures.edited, beside_the_library, 20),
}
_STATE = {".jsonl": structures.lines, ".safetensors": structures.edited}


def kinds(home: Path) -> dict[str, Kind]:
    """All of them, over valid files that are made in this folder, and the work that runs left there."""
    fuzz.make(home)
    found = dict(KINDS)
    inputs = home / "unfinished" / "inputs"
    inputs.mkdir(parents=True)
    make_inputs(inputs)
    made = jobs(inputs)
    for name, operation in {"merge": "write_at", "merge as LoRA": "write_at", "decompose": "replace"}.items():
        job, left = made[name], home / "unfinished" / name
        job.prepare(left)
        places = [n for n, done in enumerate(faults.names_of(partial(job.run, left))) if done == operation]
        job.prepare(left)
        faults.killed(partial(job.run, left), places[2 * len(places) // 3], "after")
        for path in sorted(path for path in left.rglob("*") if path.is_file() and path.stat().st_size):
            drawn = (structures.edited, *filter(None, [_STATE.get(path.suffix)]))
            for strategy in dict.fromkeys(drawn):
                found[f"{name}: {strategy.__name__} for {path.name}"] = Kind(
                    str(path.relative_to(home)), strategy, partial(resumed, job), 2
                )
    return found


def test_of(drawn: st.SearchStrategy[bytes], attempt: fuzz.Attempt, number: int) -> Callable[[], None]:
    """Hypothesis's test of so many files, of which nothing is kept or made smaller: an attempt ends the process."""
    checks = list(HealthCheck)

    @seed(number)
    @settings(max_examples=BATCH, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=checks)
    @given(drawn)
    def test(data: bytes) -> None:
        attempt(number, data)

    return test


def batch(home: Path, kind: Kind, number: int) -> None:
    """Try as many files of one kind, in a process."""
    path = home / kind.file
    valid = path.read_bytes() if path.exists() else b""

    def trials(attempt: fuzz.Attempt) -> None:
        test_of(kind.drawn(valid), attempt, number)()

    fuzz.in_a_process(home, kind.file, partial(kind.attempt, path), trials)
