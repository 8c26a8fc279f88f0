"""The positions of S: an adapter's own, those of its seed, or those of its basis file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from frodctl.errors import InvalidInput
from frodctl.formats.adapter import Adapter
from frodctl.formats.basis_file import BasisFile
from frodctl.formats.fields import is_rate, is_seed

if TYPE_CHECKING:
    from frodctl.arrays import HostArray


def positions_of(adapter: Adapter, basis: BasisFile | None) -> dict[str, HostArray]:
    """The positions of S by category, (2, nnz) int64: the adapter's own, the seed's, or the basis file's.

    Raises
    ------
    InvalidInput
        There are none; one lies outside the matrix or on its diagonal, or is there twice; they are not as many as the
        values of S; or they are not those that the adapter was trained at: the seed's, where it has one, and those of
        the recorded digest.
    """
    import numpy as np

    own, widths = adapter.provenance, adapter.categories
    stored = _stored_positions(adapter)
    if own is not None and own.seed is not None:
        found = drawn(widths, own.sparsity, own.seed)
        for category, positions in stored.items():
            if not np.array_equal(positions, found[category]):
                name = adapter.indices[category].name
                raise InvalidInput(f"{adapter.name}: tensor {name} is not the pattern of the adapter's seed {own.seed}")
    elif set(widths) <= set(stored):
        found = stored
    elif own is None:
        found = drawn(widths, *_peft_pattern(adapter)) | stored
    elif basis is None:
        raise InvalidInput(f"{adapter.name}: holds neither its pattern nor a seed; give its basis file (`basis`)")
    else:
        found = {category: positions for category, positions in basis.indices().items() if category in widths} | stored
    for category, positions in found.items():
        where = f"{basis.path}" if basis is not None and category not in stored else adapter.name
        _check_positions(adapter, category, positions, where)
    return found


def _stored_positions(adapter: Adapter) -> dict[str, HostArray]:
    """The positions that an adapter holds, as they may be: in the matrix, off its diagonal, each once."""
    from frodctl.method.pattern import fault

    widths = adapter.categories
    for category, info in adapter.sizes.items():
        if adapter.tensor(info).tolist() != [widths[category]] * 2:
            raise InvalidInput(f"{adapter.name}: tensor {info.name} does not say {[widths[category]] * 2}")
    stored = {category: adapter.tensor(info) for category, info in adapter.indices.items()}
    for category, positions in stored.items():
        if wrong := fault(positions, widths[category]):
            raise InvalidInput(f"{adapter.name}: tensor {adapter.indices[category].name} {wrong}")
    return stored


def _check_positions(adapter: Adapter, category: str, positions: HostArray, where: str) -> None:
    """`InvalidInput` where positions, found in ``where``, are not those of the recorded digest, or of S's values."""
    import numpy as np

    from frodctl.checkpoint.stream import digest

    recorded = adapter.provenance.pattern.get(category) if adapter.provenance else None
    if recorded is not None and digest(np.ascontiguousarray(positions)) != recorded:
        raise InvalidInput(
            f"{where}: the positions of {category} are not those that {adapter.name} was trained at (digests differ); "
            "give the basis file that has them"
        )
    counts = {module.nnz for module in adapter.modules if module.category == category}
    if counts != {positions.shape[1]}:
        raise InvalidInput(
            f"{adapter.name}: {max(counts)} sparse values for the {positions.shape[1]} positions of {category}"
        )


def drawn(widths: Mapping[str, int], rates: Mapping[str, float], seed: int) -> dict[str, HostArray]:
    """The positions that a seed stands for, by category, as everybody draws them."""
    from frodctl.method.pattern import patterns

    return patterns(widths, rates, seed)


def _peft_pattern(adapter: Adapter) -> tuple[dict[str, float], int]:
    """Sparsity by category and seed of PEFT's adapters."""
    seed, rate = adapter.config.get("projection_prng_key"), adapter.config.get("sparse_rate")
    if not is_seed(seed) or not is_rate(rate):
        raise InvalidInput(f"{adapter.name}: its config lacks projection_prng_key or sparse_rate")
    return dict.fromkeys(adapter.categories, float(rate)), seed
