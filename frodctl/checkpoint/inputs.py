"""What strangers wrote, at the door: ordinary files only, and JSON that cannot take all of the memory."""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TypeAlias

from frodctl.checkpoint import files
from frodctl.checkpoint.bounds import MAX_JSON_BYTES, MAX_JSON_VALUES
from frodctl.errors import InvalidInput

Json: TypeAlias = Any  #: a value of JSON, whose form its reader has to know

_KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device", stat.S_IFBLK: "device",
}  # fmt: skip
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def kind_of(path: str | Path) -> str | None:
    """What a path leads to: "file", "folder", "FIFO", "socket", "device", "broken link"; None where nothing is.

    Raises
    ------
    InvalidInput
        The system does not let us look.
    """
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "special file")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the path
        return "broken link" if os.path.islink(path) else None
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror})") from None


def open_input(path: Path) -> IO[bytes]:
    """Open an ordinary file, or a link to one, for reading.

    Raises
    ------
    InvalidInput
        It is something else: opening a FIFO would wait for a writer, and a device need not end.
    """
    kind = kind_of(path)
    if kind != "file":
        raise InvalidInput(f"{path}: is a {kind}, not a file" if kind else f"{path}: no such file")
    try:
        return BufferedReader(files.open_read(path))
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file; anything else is an `InvalidInput`."""
    with open_input(path) as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    try:
        value = decode_json(raw.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{path}: expected a JSON object")
    return value


def check_amount(raw: bytes) -> None:
    """`ValueError` where JSON would take all of the memory, decoded by whatever."""
    if len(raw) > MAX_JSON_BYTES or sum(map(raw.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes or {MAX_JSON_VALUES} values")


def decode_json(raw: bytes, *, strict: bool = False) -> Json:
    """Decode UTF-8 JSON.

    Half a surrogate pair, which no file and no terminal can be given, becomes a question mark. With ``strict`` it is
    refused, and so is a key that an object has twice.

    Raises
    ------
    ValueError
        It is not JSON, or too much of it.
    RecursionError
        It is nested too deeply.
    """
    check_amount(raw)
    # decoded here: json.loads would take UTF-16 too
    value = json.loads(raw.decode(), object_pairs_hook=_unique if strict else None)
    if _ESCAPED_SURROGATE.search(raw):
        value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="strict" if strict else "replace"))
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {name!r:.80}")
    return entries
