"""A trained FRoD adapter: PEFT's layout, whoever wrote it.

``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``) with the tensors::

    base_model.frod_V.{category}                       (n, n)
    base_model.frod_s_indices.{category}               (2, nnz) int64, rows and columns
    base_model.frod_s_size.{category}                  (2,) int64
    base_model.model.{module}.frod_lambda_l            (n,)
    base_model.model.{module}.frod_lambda_s_values     (nnz,)
    base_model.model.{module}.weight, .bias            trained modules, trained biases

The first three may be missing; then the basis is elsewhere. A pattern that is neither a seed's nor the basis file's
is then in ``base_model.indices.{category}``. What frodctl writes has a ``frodctl`` object in its config, see
`Provenance`, and a ``peft_type`` that PEFT does not know: whatever else the config said, PEFT would load the adapter
with a U, and mostly with a V, of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from frodctl.checkpoint import codec, names, sink
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.inputs import Json, read_json
from frodctl.checkpoint.opening import read_file_header
from frodctl.checkpoint.records import ADAPTER_FILES, WEIGHT_FILES, Location, TensorInfo
from frodctl.errors import FrodctlError, InvalidInput, UsageError
from frodctl.formats.basis_file import check_digest, check_version, digest_of
from frodctl.formats.fields import is_alpha, is_rate, is_seed, is_text_map
from frodctl.method.budget import nnz

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

VERSION = 1
CONFIG_FILE = ADAPTER_FILES[0]
#: What PEFT says as it refuses the adapter: KeyError: 'frodctl: …'.
PEFT_TYPE = "frodctl: PEFT cannot load this adapter; load it with frodctl.load_adapter or frodctl.training.peft.load"
_SHARED = {"frod_V": "V", "frod_s_indices": "indices", "frod_s_size": "sizes", "indices": "indices"}
_MODULE = re.compile(r"(?P<module>.+)\.frod_(?P<what>lambda_l|lambda_s_values|lambda_0)")


@dataclass(frozen=True)
class Provenance:
    """The ``frodctl`` object of an adapter's config."""

    form: str  #: delta or reconstruct
    V_digests: Mapping[str, str]  #: by category, ``sha256:…`` of V's bytes
    base_digests: Mapping[str, str]  #: by module of the checkpoint, ``sha256:…`` of its weight's bytes
    seed: int | None  #: of the pattern; None where the adapter or the basis file holds it
    sparsity: Mapping[str, float]  #: by category
    categories: Mapping[str, str]  #: of the modules whose category is not PEFT's name for it
    pattern: Mapping[str, str]  #: by category, ``sha256:…`` of the positions' bytes
    dtype: Mapping[str, str]  #: by category, of V and V⁻ᵀ in training (the safetensors format's name), if not as stored
    head: Mapping[str, Json] = field(default_factory=dict)  #: the class that has it, and its labels, as a config.json
    basis_file: str | None = None  #: where it was, seen from the adapter's folder, or its name alone
    #: modules and tensors have the checkpoint's names, and the live model has this before them; None: they have its own
    live_prefix: str | None = None
    shapes: Mapping[str, Json] = field(default_factory=dict)  #: then, of the weights as the checkpoint stores them
    digests: Mapping[str, str] = field(default_factory=dict)  #: by name, ``sha256:…`` of every tensor's but V's bytes
    #: of the live base: ``kind``, ``dtype`` (the format's name) and the ``modules`` that were so; empty where none was
    quantization: Mapping[str, Json] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def from_config(cls, value: Json, where: str) -> Provenance:
        """Check the object's types; `InvalidInput` names the file."""
        try:
            check_version(value.get("version", 1), VERSION, f"{where}: adapter")
            maps: dict[str, Json] = {name: dict(value.get(_key(name)) or {}) for name in _MAPPINGS}
            texts: dict[str, Json] = {name: value.get(name) for name in ("basis_file", "live_prefix")}
            found = cls(form=value["form"], seed=value.get("seed"), **texts, **maps)
        except (TypeError, KeyError, ValueError, AttributeError):
            raise InvalidInput(f"{where}: damaged frodctl object") from None
        for key, holds in found._fields_hold():
            if not holds:
                raise InvalidInput(f"{where}: damaged frodctl object: {key}")
        if "digest" in value and value["digest"] != digest_of(value):
            raise InvalidInput(f"{where}: its config's frodctl object was changed since it was saved (digests differ)")
        return found

    def as_json(self) -> dict[str, object]:
        """For the config, with a digest of all the rest."""
        value = {_key(name): item for name, item in asdict(self).items()}
        return value | {"digest": digest_of(value)}

    def _fields_hold(self) -> Iterator[tuple[str, bool]]:
        yield "form", self.form in ("delta", "reconstruct")
        yield "seed", self.seed is None or is_seed(self.seed)
        for name in ("basis_file", "live_prefix"):
            yield name, isinstance(getattr(self, name), str | None)
        for name in ("V_digests", "base_digests", "categories", "pattern", "digests"):
            yield _key(name), is_text_map(getattr(self, name))
        yield "dtype", all(name in FLOAT_DTYPES for name in self.dtype.values())
        yield "sparsity", all(is_rate(rate) for rate in self.sparsity.values())
        yield "head", _is_head(self.head)
        yield "shapes", all(map(_is_shape, self.shapes.values()))
        yield "quantization", not self.quantization or _is_quantization(self.quantization)


def _key(field: str) -> str:
    """What a field of `Provenance` is called in the config."""
    return {"V_digests": "basis", "base_digests": "base"}.get(field, field)


#: PEFT's task types whose heads have labels.
LABELLING_TASKS = ("SEQ_CLS", "TOKEN_CLS")
#: What a config.json, and so `Provenance.head`, says of a head's labels.
LABEL_KEYS = ("id2label", "label2id", "problem_type")
#: Those fields of `Provenance` that are JSON objects.
_MAPPINGS = (
    "V_digests", "base_digests", "sparsity", "categories", "pattern", "dtype", "head", "digests", "shapes",
    "quantization",
)  # fmt: skip


def _is_shape(shape: Json) -> bool:
    return isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)


def _is_quantization(found: Mapping[str, Json]) -> bool:
    modules = found.get("modules")
    return (
        isinstance(found.get("kind"), str)
        and (found.get("dtype") is None or found["dtype"] in FLOAT_DTYPES)
        and isinstance(modules, list)
        and all(isinstance(module, str) for module in modules)
    )


def _is_head(head: Mapping[str, Json]) -> bool:
    texts = [head[key] for key in ("architecture", "problem_type") if key in head]
    labels, numbers = head.get("id2label", {}), head.get("label2id", {})
    return (
        all(isinstance(text, str) for text in texts)
        and is_text_map(labels)
        and isinstance(numbers, dict)
        and all(type(number) is int for number in numbers.values())
    )


@dataclass(frozen=True)
class TrainedModule:
    """What was trained of one targeted layer."""

    module: str  #: its path in the live model
    category: str
    scales: TensorInfo  #: λ'
    values: TensorInfo | None  #: of S; None where it has no positions
    base_scales: TensorInfo | None  #: λ, where training began; None where the basis file says it
    checkpoint_path: str | None  #: its path in the checkpoint; None in PEFT's own adapters, as is the next
    digest: str | None  #: ``sha256:…`` of its weight's bytes there

    @property
    def n(self) -> int:
        return self.scales.shape[0]

    @property
    def nnz(self) -> int:
        """Number of values of S."""
        return self.values.shape[0] if self.values is not None else 0


@dataclass(frozen=True)
class Adapter:
    """A validated adapter; its tensors are read when asked for."""

    name: str  #: as its user named it
    root: Path | None  #: the folder with its files; None where only headers were fetched
    config: Mapping[str, object]
    provenance: Provenance | None  #: None for PEFT's own
    modules: tuple[TrainedModule, ...]
    V: Mapping[str, TensorInfo]  #: by category
    indices: Mapping[str, TensorInfo]  #: the pattern by category
    sizes: Mapping[str, TensorInfo]  #: of S by category
    replaced: Mapping[str, TensorInfo] = field(repr=False)  #: trained tensors by their names in the live model
    tensors: Mapping[str, TensorInfo] = field(repr=False)  #: all of them, by their names in the file

    @property
    def categories(self) -> dict[str, int]:
        """The categories and their n."""
        return {module.category: module.n for module in self.modules}

    def files(self) -> list[Path]:
        """Its config and its weights; none of headers alone."""
        return [] if self.root is None else [self.root / CONFIG_FILE, self.root / self.modules[0].scales.file]

    @property
    def lacking(self) -> list[str]:
        """The categories whose V it does not hold."""
        return sorted(set(self.categories) - set(self.V))

    @property
    def base_model(self) -> str | None:
        """The base model that the config names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def task(self) -> str | None:
        """PEFT's task type."""
        task = self.config.get("task_type")
        return task if isinstance(task, str) else None

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The ends of the paths of the modules that were trained as a whole."""
        named = self.config.get("modules_to_save")
        return tuple(named) if isinstance(named, list) else ()  # of strings, which is checked

    def tensor(self, info: TensorInfo) -> HostArray:
        """The tensor, in its stored dtype; `InvalidInput` where it is not the recorded one, or not finite."""
        import numpy as np

        from frodctl.checkpoint.stream import read_tensor

        assert self.root is not None
        found = read_tensor(self.root, info)
        check_digest(found, self._digest(info.name), f"{self.name}: tensor {info.name}")
        if info.dtype in FLOAT_DTYPES and not np.isfinite(found).all():
            raise InvalidInput(f"{self.name}: tensor {info.name} holds NaN or Inf")
        return found

    def _digest(self, tensor: str) -> str | None:
        """What is recorded of a tensor; nothing in PEFT's own adapters."""
        if self.provenance is None:
            return None
        category = tensor.removeprefix("base_model.frod_V.")
        return self.provenance.V_digests[category] if category != tensor else self.provenance.digests.get(tensor)

    def positions_count(self, category: str) -> int | None:
        """How many positions S has there, as headers and config say; None where they do not."""
        own, n = self.provenance, self.categories[category]
        if category in self.indices:
            return self.indices[category].shape[1]
        if own is not None and own.seed is None:
            return None
        rate = self.config.get("sparse_rate") if own is None else own.sparsity.get(category)
        return nnz(n, rate) if rate is not None and is_rate(rate) else None

    def is_saved_module(self, tensor: str) -> bool:
        """Whether the tensor (its name in the live model) is of a module that was trained as a whole."""
        parents = tensor.split(".")[:-1]
        paths = [".".join(parents[: count + 1]) for count in range(len(parents))]
        return any(path.endswith(entry) for path in paths for entry in self.modules_to_save)  # as PEFT has it


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
        from frodctl.checkpoint.hub_errors import is_offline

        if headers_only and not is_offline(location):
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


def is_adapter(location: Location) -> bool:
    """Whether an adapter is there, rather than a model or anything else; errors are those of `open_adapter`."""
    path = location.local_path()
    if location.file or (path is not None and path.is_file()):
        return (location.file or Path(location.model).name) in ADAPTER_FILES[1:]
    if path is None:
        from frodctl.checkpoint import hub

        files = hub.list_files(location)
    else:
        folder = path / location.subfolder
        files = [str(p.relative_to(folder)) for p in (*folder.glob("*"), *folder.glob(f"*/{CONFIG_FILE}"))]
    # beside an adapter a trainer may keep its state under a model's usual name
    is_model = "config.json" in files and any(file in WEIGHT_FILES for file in files)
    return not is_model and any(PurePosixPath(file).name == CONFIG_FILE for file in files)


def _choose(where: str, configs: Sequence[str], name: str | None) -> str:
    """The config of the adapter called ``name`` among the paths of all that are there."""
    by_name = {"default" if path == CONFIG_FILE else str(PurePosixPath(path).parent): path for path in configs}
    if not by_name:
        raise InvalidInput(f"{where}: no adapter here ({CONFIG_FILE} is missing)")
    if name is None and len(by_name) > 1 and "default" not in by_name:
        raise UsageError(f"{where}: several adapters here; choose one (`adapter_name`): {', '.join(by_name)}")
    chosen = name or ("default" if "default" in by_name else next(iter(by_name)))
    if chosen not in by_name:
        raise UsageError(f"{where}: no adapter called {chosen}; there are: {', '.join(by_name)}")
    return by_name[chosen]


def _weights(folder: Path) -> Path:
    for file in ADAPTER_FILES[1:]:
        if (folder / file).is_file():
            return folder / file
    raise InvalidInput(f"{folder}: no adapter weights here ({' or '.join(ADAPTER_FILES[1:])})")


def _provenance(name: str, config: Mapping[str, object], infos: Sequence[TensorInfo]) -> Provenance | None:
    """Who wrote the adapter: None for PEFT."""
    kind, own = config.get("peft_type"), config.get("frodctl")
    ours = own is not None and isinstance(kind, str) and kind.startswith("frodctl")
    if kind != "FROD" and not ours:
        raise InvalidInput(f"{name}: an adapter of type {kind}, not FROD")
    if own is None and any(info.name.endswith(".frod_lambda_0") for info in infos):
        raise InvalidInput(f"{name}: its config lacks the frodctl object that it was saved with")
    return Provenance.from_config(own, name) if own is not None else None


def _adapter(name: str, root: Path | None, config: dict[str, object], infos: Sequence[TensorInfo]) -> Adapter:
    provenance = _provenance(name, config, infos)
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(entry, str) and entry for entry in saved)):
        raise InvalidInput(f"{name}: modules_to_save in its config is {saved!r}, not a list of names")
    shared: dict[str, dict[str, TensorInfo]] = {kind: {} for kind in ("V", "indices", "sizes")}
    trained: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for info in infos:
        inner = info.name.removeprefix("base_model.")
        kind, _, category = inner.partition(".")
        if inner == info.name or (kind not in _SHARED and kind != "model") or not category:
            raise InvalidInput(f"{name}: tensor {info.name} is of no FRoD adapter")
        if kind in _SHARED and category in shared[_SHARED[kind]]:
            raise InvalidInput(f"{name}: tensor {info.name} is there under another name too")
        if kind in _SHARED:
            shared[_SHARED[kind]][category] = info
        elif match := _MODULE.fullmatch(category):
            trained.setdefault(match["module"], {})[match["what"]] = info
        elif ".original_module." not in info.name:  # PEFT's copy of the base's, which the trained module replaces
            replaced[re.sub(r"\.(base_layer|modules_to_save)(?=\.)", "", f".{category}")[1:]] = info
    modules = _modules(name, trained, provenance)
    tensors = {info.name: info for info in infos}
    adapter = Adapter(name, root, config, provenance, modules, **shared, replaced=replaced, tensors=tensors)
    _check_shapes(adapter)
    _check_counts(adapter)
    if provenance is not None:
        _check_records(adapter, provenance)
    return adapter


def _modules(
    name: str, trained: Mapping[str, Mapping[str, TensorInfo]], own: Provenance | None
) -> tuple[TrainedModule, ...]:
    if not trained:
        raise InvalidInput(f"{name}: no trained scales (frod_lambda_l) in this adapter")
    labels = own.categories if own else {}
    paths = names.match(trained, own.base_digests) if own else {}
    taken: set[str | None] = set()
    modules = []
    for module, parts in trained.items():
        if "lambda_l" not in parts:
            raise InvalidInput(f"{name}: module {module} has no frod_lambda_l")
        for info in parts.values():
            if len(info.shape) != 1 or info.dtype not in FLOAT_DTYPES:
                raise InvalidInput(f"{name}: tensor {info.name} is {info.dtype} {list(info.shape)}, expected a vector")
        category = labels.get(module) or names.peft_category(module)
        path = paths.get(module)
        if own and (path is None or path in taken):
            raise InvalidInput(f"{name}: its config has no digest of the base's weight of {module}")
        taken.add(path)
        digest = own.base_digests[path] if own and path else None
        scales, values, start = (parts.get(what) for what in ("lambda_l", "lambda_s_values", "lambda_0"))
        assert scales is not None
        modules.append(TrainedModule(module, category, scales, values, start, path, digest))
    return tuple(sorted(modules, key=lambda module: names.natural_key(module.module)))


def _check_shapes(adapter: Adapter) -> None:
    widths = adapter.categories
    if 0 in widths.values():
        raise InvalidInput(f"{adapter.name}: a module without scales")
    for shared in (adapter.V, adapter.indices, adapter.sizes):
        for category in set(shared) - set(widths):
            raise InvalidInput(f"{adapter.name}: tensor {shared[category].name} belongs to no trained module")
    expected: list[tuple[TensorInfo, tuple[int, ...], Sequence[str]]] = []
    expected += [(info, (2,), ("I64",)) for info in adapter.sizes.values()]
    expected += [(info, (widths[c], widths[c]), FLOAT_DTYPES) for c, info in adapter.V.items()]
    expected += [(info, (2, info.shape[-1] if info.shape else 0), ("I64",)) for info in adapter.indices.values()]
    for module in adapter.modules:
        n = (widths[module.category],)
        expected += [(info, n, FLOAT_DTYPES) for info in (module.scales, module.base_scales) if info is not None]
    for info, shape, dtypes in expected:
        if info.shape != shape or info.dtype not in dtypes:
            found = f"{info.dtype} {list(info.shape)}"
            raise InvalidInput(f"{adapter.name}: tensor {info.name} is {found}, expected {list(shape)}")


def _check_counts(adapter: Adapter) -> None:
    """S has a value of every module for every position."""
    for category in adapter.categories:
        modules = [module for module in adapter.modules if module.category == category]
        count = adapter.positions_count(category)
        if count is None:
            count = max(module.nnz for module in modules)
        for module in modules:
            if module.nnz != count:
                raise InvalidInput(
                    f"{adapter.name}: {module.module} has {module.nnz or 'no'} sparse values for the {count} positions "
                    f"of {category}"
                )


def _check_records(adapter: Adapter, own: Provenance) -> None:
    """What frodctl writes is complete, and says what it is."""

    def require(holds: bool, text: str) -> None:
        if not holds:
            raise InvalidInput(f"{adapter.name}: {text}")

    for key, holds in (("regularization_alpha", is_alpha), ("projection_prng_key", is_seed)):
        value = adapter.config.get(key)
        require(value is None or holds(value), f"{key} in its config is {value!r}")
    for category in adapter.categories:
        require(own.seed is None or category in own.sparsity, f"its config gives no sparsity for {category}")
        require(category not in adapter.V or category in own.V_digests, f"its config has no digest of V of {category}")
        known = own.seed is not None or category in adapter.indices or category in own.pattern
        require(known, f"its config has no digest of the positions of {category}")
    for module in adapter.modules:
        began = module.base_scales is not None or module.category not in adapter.V
        require(own.form != "delta" or began, f"{module.module} has no frod_lambda_0, where its training began")
    if own.digests or adapter.config["peft_type"] != "FROD":  # the first adapters were of that type and had none
        others = set(adapter.tensors) - {info.name for info in adapter.V.values()}
        for tensor in sorted(others - set(own.digests)):
            require(False, f"its config has no digest of tensor {tensor}")
        for tensor in sorted(set(own.digests) - others):
            require(False, f"tensor {tensor}, of which its config has a digest, is missing")
    for entry in adapter.modules_to_save:
        there = any(f".{entry}." in f".{tensor}" for tensor in adapter.replaced)
        require(there, f"{entry} was trained as a whole (modules_to_save), but none of its tensors is there")


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
    folder: Path, tensors: Mapping[str, HostArray], config: Mapping[str, object], provenance: Provenance, card: str
) -> None:
    """Write an adapter's files into a folder, which may hold others; a reader finds all of it or none.

    Parameters
    ----------
    folder : Path
        Made where it is not there.
    tensors : mapping of str to ndarray
        By the names that the ``…_key`` functions give.
    config : mapping
        PEFT's fields; ``peft_type`` is this format's own.
    provenance : Provenance
        Without ``digests``, which are the tensors'.
    card : str
        README.md; one that is there already is kept.

    Raises
    ------
    UsageError
        The folder holds an adapter that frodctl did not write, or cannot be written to.
    """
    from frodctl.checkpoint.stream import digest

    if (folder / "config.json").exists():
        raise UsageError(
            f"{folder}: holds a model (config.json), which transformers would load with the adapter; name another"
        )
    if (folder / CONFIG_FILE).is_file():
        ours = "frodctl" in read_json(folder / CONFIG_FILE)
    else:  # of a run that was killed as it saved
        ours = not (folder / ADAPTER_FILES[1]).exists() or _is_ours(folder / ADAPTER_FILES[1])
    if not ours:
        raise UsageError(f"{folder}: holds an adapter that is not frodctl's; name another folder")
    digests = {name: digest(t) for name, t in tensors.items() if not name.startswith("base_model.frod_V.")}
    own = replace(provenance, digests=digests).as_json()
    text = json.dumps({**config, "peft_type": PEFT_TYPE, "frodctl": own}, indent=2, sort_keys=True) + "\n"
    writers: dict[str, Callable[[IO[bytes]], None]] = {}
    if not (folder / "README.md").exists():
        writers["README.md"] = lambda file: _write_text(file, card)
    writers[ADAPTER_FILES[1]] = lambda file: _write_weights(file, tensors)
    writers[CONFIG_FILE] = lambda file: _write_text(file, text)
    sink.replace_files(folder, writers)


def _is_ours(weights: Path) -> bool:
    """Whether a file without its config holds what an adapter of frodctl's does."""
    try:
        return any(name.endswith(".frod_lambda_l") for name in codec.read_header(weights).tensors)
    except InvalidInput:
        return False


def write_tensors(file: IO[bytes], tensors: Mapping[str, HostArray]) -> None:
    """Write a safetensors file of contiguous arrays."""
    from frodctl.arrays import NAMES
    from frodctl.checkpoint.stream import tensor_bytes

    specs = codec.layout(codec.TensorSpec(name, NAMES[t.dtype], t.shape) for name, t in tensors.items())
    codec.write_file(file, specs, {"format": "pt"}, (tensor_bytes(tensors[spec.name]) for spec in specs))


def _write_weights(file: IO[bytes], tensors: Mapping[str, HostArray]) -> None:
    write_tensors(file, tensors)
    file.flush()
    codec.read_header(Path(file.name))  # before it gets its name: everyone must be able to open it


def _write_text(file: IO[bytes], text: str) -> None:
    file.write(text.encode(errors="replace"))
