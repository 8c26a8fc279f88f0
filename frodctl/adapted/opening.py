"""An adapter with the basis that it was trained over: found and checked in one place, whoever asks.

Merging, inspecting, loading and the bridge to PEFT all take V and λ from here, and the positions of S from
`frodctl.adapted.positions`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os.path import relpath
from pathlib import Path
from typing import TYPE_CHECKING

from frodctl import values
from frodctl.adapted.positions import positions_of
from frodctl.checkpoint import codec, names
from frodctl.checkpoint.inputs import kind_of
from frodctl.checkpoint.records import ADAPTER_FILES, MODEL_DTYPES, Location
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.formats.adapter import Adapter, Provenance, TrainedModule, base_scales_key, shared_keys
from frodctl.formats.basis_file import BasisFile, BasisMetadata, ModuleRecord, open_basis
from frodctl.formats.fields import is_alpha, is_seed
from frodctl.values import PathLike

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

Records = Mapping[str, ModuleRecord]  #: of a basis, by the module's path in the live model


@dataclass(frozen=True, eq=False)
class Source:
    """One adapter, and how it is to be applied."""

    adapter: Adapter = field(repr=False)
    scale: float
    form: str  #: delta or reconstruct
    basis: BasisFile | None = field(repr=False)  #: where V is, for an adapter without
    recompute: bool  #: whether V comes from PEFT's routine
    projection_dtype: str | None = None  #: of V (the format's name) for PEFT's adapters without; None: the base's


def opened(basis: PathLike | BasisFile) -> BasisFile:
    """The basis, opened if it is not yet; errors are those of `open_basis`."""
    if not isinstance(basis, BasisFile):
        return open_basis(basis)
    values.require(kind_of(basis.path) is not None, "basis", basis.path, "no such file; it was there when opened")
    return basis


def find_basis(
    adapter: Adapter, given: PathLike | BasisFile | None = None, *, trust: bool | None = None
) -> BasisFile | None:
    """The basis file of an adapter: the one that is given, or for one that lacks V the one that lies near it.

    Near it is in its folder, in the folder above, and where the adapter recorded it. There a file is taken by the
    digests of its V (and of the positions, where those are its own), whatever it is called.

    Parameters
    ----------
    adapter : Adapter
    given : path or BasisFile, optional
    trust : bool, optional
        Take the given one although the adapter does not say that it is the one. None: the caller offers no choice.

    Returns
    -------
    BasisFile or None
        None where there is none, or none is needed.

    Raises
    ------
    InvalidInput
        The given one is not the one.
    """
    if given is None:
        return next((basis for path in _near(adapter) if (basis := _fitting(adapter, path))), None)
    basis = opened(given)
    check_basis(adapter, basis, trust=trust)
    return basis


def found_near(adapter: Adapter, basis: BasisFile) -> str:
    """The note on a basis file that was not given but found."""
    return f"{adapter.name}: takes its basis, by its digests, from {relpath(basis.path)}"


def open_source(
    adapter: Adapter,
    given: PathLike | BasisFile | None = None,
    *,
    trust: bool | None = None,
    recompute: bool | None = None,
    projection_dtype: str | None = None,
    form: str | None = None,
    scale: float = 1.0,
) -> Source:
    """Resolve where an adapter's V comes from, and how the adapter is to be applied.

    Parameters
    ----------
    adapter : Adapter
    given, trust
        As for `find_basis`; for an adapter without V.
    recompute : bool, optional
        Have PEFT's routine compute V where there is none. None: the caller offers no choice.
    projection_dtype : str, optional
        The format's name of the dtype of the base as a PEFT adapter without V was trained over it.
    form : {"delta", "reconstruct"}, optional
        By default as it was trained.
    scale : float

    Raises
    ------
    InvalidInput
        There is no V, or not the adapter's.
    """
    if recompute and adapter.lacking and adapter.provenance is not None:
        raise InvalidInput(
            f"{adapter.name}: `recompute_projection` gives another V than the one whose digest the adapter records; "
            "give the basis that it was trained with (`basis`)"
        )
    basis = find_basis(adapter, given, trust=trust) if adapter.lacking else None
    recomputes = bool(adapter.lacking) and basis is None
    if recomputes and not recompute:
        offered = recompute is not None and adapter.provenance is None
        hint = ", or `recompute_projection=True` for what PEFT computes on this machine" if offered else ""
        raise InvalidInput(f"{no_basis(adapter)}{hint}")
    trained = adapter.provenance.form if adapter.provenance else "reconstruct"
    return Source(adapter, scale, form or trained, basis, recomputes, projection_dtype or _projection_dtype(adapter))


def _projection_dtype(adapter: Adapter) -> str | None:
    """The dtype of the base in the training of a PEFT adapter without V; None where nothing tells.

    PEFT keeps λ in float32 over a 16-bit base too, unless it is told not to; what was trained as a whole keeps the
    model's dtype.
    """
    if adapter.provenance is not None or not adapter.lacking:
        return None
    scales = {module.scales.dtype for module in adapter.modules} - {"F32"}
    found = scales or {info.dtype for info in adapter.replaced.values()} & set(MODEL_DTYPES.values())
    return found.pop() if len(found) == 1 else None


def find_base(location: Location, adapter: Adapter) -> tuple[Location, list[str]]:
    """Where the base is, for ``-`` the one that the adapter names; and a warning where it is called otherwise there.

    Raises
    ------
    InvalidInput
        The adapter names none.
    """
    recorded = adapter.base_model
    if location.model == "-":
        if recorded is None:
            raise InvalidInput(f"{adapter.name}: does not name its base model; name it in place of -")
        own = adapter.config.get("revision")
        revision = location.revision or (own if isinstance(own, str) else None)
        return replace(location, model=recorded, revision=revision), []
    if recorded is not None and Path(recorded.partition("@")[0]).name != location.short_name():
        return location, [f"the adapter was trained on {recorded}, not on {location.model}"]
    return location, []


def no_basis(adapter: Adapter) -> InvalidInput:
    """The error for an adapter without V, and without a basis file."""
    own = adapter.provenance is not None
    near = ", and no file with the digests that it records is near it" if own else ""
    return InvalidInput(
        f"{adapter.name}: the adapter does not hold its basis (V of {adapter.lacking[0]}){near}; give the one that it "
        "was trained with (`basis`)"
    )


def check_basis(adapter: Adapter, basis: BasisFile, *, trust: bool | None = None) -> None:
    """`InvalidInput` where a basis file is not, by its digests, the one that an adapter was trained with.

    ``trust`` as in `find_basis`.
    """
    own = adapter.provenance
    recorded = own.V_digests if own else {}
    for category, n in adapter.categories.items():
        if own is None and adapter.lacking and category in adapter.V:  # it is not taken from the file
            continue
        if category not in basis.metadata.V_digests or basis.width(category) != n:
            raise InvalidInput(f"{basis.path}: no V.{category} of width {n}, which {adapter.name} needs")
        if trust:
            continue
        if category not in recorded:
            hint = "" if trust is None else f"; `trust_basis=True` takes {basis.path} all the same"
            raise InvalidInput(f"{adapter.name}: does not record which basis it was trained with{hint}")
        if recorded[category] != basis.metadata.V_digests[category]:
            raise InvalidInput(
                f"{basis.path}: V.{category} is not the one that {adapter.name} was trained with (digests differ); "
                "give that one"
            )
    if own is not None and not trust:
        records_of(adapter, basis)


def _fitting(adapter: Adapter, path: Path) -> BasisFile | None:
    """The basis file at this path, if there is one, and it is the adapter's."""
    try:
        if not path.is_file():
            return None
        basis = open_basis(path)
        check_basis(adapter, basis)
        if adapter.provenance and adapter.provenance.seed is None and not adapter.indices:
            positions_of(adapter, basis)
    except (FrodctlError, OSError):
        return None
    return basis


def _near(adapter: Adapter) -> Iterator[Path]:
    """Files that may be the basis file of an adapter without V."""
    own, root = adapter.provenance, adapter.root
    if own is None or root is None or not adapter.lacking:
        return
    if own.basis_file:
        yield root / own.basis_file
        yield Path(own.basis_file)
    for folder in (root, root.resolve().parent):
        yield from sorted(path for path in folder.glob("*.safetensors") if path.name not in ADAPTER_FILES)


def records_of(adapter: Adapter, basis: BasisFile) -> Records:
    """What the basis says of each trained module.

    Raises
    ------
    InvalidInput
        It does not have one of frodctl's adapter's modules, or has it in another category or of another base.
    """
    known = {record.name: record for record in basis.metadata.modules}
    if adapter.provenance is None:
        matched = names.match([module.module for module in adapter.modules], known)
        return {module: known[name] for module, name in matched.items() if name is not None}
    records = {}
    for module in adapter.modules:
        record = known.get(module.checkpoint_path or "")
        if record is None:
            raise InvalidInput(f"{adapter.name}: {module.module} matches no module of {basis.path}: another basis?")
        if record.category != module.category:
            raise InvalidInput(f"{adapter.name}: {module.module} is not of {record.category}, as in {basis.path}")
        if record.digest != module.digest:
            raise InvalidInput(
                f"{adapter.name}: {record.name} was trained on another base than the one of {basis.path} (digests "
                "differ)"
            )
        records[module.module] = record
    return records


def own_basis(adapter: Adapter) -> BasisFile | None:
    """An adapter of frodctl's that holds V, λ and the positions, as a basis; None where it lacks any of them."""
    own, root = adapter.provenance, adapter.root
    if own is None or root is None or adapter.lacking or not set(adapter.categories) <= set(adapter.indices):
        return None
    path = root / adapter.modules[0].scales.file
    if path.suffix != ".safetensors" or any(module.base_scales is None for module in adapter.modules):
        return None
    aliases = {}
    for category in adapter.categories:
        aliases[f"V.{category}"], aliases[f"indices.{category}"], _ = shared_keys(category)
    aliases |= {f"lambda.{module.checkpoint_path}": base_scales_key(module.module) for module in adapter.modules}
    transposed = adapter.config.get("fan_in_fan_out") is True
    alpha, seed = adapter.config.get("regularization_alpha"), adapter.config.get("projection_prng_key")
    revision = adapter.config.get("revision")
    metadata = BasisMetadata(
        tool="",
        model=adapter.base_model or "",
        revision=revision if isinstance(revision, str) else None,
        alpha=alpha if is_alpha(alpha) else 1e-3,
        seed=own.seed if own.seed is not None else seed if is_seed(seed) else 0,
        sparsity={category: own.sparsity.get(category, 0.0) for category in adapter.categories},
        precision="auto",
        V_digests={category: own.V_digests[category] for category in adapter.categories},
        modules=[_record(module, own, transposed) for module in adapter.modules],
        digests={name: own.digests[key] for name, key in aliases.items() if key in own.digests},
    )
    return BasisFile(path, metadata, codec.read_header(path), aliases)


def _record(module: TrainedModule, own: Provenance, transposed: bool) -> ModuleRecord:
    assert module.checkpoint_path is not None
    assert module.digest is not None
    known = own.shapes.get(module.checkpoint_path)
    shape = tuple(known) if known else (module.n, 0) if transposed else (0, module.n)  # then m is not recorded
    layer = names.layer_index(module.checkpoint_path)
    return ModuleRecord(module.checkpoint_path, module.category, layer, shape, transposed, module.digest)


def V_of(adapter: Adapter, basis: BasisFile | None, category: str) -> HostArray:
    """V (n, n) of a category as it is stored: the adapter's own, or the basis file's."""
    if category in adapter.V:
        return adapter.tensor(adapter.V[category])
    if basis is None:
        raise no_basis(adapter)
    return basis.tensor(f"V.{category}")


def base_scales_of(
    adapter: Adapter, module: TrainedModule, basis: BasisFile | None, records: Records
) -> HostArray | None:
    """λ (n,) where training of a module began, as adapter or basis say; None where neither does.

    Raises
    ------
    InvalidInput
        They differ.
    """
    import numpy as np

    own = adapter.tensor(module.base_scales) if module.base_scales is not None else None
    record = records.get(module.module)
    if basis is None or record is None:
        return own
    found = basis.tensor(f"lambda.{record.name}")
    if len(found) != module.n:
        raise InvalidInput(f"{basis.path}: lambda.{record.name} is {list(found.shape)}, not {[module.n]}")
    if own is not None and not np.array_equal(own.astype(np.float32), found):
        raise InvalidInput(f"{adapter.name}: {module.module} began at other scales than {basis.path} has")
    return found


def trained_of(
    adapter: Adapter, module: TrainedModule, basis: BasisFile | None, records: Records
) -> tuple[HostArray, HostArray, HostArray | None]:
    """λ' (n,) and the values of S (nnz,) of a module, and λ (n,) where adapter or basis say it (`base_scales_of`)."""
    import numpy as np

    scales = adapter.tensor(module.scales)
    values = adapter.tensor(module.values) if module.values is not None else np.zeros(0, scales.dtype)
    return scales, values, base_scales_of(adapter, module, basis, records)


def doubts(source: Source) -> list[str]:
    """Warnings on a V that may be another one than was trained with."""
    found, name = [], source.adapter.name
    if source.recompute:
        found.append(
            f"{name} does not hold its basis; PEFT's routine recomputes it here, and where this machine differs "
            "from the one it was trained on the result is wrong and nothing can tell"
        )
    if source.adapter.lacking and source.adapter.provenance is None:
        called = {label: dtype for dtype, label in MODEL_DTYPES.items()}
        dtype = called.get(source.projection_dtype or "", "the dtype of the base")
        found.append(
            f"{name}: V is taken in {dtype}; if the base was loaded in another dtype for training, say which "
            "(`projection_dtype`), or the result is wrong"
        )
    return found


def without_digests(*sources: Adapter | BasisFile | None) -> str | None:
    """The note on files of frodctl's that an earlier version wrote, if there are any among these."""
    found: Sequence[str] = [
        *(str(s.path) for s in sources if isinstance(s, BasisFile) and not s.metadata.digests),
        *(s.name for s in sources if isinstance(s, Adapter) and s.provenance and not s.provenance.digests),
    ]
    if not found:
        return None
    parts = " and ".join(dict.fromkeys(found))
    return f"{parts}: parts have no digest, as earlier versions of frodctl wrote them; damage there goes unnoticed"
