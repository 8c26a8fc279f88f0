"""The model card's front matter, read and written by huggingface_hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st

from frodctl.jobs.cards import front_matter, kept_fields

#: What YAML could take for something else, and whatever else there is.
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "no",
        "null",
        "1e3",
        "2024-02-30",
        "'",
        '"',
        "a: b",
        "# c",
        "- d",
        "---\n",
        "\n---\n",
        "é\u2028\x85\ufeff",
        "\0\x1b",
    ]
)
#: What is taken from a card: YAML, as it is written here, changes some other characters.
TEXT = ANY_TEXT.filter(lambda text: text.replace("\n", "").isprintable())
FIELDS = st.fixed_dictionaries(
    {}, optional={"license": TEXT, "license_link": TEXT, "language": TEXT | st.lists(TEXT, max_size=3)}
)


@settings(deadline=None)
@given(FIELDS, TEXT | st.none())
def test_what_is_written_reads_back_equal(fields: dict[str, Any], base: str | None) -> None:
    own = {"library_name": "transformers", "tags": ["frod"]}
    relation = {"base_model": base, "base_model_relation": "finetune"} if base else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "README.md")
        path.write_text("\n".join([*front_matter(fields, base or None), "", "# words"]), encoding="utf-8")
        assert metadata_load(path) == own | fields | relation
        assert kept_fields(path) == fields


BROKEN = {
    "no front matter": b"words",
    "nothing in it": b"---\n---\n",
    "never ended": b"---\nlicense: mit\n",
    "no mapping": b"---\n- 1\n---\n",
    "not YAML": b"---\nlicense: [\n---\n",
    "no such day": b"---\nlicense: 2024-02-30\n---\n",
    "not UTF-8": b"---\nlicense: \xff\n---\n",
    "a tag of Python's": b"---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    "a number of 5000 digits": b"---\nlicense: " + b"9" * 5000 + b"\n---\n",
    "nested": b"---\nlicense: " + b"[" * 3000 + b"\n---\n",
    "a circle": b"---\nlicense: &a [*a]\n---\n",
    "pairs": b"---\nlicense: !!pairs [a: 1]\n---\n",
    "not text": b"---\nlicense: {a: b}\nlanguage: [en, 1]\npipeline_tag: !!binary AA==\n---\n",
    "keys of any kind": b"---\n1: 2\n[a]: b\nnull: c\n---\n",
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
def test_nothing_is_kept_of_what_cannot_be_read(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(raw)
    assert kept_fields(tmp_path / "README.md") == {}


def test_no_card_no_fields(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "README.md").symlink_to("nowhere")
    for name in ("folder", "README.md", "missing"):
        assert kept_fields(tmp_path / name) == {}


@pytest.mark.parametrize("start", [b"---\n", b"\xef\xbb\xbf---\r\n", b"\n\n---\n"])
def test_a_front_matter_as_editors_write_it(start: bytes, tmp_path: Path) -> None:
    """The Hub reads these too."""
    (tmp_path / "README.md").write_bytes(start + b"license: mit\nlanguage:\n- en\n- 'no'\n---\nwords")
    assert kept_fields(tmp_path / "README.md") == {"license": "mit", "language": ["en", "no"]}


def test_front_matter_that_grows_as_it_is_read_is_left_alone(tmp_path: Path) -> None:
    """A kilobyte that would take hours: each of 40 lines has twice what the one before has."""
    lines = [f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)]
    card = tmp_path / "README.md"
    for front in (["a0: &a0 {x: 1}", *lines, "license: mit"], ["license: mit", f"x: {'y' * 10**6}"]):
        card.write_text("\n".join(["---", *front, "---", ""]))
        assert kept_fields(card) == {}
    card.write_text("---\nlicense: mit\nx: &a {y: 1}\nz: *a\n---\n")
    assert kept_fields(card) == {"license": "mit"}
