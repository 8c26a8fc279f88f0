"""Files that are none, and JSON that is too much."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from frodctl.checkpoint.inputs import decode_json, kind_of, open_input, read_json
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import Location
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.formats.adapter import open_adapter
from frodctl.formats.basis_file import open_basis
from tests.conftest import LLAMA_CONFIG, llama_layers, save_checkpoint


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


#: What is no file, and how it is made.
ODD: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "broken link": lambda path: path.symlink_to("nowhere"),
}


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path that leads to no file; relative, as a socket's must be short."""
    monkeypatch.chdir(tmp_path)
    path = Path(request.param)
    ODD[request.param](path)
    return path


def test_what_is_no_file_is_not_opened(odd: Path) -> None:
    assert kind_of(odd) == odd.name
    with pytest.raises(InvalidInput, match=f"is a {odd.name}"):
        open_input(odd)


def test_no_command_opens_what_is_no_file(odd: Path) -> None:
    for opener in (open_checkpoint, open_adapter, lambda location: open_basis(location.model)):
        with pytest.raises(InvalidInput, match=f"{odd}: is a {odd.name}"):
            opener(Location(str(odd)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_nor_inside_a_folder(odd: Path, name: str) -> None:
    folder = Path("model")
    if name == "config.json":
        save_checkpoint(folder, llama_layers(1))
    folder.mkdir(exist_ok=True)
    odd.rename(folder / name)
    with pytest.raises(InvalidInput, match=f"{name}: is a {odd.name}"):
        open_checkpoint(Location(str(folder)))


def test_a_config_that_is_a_folder_or_leads_in_a_circle(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, llama_layers(1))
    (tmp_path / "config.json").mkdir()
    for model in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InvalidInput, match=r"config\.json: is a folder"):
            open_checkpoint(Location(str(model)))
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(InvalidInput, match=r"config\.json: cannot be read"):
        open_checkpoint(Location(str(tmp_path)))


def test_ordinary_files_and_links_to_them_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_input(tmp_path / name) as file:
            assert file.read() == b"content"
    assert kind_of(tmp_path) == "folder"
    for nothing in ("missing", "file/below", "nul\0"):
        assert kind_of(tmp_path / nothing) is None
    with pytest.raises(InvalidInput, match="no such file"):
        open_input(tmp_path / "missing")
    with pytest.raises(InvalidInput, match="cannot be read"):
        kind_of("a" * 5000)


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}', '["\\ud800\\ud800"]', '"\\udc80"'])
def test_half_a_surrogate_pair(text: str, tmp_path: Path) -> None:
    """It cannot be written again: refused in a header, a question mark in a config."""
    with pytest.raises(ValueError, match="surrogates"):
        decode_json(text.encode(), strict=True)
    (tmp_path / "x.json").write_text(f'{{"a": {text}}}')
    assert "?" in json.dumps(read_json(tmp_path / "x.json"), ensure_ascii=False).encode().decode()


def test_whole_pairs_and_what_only_looks_like_half_a_one() -> None:
    for text in ('"\\ud83d\\ude00"', '"😀"', '"\\\\ud800"'):
        for strict in (True, False):
            assert decode_json(text.encode(), strict=strict) == json.loads(text)


def test_a_byte_order_mark_is_no_fault_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "x.json") == {}


#: What took minutes or gigabytes, as an expression for the bytes of a JSON text.
BOMBS = {
    "duplicate among many": """b'{' + b','.join(b'"%d":{}' % (i % 199_999) for i in range(200_000)) + b'}'""",
    "shape of 30 million": """b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b'0,' * 30_000_000 + b'0]}}'""",
    "shape of a million": """b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b'0,' * 1_000_000 + b'0]}}'""",
    "large product": """b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b'9' * 18 + b']}}'""",
    "empty lists": """b'{"a":[' + b'[],' * 15_000_000 + b'0]}'""",
    "one name": """b'{"' + b'a' * 40_000_000 + b'":{}}'""",
    "deep": """b'{"a":' + b'[' * 50_000_000""",
    "many names": """b'{' + b','.join(b'"%d":0' % i for i in range(1_000_000)) + b'}'""",
}


def test_no_json_takes_more_than_its_share_of_memory(tmp_path: Path) -> None:
    """As a header, a config and an index, in a process that has 1 GB."""
    code = (
        "import resource\nfrom pathlib import Path\n"
        "from frodctl.checkpoint import codec, inputs\n"
        "from frodctl.errors import InvalidInput\n"
        "resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
        "header, config = Path('x.safetensors'), Path('config.json')\n"
        f"for name, text in {BOMBS!r}.items():\n"
        "    raw = eval(text)\n"
        "    header.write_bytes(len(raw).to_bytes(8, 'little') + raw)\n"
        "    config.write_bytes(raw + b'x')\n"
        "    del raw\n"
        "    for read, path in ((codec.read_header, header), (inputs.read_json, config)):\n"
        "        try:\n"
        "            read(path)\n"
        "        except InvalidInput as error:\n"
        "            assert len(str(error)) < 400, name\n"
        "        else:\n"
        "            raise AssertionError(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_the_command_ends_at_a_fifo(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from frodctl.cli.main import main

    folder = tmp_path / "model"
    if name == "config.json":
        save_checkpoint(folder, llama_layers(1), LLAMA_CONFIG)
        (folder / name).unlink()
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    assert main(["inspect", str(folder)]) == 3
    assert main(["inspect", str(folder / name)]) == 3
    assert capfd.readouterr().err.count("is a FIFO") == 2


def test_errors_are_of_our_own_kind() -> None:
    for model in ("nul\0", "org/nul\0", "./nul\0"):
        with pytest.raises(FrodctlError):
            open_checkpoint(Location(model))


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It goes into the basis file, the adapter, the card and the picture, as well as text can have it."""
    from frodctl.cli.main import main
    from tests.jobs.test_merge import write_adapter

    base, basis, out = tmp_path / os.fsdecode(b"m\xff"), tmp_path / "b.safetensors", tmp_path / os.fsdecode(b"out\xff")
    save_checkpoint(base, llama_layers(2), LLAMA_CONFIG)
    assert main(["decompose", str(base), "-o", str(basis)]) == 0
    adapter = write_adapter(tmp_path / "a", base, basis).rename(tmp_path / os.fsdecode(b"a\xff"))
    assert main(["merge", str(base), str(adapter), str(out), "--basis", str(basis), "--dtype", "float16"]) == 0
    assert "# out?\n\n`m?`" in (out / "README.md").read_text()
    for file in ("p.png", "p.html"):
        assert main(["inspect", str(base), "--spectrum", "--plot", str(tmp_path / file)]) == 0
    assert "unexpected" not in capfd.readouterr().err


def test_a_name_that_looks_like_mathematics(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from frodctl.cli.main import main

    weights = {f"layers.{i}.$\\frac{{$.weight": tensor for i, tensor in enumerate(llama_layers(1).values())}
    save_checkpoint(tmp_path / "$x^{$", weights)
    assert main(["inspect", str(tmp_path / "$x^{$"), "--spectrum", "--plot", str(tmp_path / "p.svg")]) == 0
    assert "frac{$" in (tmp_path / "p.svg").read_text()
