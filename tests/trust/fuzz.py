"""Damaged and hostile files: valid ones, changed where their structure is, and the commands that read them.

Each batch is tried in a process of its own. Nothing may be unexpected to the command: it ends by itself with one of its
exit codes, says why in plain characters, and neither opens nor changes what is not its own.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 10.0  #: that a command may take
MEMORY = 300_000_000  #: and this much more than twice the file
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")

_HOSTILE: list[Callable[[Random], Any]] = [
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([-1, 0, 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(2**63), 10**400]),
    lambda r: r.choice([0.5, -0.0, 1e308, float("nan"), float("inf")]),
    lambda r: r.choice(["", " ", "\0", "\x1b[31mred", "a\nb", "\x07", "\u202egnp", "\ud800", "é" * 3, "x" * 70_000]),
    lambda r: r.choice(["../x", "/etc/passwd", "..", ".", "a/../../b", "C:\\x", "model.safetensors", "~", "$HOME"]),
    lambda r: r.choice(["F32", "BF16", "F4", "F64", "Q4_K", "U8", "f32"]),
    lambda r: [],
    lambda r: {},
    lambda r: [1] * r.choice([1, 3, 40, 5000]),
    lambda r: {str(number): number for number in range(r.choice([1, 2, 300]))},
]


def _spots(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every place in a JSON document, as (what holds it, its key or index)."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        found.append((value, key))
        _spots(value[key], found)
    return found


def change(value: Any, random: Random) -> Any:
    """A JSON document with one to three things changed in it."""
    box = [json.loads(json.dumps(value))]
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        holder, key = random.choice(_spots(box, []))
        kind = random.randrange(6)
        if kind == 0 and isinstance(holder, dict):
            names = ["", "x", "__metadata__", "\x1b]0;x\x07", f"{key} ", f"../{key}"]
            holder[random.choice(names)] = holder.pop(key)
        elif kind == 1 and isinstance(holder, dict):
            del holder[key]
        elif kind == 2:
            others = _spots(box, [])
            other, place = random.choice(others)
            holder[key] = json.loads(json.dumps(other[place]))
        elif kind == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += random.choice([-8, -1, 1, 8, 2**20])
        else:
            holder[key] = random.choice(_HOSTILE)(random)
    return box[0]


def as_json(value: Any, random: Random) -> bytes:
    """The document in bytes, now and then not JSON, or nested or repeated beyond all measure."""
    raw = json.dumps(value, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    kind = random.randrange(40)
    if kind == 0:
        return b"[" * 100_000
    if kind == 1:
        return raw[:1] + b'"a":1,"a":2,' + raw[1:]
    if kind == 2:
        return raw + b"\xff"
    if kind == 3:
        return b"\xef\xbb\xbf" + raw
    if kind == 4:
        return b'{"a":' * 5000 + b"1" + b"}" * 5000
    return bent(raw, random) if kind == 5 else raw


def bent(data: bytes, random: Random) -> bytes:
    """Bytes flipped, cut out, repeated, or put in."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 8])):
        place = random.randrange(len(changed) + 1)
        kind = random.randrange(5)
        if kind == 0:
            del changed[place:]
        elif kind == 1:
            del changed[place : place + random.choice([1, 2, 8, 100])]
        elif kind == 2:
            changed[place:place] = random.randbytes(random.choice([1, 4, 8]))
        elif kind == 3:
            changed[place:place] = changed[place : place + random.choice([1, 8, 64])]
        elif place < len(changed):
            changed[place] = random.randrange(256)
    return bytes(changed)


def safetensors(data: bytes, random: Random, nested: str | None = None) -> bytes:
    """A safetensors file, or its JSON metadata of this name, changed."""
    kind = random.randrange(12)
    if kind == 0:
        return bent(data, random)
    if kind == 1:
        return random.choice([0, 1, 7, 2**24, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little") + data[8:]
    if kind == 2:
        return b"GGUF\3\0\0\0" + data[8:]
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if nested and random.random() < 0.7:
        inner = change(json.loads(header["__metadata__"][nested]), random)
        header["__metadata__"][nested] = as_json(inner, random).decode(errors="replace")
    else:
        header = change(header, random)
    raw = as_json(header, random)
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + (rest if random.random() < 0.9 else bent(rest, random))


class _Malicious:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/frodctl-executed",)


def pickled(data: bytes, random: Random) -> bytes:
    """An archive of torch's, changed: its members, their sizes, what is pickled."""
    if random.random() < 0.3:
        return bent(data, random)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as given, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for item in given.infolist():
            content, name = given.read(item), item.filename
            if random.random() < 0.3:
                content = pickle.dumps(_Malicious()) if random.random() < 0.2 else bent(content, random)
            if random.random() < 0.05:
                name = random.choice(["../x", "/x", "archive/data/99", name + "\x1b[0m"])
            kind = zipfile.ZIP_DEFLATED if random.random() < 0.05 else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content * random.choice([1] * 20 + [40]), kind)
    return made.getvalue()


def _json(data: bytes, random: Random) -> bytes:
    return as_json(change(json.loads(data), random), random)


def _basis(data: bytes, random: Random) -> bytes:
    return safetensors(data, random, "frodctl")


@dataclass(frozen=True)
class Target:
    """What is changed, how, and the commands that read it, in the folder with the inputs."""

    file: str
    change: Callable[[bytes, Random], bytes]
    commands: tuple[str, ...]
    batches: int  #: in the long form


_MERGE = "merge base adapter out --basis basis.safetensors --dry-run"
_DECOMPOSE = "decompose base --dry-run -o x.safetensors"
TARGETS = {
    "a checkpoint": Target("base/model.safetensors", safetensors, ("inspect base",), 34),
    "its values": Target("base/model.safetensors", safetensors, ("inspect base --spectrum",), 20),
    "an index": Target("sharded/model.safetensors.index.json", _json, ("inspect sharded",), 20),
    "a manifest": Target("sharded/frodctl.json", _json, ("inspect sharded --spectrum",), 7),
    "a config": Target("base/config.json", _json, ("inspect base",), 14),
    "a plan": Target("base/config.json", _json, (_DECOMPOSE,), 1),
    "a basis": Target("basis.safetensors", _basis, ("inspect basis.safetensors", _MERGE), 20),
    "an adapter": Target("adapter/adapter_model.safetensors", safetensors, ("inspect adapter", _MERGE), 14),
    "its config": Target("adapter/adapter_config.json", _json, ("inspect adapter", _MERGE), 14),
    "a pickle": Target("old/pytorch_model.bin", pickled, ("inspect old",), 14),
}


def command(words: list[str]) -> str:
    """Run the command here; what it said. Anything that it should not do is an AssertionError."""
    from frodctl.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    begun = time.monotonic()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*words, "--format", "tsv"])
    said = out.getvalue() + err.getvalue()
    assert code in (0, 1, 2, 3, 4), code
    assert "Traceback" not in said, said
    assert "--debug shows where" not in said, said
    assert time.monotonic() - begun < SECONDS
    # stdout is exact in a pipe
    strange = {character for character in err.getvalue() if not character.isprintable() and character not in "\n\t"}
    assert not strange, (strange, said[:300])
    return said


def _peak() -> int:
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def _guard(home: Path) -> None:
    """End the process where it opens a file that is not below ``home``, of Python or the system, or starts another."""
    python = (sys.prefix, sys.base_prefix, *filter(None, sys.path))
    allowed = (str(home), "/proc", "/sys", "/dev", "/etc/localtime", "/usr", "/lib", *python)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(allowed) and os.path.exists(path) and not os.path.isdir(path):
                os.write(2, f"opened {path}\n".encode())
                os._exit(3)
        elif event.startswith(_FORBIDDEN):
            os.write(2, f"{event} {arguments}\n".encode())
            os._exit(4)

    sys.addaudithook(audit)


Attempt = Callable[[object, bytes], None]  #: of a file's bytes, and what they are called where they fail


def batch(home: Path, target: str, seeds: range) -> None:
    """Try as many changes of one target, in a process."""
    kind = TARGETS[target]
    valid = (home / kind.file).read_bytes()

    def trials(attempt: Attempt) -> None:
        for seed in seeds:
            attempt((target, seed), kind.change(valid, Random(f"{target} {seed}")))

    in_a_process(home, kind.file, partial(by_commands, home / kind.file, kind.commands), trials)


def by_commands(path: Path, commands: Sequence[str], data: bytes) -> None:
    """What each of these commands makes of a file of such bytes."""
    path.write_bytes(data)
    for words in commands:
        command(words.split())


def in_a_process(home: Path, file: str, attempt: Callable[[bytes], None], trials: Callable[[Attempt], None]) -> None:
    """Try a file's bytes as they come, in a process that ends at the first that are not as promised."""
    path = home / file
    valid = path.read_bytes() if path.exists() else None
    before = {str(p) for p in home.parent.rglob("*")}
    child = os.fork()
    if child == 0:
        code = 1
        try:
            attempt = guarded(home, attempt, valid)
            trials(attempt)
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc()[:3000].encode(errors="replace"))
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path.unlink(missing_ok=True) if valid is None else path.write_bytes(valid)
    assert status == 0, (file, status)
    assert {str(p) for p in home.parent.rglob("*")} == before


def guarded(home: Path, attempt: Callable[[bytes], None], valid: bytes | None) -> Attempt:
    """The attempt, in this process from now on: it ends where one is too long, too large, or not as promised."""
    os.chdir(home)
    os.environ["HF_HUB_OFFLINE"] = "1"
    attempt(valid or b"")  # once, so that everything is imported
    Path("/proc/self/clear_refs").write_text("5")
    most = _peak() + MEMORY
    _guard(home)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def one(label: object, data: bytes) -> None:
        signal.alarm(int(3 * SECONDS))
        try:
            attempt(data)
            assert _peak() <= most + 2 * len(data), _peak() - most
        except BaseException:
            shown = base64.b85encode(zlib.compress(data))[:5000].decode()
            os.write(2, f"{label}: {shown}\n{traceback.format_exc()[-3000:]}".encode(errors="replace"))
            os._exit(1)

    return one


def make(home: Path) -> None:
    """Valid files of every kind."""
    import torch

    import frodctl
    from tests.trust.jobs import make_inputs

    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    make_inputs(home)
    frodctl.merge(
        home / "base", home / "adapter", home / "sharded", basis=home / "basis.safetensors", max_shard_size=1000
    )
    (home / "old").mkdir()
    torch.save({"a.weight": torch.ones(4, 4), "b.weight": torch.ones(3).half()}, home / "old" / "pytorch_model.bin")
