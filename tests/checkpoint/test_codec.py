"""The safetensors codec, against the safetensors library."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save, save_file

from frodctl import arrays
from frodctl.arrays import from_torch
from frodctl.checkpoint import codec, files
from frodctl.checkpoint.codec import TensorSpec
from frodctl.checkpoint.stream import tensor_bytes
from frodctl.errors import InvalidInput

NAMES = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3)
DTYPES = st.sampled_from([getattr(torch, name) for name in arrays.NAMED])
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


def stored_name(tensor: torch.Tensor) -> str:
    return arrays.NAMES[from_torch(tensor).dtype]


def write(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    specs = codec.layout([TensorSpec(name, stored_name(t), tuple(t.shape)) for name, t in tensors.items()])
    file = io.BytesIO()
    codec.write_file(file, specs, metadata, (tensor_bytes(from_torch(tensors[spec.name])) for spec in specs))
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
        assert tensor_bytes(from_torch(loaded[name])) == tensor_bytes(from_torch(tensor))
    assert codec.read_header(scratch).metadata == metadata


@settings(max_examples=60, deadline=None)
@given(TENSORS, METADATA)
def test_we_read_what_the_library_writes(scratch: Path, tensors: dict[str, torch.Tensor], metadata: Any) -> None:
    save_file(tensors, scratch, metadata or None)  # {} and no tensors: the library writes what it cannot read
    header, raw = codec.read_header(scratch), scratch.read_bytes()
    assert header.tensors.keys() == tensors.keys()
    for name, (spec, offset) in header.tensors.items():
        assert (spec.dtype, spec.shape) == (stored_name(tensors[name]), tuple(tensors[name].shape))
        assert raw[offset : offset + spec.nbytes] == bytes(tensor_bytes(from_torch(tensors[name])))
    assert header.metadata == metadata


KEYS = st.sampled_from(["a", "b", "\ud800", "é", "\0", "a" * 1001, "__metadata__", "", "\U0001f600"])
NUMBERS = st.integers(0, 4) | st.sampled_from([-1, 8, 2**31, 2**62, 2**63, 2**64, True, False, None, 1.0, "1", [], {}])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "F16", "F128", 1, None, [], {}]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS | st.integers(60, 70).map(lambda count: [1] * count),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | st.sampled_from([[0, 0], [0, 8], [8, 8], 3, [1]]),
    }
)


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
    "metadata that are false": file_of({"__metadata__": False}),
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


#: The library takes these; see `BEYOND`.
STRICTER = ("duplicate tensor", "name of a million characters", "shape of 65 dimensions", "shape of a million")


def test_the_invalid_files_are_invalid_to_the_library_too() -> None:
    for name, raw in INVALID.items():
        if name not in STRICTER:
            with pytest.raises((SafetensorError, UnicodeDecodeError)):
                deserialize(raw)


#: What is refused beyond the library, by the words of its refusal.
BEYOND = {
    "duplicate name": "duplicate key",  # it takes the last, and other tools the first
    "duplicate in the metadata": "duplicate key",
    "long name": "name has [0-9]+ characters, 1000 allowed",  # it could not be shown
    "many dimensions": "no tensor can have the shape",  # 32 are the limit of numpy before 2.0
    "large shape": "no tensor can have the shape",  # they count in 64 bits with a sign
    "much JSON": "more than 100000000 bytes or 2000000 values",  # decoding it takes gigabytes
}
BEYOND_FILES = {
    "duplicate name": file_of(f"{{{ONE},{ONE}}}".encode(), bytes(8)),
    "duplicate in the metadata": file_of(f'{{"__metadata__":{{"x":"1","x":"2"}},{ONE}}}'.encode(), bytes(8)),
    "long name": file_of({"a" * 1001: entry()}, bytes(8)),
    "many dimensions": file_of({"a": entry(shape=[1] * 32 + [2])}, bytes(8)),
    "large shape": file_of({"a": entry(shape=[0, 2**61], data_offsets=[0, 0])}),
    "much JSON": file_of({"a": entry(shape=[1] * 2_000_001 + [2])}, bytes(8)),
}


@pytest.mark.parametrize("reason", BEYOND)
def test_what_is_refused_beyond_the_library(reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(BEYOND_FILES[reason])
    deserialize(BEYOND_FILES[reason])
    with pytest.raises(InvalidInput, match=BEYOND[reason]):
        codec.read_header(tmp_path / "x.safetensors")


def test_a_dtype_that_only_a_later_library_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.safetensors").write_bytes(file_of({"a": entry()}, bytes(8)))
    monkeypatch.delitem(codec.DTYPE_BITS, "F32")
    with pytest.raises(InvalidInput, match="unknown dtype 'F32'"):
        codec.read_header(tmp_path / "x.safetensors")


ELSEWHERE = {
    **{f"{field} {value!r:.20}": entry(**{field: value}) for field in entry() for value in (None, 1, -1, {}, [], [[]])},
    "nothing": {},
    "list": ["F32", [2], [0, 8]],
    "name": "a",
    "number": 1,
    "fractional shape": entry(shape=[2.0]),
    "boolean shape": entry(shape=[True, 2]),
    "shape of text": entry(shape=["2"]),
    "negative shape": entry(shape=[-1, -2]),
    "wrong size": entry(shape=[3]),
    "gap": entry(data_offsets=[8, 16]),
    "reversed": entry(data_offsets=[8, 0]),
    "half a byte": entry(dtype="F4", shape=[3], data_offsets=[0, 1]),
    "not a number": entry(data_offsets=[float("nan"), 8]),
    "beyond floating point": entry(shape=[10**400, 1.0]),
    "many dimensions": entry(shape=[1] * 64 + [2]),
    "large shape": entry(shape=[0, 2**62, 2], data_offsets=[0, 0]),
}


@pytest.mark.parametrize("tensor", ELSEWHERE.values(), ids=ELSEWHERE)
def test_an_invalid_header_that_is_elsewhere(tensor: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^org/name: ") as caught:
        codec.check_remote({"a": tensor}, "org/name")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["a" * 1001, "\ud800"])
def test_a_name_that_is_elsewhere(name: str) -> None:
    with pytest.raises(InvalidInput, match="name"):
        codec.check_remote({name: entry()}, "org/name")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from("ab"), ENTRIES, max_size=2))
def test_a_header_that_is_elsewhere_is_read_as_one_that_is_here(scratch: Path, entries: Any) -> None:
    """The file has the size that the header says."""
    try:
        tensors = codec.check_remote(entries, "org/name")
    except InvalidInput:
        tensors = None
    size = sum(spec.nbytes for spec, _ in tensors.values()) if tensors is not None else 16
    assume(size < 2**20)  # no file has 2⁶⁴ bytes
    scratch.write_bytes(file_of(entries, bytes(size)))
    start = scratch.stat().st_size - size
    if tensors is None:
        with pytest.raises(InvalidInput):
            codec.read_header(scratch)
    else:
        here = codec.read_header(scratch).tensors
        assert {name: (spec, at - start) for name, (spec, at) in here.items()} == tensors


@contextmanager
def no_mappings(number: int = errno.ENODEV) -> Iterator[None]:
    """A file system that maps no files."""

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    with patch.object(files, "open_mapped", refuse):
        yield


@pytest.mark.parametrize("raw", [*INVALID.values(), *BEYOND_FILES.values()], ids=[*INVALID, *BEYOND_FILES])
def test_invalid_files_are_refused_where_nothing_can_be_mapped(raw: bytes, scratch: Path) -> None:
    scratch.write_bytes(raw)
    with no_mappings(), pytest.raises(InvalidInput, match=re.escape(scratch.name)):
        codec.read_header(scratch)


def test_valid_files_are_read_where_nothing_can_be_mapped(scratch: Path) -> None:
    for raw in VALID:
        scratch.write_bytes(raw)
        expected = codec.read_header(scratch)
        with no_mappings():
            found = codec.read_header(scratch)
        assert found == expected
        assert list(found.tensors) == list(expected.tensors)


def test_a_file_larger_than_the_addresses_that_a_process_may_have(scratch: Path) -> None:
    """As by `ulimit -v`, in a process of its own."""
    header = codec.header_bytes([codec.TensorSpec("a", "U8", (2**36,))], {})
    with scratch.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2**36)  # of which nothing is on the disk
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
        with suppress(BaseException):
            os._exit(0 if codec.read_header(scratch).tensors["a"][1] == len(header) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_nothing_stays_mapped_or_open(scratch: Path) -> None:
    scratch.write_bytes(VALID[0])
    codec.read_header(scratch)
    assert scratch.name not in Path("/proc/self/maps").read_text()
    assert str(scratch) not in {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}


def test_a_path_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.safetensors")
    path.write_bytes(VALID[0])
    assert set(codec.read_header(path).tensors) == {"a", "b.c", "e"}
    path.write_bytes(VALID[0][:-1])
    with pytest.raises(InvalidInput, match="truncated"):
        codec.read_header(path)


@pytest.mark.parametrize("dtype", codec.DTYPE_BITS)
def test_every_dtype_is_read_without_a_framework_that_has_it(dtype: str, scratch: Path) -> None:
    size = 4 * codec.DTYPE_BITS[dtype] // 8
    scratch.write_bytes(file_of({"a": entry(dtype=dtype, shape=[2, 2], data_offsets=[0, size])}, bytes(size)))
    ((spec, at),) = codec.read_header(scratch).tensors.values()
    assert (spec.dtype, spec.shape, spec.nbytes) == (dtype, (2, 2), size)
    assert at + size == scratch.stat().st_size


VALID = [
    save({"a": torch.ones(2, 3), "b.c": torch.ones(3).half(), "e": torch.ones(0)}, {"k": "v", "é": "\n"}),
    save({"é\n": torch.arange(4).to(torch.float8_e4m3fn), "s": torch.tensor(7), "z": torch.ones(2, 1).bfloat16()}),
    file_of({"p": entry(dtype="F4", shape=[4], data_offsets=[0, 2]), "q": entry(data_offsets=[2, 10])}, bytes(10)),
    file_of({"e": entry(shape=[0], data_offsets=[8, 8]), "a": entry(), "d": entry(shape=[3, 0], data_offsets=[0, 0])})
    + bytes(range(8)),
    file_of({"__metadata__": {}, "a": entry(), "b": entry(dtype="C64", shape=[1], data_offsets=[8, 16])}, bytes(16)),
]
ODD = [
    *(-1, 0, 1, 2, 3, 4, 8, 2**31, 2**62, 2**63, 2**64, 10**30, True, False, None, 1.0, "1", "", "a", "\ud800"),
    *([], {}, [[]], [0, 0], [0, 8], [8, 0], [8, 8], [1] * 70, [0, 2**62, 2], [2**32, 2**31, 0], "F4", "F32", "F128"),
    *({"x": "y"}, {"x": 1}, entry(), ["F32", [2], [0, 8]], "a" * 1001),
]
NAMES_IN_PLACE = ["a", "b", "e", "é", "", "__metadata__", "\0", "\ud800", "\U0001f600", "k" * 1001, "dtype", "shape"]


def mutated(random: Random) -> bytes:
    """A valid file with one to three changes, to its bytes or to what its header says."""
    raw = random.choice(VALID)
    if random.random() < 0.4:
        return mutated_bytes(random, bytearray(raw))
    end = 8 + int.from_bytes(raw[:8], "little")
    pairs = [list(pair) for pair in json.loads(raw[8:end]).items()]
    for _ in range(random.randint(1, 2)):
        mutate(random, pairs)
    escaped = random.random() < 0.5
    fields = (f"{json.dumps(key, ensure_ascii=escaped)}: {written(random, value)}" for key, value in pairs)
    return file_of(f"{{{','.join(fields)}}}".encode(errors="surrogatepass"), raw[end:])


def mutated_bytes(random: Random, raw: bytearray) -> bytes:
    end = 8 + int.from_bytes(raw[:8], "little")
    kind = random.choice(["flip", "flip", "flip", "JSON", "JSON", "length", "cut", "cut the header", "append", "pad"])
    if kind == "cut":
        return bytes(raw[: random.randrange(len(raw))])
    if kind == "append":
        return bytes(raw) + bytes(random.randint(1, 9))
    if kind == "length":
        raw[random.randrange(8)] = random.randrange(256)
    elif kind == "cut the header":
        raw = bytearray(file_of(bytes(raw[8 : random.randrange(8, end)]), raw[end:]))
    elif kind == "pad":
        at = random.randrange(8, end + 1)
        raw = bytearray(
            file_of(bytes(raw[8:at] + random.choice([b" ", b"\n\t", b"\0", b","]) + raw[at:end]), raw[end:])
        )
    else:
        for _ in range(random.randint(1, 3)):
            flipped = random.randrange(256) if kind == "flip" else random.choice(b'0123456789-.eE"[]{},:FBUI \\u')
            raw[random.randrange(8, end)] = flipped
    return bytes(raw)


def mutate(random: Random, pairs: list[list[Any]]) -> None:
    """One change to a header's names and entries, some of which leave it valid."""
    at = random.randrange(len(pairs))
    name, value = pairs[at]
    kind = random.choice(
        ["field", "field", "field", "number", "number", "name", "swap", "twice", "drop", "value", "more"]
    )
    if kind == "swap":
        random.shuffle(pairs)
    elif kind == "twice":
        pairs.insert(random.randrange(len(pairs)), [name, random.choice([value, value, entry()])])
    elif kind == "drop" and len(pairs) > 1:
        del pairs[at]
    elif kind == "name":
        pairs[at][0] = random.choice(NAMES_IN_PLACE)
    elif kind == "value" or not isinstance(value, dict) or "shape" not in value:
        pairs[at][1] = random.choice([{name: "metadata"}, None, *ODD])
    elif kind == "more":  # a field that the format does not have, or one that it lacks then
        pairs[at][1] = {**value, random.choice(["more", "strides"]): random.choice(ODD)}
    elif kind == "number":
        field = random.choice(["shape", "data_offsets"])
        numbers = value[field] if isinstance(value[field], list) else []
        changed = [random.choice(ODD), *numbers[1:]]
        pairs[at][1] = {**value, field: random.choice([changed, changed[::-1], [*numbers, 1], numbers[::-1]])}
    else:
        pairs[at][1] = {**value, random.choice(list(value)): random.choice(ODD)}


def written(random: Random, value: Any) -> str:
    """JSON; sometimes an object has its first key twice, or lacks one."""
    text = json.dumps(value)
    if not isinstance(value, dict) or not value or random.random() > 0.05:
        return text
    key, first = next(iter(value.items()))
    again = f"{{{json.dumps(key)}: {json.dumps(first)}, {text[1:]}"
    return random.choice([again, json.dumps({k: v for k, v in value.items() if k != key})])


def test_ten_thousand_mutated_headers_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    """What it refuses is refused; what is refused beyond that is on the list; else all that is read is the same."""
    path = tmp_path / "x.safetensors"
    path.touch()
    found: Counter[str] = Counter()
    for seed in range(10_000):
        raw = mutated(Random(seed))
        with open(path, "r+b") as file:  # not made new: some file systems would wait for the disk
            file.write(raw)
            file.truncate()
        try:
            theirs = {name: (it["dtype"], it["shape"], it["data"]) for name, it in deserialize(raw)}
        except (SafetensorError, UnicodeDecodeError):
            with pytest.raises(InvalidInput, match=r"x\.safetensors"):
                codec.read_header(path)
            found["both refuse"] += 1
            continue
        try:
            ours = codec.read_header(path)
        except InvalidInput as error:
            reasons = [reason for reason, words in BEYOND.items() if re.search(words, str(error))]
            found.update(reasons or [f"{seed}: {error}"])
            continue
        read = {
            name: (spec.dtype, list(spec.shape), raw[at : at + spec.nbytes])
            for name, (spec, at) in ours.tensors.items()
        }
        assert read == theirs, seed
        with safe_open(path, framework="np") as opened:
            assert ours.metadata == (opened.metadata() or {}), seed
        found["both read"] += 1
    assert set(found) == {*BEYOND, "both refuse", "both read"} - {"much JSON"}
    assert min(found["both refuse"], found["both read"]) > 1000, found


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
