"""The safetensors codec, against the safetensors library."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import load_file, save, save_file

from frodctl.checkpoint import codec
from frodctl.checkpoint.codec import TensorSpec
from frodctl.checkpoint.stream import DTYPE_NAMES, tensor_bytes
from frodctl.errors import InvalidInput

NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3)
DTYPES = st.sampled_from(list(DTYPE_NAMES))
TENSORS = st.dictionaries(
    NAMES, st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), SHAPES, DTYPES), max_size=5
)
METADATA = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.text(max_size=8), max_size=4)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codec") / "x.safetensors"


def file_of(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def write(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    specs = codec.layout([TensorSpec(name, DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()])
    file = io.BytesIO()
    codec.write_file(file, specs, metadata, (tensor_bytes(tensors[spec.name]) for spec in specs))
    assert len(file.getvalue()) == codec.file_bytes(specs, metadata)
    return file.getvalue()


@settings(max_examples=60, deadline=None)
@given(TENSORS, METADATA)
def test_the_library_reads_what_we_write(scratch: Path, tensors: dict[str, torch.Tensor], metadata: Any) -> None:
    scratch.write_bytes(write(tensors, metadata))
    loaded = load_file(scratch)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert tensor_bytes(loaded[name].contiguous()) == tensor_bytes(tensor)
    assert codec.read_header(scratch).metadata == metadata


@settings(max_examples=60, deadline=None)
@given(TENSORS, METADATA)
def test_we_read_what_the_library_writes(scratch: Path, tensors: dict[str, torch.Tensor], metadata: Any) -> None:
    save_file(tensors, scratch, metadata or None)  # {} and no tensors: the library writes what it cannot read
    header, raw = codec.read_header(scratch), scratch.read_bytes()
    assert header.tensors.keys() == tensors.keys()
    for name, (spec, offset) in header.tensors.items():
        assert (spec.dtype, spec.shape) == (DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape))
        assert raw[offset : offset + spec.nbytes] == bytes(tensor_bytes(tensors[name]))
    assert header.metadata == metadata


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_corruption_never_crashes_and_nothing_invalid_is_accepted(scratch: Path, data: st.DataObject) -> None:
    raw = bytearray(save({"a": torch.ones(2, 3), "b.c": torch.ones(3).half(), "e": torch.ones(0)}, {"k": "v"}))
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header_end - 1))
        raw[at] = data.draw(st.sampled_from(b'0123456789-.eE"[]{},:FBUI ') | st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    scratch.write_bytes(raw)
    try:
        codec.read_header(scratch)
    except InvalidInput:
        return
    deserialize(bytes(raw))  # what we accept, the library accepts


KEYS = st.sampled_from(["a", "b", "\ud800", "é", "\0", "a" * 1001, "__metadata__", "", "\U0001f600"])
NUMBERS = st.integers(0, 4) | st.sampled_from([-1, 8, 2**31, 2**62, 2**63, 2**64, True, False, None, 1.0, "1", [], {}])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "F16", "F128", 1, None, [], {}]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS | st.integers(60, 70).map(lambda count: [1] * count),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | st.sampled_from([[0, 0], [0, 8], [8, 8], 3, [1]]),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from("ab"), ENTRIES | NUMBERS, max_size=2), st.integers(0, 24))
def test_no_header_crashes_and_nothing_invalid_is_accepted(scratch: Path, header: Any, size: int) -> None:
    scratch.write_bytes(file_of(header, bytes(size)))
    try:
        codec.read_header(scratch)
    except InvalidInput:
        return
    deserialize(scratch.read_bytes())


NESTED = st.recursive(
    NUMBERS | KEYS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=8
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(KEYS, ENTRIES | NESTED | st.just(entry())), max_size=4),
    st.sampled_from([0, 8, 16]),
    st.booleans(),
)
def test_no_name_nesting_or_metadata_crashes(scratch: Path, items: Any, size: int, escaped: bool) -> None:
    """Keys as they come, twice too; what is accepted can be shown and written, and the library accepts it."""
    fields = (json.dumps(key, ensure_ascii=escaped) + ":" + json.dumps(value) for key, value in items)
    scratch.write_bytes(file_of(f"{{{','.join(fields)}}}".encode(errors="surrogatepass"), bytes(size)))
    try:
        header = codec.read_header(scratch)
    except InvalidInput as error:
        str(error).encode()
        return
    deserialize(scratch.read_bytes())
    codec.header_bytes([spec for spec, _ in header.tensors.values()], header.metadata)


ONE = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
INVALID = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header longer than the file": struct.pack("<Q", 3) + b"{}",
    "header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "garbage": file_of(b"\x80\x04garbage"),
    "not an object": file_of(b"[]"),
    "NUL padding": file_of(b"{}\0\0"),
    "deeply nested": file_of(b"[" * 100_000),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "UTF-16": file_of(f"{{{ONE}}}".encode("utf-16-le"), bytes(8)),
    "byte order mark": file_of(b"\xef\xbb\xbf{}"),
    "lone surrogate": file_of(f"{{{ONE}}}".replace('"a"', r'"\ud800"').encode(), bytes(8)),
    "half a pair in the metadata": file_of(rf'{{"__metadata__":{{"a":"\udc80"}},{ONE}}}'.encode(), bytes(8)),
    "name of a million characters": file_of({"a" * 1_000_000: entry()}, bytes(8)),
    "shape of 65 dimensions": file_of({"a": entry(shape=[1] * 64 + [2])}, bytes(8)),
    "shape of a million": file_of({"a": entry(shape=[1] * 1_000_000)}, bytes(4)),
    "duplicate among many": file_of(b"{" + b",".join(b'"%d":{}' % (i % 49_999) for i in range(50_000)) + b"}"),
    "number of 5000 digits": file_of({"a": entry(shape=[0])}, b"").replace(b"[0]", b"[" + b"9" * 5000 + b"]"),
    "duplicate tensor": file_of(f"{{{ONE},{ONE}}}".encode(), bytes(8)),
    "duplicate field": file_of({"a": entry()}, bytes(8)).replace(b'"shape"', b'"dtype"'),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "unknown dtype": file_of({"a": entry(dtype="F128")}, bytes(8)),
    "dtype is a list": file_of({"a": entry(dtype=["F32"])}, bytes(8)),
    "negative shape": file_of({"a": entry(shape=[-1, -2])}, bytes(8)),
    "boolean shape": file_of({"a": entry(shape=[True, 2])}, bytes(8)),
    "fractional shape": file_of({"a": entry(shape=[2.0])}, bytes(8)),
    "shape beyond 64 bits": file_of({"a": entry(shape=[2**62, 4, 0], data_offsets=[0, 0])}),
    "offsets beyond 64 bits": file_of({"a": entry(data_offsets=[2**64, 2**64 + 8])}, bytes(8)),
    "offsets reversed": file_of({"a": entry(data_offsets=[8, 0])}, bytes(8)),
    "wrong size": file_of({"a": entry(shape=[3])}, bytes(8)),
    "half a byte": file_of({"a": entry(dtype="F4", shape=[3], data_offsets=[0, 1])}, bytes(1)),
    "overlap": file_of({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)),
    "aliases": file_of({"a": entry(), "b": entry()}, bytes(8)),
    "gap": file_of({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)),
    "gap at the start": file_of({"a": entry(data_offsets=[4, 12])}, bytes(12)),
    "empty tensor inside another": file_of({"a": entry(), "z": entry(shape=[0], data_offsets=[4, 4])}, bytes(8)),
    "truncated data": file_of({"a": entry()}, bytes(7)),
    "bytes after the data": file_of({"a": entry()}, bytes(9)),
}


@pytest.mark.parametrize("raw", INVALID.values(), ids=INVALID)
def test_invalid_files_are_refused_by_name(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InvalidInput, match=r"bad\.safetensors") as caught:
        codec.read_header(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600


#: The library takes these: of two equal names the last one, and names and shapes of any length.
STRICTER = ("duplicate tensor", "name of a million characters", "shape of 65 dimensions", "shape of a million")


def test_the_invalid_files_are_invalid_to_the_library_too() -> None:
    for name, raw in INVALID.items():
        if name not in STRICTER:
            with pytest.raises((SafetensorError, UnicodeDecodeError)):
                deserialize(raw)


def test_null_metadata_is_none_as_for_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_of({"__metadata__": None, "a": entry()}, bytes(8)))
    deserialize(path.read_bytes())
    assert codec.read_header(path).metadata == {}


def test_bytes_do_not_depend_on_the_order_of_the_input() -> None:
    tensors = {name: torch.ones(3) for name in ("z", "a", "m")} | {"d": torch.ones(2, dtype=torch.float64)}
    metadata = {"b": "1", "a": "2"}
    raw = write(tensors, metadata)
    assert raw == write(dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == ["a", "b"]
    assert length % 8 == 0


def test_every_tensor_is_aligned_to_its_elements() -> None:
    raw = write({"a": torch.ones(3).half(), "b": torch.ones(1, dtype=torch.float64), "c": torch.ones(5)}, {})
    length = int.from_bytes(raw[:8], "little")
    for item in json.loads(raw[8 : 8 + length]).values():
        if item:
            assert (8 + length + item["data_offsets"][0]) % (codec.DTYPE_BITS[item["dtype"]] // 8) == 0


@pytest.mark.parametrize("chunks", [[b"1234"], [b"12345678", b"9"]], ids=["too few", "too many"])
def test_writing_other_than_the_promised_bytes_is_a_bug(chunks: list[bytes]) -> None:
    with pytest.raises(AssertionError):
        codec.write_file(io.BytesIO(), [TensorSpec("a", "F32", (2,))], {}, iter(chunks))
