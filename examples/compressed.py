"""What compression leaves of a fine-tuning: finetune.py's models, written down in fewer bytes, and their worth then.

    pip install 'frodctl[test]' && python examples/compressed.py

Two classifiers are trained as finetune.py does it, one by FRoD over a shared basis and one as a whole, at the middle of
the learning rates that are tried there. The weights of the encoder's linear layers are then written down in fewer
bytes: the adapter as LoRA by `frodctl.merge`; of the whole model what changed in them as FRoD and as LoRA by
`frodctl.extract`, and as its largest entries. The head and all other tensors stay as they were trained. Progress goes
to stderr, tables in markdown to stdout.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from finetune import (
    BUDGET,
    TARGETS,
    Classifier,
    Groups,
    Lab,
    Method,
    decompose,
    evaluate,
    mean,
    method_called,
    open_lab,
    say,
    table,
)
from torch import Tensor, nn

import frodctl

RANKS = [16, 64, 256]
BUDGETS = [BUDGET, 4 * BUDGET]
POSITION_BYTES = 4  # of an entry among the largest, beside four for its value

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """The weights of the linear layers, written down in some way."""

    name: str
    nbytes: int
    weights: Weights


@dataclass(frozen=True)
class Worth:
    """What a form keeps of the update, and what the model is worth with it."""

    nbytes: int
    kept: float  #: ⟨Δ, ΔW⟩/‖ΔW‖²
    distance: float  #: ‖Δ − ΔW‖/‖ΔW‖
    loss: float
    accuracy: float


Found = dict[str, list[Worth]]  # by form, of each seed


@dataclass(frozen=True)
class Setup:
    """The base, its basis, and a folder for what is written."""

    lab: Lab
    source: Path
    basis: Path
    folder: Path

    def trained(self, method: Method, seed: int, steps: int) -> Classifier:
        """A classifier at the middle of the method's rates, as training leaves it."""
        models: list[Classifier] = []

        def prepare(model: Classifier, rate: float) -> Groups:
            models.append(model)
            return method.prepare(model, rate)

        rate = method.rates[len(method.rates) // 2]
        self.lab.run(replace(method, prepare=prepare), rate, seed, steps, steps, self.lab.task.test)
        return models[0]

    def base(self) -> Form:
        return Form("the base's", 0, weights_of(self.lab.encoder))

    def as_lora(self, adapter: Path, rank: int) -> Form:
        """A LoRA adapter, merged by PEFT."""
        model = peft.PeftModel.from_pretrained(copy.deepcopy(self.lab.encoder), str(adapter))
        merged: Any = model.merge_and_unload()
        return Form(f"LoRA, r = {rank}", adapter_bytes(adapter), weights_of(merged))

    def merged(self, name: str, adapter: Path) -> Form:
        """A FRoD adapter, merged by frodctl."""
        output = frodctl.merge(self.source, adapter, self.folder / "merged", basis=self.basis, force=True).output
        merged = transformers.AutoModel.from_pretrained(output, add_pooling_layer=False)
        return Form(name, adapter_bytes(adapter), weights_of(merged))


def weights_of(encoder: nn.Module) -> Weights:
    """Of the linear layers that FRoD has for targets."""
    parameters = dict(encoder.named_parameters())
    return {name: W.detach() for name, W in parameters.items() if name.endswith(tuple(f"{t}.weight" for t in TARGETS))}


def adapter_bytes(adapter: Path) -> int:
    return (adapter / "adapter_model.safetensors").stat().st_size


def forms_of_adapter(setup: Setup, adapter: Path) -> Iterator[Form]:
    """A FRoD adapter, merged and as LoRA."""
    yield setup.base()
    yield setup.merged("FRoD, merged", adapter)
    output = setup.folder / "lora"
    for rank in RANKS:
        frodctl.merge(setup.source, adapter, output, as_="lora", rank=rank, basis=setup.basis, force=True)
        yield setup.as_lora(output, rank)


def of_adapters(setup: Setup, seeds: int, steps: int) -> Found:
    """Train FRoD adapters and try their forms."""
    method = method_called("frod", setup.source, setup.folder, setup.lab.task)
    found: Found = {}
    for seed in range(seeds):
        model = setup.trained(method, seed, steps)
        adapter = frodctl.save_adapter(model.encoder, setup.folder / "adapter")
        model.encoder = method.merge(model.encoder)
        compare(setup, model, forms_of_adapter(setup, adapter), found)
    return found


def forms_of_tuned(setup: Setup, tuned: Path, end: Weights) -> Iterator[Form]:
    """A model that was trained as a whole, itself and extracted: LoRA and the largest entries at FRoD's bytes."""
    yield setup.base()
    yield Form("full fine-tuning", sum(4 * W.numel() for W in end.values()), end)
    output = setup.folder / "extracted"
    rank_bytes = sum(4 * sum(W.shape) for W in end.values())
    for budget in BUDGETS:
        frodctl.extract(setup.source, tuned, output, as_="frod", basis=setup.basis, budget=budget, force=True)
        frod = setup.merged(f"FRoD, budget {budget:.2%}", output)
        yield frod
        rank = round(frod.nbytes / rank_bytes)
        frodctl.extract(
            setup.source, tuned, output, target_modules=TARGETS, exclude_modules="pooler.dense", rank=rank, force=True
        )
        yield setup.as_lora(output, rank)
        yield largest_entries(weights_of(setup.lab.encoder), end, frod.nbytes)


def of_tuned(setup: Setup, seeds: int, steps: int) -> Found:
    """Train models as a whole and try their forms."""
    method = method_called("full", setup.source, setup.folder, setup.lab.task)
    found: Found = {}
    tuned = setup.folder / "tuned"
    for seed in range(seeds):
        model = setup.trained(method, seed, steps)
        model.encoder.save_pretrained(tuned)
        compare(setup, model, forms_of_tuned(setup, tuned, weights_of(model.encoder)), found)
    return found


def largest_entries(start: Weights, end: Weights, nbytes: int) -> Form:
    """As many entries of ΔW as fit into the bytes: those that are largest, of all layers."""
    count = nbytes // (4 + POSITION_BYTES)
    changes = torch.cat([(end[name] - start[name]).flatten() for name in start])
    largest = changes.abs().topk(count).indices
    kept = torch.zeros_like(changes).index_copy_(0, largest, changes[largest])
    parts = kept.split([W.numel() for W in start.values()])
    weights = {name: W + part.view_as(W) for (name, W), part in zip(start.items(), parts, strict=True)}
    return Form(f"the {count / len(changes):.1%} largest entries", count * (4 + POSITION_BYTES), weights)


def compare(setup: Setup, model: Classifier, forms: Iterator[Form], found: Found) -> None:
    """Add what each form of a trained model's linear layers is worth, all else being the model's."""
    start, original = weights_of(setup.lab.encoder), weights_of(model.encoder)
    for form in forms:
        kept, distance = nearness(start, original, form.weights)
        changed = copy.deepcopy(model)
        changed.encoder.load_state_dict(form.weights, strict=False)
        loss, accuracy = evaluate(changed, setup.lab.task.test)
        worth = f"loss {loss:.4f}, accuracy {accuracy:.1%}"
        say(f"{form.name}: {form.nbytes} bytes, {kept:.2%} kept, distance {distance:.4f}, {worth}")
        found.setdefault(form.name, []).append(Worth(form.nbytes, kept, distance, loss, accuracy))


def nearness(start: Weights, original: Weights, weights: Weights) -> tuple[float, float]:
    """Of what the weights changed to what the original ones did: ⟨Δ, ΔW⟩/‖ΔW‖² and ‖Δ − ΔW‖/‖ΔW‖."""
    wanted, got = (
        torch.cat([(changed[name].double() - W.double()).flatten() for name, W in start.items()])
        for changed in (original, weights)
    )
    return float(got @ wanted / (wanted @ wanted)), float((got - wanted).norm() / wanted.norm())


def print_worth(title: str, found: Found) -> None:
    print(f"{title}\n")
    rows = []
    for name, seeds in found.items():
        size = f"{seeds[0].nbytes / 1e6:.2f} MB" if seeds[0].nbytes else "–"
        rows.append(
            [
                name,
                size,
                mean([worth.kept for worth in seeds], 1, 100),
                mean([worth.distance for worth in seeds], 3),
                mean([worth.loss for worth in seeds], 3),
                mean([worth.accuracy for worth in seeds], 1, 100),
            ]
        )
    table(["linear layers", "bytes", "kept, %", "distance", "test loss", "accuracy, %"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of a training")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--short", action="store_true", help="little of everything, two layers: does it run?")
    parser.add_argument("--trained", nargs="+", choices=["frod", "full"], default=["frod", "full"], help="whose table")
    arguments = parser.parse_args()
    steps, seeds = (6, 1) if arguments.short else (arguments.steps, arguments.seeds)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, lab = open_lab(folder, arguments.short)
        basis, _ = decompose(source, folder, "uniform", False)
        setup = Setup(lab, source, basis, folder)
        if "frod" in arguments.trained:
            print_worth("A FRoD adapter, merged and as LoRA:", of_adapters(setup, seeds, steps))
        if "full" in arguments.trained:
            print_worth("A model that was fine-tuned as a whole, itself and extracted:", of_tuned(setup, seeds, steps))


if __name__ == "__main__":
    main()
