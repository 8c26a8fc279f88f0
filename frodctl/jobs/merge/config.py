"""The merged model's config.json: the base's, kept true."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from frodctl.checkpoint.codec import FLOAT_DTYPES, TensorSpec
from frodctl.formats.adapter import Adapter

_DTYPE_KEYS = ("dtype", "torch_dtype")
#: PEFT's task types, and what transformers calls a model for it.
_TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
TASKS_WITHOUT_LM_HEAD = (*_TASK_CLASSES, "FEATURE_EXTRACTION")
LABELLING_TASKS = ("SEQ_CLS", "TOKEN_CLS")


def usual_dtype(specs: Sequence[TensorSpec]) -> str:
    """The floating-point dtype that most of the parameters have."""
    counts = Counter[str]()
    for spec in specs:
        if spec.dtype in FLOAT_DTYPES:
            counts[spec.dtype] += spec.nbytes
    return counts.most_common(1)[0][0] if counts else "F32"


def edited(
    config: Mapping[str, Any],
    specs: Sequence[TensorSpec],
    added: Collection[str],
    replaced: Mapping[str, tuple[Any, Any]],
    adapter: Adapter,
    dtype: str,
) -> dict[str, Any] | None:
    """The config of the result; None where the base's own will do, or there is none.

    Parameters
    ----------
    config : mapping
        The base's.
    specs : sequence of TensorSpec
        The result's tensors.
    added, replaced : collection of str, mapping
        The tensors that the base does not have, and all that were trained as a whole.
    adapter : Adapter
        Its task says what kind of model the result is.
    dtype : str
        What was asked for: auto keeps the tensors' own.
    """
    if not config:
        return None
    result = copy.deepcopy(dict(config))
    if dtype != "auto":
        _set_dtype(result, dtype)
        if not any(key in result for key in _DTYPE_KEYS):
            result["torch_dtype"] = dtype  # which older and newer transformers read
    if added:
        _set_task(result, adapter)
    heads = {name for name in replaced if adapter.is_saved_module(name)}
    if heads:
        _set_labels(result, {spec.name: spec.shape for spec in specs if spec.name in heads}, adapter)
    return result if result != config else None


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    for key in _DTYPE_KEYS:
        if isinstance(config.get(key), str):
            config[key] = dtype
    for part in config.values():
        if isinstance(part, dict):
            _set_dtype(part, dtype)


def _class_of(adapter: Adapter) -> str | None:
    """The class that was trained, where PEFT says it: for models without a task type."""
    mapping = adapter.config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return named if isinstance(named, str) else None


def _set_task(config: dict[str, Any], adapter: Adapter) -> None:
    """Name the class that has the added head."""
    task = adapter.config.get("task_type")
    architectures = config.get("architectures")
    named = _class_of(adapter)
    if named is not None:
        config["architectures"] = [named]
    elif task in _TASK_CLASSES and isinstance(architectures, list) and architectures:
        stem = re.sub(r"(For[A-Z]\w*|LMHead|Double\w+)?(Model)?$", "", str(architectures[0]))
        config["architectures"] = [stem + _TASK_CLASSES[task]]


def _set_labels(config: dict[str, Any], heads: Mapping[str, tuple[int, ...]], adapter: Adapter) -> None:
    """Give the model as many labels as a classifying head has rows."""
    labelling = adapter.config.get("task_type") in LABELLING_TASKS or "Classification" in (_class_of(adapter) or "")
    rows = _head_rows(heads)
    labels = config.get("id2label")
    if labelling and rows and not (isinstance(labels, dict) and len(labels) == rows):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(rows)}
        config.pop("num_labels", None)


def _head_rows(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rows of the head's last layer: of several layers the one called so, else the last by name."""
    weights = sorted(name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2)
    last = [name for name in weights if name.split(".")[-2:-1] in (["out_proj"], ["classifier"], ["score"])]
    return shapes[(last or weights)[-1]][0] if weights else None
