"""Output appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest

from frodctl.checkpoint import sink
from frodctl.checkpoint.sink import Staging, check_output_file, check_output_folder, require_disk
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


def test_an_output_folder_must_not_touch_what_is_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    for path in (base, base / "inner" / "out", tmp_path, tmp_path / "link" / "out", base / ".." / "base"):
        with pytest.raises(UsageError, match="which is read"):
            check_output_folder(path, [base], force=True)
    check_output_folder(tmp_path / "base2", [base], force=False)


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(UsageError, match="--force"):
        check_output_folder(home, [], force=False)
    check_output_folder(home, [], force=True)
    (home / "thesis.tex").touch()
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(UsageError, match="more than a checkpoint"):
            check_output_folder(home, [], force=True)
        (home / name).touch()
    check_output_folder(home, [], force=True)
    for precious in (".git", "src", "adapter_config.json", "model.frod.safetensors"):
        (home / precious).mkdir() if "." not in precious[1:] else (home / precious).touch()
        with pytest.raises(UsageError, match="more than a checkpoint"):
            check_output_folder(home, [], force=True)
        (home / precious).rmdir() if (home / precious).is_dir() else (home / precious).unlink()
    (home / "1_Pooling").mkdir()
    (home / "README.md").write_text("# x\n\nMerged by frodctl 0.1.\n")
    check_output_folder(home, [], force=True)
    for path in (home / "config.json", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(home)
        with pytest.raises(UsageError, match="not a folder"):
            check_output_folder(path, [], force=True)


def staged(output: Path, key: str = "key", resume: bool = True) -> Staging:
    """A staging with one finished piece, a folder."""
    staging = Staging(output, key, resume=resume)
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
        monkeypatch.setattr(sink, "_exchange", lambda first, second: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with staged(tmp_path / "out") as staging:
        staging.publish_folder("tree")
    assert files(tmp_path) == {"out", "out/file"}


def test_what_was_moved_aside_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut between the two renames of a system without an exchange."""
    monkeypatch.setattr(sink, "_exchange", lambda first, second: False)
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
    with Staging(tmp_path / "out", "key", resume=True) as again:
        assert files(tmp_path / "out") == {"old"}
        assert files(again.path("tree")) == {"file"}


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", "one", resume=True), pytest.raises(FrodctlError, match="another run"):
        Staging(tmp_path / "out", "two", resume=False)
    with Staging(tmp_path / "out", "two", resume=True):
        pass
    assert files(tmp_path) == set()


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
    with Staging(tmp_path / "out", "one", resume=True) as staging:
        staging.write("piece", lambda file: None)
    with Staging(tmp_path / "out", "two", resume=True) as staging:
        assert not staging.path("piece").exists()
    with Staging(tmp_path / "out", "one", resume=True) as staging:
        assert staging.path("piece").exists()


def test_no_resume_discards(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", "key", resume=True) as staging:
        staging.write("piece", lambda file: None)
    with Staging(tmp_path / "out", "key", resume=False) as staging:
        assert not staging.path("piece").exists()


def test_a_job_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", "key", resume=True):
        pass
    assert files(tmp_path) == set()
    with Staging(tmp_path / "out", "key", resume=True) as staging:
        staging.write("piece", lambda file: None)
    assert staging.path("piece").exists()
