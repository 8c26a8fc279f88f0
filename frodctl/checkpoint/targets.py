"""Which weights of a checkpoint are decomposed, found from names, shapes and config alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from frodctl.checkpoint import names
from frodctl.checkpoint.codec import FLOAT_DTYPES
from frodctl.checkpoint.records import Checkpoint, TensorInfo
from frodctl.checkpoint.requests import Request
from frodctl.errors import FrodctlError, InvalidInput, UsageError

#: The modules that PEFT 0.21 adapts by default, by ``model_type``: names, or one regular expression.
DEFAULT_TARGETS: Mapping[str, str] = {
    **dict.fromkeys(
        "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm phi gemma gemma2 gemma3_text qwen2 qwen3".split(),
        "q_proj,v_proj",
    ),
    **dict.fromkeys("t5 mt5".split(), "q,v"),
    **dict.fromkeys("bert roberta xlm-roberta electra layoutlm vit".split(), "query,value"),
    **dict.fromkeys("bloom gpt_neox chatglm RefinedWeb RefinedWebModel falcon".split(), "query_key_value"),
    **dict.fromkeys("gpt2 gpt_bigcode".split(), "c_attn"),
    "mpt": "Wqkv",
    "codegen": "qkv_proj",
    "deberta": "in_proj",
    "deberta-v2": "query_proj,value_proj",
    "btlm": "c_proj,c_attn",
    "blip-2": "q,v,q_proj,v_proj",
    "nemotron_h": "q_proj,k_proj,v_proj,o_proj",
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "rwkv": "key,value,receptance,output",
    "rwkv7": "r_proj,k_proj,v_proj,o_proj,key,value",
}

#: Model types whose layers of these names are transformers' Conv1D, which stores the transposed weight.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")

#: Model types that store fused experts as (experts, in_features, out_features).
TRANSPOSED_EXPERT_MODELS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text")

_EMBEDDING = re.compile(
    r"embed(?!.*(proj|mapping))|^(wte|wpe|shared|relative_attention_bias|rel_pos.*|pos_emb.*)$", re.IGNORECASE
)
_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)
_ROUTER = re.compile(r"^(routers?|shared_expert_gate)$")
#: Fused experts (experts, out_features, in_features) whose path does not say so: GraniteMoE's, JetMoE's.
_FUSED_EXPERTS = ("input_linear", "output_linear")


@dataclass(frozen=True)
class Target:
    """One weight to decompose."""

    module: str  #: path in the checkpoint; a slice of a fused expert tensor ends in ``[7]``
    tensor: TensorInfo
    index: int | None  #: which slice of a fused expert tensor
    shape: tuple[int, int]  #: as stored
    transposed: bool  #: stored as (in_features, out_features)

    @property
    def m(self) -> int:
        """out_features"""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def n(self) -> int:
        """in_features"""
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def stored(self) -> TensorInfo:
        """The tensor that holds it and nothing else: the slice, of a fused one."""
        return self.tensor if self.index is None else self.tensor.slice(self.index)

    @property
    def named_conv1d(self) -> bool:
        """Whether it is called as transformers calls its transposed layers."""
        return self.module.rsplit(".", 1)[-1] in CONV1D_NAMES

    @property
    def nbytes(self) -> int:
        """Bytes it takes as it is read."""
        return self.stored.nbytes

    @property
    def layer(self) -> int | None:
        return names.layer_index(self.module)


@dataclass(frozen=True)
class LeftOut:
    """A matrix of the checkpoint that is not decomposed, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Selection:
    """What a request selects: the targets in natural order, and everything else with its reason."""

    targets: tuple[Target, ...]
    left_out: tuple[LeftOut, ...]


def select(
    checkpoint: Checkpoint,
    target_modules: str = "default",
    exclude_modules: str | None = None,
    layers: str | None = None,
) -> Selection:
    """Choose the weights to decompose.

    Parameters
    ----------
    checkpoint : Checkpoint
    target_modules : str
        ``default`` (PEFT's for the model type), ``all-linear`` (every linear layer inside the repeated
        blocks), module names separated by commas, or a regular expression that must match the whole path.
    exclude_modules : str, optional
        Names or a regular expression of modules to leave out.
    layers : str, optional
        Block numbers to take, such as ``0-11`` or ``0,2,8-11``.

    Raises
    ------
    UsageError
        Nothing, or one of several names, matches, or a block does not exist; the message says what there is.
    FrodctlError
        A shard that may hold some of them is not here.
    """
    modules = [name.removesuffix(".weight") for name in (*checkpoint.tensors, *checkpoint.absent)]
    default = _default_targets(checkpoint) if target_modules == "default" else None
    request = Request(target_modules, exclude_modules, layers, modules, default)
    targets: list[Target] = []
    left_out: list[LeftOut] = []
    linear: list[str] = []
    for info in sorted(checkpoint.tensors.values(), key=lambda t: names.natural_key(t.name)):
        module = info.name.removesuffix(".weight")
        reason = _not_linear(info, checkpoint)
        if reason is None:
            linear.append(module)
            reason = request.reason_against(module)
        if reason is None:
            targets += _targets(info, checkpoint)
        elif len(info.shape) > 1:
            left_out.append(LeftOut(info.name, info.shape, reason))
    _require_present(request, checkpoint)
    request.require_matches(linear)
    return Selection(tuple(targets), tuple(left_out))


def _require_present(request: Request, checkpoint: Checkpoint) -> None:
    """`FrodctlError` if a tensor that is not here is asked for, as far as its name tells."""
    for name, shard in checkpoint.absent.items():
        if not is_table(name) and request.reason_against(name.removesuffix(".weight")) is None:
            raise FrodctlError(
                f"{checkpoint.model}: {shard}, which has {name}, is not in the local cache; run without `offline`"
            )


def linear_layers(checkpoint: Checkpoint) -> dict[str, tuple[TensorInfo, int | None]]:
    """What may be the weight of a linear layer, or of one of several experts, by its module: the tensor, and which."""
    found: dict[str, tuple[TensorInfo, int | None]] = {}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if is_fused_experts(info):
            found |= {f"{module}[{index}]": (info, index) for index in range(info.shape[0])}
        elif name.endswith(".weight"):
            found[module] = info, None
    return found


def linear_layer(info: TensorInfo, index: int | None, checkpoint: Checkpoint) -> Target:
    """The tensor, or one that it stacks, as the weight of a linear layer.

    Raises
    ------
    InvalidInput
        It is no floating-point matrix.
    """
    if len(info.shape) != (2 if index is None else 3) or info.dtype not in FLOAT_DTYPES:
        what = f"{info.dtype} {list(info.shape)}"
        raise InvalidInput(f"{checkpoint.model}: tensor {info.name} is {what}, not the weight of a linear layer")
    return _targets(info, checkpoint)[index or 0]


def is_table(name: str) -> bool:
    """Whether a tensor of this name is an embedding's or a norm's, though it may be a matrix."""
    last = name.removesuffix(".weight").rpartition(".")[2]
    return _EMBEDDING.search(last) is not None or _NORM.search(last) is not None


def is_fused_experts(info: TensorInfo) -> bool:
    """Whether a tensor of three dimensions stacks the weights of experts."""
    *parents, last = info.name.removesuffix(".weight").split(".")
    return len(info.shape) == 3 and ("experts" in parents or last in _FUSED_EXPERTS)


def _not_linear(info: TensorInfo, checkpoint: Checkpoint) -> str | None:
    """Why the tensor is no linear layer's weight; None if it is one."""
    *parents, last = info.name.removesuffix(".weight").split(".")
    if info.dtype not in FLOAT_DTYPES:
        return f"not floating point ({info.dtype})"
    if is_fused_experts(info):
        return None if _expert_orientation(info, checkpoint) is not None else "experts of unknown orientation"
    if len(info.shape) != 2 or 0 in info.shape:
        return "not a matrix"
    if not info.name.endswith(".weight"):
        return "not the weight of a linear layer"
    if _EMBEDDING.search(last):
        return "an embedding"
    if _NORM.search(last):
        return "a norm"
    if any(_ROUTER.match(part) for part in [*parents, last]) or _gates_experts(parents, last, checkpoint):
        return "a router"
    return None


def _gates_experts(parents: list[str], last: str, checkpoint: Checkpoint) -> bool:
    prefix = ".".join([*parents, "experts."])
    return last == "gate" and any(name.startswith(prefix) for name in checkpoint.tensors)


def _expert_orientation(info: TensorInfo, checkpoint: Checkpoint) -> bool | None:
    """Whether a fused expert tensor stores each expert transposed; None where nothing tells.

    The layers around the experts have the model's hidden size, so a projection *into* the experts has it as
    in_features, and one out of them (``down_proj``, ``w2``, ``output_linear``) as out_features.
    """
    config = config_of(info.name, checkpoint.config)
    if config.get("model_type") in TRANSPOSED_EXPERT_MODELS:
        return True
    hidden = config.get("hidden_size", checkpoint.config.get("hidden_size"))
    parent = info.name.removesuffix(".weight").rpartition(".")[0] + "."
    # the tensor itself first; where it is square, the others of these experts tell
    fused = [info, *(t for t in checkpoint.tensors.values() if t.name.startswith(parent) and len(t.shape) == 3)]
    for name, (_, rows, columns) in ((t.name.removesuffix(".weight"), t.shape) for t in fused):
        if (rows == hidden) != (columns == hidden):
            out_of_experts = re.search(r"down|w2|output|out_proj", name.rpartition(".")[-1]) is not None
            return bool((columns if out_of_experts else rows) == hidden)
        if not hidden == rows == columns:
            return None
    return None if "experts" in parent else False


def _targets(info: TensorInfo, checkpoint: Checkpoint) -> list[Target]:
    module = info.name.removesuffix(".weight")
    if len(info.shape) == 3:
        transposed = bool(_expert_orientation(info, checkpoint))
        shape = (info.shape[1], info.shape[2])
        return [Target(f"{module}[{i}]", info, i, shape, transposed) for i in range(info.shape[0])]
    config = config_of(module, checkpoint.config)
    conv1d = config.get("model_type") in CONV1D_MODELS and module.rsplit(".", 1)[-1] in CONV1D_NAMES
    return [Target(module, info, None, (info.shape[0], info.shape[1]), conv1d)]


def config_of(name: str, config: Mapping[str, object]) -> Mapping[str, object]:
    """The part of a composite model's config that describes the tower this module is in."""
    parts = name.split(".")
    for key, part in config.items():
        tower = key.removesuffix("_config").removesuffix("_model")
        if isinstance(part, dict) and "model_type" in part and _in_tower(tower, parts):
            return part
    return config


def _in_tower(tower: str, parts: Collection[str]) -> bool:
    aliases = {"text": ("text_model", "language_model"), "vision": ("vision_model", "vision_tower", "visual")}
    return any(alias in parts for alias in (tower, f"{tower}_model", *aliases.get(tower, ())))


def _default_targets(checkpoint: Checkpoint) -> str:
    """PEFT's default for the type of this model."""
    model_type = str(checkpoint.config.get("model_type", ""))
    if model_type not in DEFAULT_TARGETS:
        without = "config.json names no model_type" if checkpoint.config else "no config.json here"
        what = f"no default targets for model type {model_type!r}" if model_type else without
        raise UsageError(f"{what}; give `target_modules`: all-linear, names or a regular expression")
    return DEFAULT_TARGETS[model_type]
