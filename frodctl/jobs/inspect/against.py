"""Two checkpoints, tensor by tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from frodctl.checkpoint import names, stream
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.opening import open_checkpoint
from frodctl.checkpoint.records import Checkpoint, TensorInfo
from frodctl.checkpoint.ties import same_bytes
from frodctl.jobs.inspect import columns, headers
from frodctl.jobs.inspect.matrices import Spectra
from frodctl.jobs.inspect.options import InspectOptions
from frodctl.jobs.inspect.report import Report, Row
from frodctl.jobs.profile import Unprofiled
from frodctl.jobs.progress import Callback, Progress
from frodctl.jobs.resources import choose_device

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

_PIECE = 1 << 18  # elements


def comparison(
    name: str, checkpoint: Checkpoint, options: InspectOptions, progress: Callback, profile: Unprofiled
) -> Report:
    """Rows of what is equal, what differs and by how much, and what is on one side only."""
    assert options.against is not None
    location = options.location_of_other(options.against)
    other = open_checkpoint(location, progress=lambda text: progress(Progress(text)))
    matched = names.match(checkpoint.tensors, other.tensors)
    pairs: list[tuple[TensorInfo | None, TensorInfo | None]] = [
        (info, other.tensors.get(matched[tensor] or "")) for tensor, info in checkpoint.tensors.items()
    ]
    taken = set(matched.values())
    pairs += [(None, info) for tensor, info in other.tensors.items() if tensor not in taken]
    there = [_either(pair).name for pair in pairs]
    pairs = [pair for pair in pairs if options.selects(_either(pair).name)]
    pairs.sort(key=lambda pair: names.natural_key(_either(pair).name))
    counts = Counter[str]()

    def rows() -> Iterator[Row]:
        spectra = Spectra(choose_device(options.device), profile) if options.spectrum else None
        for mine, theirs in pairs:
            row = _compare(checkpoint, mine, other, theirs, spectra)
            counts[row.values["status"]] += 1
            yield row

    def summary() -> dict[str, Json]:
        different = sum(count for status, count in counts.items() if status != "equal")
        return {"against": other.model, "equal": counts["equal"], "different": different, "statuses": dict(counts)}

    return Report(name, "comparison", columns.of_comparison(options), rows(), summary, len(pairs), there)


def _either(pair: tuple[TensorInfo | None, TensorInfo | None]) -> TensorInfo:
    info = pair[0] or pair[1]
    assert info is not None
    return info


def _compare(
    first: Checkpoint,
    mine: TensorInfo | None,
    second: Checkpoint,
    theirs: TensorInfo | None,
    spectra: Spectra | None,
) -> Row:
    info = _either((mine, theirs))
    values = headers.tensor_values(info) | {"other_name": None, "other_dtype": None}
    empty = {"relative_difference": None, "cosine": None, "max_difference": None}
    if mine is None or theirs is None:
        return Row(values | {"status": "only here" if theirs is None else "only there"} | empty)
    values |= {"other_name": theirs.name, "other_dtype": theirs.stored_dtype}
    if mine.shape != theirs.shape:
        return Row(values | {"status": "other shape"} | empty)
    A_source, B_source = first.source, second.source
    assert A_source is not None
    assert B_source is not None
    if same_bytes(A_source, mine, B_source, theirs):
        return Row(values | {"status": "equal", "relative_difference": 0.0, "cosine": 1.0, "max_difference": 0.0})
    status = "differs" if values["dtype"] == values["other_dtype"] else "other dtype"
    if mine.dtype not in FLOAT_DTYPES or theirs.dtype not in FLOAT_DTYPES:
        return Row(values | {"status": status} | empty)
    A, B = stream.read_tensor(A_source, mine), stream.read_tensor(B_source, theirs)
    row = values | {"status": status} | _differences(A, B)
    if spectra is None or A.ndim != 2:
        return Row(row)
    figures = spectra.of(B.astype(np.float64) - A.astype(np.float64), f"difference of {info.name}")
    more = {f"difference_{key}": value for key, value in figures.values.items() if key != "profile"}
    return Row(row | more | {"profile": figures.values["profile"]}, figures.singular_values)


def _differences(A: HostArray, B: HostArray) -> dict[str, float | None]:
    """‖B − A‖/‖A‖, the cosine of the angle between them, and the largest |B − A|, in float64 and in pieces."""
    products, largest = np.zeros(4), 0.0
    first, second = A.reshape(-1), B.reshape(-1)
    for begin in range(0, first.size, _PIECE):
        a, b = (flat[begin : begin + _PIECE].astype(np.float64) for flat in (first, second))
        with np.errstate(all="ignore"):  # of NaN, Inf and what leaves float64, which the figures show
            difference = b - a
            pairs = (a, a), (b, b), (a, b), (difference, difference)
            products += [np.einsum("i,i->", x, y) for x, y in pairs]
            largest = float(np.maximum(largest, np.abs(difference).max()))
    aa, bb, ab, dd = map(float, products)
    return {
        "relative_difference": math.sqrt(dd / aa) if aa else None,
        "cosine": ab / math.sqrt(aa) / math.sqrt(bb) if aa and bb else None,
        "max_difference": largest,
    }
