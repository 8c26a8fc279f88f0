"""What a folder may lose to ``force``: what frodctl wrote there, or a plain checkpoint, and nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frodctl.checkpoint import manifest
from frodctl.checkpoint.sink import check_output_folder
from frodctl.errors import UsageError

CHECKPOINT = {
    "config.json": "{}", "generation_config.json": "{}", "model-00001-of-00002.safetensors": "one",
    "model-00002-of-00002.safetensors": "two", "model.safetensors.index.json": "{}", "tokenizer.json": "{}",
    "tokenizer_config.json": "{}", "special_tokens_map.json": "{}", "vocab.json": "{}", "merges.txt": "",
    "tokenizer.model": "x", "chat_template.jinja": "x", "preprocessor_config.json": "{}",
}  # fmt: skip
CARD = f"---\nlicense: mit\n---\n# out\n\n{manifest.MERGED_BY} 0.1.0.dev0.\n"


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def merged(folder: Path) -> None:
    """As this version leaves it, with code and a licence."""
    fill(
        folder, {**CHECKPOINT, "README.md": CARD, "modeling_x.py": "x", "LICENSE": "MIT", "1_Pooling/config.json": "{}"}
    )
    manifest.write(folder, "frodctl 1")


def merged_earlier(folder: Path) -> None:
    """As versions without a manifest left it."""
    fill(folder, {**CHECKPOINT, "README.md": CARD, "modules.json": "[]", "1_Pooling/config.json": "{}"})


def saved(folder: Path) -> None:
    """As save_pretrained leaves it."""
    fill(folder, CHECKPOINT)


def bare(folder: Path) -> None:
    """Empty, or with an empty folder."""
    (folder / "empty" / "inner").mkdir(parents=True)


KINDS = [merged, merged_earlier, saved, bare]
FOREIGN = [
    ".git/HEAD", ".gitignore", ".env", "sub/a.docx", "train.py", "model.gguf", "optimizer.pt", "results.json",
    "notes.txt", "thesis.tex", "checkpoint-10/config.json", "checkpoint-10/model.safetensors", "runs/events.out.1",
    "adapter_config.json", "adapter_model.safetensors", "tiny.frod.safetensors", "other.safetensors", "data.parquet",
    "training_args.bin", "scheduler.pt", "trainer_state.json", "my_config.json", "config.json.bak", "a/b/c/d",
    "sub/config.json", "1_Pooling/notes.txt", "Model.safetensors", "out.log", "tokenizer.json ", "line\nbreak",
]  # fmt: skip


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__)
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    request.param(folder)
    return folder


def contents(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


def refuses(folder: Path, named: str) -> None:
    before = contents(folder)
    with pytest.raises(UsageError, match=re.escape(named)):
        check_output_folder(folder, [], force=True)
    assert contents(folder) == before


def test_what_frodctl_or_save_pretrained_made_may_go(out: Path) -> None:
    assert list(manifest.foreign(out)) == []
    check_output_folder(out, [], force=True)
    with pytest.raises(UsageError, match="exists"):
        check_output_folder(out, [], force=False)


@pytest.mark.parametrize("name", FOREIGN)
def test_anything_else_stays_and_is_named(name: str, out: Path) -> None:
    fill(out, {name: "precious"})
    refuses(out, name)


@pytest.mark.parametrize("name", ["link", "config.json", "tokenizer.json", "1_Pooling"])
@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_a_link_stays(name: str, target: str, out: Path) -> None:
    (out.parent / "file").touch()
    (out.parent / "folder").mkdir()
    place = out / name
    place.unlink() if place.is_file() else None
    if place.is_dir():
        place.rename(out.parent / "moved")
    place.symlink_to(out.parent / target)
    refuses(out, name)


@pytest.mark.parametrize("name", ["fifo", "tokenizer.json"])
def test_a_fifo_stays(name: str, out: Path) -> None:
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    refuses(out, name)


def test_a_card_of_somebody_stays(tmp_path: Path) -> None:
    fill(tmp_path, {**CHECKPOINT, "README.md": "# My model\n\nTwo weeks of work."})
    refuses(tmp_path, "README.md")


@pytest.mark.parametrize("name", ["README.md", "config.json", "modeling_x.py", "model-00001-of-00002.safetensors"])
def test_a_file_that_was_changed_since_stays(name: str, tmp_path: Path) -> None:
    merged(tmp_path)
    (tmp_path / name).write_text((tmp_path / name).read_text() + "more")
    refuses(tmp_path, f"{name} (changed)")


def test_a_file_that_is_gone_is_nobodys_loss(tmp_path: Path) -> None:
    merged(tmp_path)
    (tmp_path / "LICENSE").unlink()
    (tmp_path / "1_Pooling" / "config.json").unlink()
    check_output_folder(tmp_path, [], force=True)


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    for names in (["tokenizer.json"], ["config.json"], ["model.safetensors"], ["tokenizer.json", "config.json"]):
        folder = fill(tmp_path / "-".join(names), dict.fromkeys(names, "{}"))
        refuses(folder, names[0] if len(names) == 1 else "config.json, tokenizer.json")


def damages() -> list[Callable[[Path], object]]:
    def text(value: str) -> Callable[[Path], object]:
        return lambda path: path.write_text(value)

    def linked(path: Path) -> None:
        path.rename(path.parent.parent / "manifest")
        path.symlink_to("../manifest")

    def piped(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    values = [
        7,
        None,
        [],
        {},
        {"files": 7},
        {"files": []},
        {"files": {"a": "1"}},
        {"files": {"a": 1.5}},
        {"files": None},
    ]
    return [
        *(text(json.dumps(value)) for value in values),
        *(text(value) for value in ("", "{", "[" * 100_000, "\0", '{"files": ' + "1" * 10_000 + "}")),
        lambda path: path.write_bytes(b"\xff\xfe"),
        linked,
        piped,
    ]


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_manifest_lets_nothing_go(damage: Callable[[Path], object], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    merged(folder)
    fill(folder, {"thesis.tex": "precious"})
    damage(folder / manifest.FILE)
    refuses(folder, "thesis.tex")
    (folder / "thesis.tex").unlink()
    refuses(folder, manifest.FILE)


def test_a_manifest_that_lists_hidden_files_does_not_let_them_go(tmp_path: Path) -> None:
    merged(tmp_path)
    fill(tmp_path, {".git/HEAD": "ref", "sub/.git/HEAD": "ref"})
    manifest.write(tmp_path, "somebody")
    refuses(tmp_path, ".git/HEAD, sub/.git/HEAD")


def test_what_it_says(tmp_path: Path) -> None:
    """Names and sizes, in equal bytes for equal content, and nothing of the machine."""
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        merged(folder)
    text = (tmp_path / "one" / manifest.FILE).read_text()
    assert text == (tmp_path / "two" / manifest.FILE).read_text()
    value = json.loads(text)
    paths = [path for path in (tmp_path / "one").rglob("*") if path.is_file() and path.name != manifest.FILE]
    assert value.pop("files") == {str(p.relative_to(tmp_path / "one")): p.stat().st_size for p in paths}
    assert value == {"tool": "frodctl 1", "version": 1}
    assert str(tmp_path) not in text


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8), min_size=1,
                 max_size=3).filter(lambda parts: not {".", ".."} & set(parts)).map("/".join),
        min_size=1, max_size=4,
    ),
    kind=st.sampled_from(KINDS),
)  # fmt: skip
def test_no_file_of_any_name_is_lost(
    names: list[str], kind: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("out")
    kind(folder)
    own = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    added = set()
    for name in names:
        path = folder / name
        if str(path.relative_to(folder)) in own or any(parent.is_file() for parent in path.parents) or path.is_dir():
            continue
        fill(folder, {name: "precious"})
        added.add(name)
    assert set(manifest.foreign(folder)) == added


def test_a_file_of_the_same_size_that_was_written_to_is_changed(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    manifest.write(tmp_path, "frodctl 0")
    assert list(manifest.foreign(tmp_path)) == []
    later = (tmp_path / manifest.FILE).stat().st_mtime + 60
    os.utime(tmp_path / "model.safetensors", (later, later))
    assert list(manifest.foreign(tmp_path)) == ["model.safetensors (changed)"]
    (tmp_path / ".git").mkdir()
    assert ".git/" in set(manifest.foreign(tmp_path))
