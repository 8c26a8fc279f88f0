"""What frodctl wrote into a folder, so that it may take that away again and nothing else.

A merged checkpoint holds ``frodctl.json``, which goes where the model goes and says nothing of the machine::

    {"files": {"config.json": 710, "model.safetensors": 269060552}, "tool": "frodctl 0.1.0", "version": 1}

``files`` has the size in bytes of every file but this one, by its path below the folder; ``digests``, of the weights'
files, ``sha256:…`` of each tensor's bytes by its name, or of each slice's where it was written slice by slice.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from frodctl.checkpoint import files
from frodctl.checkpoint.inputs import read_json
from frodctl.checkpoint.records import WEIGHT_FILES, TensorInfo
from frodctl.checkpoint.source import MANIFEST
from frodctl.errors import InvalidInput

FILE = MANIFEST
#: Marks the model card of a merge; those of versions without a manifest are known by it.
MERGED_BY = "Merged by frodctl"
_VERSION = 1
_MOMENT = 2.0  # seconds by which clocks of file systems may be coarse

_CONFIGS = r"""
    ((generation | (image_|video_)?(pre)?processor | feature_extractor | tokenizer | sentence_bert)_)?config\.json
    | tokenizer\.(json|model) | (special_tokens_map | added_tokens | chat_template | vocab)\.json | vocab\.txt
    | merges\.txt | chat_template\.jinja | spiece\.model | (source|target)\.spm | sentencepiece\.bpe\.model
    """
_WEIGHTS = r"((diffusion_)?pytorch_model | model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
_VARIANTS = r"""(?!.*\.frod\.) ((diffusion_)?pytorch_model | model | consolidated)(\.\w+)?(-\d+-of-\d+)?(\.\w+)?
    \.(safetensors|bin)(\.index(\.\w+)?\.json)?"""
#: Files of a checkpoint or an adapter, which a program may take for theirs by the name alone.
PART_OF_A_MODEL = re.compile(
    rf"(?xi) {_WEIGHTS} | {_VARIANTS} | {_CONFIGS} | adapter_config\.json | adapter_model\.(safetensors|bin)"
)
#: Those that hold weights.
WEIGHTS = re.compile(rf"(?xi) {_WEIGHTS} | adapter_model\.(safetensors|bin)")
#: What save_pretrained makes, of transformers' models and of sentence-transformers' modules.
_CHECKPOINT_FILE = re.compile(
    rf"(?x) {_WEIGHTS} | {_CONFIGS} | modules\.json | config_sentence_transformers\.json "
    r"| \d+_\w+/(config\.json | model\.safetensors | pytorch_model\.bin)"
)


def write(folder: Path, tool: str, digests: Mapping[str, Mapping[str, str]] | None = None) -> None:
    """Write ``frodctl.json`` over everything that is in the folder now, with the tensors' digests by file and name."""
    sizes = {path: size for path, size in _files(folder) if path != FILE}
    value: dict[str, Any] = {"version": _VERSION, "tool": tool, "files": sizes}
    if digests is not None:
        value["digests"] = digests
    files.write_text(folder / FILE, json.dumps(value, indent=2, sort_keys=True) + "\n")


def foreign(folder: Path) -> Iterator[str]:
    """The paths below a folder that would be lost with it: nothing where frodctl wrote all of it.

    With a manifest, what it does not list, lists with another size, or was written to after it. Without one, what
    ``save_pretrained`` does not make; everything where that made no checkpoint here. Hidden files, links and whatever
    is no ordinary file always.
    """
    sizes = _recorded(folder)
    written = (folder / FILE).stat().st_mtime if sizes is not None else 0.0
    names = {entry.name for entry in folder.iterdir()}
    merged = "README.md" in names and MERGED_BY in _text(folder / "README.md")
    checkpoint = merged or ("config.json" in names and not names.isdisjoint(WEIGHT_FILES))

    def known(path: str) -> bool:
        return bool(checkpoint and _CHECKPOINT_FILE.fullmatch(path)) or (merged and path == "README.md")

    for path, size in _files(folder):
        if size is None or any(part.startswith(".") for part in path.split("/")):
            yield path
        elif sizes is None:
            if not known(path):
                yield path
        elif path != FILE and path not in sizes:
            yield path
        elif path != FILE and (sizes[path] != size or (folder / path).stat().st_mtime > written + _MOMENT):
            yield f"{path} (changed)"


def _files(folder: Path, above: str = "") -> Iterator[tuple[str, int | None]]:
    """Every path below the folder that is no folder; with the size of ordinary files, None for links and the like.

    A hidden folder with nothing in it is one of those.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = above + entry.name
        if entry.is_dir(follow_symlinks=False):
            inner = list(_files(Path(entry.path), f"{path}/"))
            yield from inner or ([(f"{path}/", None)] if entry.name.startswith(".") else [])
        else:
            yield path, entry.stat().st_size if entry.is_file(follow_symlinks=False) else None


def digests(folder: Path) -> dict[str, dict[str, str]]:
    """The tensors' digests by file and name; nothing where the folder records none."""
    try:
        recorded = _read(folder)["digests"]
        found = {file: dict(tensors) for file, tensors in recorded.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
    return found if all(isinstance(text, str) for tensors in found.values() for text in tensors.values()) else {}


def with_digests(infos: Sequence[TensorInfo], recorded: Mapping[str, str], where: str) -> list[TensorInfo]:
    """A file's tensors with what is recorded of them; `InvalidInput` where other tensors are."""
    if not recorded:
        return list(infos)
    names = {info.name for info in infos}
    known = {name if name in names else re.sub(r"\[\d+\]$", "", name) for name in recorded}
    if others := sorted(known ^ names):
        raise InvalidInput(
            f"{where}: tensor {others[0]} is there, or in {FILE}, but not in both: damaged; remove that file "
            "if another program wrote the weights anew"
        )
    return [replace(info, recorded=recorded) for info in infos]


def _recorded(folder: Path) -> dict[str, int] | None:
    """Sizes by path as the manifest has them; None where there is none that can be read."""
    try:
        found = _read(folder)["files"]
        return dict(found) if all(type(size) is int for size in found.values()) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _read(folder: Path) -> dict[str, Any]:
    """What the manifest holds; nothing where there is none that can be read."""
    try:
        return read_json(folder / FILE) if (folder / FILE).is_file() else {}
    except (OSError, InvalidInput):
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
