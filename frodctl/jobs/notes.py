"""What a job found of the parts that it has finished, kept for a run that takes them up."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from frodctl.checkpoint import files
from frodctl.method.fidelity import Fidelity


class Notes:
    """How near the finished layers come to their ΔW; a context manager while some are added."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, Fidelity] = {}
        for line in files.read_bytes(file).splitlines():
            with suppress(ValueError, TypeError):  # the line that was being written as the run was killed
                module, *figures = json.loads(line)
                self.known[module] = Fidelity(*figures)

    def __enter__(self) -> Notes:
        self._open = files.open_write(self.file, "a")
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, module: str, found: Fidelity) -> None:
        self.known[module] = found
        self._open.write(json.dumps([module, *astuple(found)]).encode() + b"\n")
        self._open.flush()
