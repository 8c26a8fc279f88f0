"""The same jobs in odd places: names, file systems, clocks, masks, and inputs that change between two runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import frodctl
from frodctl.errors import InvalidInput
from tests.trust import faults
from tests.trust.jobs import Job, content, jobs, make_inputs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("places") / "inputs"
    folder.mkdir()
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def made(home: Path) -> dict[str, Job]:
    return jobs(home)


NAMES = ["a b", "a\nb", "\x1b[31mred", "-o", "'$(x)`", "é" * 120, os.fsdecode(b"\xff\xfe")]


@pytest.mark.parametrize("name", NAMES, ids=map(ascii, NAMES))
@pytest.mark.parametrize("job", ["decompose", "merge"])
def test_folders_of_any_name(job: str, name: str, made: dict[str, Job], tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    made[job].run(folder)
    assert content(folder / made[job].output) == made[job].expected


def lacking(*operations: str) -> faults.Around:
    """A file system that cannot do these."""

    def act(count: int, name: str, do: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
        if name not in operations:
            return do()
        if name in ("rename_new", "exchange"):
            return False
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    return act


@pytest.mark.parametrize("job", ["decompose", "merge", "merge over another", "merge as LoRA"])
def test_a_file_system_without_flushes_locks_or_new_kinds_of_renames(
    job: str, made: dict[str, Job], tmp_path: Path
) -> None:
    made[job].prepare(tmp_path / "work")
    with faults.around(lacking("fsync", "lock", "rename_new", "exchange")):
        made[job].run(tmp_path / "work")
    assert content(tmp_path / "work") == content_of(made[job])


def content_of(job: Job) -> dict[str, bytes | None]:
    """The folder with nothing but the output in it."""
    whole = {"": None} if "" not in job.expected else {}
    return {f"{job.output}/{name}".removesuffix("/"): data for name, data in {**whole, **job.expected}.items()}


def test_what_a_file_system_lacks_is_said(home: Path, tmp_path: Path) -> None:
    said: list[str] = []
    run = partial(
        frodctl.decompose,
        home / "base",
        target_modules="all-linear",
        progress=lambda report: said.append(report.text),
    )
    run(tmp_path / "1.safetensors")
    assert not any("file system" in text for text in said)
    with faults.around(lacking("fsync", "lock")):
        run(tmp_path / "2.safetensors")
    (notice,) = (text for text in said if "file system" in text)
    assert "no locks" in notice
    assert "flushes no folders" in notice


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_outputs_are_for_those_whom_the_umask_lets(mask: int, made: dict[str, Job], tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        for name in ("decompose", "merge", "merge as LoRA"):
            made[name].prepare(tmp_path / name)
            made[name].run(tmp_path / name)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*/*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path


def cut(job: Job, folder: Path, share: float) -> None:
    """A run that ends after this share of its operations."""
    job.prepare(folder)
    count = len(faults.names_of(partial(job.run, folder)))
    job.prepare(folder)
    assert faults.killed(partial(job.run, folder), int(share * count), "after")


@pytest.mark.parametrize("times", [(-(10**9), 4 * 10**9), (4 * 10**9, -(10**9))], ids=["ahead", "back"])
@pytest.mark.parametrize("job", ["decompose", "merge"])
def test_a_clock_that_jumps(job: str, times: tuple[int, int], made: dict[str, Job], tmp_path: Path) -> None:
    """What a killed run left is from another century than what it was made from."""
    cut(made[job], tmp_path / "work", 0.6)
    left = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert left
    for time, path in zip(times * len(left), left, strict=False):
        os.utime(path, (time, time))
    made[job].run(tmp_path / "work")
    assert content(tmp_path / "work" / made[job].output) == made[job].expected


@pytest.mark.parametrize("job", ["decompose", "merge"])
def test_a_base_that_changes_between_a_kill_and_the_next_run(job: str, tmp_path: Path) -> None:
    """Nothing is taken up, though size and time are the same: a basis is of the new base, and a merge is refused."""
    home = tmp_path / "inputs"
    home.mkdir()
    make_inputs(home)
    made, weights = jobs(home)[job], home / "base" / "model.safetensors"
    cut(made, tmp_path / "work", 0.8)
    state, raw = weights.stat(), bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    if job == "merge":
        with pytest.raises(InvalidInput, match=r"model\.layers\.1\.self_attn\.q_proj"):
            made.run(tmp_path / "work")
        return
    made.run(tmp_path / "work")
    assert content(tmp_path / "work" / "out.safetensors") != made.expected
    made.prepare(tmp_path / "anew")
    made.run(tmp_path / "anew")
    assert content(tmp_path / "work") == content(tmp_path / "anew")
