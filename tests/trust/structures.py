"""Files drawn from their grammar by hypothesis: valid in ways that no program writes them, or nearly so.

Where `tests.trust.fuzz` changes the files that frodctl writes, these are made from nothing, or with every digest right,
so that what comes after the first checks is reached.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch._utils import _rebuild_tensor_v2

from frodctl.checkpoint.codec import DTYPE_BITS
from frodctl.formats.basis_file import digest_of

Draw = Callable[[st.SearchStrategy[Any]], Any]

SIZES = st.sampled_from([*range(9), *(16, -1, 2**31, 2**63, 2**64, 10**400)])
TEXTS = st.text(max_size=6) | st.sampled_from(["x" * 1001, "\ud800", "\x1b[2J", "../x", "/etc/passwd", "a\nb", "\0"])
SCALARS = st.none() | st.booleans() | SIZES | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
_ROLES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "mlp.experts.gate_up_proj")
_PARTS = ("weight", "weight", "weight", "weight_scale_inv", "weight_scale", "input_scale", "qweight", "bias")
MODULES = st.builds("model.layers.{}.{}".format, st.integers(0, 3), st.sampled_from(_ROLES))
NAMES = (
    st.builds("{}.{}".format, MODULES, st.sampled_from(_PARTS))
    | st.sampled_from(["lm_head.weight", "model.embed_tokens.weight", "V.mlp_up_proj", "__metadata__", ""])
    | st.builds("base_model.model.{}.frod_lambda_l".format, MODULES)
    | TEXTS
)
SHAPES = st.lists(st.integers(0, 4), max_size=3) | st.sampled_from([[8, 8], [8, 8], [12, 8], [4, 4], [2, 4, 4]])
_FLAWS = ("overlap", "gap", "reversed", "shape", "dtype", "offsets", "without", "more", "another", "twice")


def seldom(draw: Draw, often: Any, strategy: st.SearchStrategy[Any]) -> Any:
    """Mostly what is given."""
    return draw(strategy) if draw(st.integers(0, 7)) == 7 else often


@st.composite
def headers(draw: Draw) -> tuple[bytes, int]:
    """The JSON of a safetensors header, and how many bytes its tensors have."""
    pairs: list[tuple[str, Any]] = []
    position = 0
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        dtype, shape = draw(st.sampled_from(["F32", "F32", "BF16", *DTYPE_BITS])), draw(SHAPES)
        end = position + prod(shape) * DTYPE_BITS[dtype] // 8
        pairs.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}))
        position = end
    for place in draw(st.lists(st.integers(0, len(pairs) - 1), max_size=2)) if pairs else ():
        _spoil(draw, pairs, place)
    pairs = draw(st.permutations(pairs))
    if draw(st.booleans()):
        pairs.append(("__metadata__", draw(st.dictionaries(TEXTS, TEXTS, max_size=2) | JSON)))
    escaped, space = draw(st.booleans()), draw(st.sampled_from(["", "", " ", "\n\t"]))
    fields = (f"{json.dumps(name, ensure_ascii=escaped)}{space}:{space}{json.dumps(value)}" for name, value in pairs)
    return f"{{{f'{space},'.join(fields)}}}".encode(errors="surrogatepass"), position


def _spoil(draw: Draw, pairs: list[tuple[str, Any]], place: int) -> None:
    """One thing wrong with one tensor, if nothing is yet."""
    name, entry = pairs[place]
    try:
        begin, end = entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        return
    entry, flaw = copy.deepcopy(entry), draw(st.sampled_from(_FLAWS))
    if flaw in ("overlap", "gap") and isinstance(begin, int) and isinstance(end, int):
        shift = draw(st.sampled_from([1, 4, 8])) * (1 if flaw == "gap" else -1)
        entry["data_offsets"] = [begin + shift, end + shift]
    elif flaw == "reversed":
        entry["data_offsets"] = [end, begin]
    elif flaw in ("shape", "offsets"):
        entry["shape" if flaw == "shape" else "data_offsets"] = draw(st.lists(SIZES, max_size=3) | JSON)
    elif flaw == "dtype":
        entry["dtype"] = draw(st.sampled_from([*DTYPE_BITS, "F128", "f32"]) | JSON)
    elif flaw == "without":
        del entry[draw(st.sampled_from(sorted(entry)))]
    elif flaw == "more":
        entry[draw(TEXTS)] = draw(JSON)
    pairs[place] = name, draw(JSON) if flaw == "another" else entry
    if flaw == "twice":
        pairs.append(pairs[draw(st.integers(0, len(pairs) - 1))])


@st.composite
def safetensors(draw: Draw, valid: bytes = b"") -> bytes:
    """A file with such a header: the length, the padding, as many bytes as it says or some more or fewer."""
    raw, nbytes = draw(headers())
    raw += b" " * seldom(draw, -len(raw) % 8, st.integers(0, 9))
    length = seldom(draw, len(raw), st.sampled_from([0, len(raw) - 1, len(raw) + 1, 10**8 + 1, 2**63, 2**64 - 1]))
    nbytes = seldom(draw, nbytes, st.sampled_from([0, max(0, nbytes - 1), nbytes + 1]))
    numbers = st.sampled_from([b"\0", b"\x3f", b"\xff", b"\0\0\x80\x7f", b"\x12\x34\x56\x3e"])
    pattern = draw(numbers | st.binary(min_size=1))
    return (length % 2**64).to_bytes(8, "little") + raw + (pattern * (nbytes // len(pattern) + 1))[:nbytes]


@st.composite
def documents(draw: Draw, valid: bytes) -> bytes:
    """A JSON object with some of its values drawn anew, near to what they were; a digest in it is right again."""
    value = changed(draw, json.loads(valid))
    for holder in (value, value.get("frodctl")):
        if isinstance(holder, dict) and "digest" in holder:
            holder["digest"] = _digest(holder)
    return json.dumps(value, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


def _digest(value: dict[str, Any]) -> str:
    """The one that a reader comes to."""
    return digest_of(json.loads(json.dumps(value)))


def changed(draw: Draw, value: Any) -> Any:
    """A JSON value with one to three of the values in it drawn anew."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        spots = list(_spots(value))
        if not spots:
            return value
        holder, key = draw(st.sampled_from(spots))
        action = draw(st.sampled_from(["near", "near", "any", "another", "away", "more"]))
        if action == "away":
            del holder[key]
        elif action == "more" and isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(JSON)
        elif action == "another":
            other, place = draw(st.sampled_from(spots))
            holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = draw(_near(holder[key]) if action == "near" else JSON)
    return value


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, or like enough to pass for it."""
    if isinstance(value, bool) or value is None:
        return st.booleans() | st.none() | st.sampled_from([0, 1])
    if isinstance(value, int):
        same = [float(value)] if abs(value) < 2**1000 else []  # longer ones are no floats
        return st.sampled_from([value - 1, value + 1, -value, *same]) | SIZES
    if isinstance(value, float):
        whole = [int(value)] if math.isfinite(value) else []
        return st.floats() | st.sampled_from([value * (1 + 2**-52), -value, *whole])
    if isinstance(value, str):
        return st.sampled_from([value.upper(), f"{value} ", value[:-1], f"{value}/{value}", value[::-1]]) | TEXTS
    if isinstance(value, list):
        return st.sampled_from([value[:-1], value * 2, value[::-1], dict.fromkeys(map(str, value))])
    return st.sampled_from([{}, list(value), {f"{key}.": item for key, item in value.items()}])


def _spots(value: Any) -> Any:
    """Every place in a JSON value, as (what holds it, its key or index)."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _spots(value[key])


@st.composite
def rewritten(draw: Draw, valid: bytes) -> bytes:
    """A safetensors file with another header over the same bytes; one drawn, or some of its values drawn anew.

    Where frodctl's object is in the metadata, its digest is right.
    """
    length = int.from_bytes(valid[:8], "little")
    header, own = json.loads(valid[8 : 8 + length]), "frodctl"
    metadata = header.get("__metadata__", {})
    if own in metadata and draw(st.booleans()):
        metadata[own] = draw(documents(metadata[own].encode())).decode(errors="replace")
    elif draw(st.integers(0, 3)):
        header = {"__metadata__": metadata} | changed(draw, header)
    else:
        header = {"__metadata__": metadata} | json.loads(draw(headers())[0])
    raw = json.dumps(header, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + valid[8 + length :]


@st.composite
def edited(draw: Draw, valid: bytes) -> bytes:
    """The same bytes with one to three of them, or of stretches of them, changed, lost, or put in."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        place, length = draw(st.integers(0, len(data))), draw(st.sampled_from([1, 1, 2, 8, 64, 4096]))
        action = draw(st.sampled_from(["put", "over", "away", "zeros", "end", "again"]))
        if action == "end":
            del data[place:]
        elif action == "again":
            data[place:place] = data[place : place + length]
        elif action == "zeros":
            data[place : place + length] = bytes(len(data[place : place + length]))
        else:
            new = b"" if action == "away" else draw(st.binary(min_size=1, max_size=8))
            data[place : place + (0 if action == "put" else length if action == "away" else len(new))] = new
    return bytes(data)


@st.composite
def lines(draw: Draw, valid: bytes) -> bytes:
    """Lines that are lost, are there twice or in another order, or say something else."""
    given = valid.splitlines()
    found = draw(st.lists(st.sampled_from(given), max_size=2 * len(given)))
    found = [draw(_lines_like(line)) if draw(st.integers(0, 3)) == 3 else line for line in found]
    found += draw(st.lists(st.sampled_from([b"", b"[" * 5000, b"{}", b"\xff", b"[[], [], []]", b"null"]), max_size=1))
    return b"\n".join(found) + draw(st.sampled_from([b"\n", b"", b'["model']))


@st.composite
def _lines_like(draw: Draw, line: bytes) -> bytes:
    """Another value of JSON, where it is one."""
    try:
        return json.dumps(changed(draw, json.loads(line))).encode()
    except ValueError:
        return draw(edited(line))


@st.composite
def indices(draw: Draw, valid: bytes) -> bytes:
    """An index over files that are there, or are not, or are none of its own."""
    value = json.loads(valid)
    files = sorted(set(value["weight_map"].values()))
    strays = [*files, "model.safetensors", "../base/model.safetensors", "config.json", "1_Pooling", "."]
    keys = st.sampled_from(sorted(value["weight_map"])) | NAMES
    named = st.dictionaries(keys, st.sampled_from(strays) | JSON, max_size=8)
    value["weight_map"] = {**(value["weight_map"] if draw(st.booleans()) else {}), **draw(named)}
    value["metadata"] = seldom(draw, value["metadata"], JSON)
    return json.dumps(value, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


_FAMILIES = ("llama", "gpt2", "bert", "mixtral", "qwen2_moe", "deepseek_v3", "t5", "gemma3", "opt", "nothing")
_QUANTIZATION = st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(["fp8", "compressed-tensors", "gptq", "awq", "bitsandbytes", "mxfp4"]) | JSON,
        "weight_block_size": st.lists(SIZES, max_size=3) | JSON,
        "modules_to_not_convert": st.lists(NAMES, max_size=2) | JSON,
        "config_groups": st.dictionaries(TEXTS, st.fixed_dictionaries({"weights": JSON}) | JSON, max_size=2) | JSON,
    },
)
_CONFIG: dict[str, st.SearchStrategy[Any]] = {
    "model_type": st.sampled_from(_FAMILIES) | JSON,
    "architectures": st.lists(st.sampled_from(["LlamaForCausalLM", "GPT2LMHeadModel"]) | JSON, max_size=2) | JSON,
    "hidden_size": SIZES | JSON,
    "num_hidden_layers": SIZES | JSON,
    "num_experts": SIZES | JSON,
    "tie_word_embeddings": st.booleans() | JSON,
    "torch_dtype": st.sampled_from(["float32", "bfloat16", "auto"]) | JSON,
    "quantization_config": _QUANTIZATION | JSON,
    "id2label": st.dictionaries(TEXTS, TEXTS, max_size=2) | JSON,
    "auto_map": st.dictionaries(TEXTS, TEXTS, max_size=2) | JSON,
    "_class_name": st.sampled_from(["UNet2DConditionModel", "FluxTransformer2DModel"]) | JSON,
}
_CONFIGS = st.fixed_dictionaries({}, optional=_CONFIG)


@st.composite
def configs(draw: Draw, valid: bytes) -> bytes:
    """A model's config.json, of one tower or of several, and what of it matters here of every kind."""
    value = {**(json.loads(valid) if draw(st.booleans()) else {}), **draw(_CONFIGS)}
    for tower in draw(st.lists(st.sampled_from(["text_config", "vision_config", "encoder"]), max_size=2, unique=True)):
        value[tower] = seldom(draw, draw(_CONFIGS), JSON)
    return json.dumps(value, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


class _Stored:
    """A storage in another member of the archive."""

    def __init__(self, *place: Any) -> None:
        self.place = ("storage", *place)


class _Called:
    """A call as it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> Any:
        return item.place if isinstance(item, _Stored) else None


_STORAGES = st.sampled_from([torch.FloatStorage, torch.HalfStorage, torch.LongStorage, torch.BoolStorage])
_NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, -1, 2**31, 2**62])


@st.composite
def archives(draw: Draw, valid: bytes = b"") -> bytes:
    """What torch.save writes: tensors over storages of any number, size, offset and strides, and calls of anything."""
    state: Any = OrderedDict()
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        storage = _Stored(draw(_STORAGES), draw(st.sampled_from("0012")), "cpu", seldom(draw, 8, _NUMBERS))
        shape, stride = seldom(draw, (2, 2), st.lists(_NUMBERS, max_size=3).map(tuple)), (2, 1)
        stride = seldom(draw, stride[: len(shape)], st.lists(_NUMBERS, max_size=3).map(tuple))
        arguments = storage, seldom(draw, 0, _NUMBERS), shape, stride, False, OrderedDict()
        others = st.sampled_from([_Called(exec, "1 / 0"), _Called(print, "called"), storage, 1])
        state[name] = seldom(draw, _Called(_rebuild_tensor_v2, *arguments), others)
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=draw(st.sampled_from([2, 2, 2, 3, 4]))).dump(seldom(draw, state, st.just([state])))
    root = draw(st.sampled_from(["archive", "archive", "x", "../x", ""]))
    members = {"data.pkl": pickled.getvalue(), "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{key}": bytes(draw(st.sampled_from([32, 32, 64, 8, 0]))) for key in "012"}
    for name in draw(st.lists(st.sampled_from(sorted(members)), max_size=1)):
        del members[name]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", seldom(draw, zipfile.ZIP_STORED, st.just(zipfile.ZIP_DEFLATED))) as file:
        for name, data in members.items():
            file.writestr(f"{root}/{name}", data)
    return archive.getvalue()


@st.composite
def ggufs(draw: Draw, valid: bytes = b"") -> bytes:
    """A file of llama.cpp's where another is expected: magic, version, counts, keys with values, tensors."""
    counts = [seldom(draw, draw(st.integers(0, 2)), st.sampled_from([2**31, 2**64 - 1])) for _ in range(2)]
    parts = [draw(st.sampled_from([b"GGUF", b"FUGG", b"GGML"])), struct.pack("<IQQ", draw(st.integers(0, 4)), *counts)]
    for _ in range(min(counts[1], 2)):
        text = draw(TEXTS).encode(errors="replace")
        parts.append(struct.pack("<Q", seldom(draw, len(text), st.just(2**63))) + text)
        parts.append(struct.pack("<I", draw(st.integers(0, 14))) + draw(st.binary(max_size=12)))
    return b"".join(parts) + draw(st.binary(max_size=40))
