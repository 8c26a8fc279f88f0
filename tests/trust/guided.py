"""A fuzzer guided by coverage: ``python -m tests.trust.guided KIND``; its files are those of `tests.trust.drawn`.

What leads to lines of frodctl that no file before it led to is varied further. It needs atheris (``pip install
atheris``), of which there are wheels for some systems alone. It ends at the first file that is not as promised.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import atheris

_BEGINNINGS = 64  #: random ones, from which the fuzzer sets out
_BYTES = 8192  #: of what is drawn from


def main() -> int:
    with atheris.instrument_imports(include=["frodctl"]):
        import frodctl.cli.main  # noqa: F401  # with all that it imports
        from tests.trust import drawn

    parser = argparse.ArgumentParser(prog="python -m tests.trust.guided", description=__doc__)
    parser.add_argument("kind", help=", ".join(drawn.KINDS))
    parser.add_argument("--files", type=int, default=100_000, help="how many to try")
    parser.add_argument("--corpus", type=Path, help="folder of what was found to lead further, kept for the next run")
    options = parser.parse_args()
    with TemporaryDirectory() as folder, TemporaryDirectory() as kept:
        corpus = options.corpus or Path(kept)
        _begin(corpus)
        home = Path(folder, "drawn")
        kind = drawn.kinds(home)[options.kind]
        drawn.fuzz.in_a_process(
            home, kind.file, partial(kind.attempt, home / kind.file), partial(_fuzz, drawn, kind, home, corpus, options)
        )
    return 0


def _begin(corpus: Path) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    for number in range(_BEGINNINGS):
        file = corpus / f"{number:02d}"
        if not file.exists():
            file.write_bytes(random.Random(number).randbytes(_BYTES))


def _fuzz(drawn: Any, kind: Any, home: Path, corpus: Path, options: argparse.Namespace, attempt: Any) -> None:
    """Never returns: the fuzzer ends its process."""
    count = 0

    def counted(number: object, data: bytes) -> None:
        nonlocal count
        count += 1
        attempt((number, count), data)
        if count == options.files:
            os._exit(0)

    path = home / kind.file
    test = drawn.test_of(kind.drawn(path.read_bytes() if path.exists() else b""), counted, 0)
    flags = [f"-max_len={_BYTES}", "-len_control=0", "-rss_limit_mb=0", "-timeout=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], test.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    raise SystemExit(main())
