"""Saving what was trained."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import frodctl
from frodctl import values
from frodctl.arrays import NAMED, NAMES, dtype_name, from_torch, to_torch
from frodctl.checkpoint import codec, names, sink
from frodctl.checkpoint.stream import digest
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats import adapter as adapter_format
from frodctl.formats.adapter import Provenance
from frodctl.training.attached import (
    Attached,
    added_prefixes,
    frod_layers,
    require_attachment,
    saved_modules,
    state_prefixes,
    updates_of,
)
from frodctl.training.experts import OneExpert
from frodctl.training.layer import Update
from frodctl.training.located import as_stored
from frodctl.training.quantized import quantization_of

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

#: PEFT's task types by what the model's class is called.
_TASKS = {
    r"For(Sequence|Image|Audio)Classification$": "SEQ_CLS",
    r"ForTokenClassification$": "TOKEN_CLS",
    r"ForQuestionAnswering$": "QUESTION_ANS",
    r"(ForCausalLM|LMHeadModel)$": "CAUSAL_LM",
    r"(?<!LMHead)(?<!DoubleHeads)Model$": "FEATURE_EXTRACTION",
}
#: The classes whose heads a checkpoint of the bare model lacks.
_WITH_A_HEAD = re.compile(r"(Classification|QuestionAnswering|ForCausalLM|LMHeadModel)$")
#: How many folders up, and down again, the way to a basis file may lead to be recorded.
_NEAR = 2
_CARD = """---
{fields}
---

# FRoD adapter

Trained by frodctl {version} on `{base}`. {holds}

    frodctl merge {base} ADAPTER OUT{basis}

folds it into dense weights; `frodctl.load_adapter` goes on training. PEFT refuses it: it would compute other columns U
than those that were trained{peft}; `frodctl.training.peft.load` makes PEFT's model of it.
"""


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str | None = None,
    self_contained: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save one adapter of a model, in PEFT's layout.

    Small by default: without V and, unless it was selected (`select_pattern`) or moved (`reallocate`), without the
    pattern; the basis file has them. PEFT refuses either kind, by its type, rather than load it with a U or V of its
    own.

    In distributed training one process saves. Only where parameters are sharded (``fully_shard``) and no gathered
    ``state_dict`` is given, all must call this, to gather them; the first of them writes.

    Parameters
    ----------
    model : Module
        With adapters attached.
    folder : path
        Made where it is not there; other files in it are left alone. An adapter not called "default" goes into the
        sub-folder of its name, as PEFT has it.
    adapter_name : str, optional
        By default the active one.
    self_contained : bool
        Save V, the pattern and λ too, so that `frodctl.merge` and `load_adapter` need no basis file. Always so where
        the adapter was loaded from such a one, without the file.
    state_dict : mapping of str to Tensor, optional
        The model's, with whole tensors, to take the trained numbers from.

    Returns
    -------
    Path
        The folder that holds the files.

    Raises
    ------
    UsageError
        No such adapter is attached, ``state_dict`` does not have it, or the folder is a file.
    InvalidInput
        A trained number is NaN or Inf, or the basis file has changed.
    """
    folder, self_contained = values.path(folder, "folder"), values.flag(self_contained, "self_contained")
    adapter_name = values.optional(values.text)(adapter_name, "adapter_name")
    values.require(
        state_dict is None or (isinstance(state_dict, Mapping) and all(isinstance(name, str) for name in state_dict)),
        "state_dict",
        state_dict,
        "expected tensors by name",
    )
    attachment = require_attachment(model)
    name = adapter_name or attachment.active
    if name not in attachment.adapters:
        raise UsageError(f"no adapter called {name} is attached; there are: {', '.join(attachment.adapters)}")
    attached = attachment.adapters[name]
    folder = folder if name == "default" else folder / name
    self_contained = self_contained or bool(attached.basis.aliases)
    updates = updates_of(model, name)
    patterns = {update.basis.category: update.pattern for update in updates.values()}
    tensors = _trained(model, name, attached, trained_state(model) if state_dict is None else state_dict)
    if self_contained:
        tensors |= _shared(attached, updates)
    elif attached.selected:
        tensors |= {adapter_format.indices_key(c): pattern.indices() for c, pattern in patterns.items()}
    shapes: dict[str, list[int]] = {}
    if attached.live_prefix is not None:
        shapes = {record.name: list(record.shape) for record in attached.modules.values()}
    provenance = Provenance(
        form="delta",
        V_digests=attached.V_digests,
        base_digests={record.name: record.digest for record in attached.modules.values()},
        seed=attached.seed,
        sparsity=dict(attached.sparsity),
        categories={p: r.category for p, r in attached.modules.items() if r.category != names.peft_category(p)},
        pattern={c: digest(_array(pattern.indices())) for c, pattern in patterns.items()},
        dtype={u.basis.category: NAMES[NAMED[dtype_name(u.basis.V)]] for u in updates.values() if u.basis.is_rounded},
        head=_head(model),
        live_prefix=attached.live_prefix,
        shapes=shapes,
        basis_file=None if self_contained else _seen_from(folder, attached.basis.path),
        quantization=quantization_of(model, attached.places),
    )
    config = _config(model, attached, tensors)
    if state_dict is not None or writes(model):
        arrays = {name: _array(tensor) for name, tensor in tensors.items()}
        adapter_format.write_adapter(folder, arrays, config, provenance, _card(config, self_contained))
    return folder


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained numbers of all adapters by their names in the model's state: those alone, as quantized layers may
    repack their weights for the rest. Sharded ones are gathered, for which every process must call this.
    """
    parts: list[tuple[str, nn.Module]] = [(f"{p}.adapters", m.adapters) for p, m in frod_layers(model).items()]
    parts += [(f"{path}.modules_to_save", m.modules_to_save) for path, m in saved_modules(model).items()]
    state = {f"{path}.{name}": tensor for path, part in parts for name, tensor in part.state_dict().items()}
    return {names.unwrapped(name): _whole(tensor) for name, tensor in state.items()}


def save_trained_state(model: nn.Module, file: Path, state: Mapping[str, Tensor]) -> None:
    """Save what ``state`` has of the trained numbers of all adapters under their names there, exactly as they are."""
    added = tuple(map(names.unwrapped, added_prefixes(model)))
    unwrapped = {names.unwrapped(name): tensor for name, tensor in state.items()}
    kept = {name: _array(tensor) for name, tensor in unwrapped.items() if name.startswith(added)}
    sink.replace_files(file.parent, {file.name: lambda out: adapter_format.write_tensors(out, kept)})


def _array(tensor: Tensor) -> HostArray:
    return from_torch(tensor.cpu().contiguous())


def writes(model: nn.Module) -> bool:
    """Whether this process is to write: of those that hold shards of the model (DTensors) the first alone."""
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters() if parameter.requires_grad)
    return not sharded or torch.distributed.get_rank() == 0


def _whole(tensor: Any) -> Any:
    """Gathered from all processes where it is a DTensor; its shard may be on the CPU, which NCCL cannot gather."""
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _trained(model: nn.Module, name: str, attached: Attached, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """λ' and S of an adapter, and the modules that it trained as a whole, by their names in the file."""
    state = {names.unwrapped(key): tensor for key, tensor in state.items()}
    tensors: dict[str, Tensor] = {}
    prefixes = state_prefixes(model, name)
    for module, update in updates_of(model, name).items():
        delta, sparse = (_number(state, f"{prefixes[module]}.{kind}") for kind in ("delta", "values"))
        _require_whole(module, delta, update)
        if isinstance(update, OneExpert):
            delta, sparse = delta[update.expert], sparse[update.expert]
        scales = update.base_scales.double() + delta.to(update.base_scales.device, torch.float64)
        # rows with λ = 0 drop out here, but PEFT would give them some U
        alive = update.base_scales > 0
        rows = update.pattern.indices()[0]
        tensors[adapter_format.lambda_key(module)] = torch.where(alive, scales, 0).float()
        tensors[adapter_format.values_key(module)] = torch.where(alive[rows], sparse.to(alive.device), 0)
    whole = {
        f"{path}.{key}": _number(state, f"{path}.modules_to_save.{name}.{key}")
        for path, saved in ((names.unwrapped(wrapped), saved) for wrapped, saved in saved_modules(model).items())
        if name in saved.modules_to_save
        for key in saved.modules_to_save[name].state_dict()
    }
    if attached.live_prefix is not None:
        whole = as_stored(model, whole)
    # copied, as FSDP's first version could not free what it gathered while numpy looks at it
    tensors |= {adapter_format.replaced_key(key): tensor.clone() for key, tensor in whole.items()}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InvalidInput(f"{key}: holds NaN or Inf; training has diverged")
    return tensors


def _number(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise UsageError(f"the state_dict has no {name}, which is trained; give the whole model's")
    values.require(isinstance(state[name], Tensor), "state_dict", state[name], f"{name} is no tensor")
    return state[name].detach()


def _require_whole(module: str, delta: Tensor, update: Update | OneExpert) -> None:
    """FSDP's first version and DeepSpeed ZeRO-3 leave each process a part of a parameter, or nothing, in its place."""
    expected = update.base_scales.numel()
    if delta.shape[-1:] != (expected,):
        raise UsageError(
            f"{module}: this process has {delta.numel()} of the {expected} numbers of λ'; save within FSDP's "
            "summon_full_params or DeepSpeed's GatheredParameters, or give a gathered `state_dict`"
        )


def _shared(attached: Attached, updates: Mapping[str, Update | OneExpert]) -> dict[str, Tensor]:
    """V as the basis file has it, pattern and λ."""
    basis = attached.basis
    opened = replace(basis, header=codec.read_header(basis.path))  # it may have been written again
    tensors: dict[str, Tensor] = {}
    for path, update in updates.items():
        tensors[adapter_format.base_scales_key(path)] = update.base_scales
        category = update.basis.category
        V, indices, size = adapter_format.shared_keys(category)
        if V not in tensors:
            if f"V.{category}" not in opened:
                raise InvalidInput(
                    f"{opened.path}: V.{category} is no longer there, and the adapter is trained with it"
                )
            tensors[V] = to_torch(opened.tensor(f"V.{category}"))
            tensors[indices] = update.pattern.indices()
            tensors[size] = torch.tensor([update.basis.n] * 2)
    return tensors


def _seen_from(folder: Path, basis: Path) -> str:
    """Where a basis file lies, seen from an adapter's folder; if that is far away, only its name."""
    try:
        path = Path(os.path.relpath(basis, folder.resolve()))
    except ValueError:  # on another drive
        return basis.name
    return path.as_posix() if path.parts.count("..") <= _NEAR else basis.name


def _head(model: nn.Module) -> dict[str, object]:
    """The class of a model with a head, which its checkpoint may lack, and the labels, as config.json has them."""
    config: Any = getattr(model, "config", None)
    labels, kind = getattr(config, "id2label", None), type(model).__name__
    if not isinstance(labels, dict) or not _WITH_A_HEAD.search(kind):
        return {}
    found: dict[str, object] = {"architecture": kind}
    if kind.endswith("Classification"):
        found["id2label"] = {str(number): str(label) for number, label in labels.items()}
        found["label2id"] = {str(label): int(number) for number, label in labels.items()}
        problem = getattr(config, "problem_type", None)
        found |= {"problem_type": problem} if isinstance(problem, str) else {}
    return found


def _config(model: nn.Module, attached: Attached, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """PEFT's fields."""
    saved = [name for name in attached.modules_to_save if any(f".{name}." in key for key in tensors)]
    kind = type(model)
    task = next((task for pattern, task in _TASKS.items() if re.search(pattern, kind.__name__)), None)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    basis = attached.basis.metadata
    return {
        "auto_mapping": mapping if task is None else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or basis.model,
        "bias": "none",
        "fan_in_fan_out": any(record.transposed for record in attached.modules.values()),
        "frod_dropout": attached.dropout,
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": saved or None,
        "projection_prng_key": basis.seed if attached.seed is None else attached.seed,
        "regularization_alpha": basis.alpha,
        "revision": basis.revision,
        "save_projection": True,
        "sparse_rate": max(attached.sparsity.values()),
        "target_modules": sorted(attached.modules, key=names.natural_key),
        "task_type": task,
    }


def _card(config: Mapping[str, Any], self_contained: bool) -> str:
    from huggingface_hub import ModelCardData

    base = Path(config["base_model_name_or_path"])
    name = str(base) if not base.is_absolute() else base.name
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in name)
    return _CARD.format(
        fields=ModelCardData(library_name="frodctl", base_model=text, tags=["frod"]).to_yaml(),
        base=text,
        version=frodctl.__version__,
        holds="It holds its basis." if self_contained else "Its basis is in the shared-basis file it was trained with.",
        basis="" if self_contained else " --basis FILE",
        peft="" if self_contained else ", and another V",
    )
