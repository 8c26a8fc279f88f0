"""Output appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest

from frodctl.checkpoint.sink import Staging, check_output_file, require_disk
from frodctl.errors import FrodctlError, OutOfResources, UsageError


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def failing(file: IO[bytes]) -> None:
    file.write(b"half")
    raise KeyboardInterrupt


def test_disk_is_checked_against_what_is_free(tmp_path: Path) -> None:
    require_disk(tmp_path, 1)
    with pytest.raises(OutOfResources, match="MB free") as caught:
        require_disk(tmp_path, 10**18)
    assert caught.value.exit_code == 4


def test_an_output_that_exists_needs_force(tmp_path: Path) -> None:
    output = tmp_path / "out"
    check_output_file(output, force=False)
    output.write_bytes(b"old")
    with pytest.raises(UsageError, match="--force"):
        check_output_file(output, force=False)
    check_output_file(output, force=True)
    assert output.read_bytes() == b"old"


def test_a_folder_or_a_device_is_no_output_even_by_force(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path(os.devnull)):
        with pytest.raises(UsageError):
            check_output_file(path, force=True)


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


def test_a_piece_appears_only_when_complete(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", "key", resume=True)
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
    staging = Staging(output, "key", resume=True)
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
    Staging(tmp_path / "out", "one", resume=True).write("piece", lambda file: None)
    assert not Staging(tmp_path / "out", "two", resume=True).path("piece").exists()
    assert Staging(tmp_path / "out", "one", resume=True).path("piece").exists()


def test_no_resume_discards(tmp_path: Path) -> None:
    Staging(tmp_path / "out", "key", resume=True).write("piece", lambda file: None)
    assert not Staging(tmp_path / "out", "key", resume=False).path("piece").exists()


def test_a_job_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    Staging(tmp_path / "out", "key", resume=True).discard_if_empty()
    assert files(tmp_path) == set()
    staging = Staging(tmp_path / "out", "key", resume=True)
    staging.write("piece", lambda file: None)
    staging.discard_if_empty()
    assert staging.path("piece").exists()
