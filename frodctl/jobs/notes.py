"""What a job found of the parts that it has finished, kept for a run that takes them up."""

from __future__ import annotations

import hashlib
import json
from dataclasses import astuple
from pathlib import Path

from frodctl.checkpoint import files
from frodctl.method.fidelity import Fidelity


class Notes:
    """How near the finished layers come to their ΔW; a context manager while some are added.

    Each is a line of JSON after its digest: one that was being written as the run was killed, or damaged since, is not
    taken up.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Fidelity] = {}
        for line in files.read_bytes(file).splitlines():
            digest, _, text = line.partition(b" ")
            if digest == _digest(text):
                module, *figures = json.loads(text)
                self.known[module] = Fidelity(*figures)

    def __enter__(self) -> Notes:
        self._open = files.open_write(self.file, "a")
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, module: str, found: Fidelity) -> None:
        self.known[module] = found
        text = json.dumps([module, *astuple(found)]).encode()
        self._open.write(_digest(text) + b" " + text + b"\n")
        self._open.flush()


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
