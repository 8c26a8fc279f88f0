"""The merged model's config.json: the base's, kept true."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from frodctl.adapted.opening import Source
from frodctl.checkpoint.codec import FLOAT_DTYPES, TensorSpec
from frodctl.checkpoint.inputs import Json
from frodctl.checkpoint.records import MODEL_DTYPES, TensorInfo
from frodctl.formats.adapter import LABEL_KEYS, LABELLING_TASKS, Adapter

_DTYPE_KEYS = ("dtype", "torch_dtype")
#: PEFT's task types, and what transformers calls a model for it.
_TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
#: What the Hub calls a model of such a class.
_PIPELINE_TAGS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
}
TASKS_WITHOUT_LM_HEAD = (*_TASK_CLASSES, "FEATURE_EXTRACTION")


def usual_dtype(specs: Sequence[TensorSpec]) -> str:
    """The floating-point dtype that most of the parameters have."""
    counts = Counter[str]()
    for spec in specs:
        if spec.dtype in FLOAT_DTYPES:
            counts[spec.dtype] += spec.nbytes
    return counts.most_common(1)[0][0] if counts else "F32"


def edited(
    config: Mapping[str, Json],
    specs: Sequence[TensorSpec],
    added: Collection[str],
    replaced: Mapping[str, tuple[Source, TensorInfo]],
    adapter: Adapter,
    dtype: str,
    quantization: Mapping[str, Json] | None = None,
) -> dict[str, Json] | None:
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
        What was asked for: auto keeps the tensors' own, and so does what is left beside weights in 8 bits.
    quantization : mapping, optional
        What to say of weights in 8 bits.
    """
    if not config:
        return None
    adapter = headed(adapter, added, replaced)
    result = copy.deepcopy(dict(config))
    _drop_quantization(result)
    if quantization is not None:
        result["quantization_config"] = dict(quantization)
    if dtype in MODEL_DTYPES:
        _set_dtype(result, dtype)
        if not any(key in result for key in _DTYPE_KEYS):
            result["torch_dtype"] = dtype  # which older and newer transformers read
    if added:
        _set_task(result, adapter)
    heads = _heads(replaced)
    _set_labels(result, {spec.name: spec.shape for spec in specs if spec.name in heads}, adapter)
    return result if result != config else None


def headed(first: Adapter, added: Collection[str], replaced: Mapping[str, tuple[Source, TensorInfo]]) -> Adapter:
    """The adapter that has the head, which says what kind of model the result is; else the first."""
    heads = _heads(replaced)
    return next((replaced[name][0].adapter for name in sorted(heads, key=lambda name: name not in added)), first)


def _heads(replaced: Mapping[str, tuple[Source, TensorInfo]]) -> set[str]:
    """The tensors of modules that were trained as a whole (the others are biases)."""
    return {name for name, (source, _) in replaced.items() if source.adapter.is_saved_module(name)}


def pipeline_tag(adapter: Adapter, added: Collection[str], base_tag: str | None) -> str | None:
    """The Hub's name for what the result is for: a classifier's own; else the base's, unless it got a new head."""
    named = class_of(adapter) or _TASK_CLASSES.get(adapter.task or "", "")
    own = next((tag for ending, tag in _PIPELINE_TAGS.items() if named.endswith(ending)), None)
    return own or (None if added else base_tag)


def _set_dtype(config: dict[str, Json], dtype: str) -> None:
    for key in _DTYPE_KEYS:
        if isinstance(config.get(key), str):
            config[key] = dtype
    for part in config.values():
        if isinstance(part, dict):
            _set_dtype(part, dtype)


def _drop_quantization(config: dict[str, Json]) -> None:
    """Weights that had scales are dense now."""
    for part in (config, *config.values()):
        if isinstance(part, dict) and part.get("quantization_config"):
            del part["quantization_config"]


def class_of(adapter: Adapter) -> str | None:
    """The class that was trained, where the adapter says it: PEFT's does for models without a task type."""
    if adapter.provenance is not None and "architecture" in adapter.provenance.head:
        return str(adapter.provenance.head["architecture"])
    mapping = adapter.config.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return named if isinstance(named, str) else None


def _set_task(config: dict[str, Json], adapter: Adapter) -> None:
    """Name the class that has the added head."""
    task = adapter.task
    architectures = config.get("architectures")
    named = class_of(adapter)
    if named is not None:
        config["architectures"] = [named]
    elif task in _TASK_CLASSES and isinstance(architectures, list) and architectures:
        stem = re.sub(r"(For[A-Z]\w*|LMHead|Double\w+)?(Model)?$", "", str(architectures[0]))
        sees_alone = task == "SEQ_CLS" and "num_channels" in config and "vocab_size" not in config
        config["architectures"] = [stem + ("ForImageClassification" if sees_alone else _TASK_CLASSES[task])]


def _set_labels(config: dict[str, Json], heads: Mapping[str, tuple[int, ...]], adapter: Adapter) -> None:
    """Give the model as many labels as a classifying head has rows, by the names that it was trained with."""
    labelling = adapter.task in LABELLING_TASKS or "Classification" in (class_of(adapter) or "")
    rows = _head_rows(heads)
    labels = config.get("id2label")
    if labelling and rows and not (isinstance(labels, dict) and len(labels) == rows):
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(rows)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(rows)}
        config.pop("num_labels", None)
    own = adapter.provenance.head if adapter.provenance else {}
    count = rows or len(labels if isinstance(labels, dict) else ())
    if labelling and count and count == len(own.get("id2label", ())):
        config.update({key: own[key] for key in LABEL_KEYS if key in own})
        config.pop("num_labels", None)


def _head_rows(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rows of the head's last layer: of several layers the one called so, else the last by name."""
    weights = sorted(name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2)
    last = [name for name in weights if name.split(".")[-2:-1] in (["out_proj"], ["classifier"], ["score"])]
    return shapes[(last or weights)[-1]][0] if weights else None
