"""The long form of the promises' tests: ``python -m tests.trust``, again until it says that all is done.

It goes on where it ended, as the files in --state have it, for --seconds each time; with --write it writes the counts
into docs/promises.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported: the matrices are tiny

from tests.trust.promises import write
from tests.trust.suites import SUITES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trust", description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("build/trust"), help="folder with what was done so far")
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long to go on")
    parser.add_argument("--only", choices=SUITES, action="append", help="these suites alone")
    parser.add_argument("--write", action="store_true", help="write the counts into docs/promises.md")
    options = parser.parse_args()
    options.state.mkdir(parents=True, exist_ok=True)
    files = {name: options.state / f"{name}.json" for name in SUITES}
    end = time.monotonic() + options.seconds
    for name in options.only or SUITES:
        file = files[name]
        record = json.loads(file.read_text()) if file.is_file() else {"done": 0, "seconds": 0.0, "failed": []}
        begun = time.monotonic()
        with TemporaryDirectory() as folder:
            cases = SUITES[name].cases(Path(folder))
            record["all"] = len(cases)
            while record["done"] < len(cases) and time.monotonic() < end:
                number = record["done"]
                try:
                    cases[number]()
                except Exception as error:
                    record["failed"].append(number)
                    print(f"{name} {number}: {error!r:.300}", flush=True)
                record["done"] += 1
        record["seconds"] += time.monotonic() - begun
        file.write_text(json.dumps(record))
        print(f"{name}: {record['done']} of {record['all']}, {len(record['failed'])} failed", flush=True)
    state = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    finished = all(name in state and state[name]["done"] == state[name]["all"] for name in SUITES)
    if options.write and finished:
        write(state)
    return int(any(record["failed"] for record in state.values()) or not finished)


if __name__ == "__main__":
    raise SystemExit(main())
