"""A trained FRoD adapter: PEFT's layout, whoever wrote it.

``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``) with the tensors::

    base_model.frod_V.{category}                       (n, n)
    base_model.frod_s_indices.{category}               (2, nnz) int64, rows and columns
    base_model.frod_s_size.{category}                  (2,) int64
    base_model.model.{module}.frod_lambda_l            (n,)
    base_model.model.{module}.frod_lambda_s_values     (nnz,)
    base_model.model.{module}.weight, .bias            trained modules, trained biases

The first three may be missing; then the basis is elsewhere. A pattern that is neither a seed's nor the basis file's
is then in ``base_model.indices.{category}``: under PEFT's name PEFT would load the adapter, with a V of its own.
What frodctl writes has a ``frodctl`` object in its config, see `Provenance`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from frodctl.checkpoint import codec, names, sink
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.inputs import read_json
from frodctl.checkpoint.source import ADAPTER_FILES, Location, TensorInfo, read_file_header
from frodctl.errors import FrodctlError, InvalidInput, UsageError

CONFIG_FILE = ADAPTER_FILES[0]
_SHARED = {"frod_V": "bases", "frod_s_indices": "indices", "frod_s_size": "sizes", "indices": "indices"}
_MODULE = re.compile(r"(?P<module>.+)\.frod_(?P<what>lambda_l|lambda_s_values|lambda_0)")


@dataclass(frozen=True)
class Provenance:
    """The ``frodctl`` object of an adapter's config."""

    form: str  #: delta or reconstruct
    basis: Mapping[str, str]  #: by category, ``sha256:…`` of V's bytes
    base: Mapping[str, str]  #: by module of the checkpoint, ``sha256:…`` of its weight's bytes
    seed: int | None  #: of the pattern; None where the adapter or the basis file holds it
    sparsity: Mapping[str, float]  #: by category
    categories: Mapping[str, str]  #: of the modules whose category is not PEFT's name for it
    pattern: Mapping[str, str]  #: by category, ``sha256:…`` of the positions' bytes, where no seed gives them
    dtype: Mapping[str, str]  #: by category, of V and V⁻ᵀ in training (the safetensors format's name), if not as stored

    @classmethod
    def from_config(cls, value: Any, where: str) -> Provenance:
        """Check the object's types; `InvalidInput` names the file."""
        try:
            form, seed = value["form"], value.get("seed")
            maps = [
                dict(value.get(key) or {}) for key in ("basis", "base", "sparsity", "categories", "pattern", "dtype")
            ]
        except (TypeError, KeyError, ValueError, AttributeError):
            raise InvalidInput(f"{where}: damaged frodctl object") from None
        basis, base, sparsity, categories, pattern, dtype = maps
        texts = [*basis.values(), *base.values(), *categories.values(), *pattern.values()]
        numbers = sparsity.values()
        if (
            form not in ("delta", "reconstruct")
            or not (seed is None or type(seed) is int)
            or not all(isinstance(text, str) for text in texts)
            or not all(name in FLOAT_DTYPES for name in dtype.values())
            or not all(isinstance(number, (int, float)) for number in numbers)
        ):
            raise InvalidInput(f"{where}: damaged frodctl object")
        return cls(form, basis, base, seed, sparsity, categories, pattern, dtype)


@dataclass(frozen=True)
class TrainedModule:
    """What was trained of one targeted layer."""

    module: str  #: its path in the live model
    category: str
    scales: TensorInfo  #: λ'
    values: TensorInfo | None  #: of S; None where nothing of it was trained
    base_scales: TensorInfo | None  #: λ, where training began; None where the basis file says it

    @property
    def n(self) -> int:
        return self.scales.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A validated adapter; its tensors are read when asked for."""

    name: str  #: as its user named it
    root: Path | None  #: the folder with its files; None where only headers were fetched
    config: Mapping[str, Any]
    provenance: Provenance | None  #: None for PEFT's own
    modules: tuple[TrainedModule, ...]
    bases: Mapping[str, TensorInfo]  #: V by category
    indices: Mapping[str, TensorInfo]  #: the pattern by category
    replaced: Mapping[str, TensorInfo] = field(repr=False)  #: trained tensors by their names in the live model

    @property
    def categories(self) -> dict[str, int]:
        """The categories and their n."""
        return {module.category: module.n for module in self.modules}

    def files(self) -> list[Path]:
        """Its config and its weights; none of headers alone."""
        return [] if self.root is None else [self.root / CONFIG_FILE, self.root / self.modules[0].scales.file]

    @property
    def base(self) -> str | None:
        """The base model that the config names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def tensor(self, info: TensorInfo) -> Any:
        """The torch.Tensor, in its stored dtype."""
        from frodctl.checkpoint.stream import read_tensor

        assert self.root is not None
        return read_tensor(self.root, info)

    def check_positions(self, category: str, positions: Any, where: object) -> None:
        """`InvalidInput` where these positions (2, nnz), found in ``where``, are not those it was trained at."""
        from frodctl.checkpoint.stream import digest

        recorded = self.provenance.pattern.get(category) if self.provenance else None
        if recorded is not None and digest(positions.contiguous()) != recorded:
            raise InvalidInput(
                f"{where}: the positions of {category} are not those that {self.name} was trained at (digests differ); "
                "give the basis file that has them"
            )

    def is_saved_module(self, tensor: str) -> bool:
        """Whether the tensor (its name in the live model) is of a module that was trained as a whole."""
        parents = tensor.split(".")[:-1]
        paths = [".".join(parents[: count + 1]) for count in range(len(parents))]
        saved = [entry for entry in self.config.get("modules_to_save") or () if isinstance(entry, str)]
        return any(path.endswith(entry) for path in paths for entry in saved)  # as PEFT has it


def open_adapter(location: Location, name: str | None = None, *, headers_only: bool = False) -> Adapter:
    """Find an adapter and read its config and headers; fetch it first if it is on the Hub.

    Parameters
    ----------
    location : Location
        A folder, an adapter's weights file, or a Hub id.
    name : str, optional
        Which of several adapters: the sub-folder it is in ("default" is in the folder itself).
    headers_only : bool
        Fetch no weights from the Hub: the result's tensors cannot be read.

    Raises
    ------
    FrodctlError
        There is no such adapter, or the Hub cannot be reached.
    UsageError
        There are several, and no name.
    InvalidInput
        Not a FRoD adapter, or a damaged one.
    """

    def choose(configs: Sequence[str]) -> str:
        return _choose(location.model, configs, name)

    path = location.local_path()
    if path is None:
        from frodctl.checkpoint import hub

        if headers_only and not hub.is_offline(location):
            config, infos = hub.remote_adapter(location, choose)
            return _adapter(location.model, None, config, infos)
        path = hub.download_adapter(location)
    if path.is_file():
        folder, weights = path.parent, path
        if not (folder / CONFIG_FILE).is_file():
            raise InvalidInput(f"{path}: no {CONFIG_FILE} beside it")
    else:
        folder = path / location.subfolder if location.local_path() else path
        if not folder.is_dir():
            raise FrodctlError(f"{folder}: no such folder")
        found = [folder / CONFIG_FILE, *sorted(folder.glob(f"*/{CONFIG_FILE}"))]
        configs = [str(config.relative_to(folder)) for config in found if config.is_file()]
        folder = (folder / choose(configs)).parent
        weights = _weights(folder)
    infos = read_file_header(weights)
    return _adapter(location.model, folder, read_json(folder / CONFIG_FILE), infos)


def _choose(where: str, configs: Sequence[str], name: str | None) -> str:
    """The config of the adapter called ``name`` among the paths of all that are there."""
    by_name = {"default" if path == CONFIG_FILE else str(PurePosixPath(path).parent): path for path in configs}
    if not by_name:
        raise InvalidInput(f"{where}: no adapter here ({CONFIG_FILE} is missing)")
    if name is None and len(by_name) > 1 and "default" not in by_name:
        raise UsageError(f"{where}: several adapters here; choose with --adapter-name: {', '.join(by_name)}")
    chosen = name or ("default" if "default" in by_name else next(iter(by_name)))
    if chosen not in by_name:
        raise UsageError(f"{where}: no adapter called {chosen}; there are: {', '.join(by_name)}")
    return by_name[chosen]


def _weights(folder: Path) -> Path:
    for file in ADAPTER_FILES[1:]:
        if (folder / file).is_file():
            return folder / file
    raise InvalidInput(f"{folder}: no adapter weights here ({' or '.join(ADAPTER_FILES[1:])})")


def _adapter(name: str, root: Path | None, config: dict[str, Any], infos: Sequence[TensorInfo]) -> Adapter:
    if config.get("peft_type") != "FROD":
        raise InvalidInput(f"{name}: an adapter of type {config.get('peft_type')}, not FROD")
    provenance = Provenance.from_config(config["frodctl"], name) if "frodctl" in config else None
    shared: dict[str, dict[str, TensorInfo]] = {kind: {} for kind in _SHARED.values()}
    trained: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for info in infos:
        inner = info.name.removeprefix("base_model.")
        kind, _, category = inner.partition(".")
        if inner == info.name or (kind not in _SHARED and kind != "model") or not category:
            raise InvalidInput(f"{name}: tensor {info.name} is of no FRoD adapter")
        if kind in _SHARED:
            shared[_SHARED[kind]][category] = info
        elif match := _MODULE.fullmatch(category):
            trained.setdefault(match["module"], {})[match["what"]] = info
        elif ".original_module." not in info.name:  # PEFT's copy of the base's, which the trained module replaces
            replaced[re.sub(r"\.(base_layer|modules_to_save)(?=\.)", "", f".{category}")[1:]] = info
    labels = provenance.categories if provenance else {}
    modules = [_module(name, module, parts, labels) for module, parts in trained.items()]
    if not modules:
        raise InvalidInput(f"{name}: no trained scales (frod_lambda_l) in this adapter")
    modules.sort(key=lambda module: names.natural_key(module.module))
    adapter = Adapter(name, root, config, provenance, tuple(modules), shared["bases"], shared["indices"], replaced)
    _check_shapes(adapter, shared["sizes"])
    return adapter


def _module(name: str, module: str, parts: Mapping[str, TensorInfo], labels: Mapping[str, str]) -> TrainedModule:
    if "lambda_l" not in parts:
        raise InvalidInput(f"{name}: module {module} has no frod_lambda_l")
    for info in parts.values():
        if len(info.shape) != 1 or info.dtype not in FLOAT_DTYPES:
            raise InvalidInput(f"{name}: tensor {info.name} is {info.dtype} {list(info.shape)}, expected a vector")
    category = labels.get(module) or names.peft_category(module)
    return TrainedModule(module, category, parts["lambda_l"], parts.get("lambda_s_values"), parts.get("lambda_0"))


def _check_shapes(adapter: Adapter, sizes: Mapping[str, TensorInfo]) -> None:
    widths = adapter.categories
    if 0 in widths.values():
        raise InvalidInput(f"{adapter.name}: a module without scales")
    for shared in (adapter.bases, adapter.indices, sizes):
        for category in set(shared) - set(widths):
            raise InvalidInput(f"{adapter.name}: tensor {shared[category].name} belongs to no trained module")
    expected: list[tuple[TensorInfo, tuple[int, ...], Sequence[str]]] = []
    expected += [(info, (2,), ("I64",)) for info in sizes.values()]
    expected += [(info, (widths[c], widths[c]), FLOAT_DTYPES) for c, info in adapter.bases.items()]
    expected += [(info, (2, *info.shape[1:2]), ("I64",)) for info in adapter.indices.values()]
    for module in adapter.modules:
        n = (widths[module.category],)
        expected += [(info, n, FLOAT_DTYPES) for info in (module.scales, module.base_scales) if info is not None]
        if module.values is not None and module.category in adapter.indices:
            expected.append((module.values, adapter.indices[module.category].shape[1:], FLOAT_DTYPES))
    for info, shape, dtypes in expected:
        if info.shape != shape or info.dtype not in dtypes:
            found = f"{info.dtype} {list(info.shape)}"
            raise InvalidInput(f"{adapter.name}: tensor {info.name} is {found}, expected {list(shape)}")


def lambda_key(module: str) -> str:
    """The tensor with λ' of the module at this path in the live model."""
    return f"base_model.model.{module}.frod_lambda_l"


def values_key(module: str) -> str:
    """The tensor with the values of S."""
    return f"base_model.model.{module}.frod_lambda_s_values"


def base_scales_key(module: str) -> str:
    """The tensor with λ, where training began."""
    return f"base_model.model.{module}.frod_lambda_0"


def replaced_key(tensor: str) -> str:
    """The tensor of this name in the live model, trained as a whole."""
    return f"base_model.model.{tensor}"


def shared_keys(category: str) -> tuple[str, str, str]:
    """The tensors with a category's V, positions and size of S."""
    return (
        f"base_model.frod_V.{category}",
        f"base_model.frod_s_indices.{category}",
        f"base_model.frod_s_size.{category}",
    )


def indices_key(category: str) -> str:
    """The tensor with a category's positions in an adapter without V."""
    return f"base_model.indices.{category}"


def write_adapter(
    folder: Path, tensors: Mapping[str, Any], config: Mapping[str, Any], provenance: Provenance, card: str
) -> None:
    """Write an adapter's files into a folder, which may hold others; a reader finds all of it or none.

    Parameters
    ----------
    folder : Path
        Made where it is not there.
    tensors : mapping of str to torch.Tensor
        By the names that the ``…_key`` functions give.
    config : mapping
        PEFT's fields.
    provenance : Provenance
    card : str
        README.md; one that is there already is kept.

    Raises
    ------
    UsageError
        The folder holds an adapter that frodctl did not write, or cannot be written to.
    """
    if (folder / CONFIG_FILE).is_file() and "frodctl" not in read_json(folder / CONFIG_FILE):
        raise UsageError(f"{folder}: holds an adapter that is not frodctl's; name another folder")
    text = json.dumps({**config, "frodctl": asdict(provenance)}, indent=2, sort_keys=True) + "\n"
    writers: dict[str, Callable[[IO[bytes]], None]] = {}
    if not (folder / "README.md").exists():
        writers["README.md"] = lambda file: _write_text(file, card)
    writers[ADAPTER_FILES[1]] = lambda file: write_tensors(file, tensors)
    writers[CONFIG_FILE] = lambda file: _write_text(file, text)
    sink.replace_files(folder, writers)


def write_tensors(file: IO[bytes], tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file of torch.Tensors."""
    from frodctl.checkpoint.stream import DTYPE_NAMES, tensor_bytes

    specs = codec.layout(codec.TensorSpec(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items())

    def chunks() -> Iterator[memoryview]:
        for spec in specs:
            yield tensor_bytes(tensors[spec.name].detach().cpu().contiguous())

    codec.write_file(file, specs, {"format": "pt"}, chunks())


def _write_text(file: IO[bytes], text: str) -> None:
    file.write(text.encode(errors="replace"))
