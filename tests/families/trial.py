"""One family's model through all that a user does with it: decompose, attach, train, save, load, merge, load again."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

import frodctl
from frodctl.training.attached import updates_of
from tests.families.recipes import STEPS, Family, Values

STEPS_OF_TRAINING = 3
#: How far two outputs that are equal but for rounding may be apart, of their size.
TOLERANCE = 1e-5
#: How far the outputs must have gone from the base's for that to mean anything.
MOVED = 1e-3


class Wrong(Exception):
    """A step ended, with a result that is not right."""


def tried(family: Family, folder: Path) -> dict[str, Any]:
    """What came of each step: ok, ``refused: `` and the sentence, or ``failed: `` and the error; nothing after that."""
    torch.manual_seed(0)
    trial = Trial(family, folder)
    row: dict[str, Any] = {"family": family.name, "class": family.model, "layers": 0, "note": ""}
    for step in STEPS:
        if step == "experts" and not family.experts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row[step] = _outcome(trial, step)
        row |= {"layers": len(trial.wanted), "note": trial.note}
        if row[step] != "ok" and step != "experts":
            break
    return row


def _outcome(trial: Trial, step: str) -> str:
    try:
        getattr(trial, step)()
    except frodctl.FrodctlError as error:
        return f"refused: {error}"
    except Exception as error:  # whatever it is, it is this family's result
        return f"failed: {type(error).__name__}: {error}"
    return "ok"


class Trial:
    """A family's model on disk and in memory; its methods are the steps, in order."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.base, self.basis = folder / "base", folder / "basis.safetensors"
        self.inputs = given(family.inputs)
        self.exclude = family.experts
        self.targets: dict[str, str] = {}  # the tensors by module
        self.note = ""

    @property
    def wanted(self) -> list[str]:
        """The modules to train."""
        return [module for module in self.targets if not re.fullmatch(self.exclude, module)]

    def decompose(self) -> None:
        """Everything that is linear, with nothing left out without a reason."""
        saved_model(self.family, self.base)
        plan = frodctl.decompose(self.base, self.basis, target_modules="all-linear").plan
        targets = [target for category in plan.categories for target in category.targets]
        inside = {target.tensor.name for target in targets}
        matrices = {name for name, info in plan.checkpoint.tensors.items() if len(info.shape) > 1}
        require(matrices == inside | {item.name for item in plan.left_out}, "a matrix is left out without a reason")
        self.targets = {target.module: target.tensor.name for target in targets}

    def experts(self) -> None:
        """All of the basis, experts and all."""
        frodctl.attach(self.loaded(self.base), self.basis)
        self.exclude = ""

    def attach(self) -> None:
        """All of the basis, or all but the experts where they were refused; the outputs are the base's, bit for bit."""
        self.model = self.loaded(self.base)
        self.before = self.outputs(self.model)
        frodctl.attach(self.model, self.basis, exclude_modules=self.exclude or None)
        after = self.outputs(self.model)
        require(all(map(torch.equal, self.before, after)), "the outputs are not the base's, bit for bit")

    def train(self) -> None:
        """A few steps, which change the outputs."""
        groups = frodctl.parameter_groups(self.model, rho_lambda=0.03, rho_sparse=0.03)
        optimizer = torch.optim.Adam(groups)
        for _ in range(STEPS_OF_TRAINING):
            sum(output.square().mean() for output in self.outputs(self.model, grad=True)).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        self.live = self.outputs(self.model)
        require(distance(self.before, self.live) > MOVED, "the outputs are still the base's")
        still = [path for path, update in updates_of(self.model, "default").items() if not update.delta.any()]
        self.note = f"no gradient in {len(still)} of them" if still else ""

    def load(self) -> None:
        """The saved adapter, over a fresh base, computes what the trained model does."""
        frodctl.save_adapter(self.model, self.folder / "adapter")
        model = self.loaded(self.base)
        frodctl.load_adapter(model, self.folder / "adapter", self.basis)
        self.require_alike(model, "the loaded adapter's outputs")

    def merge(self) -> None:
        """The merged checkpoint, in transformers, computes it too; what was not trained has the base's bytes."""
        out = self.folder / "merged"
        result = frodctl.merge(self.base, self.folder / "adapter", out, basis=self.basis)
        merged = {weight.target.tensor.name for weight in result.plan.weights}
        wanted = {self.targets[module] for module in self.wanted}
        require(merged == wanted, f"{', '.join(sorted(wanted - merged))}: decomposed, but not trained")
        before, after = tensors_in(self.base), tensors_in(out)
        require(before.keys() == after.keys(), "the merged checkpoint has other tensors")
        changed = {name for name, tensor in before.items() if not same_bytes(tensor, after[name])}
        require(changed <= merged, f"{', '.join(sorted(changed - merged))}: changed, but not trained")
        self.require_alike(self.loaded(out), "the merged checkpoint's outputs")

    def require_alike(self, model: Any, what: str) -> None:
        far = distance(self.live, self.outputs(model))
        require(far <= TOLERANCE, f"{what} are {far:.1e} of their size from those of the trained model")

    def loaded(self, folder: Path) -> PreTrainedModel:
        kind: type[PreTrainedModel] = getattr(transformers, self.family.model)
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        wrong = {key: sorted(names) for key, names in report.items() if names and key != "unexpected_keys"}
        require(not wrong, f"transformers loads {folder.name} with {json.dumps(wrong)}")
        # frozen, as attach leaves it: torch.matmul multiplies otherwise where a gradient is asked for
        return without_cache(model).eval().requires_grad_(False)

    def outputs(self, model: Any, *, grad: bool = False) -> list[torch.Tensor]:
        """Everything in floating point that the model gives."""
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            found = model(**self.inputs).to_tuple()
        found = [output for output in found if torch.is_tensor(output) and output.is_floating_point()]
        require(all(output.isfinite().all() for output in found), "NaN or Inf in the outputs")
        return found


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


def saved_model(family: Family, folder: Path) -> Any:
    """Save the family's model, with random weights of a size at which every layer counts; returns it."""
    torch.manual_seed(0)
    kind = getattr(transformers, family.model)
    model = kind(kind.config_class(**copy.deepcopy(family.config))).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # no direction that a layer nearly lacks: there rounding would count for more than it does in a model
                torch.nn.init.orthogonal_(parameter)
                parameter.add_(torch.randn(parameter.shape), alpha=0.3 * max(1, parameter[:1].numel()) ** -0.5)
            else:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(folder)
    return model


def without_cache(model: Any) -> Any:
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = False
    return model


def given(inputs: Values) -> dict[str, torch.Tensor]:
    """The inputs of a recipe as tensors."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(value, generator=generator) if isinstance(value, tuple) else torch.tensor(value)
        for name, value in inputs.items()
    }


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest difference of two models' outputs, of the outputs' size where that is more than 1."""
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in zip(first, second, strict=True))


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bytes(first: torch.Tensor, second: torch.Tensor) -> bool:
    same_kind = first.dtype == second.dtype and first.shape == second.shape
    return same_kind and first.numpy().tobytes() == second.numpy().tobytes()
