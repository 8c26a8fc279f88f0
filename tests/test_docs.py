"""The documents are true: what they show is so, their links lead somewhere, every flag is described."""

from __future__ import annotations

import doctest
import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import click
import pytest

import frodctl
from frodctl import training
from frodctl.cli import decompose, extract, inspect, merge
from frodctl.formats.adapter import Provenance
from frodctl.formats.basis_file import BasisMetadata, ModuleRecord
from tests.documents import DOCUMENTS, README, ROOT, Untrue, blocks, run, same, scratch

PAGES = [README, *DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
COMMANDS = {
    "decompose": decompose.command,
    "merge": merge.command,
    "extract": extract.command,
    "inspect": inspect.command,
}


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Untrue]]:
    """The folder in which the README's commands ran, from where the other documents go on, and what was not so."""
    folder = scratch(tmp_path_factory.mktemp("documents") / "README")
    return folder, run(README, folder)


def test_the_readme_is_true(story: tuple[Path, list[Untrue]]) -> None:
    assert not story[1], "\n".join(map(str, story[1]))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_a_document_is_true(document: Path, story: tuple[Path, list[Untrue]], tmp_path: Path) -> None:
    shutil.copytree(story[0], tmp_path / "folder")
    found = run(document, tmp_path / "folder")
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("Wrote b (866.4 kB), in 1.4 s on cpu\n", "Wrote b (866.4 kB), in 12.0 s on cpu\n"),
        ("Peak memory about 327.0 MB, about 2 G\n", "Peak memory about 1.20 GB, about 2 G\n"),
        ("name   cond\n──────────\nq      4.45\n", "name    cond\n────────────\nq       4.46\n"),
        ("█▇▆▁ 117\n", "█▆▆▂ 117\n"),
        ("held-out loss 2.7455\n", "held-out loss 2.7461\n"),
        ("τ 333–802\n", "τ 333–801\n"),
        ("error 1.66e-07\n", "error 1.2e-07\n"),
    ],
)
def test_layout_times_and_last_digits_may_differ(shown: str, found: str) -> None:
    assert same(shown, found)


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("56 weights in 7 categories\n", "56 weights in 8 categories\n"),
        ("trainable (1.64%)\n", "trainable (1.84%)\n"),
        ("rank 128\n", "rank 127\n"),
        ("24,720 of 1,509,504\n", "25,720 of 1,509,504\n"),
        ("Wrote b\n", "writing b\nWrote b\n"),
        ("Wrote b (1.0 MB)\n", "Wrote b (2.0 MB)\n"),
        ("no such file\n", "no such folder\n"),
        ("█▇▆▁\n", "█▇▆▄\n"),
        ("cond 4.45\n", "cond –\n"),
        ("KL 3.9e-01\n", "KL 3.9e-02\n"),
        ("error 1.66e-07\n", "error 1.2e-05\n"),
        ("error 1.66e-07\n", "error 0\n"),
        ("", "Warning: something\n"),
    ],
)
def test_other_outputs_are_told_apart(shown: str, found: str) -> None:
    assert not same(shown, found)


def test_what_is_not_so_is_found_and_put_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.documents.ROOT", tmp_path)
    document = tmp_path / "document.md"
    text = (
        "```console\n$ frodctl --version\nfrodctl, version 9.9\n$ echo a |\n>   tr a b\nb\n$ echo $((6 * 7))\n41\n```\n"
        "<!-- not run: it fails -->\n```console\n$ false\n```\n"
        "```python\nx = 1.5\nprint(x)  # 2.5\n```\n```python\nprint(x)  # 1.5\n```\n```python\nx.y\n```\n"
    )
    document.write_text(text)
    found = run(document, tmp_path)
    assert [untrue.what.strip() for untrue in found] == [
        "$ frodctl --version", "$ echo $((6 * 7))", "x = 1.5\nprint(x)  # 2.5", "x.y",
    ]  # fmt: skip
    assert "AttributeError" in found[-1].found
    run(document, tmp_path, write=True)
    version = f"version {frodctl.__version__}"
    assert document.read_text() == text.replace("version 9.9", version).replace("\n41\n", "\n42\n")
    assert len(run(document, tmp_path)) == 2  # Python blocks are for their writer to mend


def test_a_command_that_fails_is_not_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.documents.ROOT", tmp_path)
    document = tmp_path / "document.md"
    text = "```console\n$ frodctl inspect nowhere/at/all -q\na: a checkpoint\n$ frodctl inspect nowhere -q | cat\n```\n"
    document.write_text(text)
    found = run(document, tmp_path, write=True)
    assert ["exit code" in untrue.what for untrue in found] == [True, True]
    assert "a: a checkpoint\n" in document.read_text()


def test_what_docstrings_show_is_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what is marked ``# doctest: +SKIP``: what takes a model that is not here."""
    monkeypatch.chdir(ROOT)
    names = [module.name for module in walk_packages(frodctl.__path__, "frodctl.")]
    results = [doctest.testmod(import_module(name)) for name in names if name != "frodctl.__main__"]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), target


def headings(page: Path) -> set[str]:
    """The anchors that a page has, as GitHub and others make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_described(name: str) -> None:
    flags = [{*param.opts, *param.secondary_opts} for param in COMMANDS[name].params if isinstance(param, click.Option)]
    text = (ROOT / "docs" / f"{name}.md").read_text()
    ours = re.sub(r"^\$ .*llama.*$", "", text, flags=re.MULTILINE)  # whose flags are its own
    described = set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", ours))
    assert [names for names in flags if not names & described] == []
    known = {flag for command in COMMANDS.values() for param in command.params for flag in param.opts}
    secondary = {flag for names in flags for flag in names}
    assert {flag for flag in described if flag.startswith("--")} <= known | secondary


def test_every_public_function_is_described() -> None:
    pages = "".join(page.read_text() for page in DOCUMENTS)
    for name in {*frodctl.__all__, *training.__all__}:
        assert re.search(rf"\b{name}\b", pages), name


def test_the_readme_is_short_and_every_page_is_linked() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    for page in DOCUMENTS:
        assert f"(docs/{page.name}" in text


def test_every_block_that_is_not_run_says_why() -> None:
    for page in (README, *DOCUMENTS):
        text = page.read_text()
        fences = len(re.findall(r"^```(?:console|python)$", text, re.MULTILINE))
        assert fences - len(list(blocks(text))) == len(re.findall("^<!-- not run: ", text, re.MULTILINE))


def test_every_field_of_the_files_is_described() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    module = ModuleRecord("q", "q", 0, (1, 1), False, "sha256:")
    written = json.loads(BasisMetadata("", "", None, 1e-3, 0, {}, "auto", {}, [module]).to_json())
    keys = {*written, *written["modules"][0], *Provenance("delta", {}, {}, None, {}, {}, {}, {}).as_json()}
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []
