"""Output appears whole or not at all, and where it may."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import pytest

from frodctl.checkpoint import files as filesystem
from frodctl.checkpoint import sink
from frodctl.checkpoint.sink import Staging, check_output_file, check_output_folder, replace_files, require_disk
from frodctl.errors import FrodctlError, OutOfResources, UsageError

ONE, TWO = "1" * 16, "2" * 16


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def failing(file: IO[bytes]) -> None:
    file.write(b"half")
    raise KeyboardInterrupt


def writing(data: bytes) -> Callable[[IO[bytes]], None]:
    def write(file: IO[bytes]) -> None:
        file.write(data)

    return write


def anything() -> None:
    """A check that nothing fails."""


def staging_of(output: Path, key: str = ONE, check: Callable[[], None] = anything, resume: bool = True) -> Staging:
    return Staging(output, key, check, resume=resume)


def test_disk_is_checked_against_what_is_free(tmp_path: Path) -> None:
    require_disk(tmp_path, 1)
    with pytest.raises(OutOfResources, match="MB free") as caught:
        require_disk(tmp_path, 10**18)
    assert caught.value.exit_code == 4


def test_an_output_that_exists_needs_force(tmp_path: Path) -> None:
    output = tmp_path / "out"
    check_output_file(output, force=False)
    output.write_bytes(b"old")
    with pytest.raises(UsageError, match="`force=True`"):
        check_output_file(output, force=False)
    check_output_file(output, force=True)
    assert output.read_bytes() == b"old"


def test_a_folder_or_a_device_is_no_output_even_by_force(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path(os.devnull)):
        with pytest.raises(UsageError):
            check_output_file(path, force=True)


@pytest.mark.parametrize("length", [248, 255, 256, 5000])
def test_a_name_too_long_for_unfinished_work(length: int, tmp_path: Path) -> None:
    for check in (check_output_file, lambda path, force: check_output_folder(path, [], force=force)):
        check(tmp_path / ("x" * 240), force=False)
        with pytest.raises(UsageError, match="too long"):
            check(tmp_path / ("x" * length), force=False)


def test_the_parent_must_be_a_writable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent in ("missing", "file"):
        with pytest.raises(UsageError, match="no such folder"):
            check_output_file(tmp_path / parent / "out", force=False)
    assert files(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FrodctlError, match="not writable"):
        check_output_file(tmp_path / "out", force=False)


def test_an_output_folder_must_not_touch_what_is_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "inner").mkdir(parents=True)
    (base / "weights").touch()
    (tmp_path / "link").symlink_to(base)
    for path in (base, base / "inner" / "out", tmp_path, tmp_path / "link" / "out", base / ".." / "base"):
        with pytest.raises(UsageError, match="which is read"):
            check_output_folder(path, [base], force=True)
    for path in (base, tmp_path / "link", tmp_path):
        with pytest.raises(UsageError, match="which is read"):
            check_output_folder(path, [base / "weights"], force=True)
    check_output_folder(tmp_path / "base2", [base], force=False)
    check_output_folder(base / "out", [base / "weights"], force=False)


def test_an_output_folder_must_not_hold_what_a_link_leads_to(tmp_path: Path) -> None:
    """A base whose shards are links into an earlier merge."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").symlink_to("../out/model.safetensors")
    with pytest.raises(UsageError, match="which is read"):
        check_output_folder(tmp_path / "out", [tmp_path / "base" / "model.safetensors"], force=True)


def test_only_a_folder_is_replaced_by_a_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(UsageError, match="`force=True`"):
        check_output_folder(home, [], force=False)
    check_output_folder(home, [], force=True)
    (home / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo")
    for target in ("missing", "empty"):
        for path in (home / "file", tmp_path / "link", tmp_path / "fifo"):
            for force in (False, True):  # nothing is promised of it
                with pytest.raises(UsageError, match=r"exists and is (not a folder|a link)"):
                    check_output_folder(path, [], force=force)
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert target


def test_a_refusal_names_what_is_in_the_way(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"thesis{number:02d}.tex").touch()
    with pytest.raises(UsageError, match=r"holds more than a checkpoint.*: thesis00\.tex, .*thesis07\.tex and more;"):
        check_output_folder(tmp_path, [], force=True)
    assert len(files(tmp_path)) == 12


def ways_to(file: Path, work: Path) -> dict[str, Path]:
    """The same file by every kind of path; ``work`` is the working directory."""
    (work / "folder-link").symlink_to(file.parent)
    (work / "file-link").symlink_to(file)
    os.link(file, work / "hard-link")
    return {
        "absolute": file,
        "relative": Path(os.path.relpath(file, work)),
        "dots": file.parent / ".." / file.parent.name / file.name,
        "through a linked folder": work / "folder-link" / file.name,
        "a link": work / "file-link",
        "a hard link": work / "hard-link",
    }


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_is_read_is_no_output_by_any_path(
    force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    file = tmp_path / "model" / "weights"
    file.write_bytes(b"precious")
    ways = ways_to(file, tmp_path / "work")
    for path in ways.values():
        for read in ways.values():
            with pytest.raises(UsageError, match="files that are read"):
                check_output_file(path, [tmp_path / "missing", read], force=force)
            with pytest.raises(UsageError, match="files that are read"):
                sink.write_file(path, writing(b"new"), [read], force=force)
    assert file.read_bytes() == b"precious"


PARTS = [
    "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors", "adapter_model.safetensors",
    "adapter_config.json", "tokenizer.json", "diffusion_pytorch_model.safetensors", "consolidated.safetensors",
    "MODEL.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("beside", ["config.json", "adapter_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_model_is_no_output_in_its_folder(name: str, beside: str, tmp_path: Path) -> None:
    if name == beside:
        return
    check_output_file(tmp_path / name, force=False)
    (tmp_path / beside).touch()
    for exists in (False, True):
        if exists:
            (tmp_path / name).touch()
        with pytest.raises(UsageError, match="part of the model"):
            check_output_file(tmp_path / name, force=True)
    with pytest.raises(UsageError, match="part of the model"):
        check_output_folder(tmp_path / name, [], force=True)
    for other in ("model.frod.safetensors", "basis.safetensors", "model-basis.safetensors", "spectra.png"):
        check_output_file(tmp_path / other, force=False)


def staged(output: Path, check: Callable[[], None] = anything) -> Staging:
    """A staging with one finished piece, a folder."""
    staging = staging_of(output, check=check)
    staging.path("tree").mkdir(exist_ok=True)
    (staging.path("tree") / "file").write_text("new")
    return staging


def test_a_folder_is_published_whole(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as staging:
        staging.publish_folder("tree")
    assert files(tmp_path) == {"out", "out/file"}
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("exchanging", [True, False])
def test_a_folder_takes_the_place_of_another(exchanging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanging:
        monkeypatch.setattr(filesystem, "exchange", lambda first, second: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with staged(tmp_path / "out") as staging:
        staging.publish_folder("tree")
    assert files(tmp_path) == {"out", "out/file"}


def test_what_was_moved_aside_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut between the two renames of a system without an exchange."""
    monkeypatch.setattr(filesystem, "exchange", lambda first, second: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    rename = os.rename

    def cut(source: Path, target: Path) -> None:
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        rename(source, target)

    with staged(tmp_path / "out") as staging, monkeypatch.context() as patch:
        patch.setattr(os, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            staging.publish_folder("tree")
    assert not (tmp_path / "out").exists()
    with staging_of(tmp_path / "out") as again:
        assert files(tmp_path / "out") == {"old"}
        assert files(again.path("tree")) == {"file"}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with staging_of(tmp_path / "out", ONE), pytest.raises(FrodctlError, match="another run"):
        staging_of(tmp_path / "out", TWO, resume=False)
    with staging_of(tmp_path / "out", TWO):
        pass
    assert files(tmp_path) == set()


def test_a_piece_appears_only_when_complete(tmp_path: Path) -> None:
    staging = staging_of(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        staging.write("piece", failing)
    assert files(staging.folder) == set()
    staging.write("piece", lambda file: file.write(b"whole") and None)
    assert staging.path("piece").read_bytes() == b"whole"
    with pytest.raises(KeyboardInterrupt):
        staging.write("piece", failing)
    assert staging.path("piece").read_bytes() == b"whole"
    assert files(staging.folder) == {"piece"}


def test_publishing_replaces_in_one_step_and_clears_up(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_bytes(b"old")
    staging = staging_of(output)
    staging.write("piece", lambda file: None)
    with pytest.raises(KeyboardInterrupt):
        staging.publish(failing)
    assert output.read_bytes() == b"old"
    assert staging.path("piece").exists()

    def write(file: IO[bytes]) -> None:
        file.write(b"new")
        assert output.read_bytes() == b"old"

    staging.publish(write)
    assert output.read_bytes() == b"new"
    assert files(tmp_path) == {"out"}


def test_the_same_job_takes_up_its_pieces_and_another_does_not(tmp_path: Path) -> None:
    with staging_of(tmp_path / "out", ONE) as staging:
        staging.write("piece", lambda file: None)
    with staging_of(tmp_path / "out", TWO) as staging:
        assert not staging.path("piece").exists()
    with staging_of(tmp_path / "out", ONE) as staging:
        assert staging.path("piece").exists()


def test_no_resume_discards(tmp_path: Path) -> None:
    with staging_of(tmp_path / "out") as staging:
        staging.write("piece", lambda file: None)
    with staging_of(tmp_path / "out", resume=False) as staging:
        assert not staging.path("piece").exists()


def test_a_job_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with staging_of(tmp_path / "out"):
        pass
    assert files(tmp_path) == set()
    with staging_of(tmp_path / "out") as staging:
        staging.write("piece", lambda file: None)
    assert staging.path("piece").exists()


# What came in the way


@pytest.mark.parametrize("flags", [True, False], ids=["renameat2", "without"])
@pytest.mark.parametrize("folder", [True, False])
def test_what_appears_during_the_work_is_kept(
    folder: bool, flags: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not flags:
        monkeypatch.setattr(filesystem, "_renameat2", lambda *_: False)
    output = tmp_path / "out"

    def check() -> None:
        check_output_folder(output, [], force=False) if folder else check_output_file(output, force=False)

    with staged(output, check) as staging:
        output.write_bytes(b"precious")
        with pytest.raises(UsageError, match="exists"):
            staging.publish_folder("tree") if folder else staging.publish(writing(b"new"))
    assert output.read_bytes() == b"precious"
    output.unlink()
    with staging_of(output, check=check) as again:  # nothing of the work is lost either
        assert files(again.folder) == {"tree", "tree/file"}
        again.publish_folder("tree")
    assert files(tmp_path) == {"out", "out/file"}


@pytest.mark.parametrize("flags", [True, False], ids=["renameat2", "without"])
def test_what_appears_after_the_last_check_is_kept_too(
    flags: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    checks: list[str] = []

    def check() -> None:
        check_output_file(output, force=False)
        checks.append("passed")
        if len(checks) == 2:
            output.write_bytes(b"precious")

    if not flags:
        monkeypatch.setattr(filesystem, "_renameat2", lambda *_: False)
    with staging_of(output, check=check) as staging, pytest.raises(UsageError, match="exists"):
        staging.publish(writing(b"new"))
    assert output.read_bytes() == b"precious"
    assert files(tmp_path) == {"out"}


def test_what_somebody_puts_into_an_earlier_output_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with staged(output, lambda: check_output_folder(output, [], force=True)) as staging:
        (output / "thesis.tex").write_text("precious")
        with pytest.raises(UsageError, match=r"thesis\.tex"):
            staging.publish_folder("tree")
    assert (output / "thesis.tex").read_text() == "precious"


def test_a_refusal_at_the_start_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.touch()
    with pytest.raises(UsageError):
        staging_of(output, check=lambda: check_output_file(output, force=False))
    assert files(tmp_path) == {"out"}


# What lies in OUTPUT.partial


def _as_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _as_hard_link(path: Path, victim: Path) -> None:
    os.link(victim if victim.is_file() else victim / "file", path)


def _as_fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("make", [_as_link, _as_hard_link, _as_fifo])
@pytest.mark.parametrize("place", ["", ONE, "previous", f"{ONE}/tree", f"{ONE}/journal", f"{ONE}/tree/model"])
def test_nothing_is_written_through_a_link(
    place: str, make: Callable[[Path, Path], None], resume: bool, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    path = tmp_path / "out.partial" / place
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path, victim)
    refused = resume or "/" not in place  # within the job's own folder it is cleared away for a fresh start
    outcome = pytest.raises(UsageError, match=r"out\.partial") if refused else nullcontext()
    with outcome, staging_of(tmp_path / "out", resume=resume) as staging:
        staging.path("tree").mkdir()
        (staging.path("tree") / "model").write_text("new")
        staging.publish_folder("tree")
    assert os.path.lexists(path) == refused
    assert files(victim) == {"file"}
    assert (victim / "file").read_text() == "precious"


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", ["thesis.tex", "notes/a", ".git/HEAD", f"{ONE}.tex"])
def test_a_folder_of_somebody_else_is_not_cleared_away(name: str, resume: bool, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / name).parent.mkdir(parents=True)
    (tmp_path / "out.partial" / name).write_text("precious")
    with pytest.raises(UsageError, match="not of an unfinished run"):
        staging_of(tmp_path / "out", resume=resume)
    assert (tmp_path / "out.partial" / name).read_text() == "precious"


# A full disk


def full(file: IO[bytes]) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_out_of_resources(number: int, tmp_path: Path) -> None:
    def write(file: IO[bytes]) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(OutOfResources, match=r"out: .*a rerun resumes"), staging_of(tmp_path / "out") as staging:
        staging.write("piece", write)
    assert files(tmp_path) == set()


@pytest.mark.parametrize("existing", ["", "a", "a/b", "a/b/c"])
def test_folders_made_for_files_go_again(existing: str, tmp_path: Path) -> None:
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    before = files(tmp_path)
    for write, error in ((full, OutOfResources), (failing, KeyboardInterrupt)):
        with pytest.raises(error):
            replace_files(tmp_path / "a" / "b" / "c", {"one": writing(b"1"), "two": write})
        assert files(tmp_path) == before
    replace_files(tmp_path / "a" / "b" / "c", {"one": writing(b"1"), "two": writing(b"2")})
    assert {"a/b/c/one", "a/b/c/two"} <= files(tmp_path)


def test_files_cannot_be_put_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder" / "two").mkdir(parents=True)
    before = files(tmp_path)
    for place in ("file", "file/inner", "file/a/b", "dangling", "fifo", "fifo/inner", "folder"):
        with pytest.raises(UsageError):
            replace_files(tmp_path / place, {"one": writing(b"1"), "two": writing(b"2")})
        assert files(tmp_path) == before
    assert (tmp_path / "file").read_text() == "precious"


def test_files_are_not_written_through_links(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    for name in ("one", "one.tmp", "two", "two.tmp"):
        (tmp_path / name).symlink_to("victim")
    replace_files(tmp_path, {"one": writing(b"1"), "two": writing(b"2")})
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "one").read_text() == "1"
    assert not (tmp_path / "one").is_symlink()
    assert files(tmp_path) == {"victim", "one", "two", "one.tmp", "two.tmp"}  # which are somebody's


def test_one_file_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for write, error in ((full, OutOfResources), (failing, KeyboardInterrupt)):
        with pytest.raises(error):
            sink.write_file(path, write, force=False)
        assert files(tmp_path) == set()
    sink.write_file(path, writing(b"old"), force=False)

    def appearing(file: IO[bytes]) -> None:
        (tmp_path / "new").write_bytes(b"precious")

    with pytest.raises(UsageError, match="exists"):
        sink.write_file(path, writing(b"new"), force=False)
    with pytest.raises(UsageError, match="exists"):
        sink.write_file(tmp_path / "new", appearing, force=False)
    assert (path.read_bytes(), (tmp_path / "new").read_bytes()) == (b"old", b"precious")
    sink.write_file(path, writing(b"new"), force=True)
    assert path.read_bytes() == b"new"
    assert files(tmp_path) == {"out", "new"}


def test_unfinished_work_of_another_job_is_left(tmp_path: Path) -> None:
    with staging_of(tmp_path / "out", ONE) as staging:
        staging.write("piece", lambda file: None)
    with staging_of(tmp_path / "out", TWO) as staging:
        staging.publish(writing(b"new"))
    with staging_of(tmp_path / "out", ONE) as staging:
        assert staging.path("piece").exists()


def test_somebodys_file_beside_the_output_is_left(tmp_path: Path) -> None:
    for name in ("out.tmp", "one.tmp"):
        (tmp_path / name).write_text("precious")
    sink.write_file(tmp_path / "out", writing(b"new"), force=False)
    replace_files(tmp_path, {"one": writing(b"1")})
    assert {name: (tmp_path / name).read_text() for name in ("out.tmp", "one.tmp")} == {
        "out.tmp": "precious", "one.tmp": "precious"
    }  # fmt: skip


def test_a_folder_above_what_is_read_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path / "model")
    for path in ("../out", "inner/../../out", "../model/../out"):
        check_output_folder(Path(path), [Path()], force=False)
    for path in ("out", "../model/out", "../link/out", "inner/../out", ".."):
        with pytest.raises(UsageError, match="which is read"):
            check_output_folder(Path(path), [Path()], force=True)
