"""Rows and summaries that need nothing but headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from frodctl.checkpoint import names, targets
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.quantized import refuse_quantized
from frodctl.checkpoint.records import Checkpoint, TensorInfo
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats.adapter import Adapter
from frodctl.formats.basis_file import BasisFile
from frodctl.method import budget


def tensor_values(info: TensorInfo) -> dict[str, Json]:
    """The first columns of a checkpoint's row."""
    return {"name": info.name, "shape": list(info.shape), "dtype": info.stored_dtype, "parameters": info.parameters}


def place_values(info: TensorInfo) -> dict[str, Json]:
    """The last columns of a checkpoint's row."""
    place = {"role": _role(info.name), "layer": names.layer_index(info.name), "file": info.file}
    return place | {"bytes": info.stored_bytes}


def _role(name: str) -> str:
    name, _, _ = name.partition("[")  # of an expert in a fused tensor
    return names.role(name.removesuffix(".weight")) + (".weight" if name.endswith(".weight") else "")


def checkpoint_summary(checkpoint: Checkpoint) -> dict[str, Json]:
    """What a checkpoint is, its tensors by role, and what `frodctl decompose` would take."""
    config = checkpoint.config
    architectures = config.get("architectures")
    tensors = list(checkpoint.tensors.values())
    bytes_by_dtype = Counter[str]()
    for part in (part for info in tensors for part in info.parts):
        bytes_by_dtype[part.dtype] += part.nbytes
    return {
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "model_type": config.get("model_type"),
        "revision": checkpoint.revision,
        "tensors": len(tensors),
        "parameters": checkpoint.parameters(),
        "bytes": sum(bytes_by_dtype.values()),
        "bytes_by_dtype": dict(bytes_by_dtype.most_common()),
        "shards": len({part.file for info in tensors for part in info.parts}),
        "roles": _roles(tensors),
        "decompose": _decomposable(checkpoint),
    }


def _roles(tensors: Sequence[TensorInfo]) -> list[dict[str, Json]]:
    groups: dict[str, list[TensorInfo]] = {}
    for info in sorted(tensors, key=lambda t: names.natural_key(t.name)):
        groups.setdefault(_role(info.name), []).append(info)
    return [
        {
            "role": role,
            "tensors": len(group),
            "shapes": [list(shape) for shape in dict.fromkeys(info.shape for info in group)],
            "dtypes": list(dict.fromkeys(info.stored_dtype for info in group)),
            "parameters": sum(info.parameters for info in group),
            "bytes": sum(info.stored_bytes for info in group),
        }
        for role, group in groups.items()
    ]


def _decomposable(checkpoint: Checkpoint) -> dict[str, Json]:
    """Categories under the default target modules if the model type has them, else under all-linear."""
    try:
        refuse_quantized(checkpoint)
    except InvalidInput:
        return {"target_modules": None, "categories": [], "reason": "the weights are quantized"}
    for target_modules in ("default", "all-linear"):
        try:
            selected = targets.select(checkpoint, target_modules).targets
        except UsageError:
            continue
        labels, _ = names.categories({target.module: target.n for target in selected})
        counts = Counter(labels[target.module] for target in selected)
        widths = {labels[target.module]: target.n for target in selected}
        found = [{"category": name, "layers": counts[name], "n": widths[name]} for name in sorted(counts)]
        return {"target_modules": target_modules, "categories": found, "reason": None}
    return {"target_modules": None, "categories": [], "reason": "no linear layers in numbered blocks"}


def basis_rows(basis: BasisFile) -> list[dict[str, Json]]:
    """A row for every tensor of a basis file, category by category: V, τ, the pattern if it is there, the scales."""
    categories = {f"lambda.{module.name}": module for module in basis.metadata.modules}
    rows: list[dict[str, Json]] = []
    for name in sorted(basis.header.tensors, key=names.natural_key):
        spec, _ = basis.header.tensors[name]
        module = categories.get(name)
        category = module.category if module else name.partition(".")[2]
        parameters = 1
        for size in spec.shape:
            parameters *= size
        rows.append(
            {"name": name, "shape": list(spec.shape), "dtype": spec.dtype, "parameters": parameters}
            | {"category": category, "layer": module.layer if module else None}
        )
    kinds = {"V": 0, "tau": 1, "indices": 2, "lambda": 3}
    return sorted(rows, key=lambda row: (row["category"], kinds.get(row["name"].partition(".")[0], 4)))


def basis_summary(basis: BasisFile, parameters: int | None) -> dict[str, Json]:
    """What a basis is of; ``parameters`` are the base's, if it is at hand."""
    metadata = basis.metadata
    categories: list[dict[str, Json]] = []
    for category in sorted(metadata.V_digests):
        n, rate = basis.width(category), metadata.sparsity[category]
        layers = [module for module in metadata.modules if module.category == category]
        categories.append(
            {
                "category": category,
                "n": n,
                "layers": len(layers),
                "sparsity": rate,
                "nnz": budget.nnz(n, rate),
                "trainable_parameters": len(layers) * budget.trainable(n, rate),
                "parameters": sum(module.shape[0] * module.shape[1] for module in layers),
            }
        )
    trainable = sum(category["trainable_parameters"] for category in categories)
    targeted = sum(category["parameters"] for category in categories)
    return {
        "model": metadata.model,
        "revision": metadata.revision,
        "tool": metadata.tool,
        "alpha": metadata.alpha,
        "seed": metadata.seed,
        "share_input": metadata.share_input,
        "peft_loadable": metadata.peft_loadable,
        "modules": len(metadata.modules),
        "trainable_parameters": trainable,
        "trainable_share_of_targets": trainable / targeted if targeted else None,
        "trainable_share": trainable / parameters if parameters else None,
        "categories": categories,
    }


def adapter_rows(adapter: Adapter) -> list[dict[str, Json]]:
    """A row for every trained module of an adapter, then for every tensor that was trained as a whole."""
    rows = []
    for module in adapter.modules:
        parameters = module.n + module.nnz
        rows.append(
            {"name": module.module, "shape": [module.n], "dtype": module.scales.dtype, "parameters": parameters}
            | {"category": module.category, "layer": names.layer_index(module.module), "nnz": module.nnz}
        )
    for name, info in sorted(adapter.replaced.items(), key=lambda item: names.natural_key(item[0])):
        rows.append(
            {"name": name, "shape": list(info.shape), "dtype": info.dtype, "parameters": info.parameters}
            | {"category": "trained as a whole", "layer": names.layer_index(name), "nnz": None}
        )
    return rows


def adapter_summary(adapter: Adapter) -> dict[str, Json]:
    """What an adapter is of, who wrote it, and whether its V is in it."""
    config = adapter.config
    own = adapter.provenance
    counts = Counter(module.category for module in adapter.modules)
    nnz = {module.category: module.nnz for module in adapter.modules}
    return {
        "base": adapter.base_model,
        "written_by": "frodctl" if own else f"PEFT {config.get('peft_version') or '(version unknown)'}",
        "form": own.form if own else "reconstruct",
        "task_type": adapter.task,
        "basis": "elsewhere" if adapter.lacking else "in the adapter",
        "modules": len(adapter.modules),
        "whole_tensors": len(adapter.replaced),
        "trainable_parameters": sum(row["parameters"] for row in adapter_rows(adapter)),
        "seed": own.seed if own else config.get("projection_prng_key"),
        "categories": [
            {"category": category, "n": n, "layers": counts[category], "nnz": nnz[category]}
            for category, n in sorted(adapter.categories.items())
        ],
    }
