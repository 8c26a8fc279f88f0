"""The shared-basis file: what `frodctl decompose` writes and everything else reads.

One safetensors file::

    V.{category}        (n, n)   the shared basis
    tau.{category}      (n,)     float64, ascending, null directions last
    lambda.{module}     (n,)     float32, in the order of V's columns
    indices.{category}  (2, nnz) int64, only where the pattern is not the seeded one

and in its ``__metadata__`` the key ``frodctl``: a JSON object, see `BasisMetadata`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TYPE_CHECKING

from frodctl import values
from frodctl.checkpoint import codec, files, manifest, sink
from frodctl.checkpoint.inputs import Json, decode_json, kind_of
from frodctl.checkpoint.records import MODEL_DTYPES, TensorInfo
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats.fields import is_alpha, is_rate, is_seed, is_text_map

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

VERSION = 1


@dataclass(frozen=True)
class ModuleRecord:
    """One decomposed weight."""

    name: str  #: the module's path in the checkpoint
    category: str
    layer: int | None  #: number of its block
    shape: tuple[int, int]  #: as stored
    transposed: bool  #: stored as (in_features, out_features)
    digest: str  #: ``sha256:…`` of the stored bytes
    dtype: str | None = None  #: of the stored bytes, by the safetensors format's name; older files lack it


@dataclass(frozen=True)
class BasisMetadata:
    """The ``frodctl`` object in the file's metadata."""

    tool: str
    model: str
    revision: str | None
    alpha: float
    seed: int
    sparsity: Mapping[str, float]  #: by category
    precision: str  #: as asked for: auto, float32 or float64
    V_digests: Mapping[str, str]  #: by category, ``sha256:…`` of V's bytes
    modules: Sequence[ModuleRecord]
    digests: Mapping[str, str] = field(default_factory=dict)  #: by name, ``sha256:…`` of every tensor's but V's bytes
    memory_limit: int | None = None  #: as asked for: what is kept and what computed again differs in rounding
    peft_collisions: Sequence[str] = field(default=())  #: PEFT's names that stand for several categories here
    #: by category whose layers read the same activations in groups, what these are called; others have one role
    share_input: Mapping[str, Sequence[str]] = field(default_factory=dict)
    version: int = VERSION

    @property
    def peft_loadable(self) -> bool:
        """Whether PEFT's own categories are these, so that it could use the file's bases."""
        return not (self.peft_collisions or self.share_input)

    def to_json(self) -> str:
        value = asdict(self) | {"peft_loadable": self.peft_loadable}
        value["basis"] = value.pop("V_digests")
        if self.memory_limit is None:
            del value["memory_limit"]
        if not self.share_input:
            del value["share_input"]
        read = decode_json(json.dumps(value).encode())  # as a reader will have it
        return json.dumps(value | {"digest": digest_of(read)}, sort_keys=True, separators=(",", ":"))

    def _check_types(self) -> None:
        _require(is_seed(self.seed), "seed")
        _require(is_alpha(self.alpha), "alpha")
        _require(is_text_map(self.V_digests), "basis")
        _require(is_text_map(self.digests), "digests")
        _require(isinstance(self.sparsity, dict) and self.sparsity.keys() == self.V_digests.keys(), "sparsity")
        _require(all(is_rate(rate) for rate in self.sparsity.values()), "sparsity")
        texts = [text for m in self.modules for text in (m.name, m.category, m.digest)]
        _require(all(isinstance(text, str) for text in [self.model, self.tool, self.precision, *texts]), "modules")
        _require(len({m.name for m in self.modules}) == len(self.modules), "modules")
        _require(self.memory_limit is None or type(self.memory_limit) is int, "memory_limit")
        _require(isinstance(self.share_input, dict) and self.share_input.keys() <= self.V_digests.keys(), "share_input")
        _require(all(map(_is_text_list, self.share_input.values())), "share_input")
        _require(self.revision is None or isinstance(self.revision, str), "revision")
        _require(all(type(size) is int for m in self.modules for size in m.shape), "shape")
        _require(all(type(m.transposed) is bool for m in self.modules), "transposed")
        _require(all(m.dtype is None or m.dtype in codec.FLOAT_DTYPES for m in self.modules), "dtype")

    @classmethod
    def from_json(cls, text: str, where: str) -> BasisMetadata:
        """Parse and check; `InvalidInput` names the file."""
        try:
            value = decode_json(text.encode())
            check_version(value["version"], VERSION, f"{where}: shared-basis")
            _require(value.get("digest") in (None, digest_of(value)), "changed since it was written: digests differ")
            known = {f.name for f in fields(cls)}
            value["V_digests"] = value.pop("basis")
            kept = {key: item for key, item in value.items() if key in known}
            modules = [_module_record(record) for record in kept.pop("modules")]
            metadata = cls(modules=modules, **kept)
            metadata._check_types()
            return metadata
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(f"{where}: damaged shared-basis metadata ({error!r})") from None


def digest_of(value: Mapping[str, object]) -> str:
    """``sha256:…`` of a JSON object, but for its own ``digest``."""
    rest = {key: item for key, item in value.items() if key != "digest"}
    return "sha256:" + hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def check_version(found: object, known: int, what: str) -> None:
    """Raise `InvalidInput` if a file is of a format that came later than ``known``, ValueError if of none."""
    if type(found) is int and found > known:
        raise InvalidInput(f"{what} format {found}, and this frodctl reads up to {known}: update frodctl")
    _require(type(found) is int and found >= 1, f"version {found!r}")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _is_text_list(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _module_record(value: Mapping[str, Json]) -> ModuleRecord:
    rows, columns = value["shape"]
    known = {f.name: value[f.name] for f in fields(ModuleRecord) if f.name != "dtype"}
    return ModuleRecord(**known | {"shape": (rows, columns), "dtype": value.get("dtype")})


@dataclass(frozen=True)
class BasisFile:
    """A validated shared basis; tensors are read when asked for, and compared with their digests then."""

    path: Path
    metadata: BasisMetadata
    header: codec.Header = field(repr=False)
    #: in an adapter that holds its basis itself: what the tensors are called there
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self.aliases.get(name, name) in self.header.tensors

    def width(self, category: str) -> int:
        """n of the category."""
        return self._place(f"V.{category}")[0].shape[0]

    def dtype(self, category: str) -> str:
        """The dtype of the category's V, by the format's name."""
        return self._place(f"V.{category}")[0].dtype

    def tensor(self, name: str) -> HostArray:
        """The tensor of that name, in its stored dtype; `InvalidInput` where it is not the recorded one."""
        from frodctl.checkpoint.stream import read_tensor

        spec, offset = self._place(name)
        info = TensorInfo(spec.name, spec.dtype, spec.shape, self.path.name, offset)
        tensor = read_tensor(self.path.parent, info)
        kind, _, category = name.partition(".")
        recorded = self.metadata.V_digests.get(category) if kind == "V" else self.metadata.digests.get(name)
        check_digest(tensor, recorded, f"{self.path}: {spec.name}")
        return tensor

    def _place(self, name: str) -> tuple[codec.TensorSpec, int]:
        known = self.aliases.get(name, name)
        if known not in self.header.tensors:
            close = ", ".join(get_close_matches(name, self.header.tensors)) or "V.…, tau.… and lambda.… are there"
            raise UsageError(f"{self.path}: no tensor {name}; {close}")
        return self.header.tensors[known]

    def indices(self) -> dict[str, HostArray]:
        """The sparse pattern of every category, (2, nnz) int64: stored, or drawn from the seed.

        Raises
        ------
        InvalidInput
            A stored position lies outside the matrix or on its diagonal, or is there twice.
        """
        from frodctl.method.pattern import fault, patterns

        widths = {category: self.width(category) for category in self.metadata.V_digests}
        stored = {c: f"indices.{c}" for c in widths if f"indices.{c}" in self}
        drawn = patterns(widths, self.metadata.sparsity, self.metadata.seed) if len(stored) < len(widths) else {}
        found = {c: self.tensor(stored[c]) if c in stored else drawn[c] for c in widths}
        for c in stored:
            if wrong := fault(found[c], widths[c]):
                raise InvalidInput(f"{self.path}: {stored[c]} {wrong}")
        return found

    def verify(self) -> None:
        """Read every tensor; `InvalidInput` names one whose digest is not the recorded one."""
        categories = self.metadata.V_digests
        for name in [f"V.{category}" for category in categories] + list(self.metadata.digests):
            self.tensor(name)


def check_digest(tensor: HostArray, recorded: str | None, what: str) -> None:
    """`InvalidInput` if a tensor's bytes are not those of the recorded digest; None says that there is none."""
    from frodctl.checkpoint.stream import digest

    if recorded is not None and digest(tensor) != recorded:
        raise InvalidInput(f"{what} is damaged: its digest is not the recorded one")


def open_basis(path: values.PathLike) -> BasisFile:
    """Read and validate the header of a shared-basis file.

    Raises
    ------
    UsageError
        ``path`` is none, or there is nothing.
    InvalidInput
        Not such a file, of another version, truncated, or with tensors missing or of the wrong shape.
    """
    path = values.path(path, "basis")
    kind = kind_of(path)
    if kind is None:
        raise UsageError(f"{path}: no such file (`basis`)")
    if kind == "folder":
        raise InvalidInput(f"{path}: is a folder, not a shared-basis file (`basis`)")
    header = codec.read_header(path)
    if "frodctl" not in header.metadata:
        raise InvalidInput(f"{path}: not a shared-basis file (made by frodctl decompose)")
    metadata = BasisMetadata.from_json(header.metadata["frodctl"], str(path))
    _check_tensors(path, header, metadata)
    return BasisFile(path, metadata, header)


def _check_tensors(path: Path, header: codec.Header, metadata: BasisMetadata) -> None:
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for category in metadata.V_digests:
        spec = header.tensors.get(f"V.{category}")
        n = spec[0].shape[0] if spec and spec[0].shape else 0
        expected[f"V.{category}"] = ((n, n), tuple(MODEL_DTYPES.values()))
        expected[f"tau.{category}"] = ((n,), ("F64",))
        if indices := header.tensors.get(f"indices.{category}"):
            nnz = indices[0].shape[-1] if indices[0].shape else 0
            expected[f"indices.{category}"] = ((2, nnz), ("I64",))
    for module in metadata.modules:
        if module.category not in metadata.V_digests:
            raise InvalidInput(f"{path}: module {module.name} is of category {module.category}, which is not there")
        n = module.shape[0] if module.transposed else module.shape[1]
        if expected[f"V.{module.category}"][0] != (n, n):
            raise InvalidInput(f"{path}: module {module.name} has {n} columns, unlike V.{module.category}")
        expected[f"lambda.{module.name}"] = ((n,), ("F32",))
    for name, (shape, dtypes) in expected.items():
        if name not in header.tensors:
            raise InvalidInput(f"{path}: tensor {name} is missing")
        if metadata.digests and not name.startswith("V.") and name not in metadata.digests:
            raise InvalidInput(f"{path}: damaged shared-basis metadata: no digest of {name}")
        found, _ = header.tensors[name]
        if found.shape != shape or found.dtype not in dtypes:
            raise InvalidInput(f"{path}: tensor {name} is {found.dtype} {list(found.shape)}, expected {list(shape)}")


def check_name(path: Path) -> None:
    """Refuse to write a basis file under a name by which no command would know it (`UsageError`)."""
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: a basis file's name must end in .safetensors")
    if manifest.WEIGHTS.fullmatch(path.name):
        raise UsageError(f"{path}: would be taken for a model's or an adapter's weights; give it another name")


def write_basis(file: IO[bytes], parts: Sequence[Path], metadata: BasisMetadata) -> None:
    """Write the shared-basis file from ``parts``, safetensors files that hold its tensors; the last one counts."""
    tensors = {}
    for part in parts:
        for name, (spec, offset) in codec.read_header(part).tensors.items():
            tensors[name] = (spec, part, offset)
    specs = codec.layout([spec for spec, _, _ in tensors.values()])

    def chunks() -> Iterator[memoryview]:
        for spec in specs:
            _, part, offset = tensors[spec.name]
            yield from codec.read_chunks(part, offset, spec.nbytes)

    codec.write_file(file, specs, file_metadata(metadata), chunks())


def write_patterns(
    basis: BasisFile, path: Path, indices: Mapping[str, HostArray], sparsity: Mapping[str, float], *, force: bool
) -> None:
    """Write a basis file again, with other patterns for some categories.

    Parameters
    ----------
    basis : BasisFile
    path : Path
        Never the basis file's own.
    indices : mapping of str to ndarray
        Positions by category, (2, nnz) int64.
    sparsity : mapping of str to float
        By category.
    force : bool
        Replace an existing file.
    """
    import numpy as np

    from frodctl.checkpoint.stream import digest, tensor_bytes

    indices = {category: np.ascontiguousarray(tensor) for category, tensor in indices.items()}
    digests = dict(basis.metadata.digests)
    if digests:  # else the others' are not known
        digests |= {f"indices.{category}": digest(tensor) for category, tensor in indices.items()}
    metadata = replace(basis.metadata, sparsity={**basis.metadata.sparsity, **sparsity}, digests=digests)
    names = {f"indices.{category}": tensor for category, tensor in indices.items()}
    specs = codec.layout(codec.TensorSpec(name, "I64", tensor.shape) for name, tensor in names.items())
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "indices.safetensors")
        with files.open_write(part, "x") as file:
            codec.write_file(file, specs, {}, (tensor_bytes(names[spec.name]) for spec in specs))
        sink.write_file(
            path, lambda file: write_basis(file, [basis.path, part], metadata), reads=[basis.path], force=force
        )


def file_metadata(metadata: BasisMetadata) -> dict[str, str]:
    """The safetensors ``__metadata__`` of a shared-basis file."""
    return {"format": "pt", "frodctl": metadata.to_json()}


def specs_of(category: str, n: int, dtype: str, modules: Sequence[str]) -> list[codec.TensorSpec]:
    """The tensors of one category in the file; ``dtype`` is V's (the safetensors format's name)."""
    return [
        codec.TensorSpec(f"V.{category}", dtype, (n, n)),
        codec.TensorSpec(f"tau.{category}", "F64", (n,)),
        *(codec.TensorSpec(f"lambda.{module}", "F32", (n,)) for module in modules),
    ]
