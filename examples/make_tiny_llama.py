"""Train the tiny Llama checkpoint in examples/tiny-llama from text that ships with Python.

The text is the language reference that CPython carries for its `help()` (`pydoc_data.topics`) and the
docstrings of a fixed list of standard-library modules, so nothing is downloaded. The result is an ordinary
sharded Hugging Face folder in bfloat16, with tied embeddings and grouped-query attention.

    pip install -c constraints.txt '.[test]'
    python examples/make_tiny_llama.py [--output DIR] [--steps N] [--seed 0]

The default run should take about twelve minutes on two idle CPU cores, and longer on busy ones. Inputs are
sorted, and torch is held to deterministic algorithms and to THREADS threads, so that the same Python,
packages, kind of processor, arguments and seed should give the same files. (Another CPython patch release
carries slightly different text, so other weights.) The README.md in the folder is written by hand, from the
losses and the sample printed here.
"""

import argparse
import ast
import importlib
import inspect
import json
import math
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils.logging import disable_progress_bar

MODULES = """
_pydecimal argparse ast asyncio.base_events asyncio.events asyncio.locks asyncio.streams asyncio.tasks
base64 bdb calendar cmd code codecs collections concurrent.futures._base configparser contextlib dataclasses
datetime difflib dis doctest email._header_value_parser email.charset email.header email.message
email.policy enum fileinput fractions ftplib functools gzip heapq http.client http.cookiejar http.server
imaplib importlib.abc inspect ipaddress json json.decoder json.encoder logging logging.config
logging.handlers mailbox mimetypes numbers optparse os pathlib pdb pickle pickletools pkgutil platform
poplib pydoc queue random re selectors shelve shutil smtplib socket socketserver ssl statistics subprocess
tarfile tempfile textwrap threading timeit tokenize traceback typing unittest.case unittest.mock
urllib.parse urllib.request uuid wave weakref xml.etree.ElementTree xml.sax.handler xml.sax.xmlreader
xmlrpc.client xmlrpc.server zipfile
"""
HELD_OUT_EVERY = 12  # every 12th help topic and every 12th module is kept for validation
VOCAB_SIZE = 1024
CONTEXT = 256
BATCH = 8
THREADS = 2  # part of the recipe: another number of threads sums in another order
PEAK_LR = 6e-3
PROMPT = 'The "for" statement is used to'


def docstrings(module: str) -> list[str]:
    """Return every docstring of a module's source, outer ones first."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def read_documents() -> tuple[list[str], list[str]]:
    """Return the training and the held-out documents, with no paragraph in more than one place."""
    train: list[str] = []
    held_out: list[str] = []
    seen: set[str] = set()
    help_topics = [[topics[name]] for name in sorted(topics)]
    modules = [docstrings(name) for name in sorted(MODULES.split())]
    for source in (help_topics, modules):
        for index, documents in enumerate(source):
            target = held_out if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train
            for document in documents:
                kept = []
                for paragraph in document.strip().split("\n\n"):
                    if paragraph.strip() not in seen:
                        seen.add(paragraph.strip())
                        kept.append(paragraph)
                if kept:
                    target.append("\n\n".join(kept))
    return train, held_out


def train_tokenizer(documents: list[str]) -> FastTokenizer:
    """Train a byte-level BPE tokenizer that puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A",
        pair="<s> $A <s> $B",
        special_tokens=[("<s>", tokenizer.token_to_id("<s>"))],
    )
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return FastTokenizer(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special)


def encode(tokenizer: FastTokenizer, documents: list[str]) -> torch.Tensor:
    """Return one long row of tokens: <s> document </s> <s> document </s> ..."""
    row: list[int] = []
    for document in documents:
        row += [*tokenizer(document, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(row)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over the first 5% of the steps, then a cosine down to a hundredth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return PEAK_LR * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return PEAK_LR * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, tokens: torch.Tensor, windows: int = 128) -> float:
    """Mean next-token loss over about `windows` full windows, spread evenly over the tokens."""
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    rows = rows[:: max(1, len(rows) // windows)]
    model.eval()
    losses: list[float] = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(BATCH)]
    return sum(losses) / len(rows)


def train_model(model: LlamaForCausalLM, train: torch.Tensor, held_out: torch.Tensor, steps: int) -> None:
    """Train in place on random windows of the training tokens, printing both losses now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        model.train()
        starts = torch.randint(len(train) - CONTEXT + 1, (BATCH,))
        batch = torch.stack([train[start : start + CONTEXT] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            seconds = time.monotonic() - started
            losses = f"loss {loss.item():.3f}  held out {mean_loss(model, held_out):.3f}"
            print(f"step {step + 1:5d}  {losses}  {seconds:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: FastTokenizer, folder: Path) -> None:
    """Write the sharded bfloat16 checkpoint and its tokenizer."""
    model.bfloat16().save_pretrained(folder, max_shard_size="1200KB")
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its own name for the class; the older name is read by 4 and 5 alike.
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    fields.pop("backend", None)
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make the text, the tokenizer and the model; save them; read them back and write a sample."""
    parser = argparse.ArgumentParser(description="Train the tiny Llama checkpoint of the examples.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-llama")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    disable_progress_bar()
    torch.manual_seed(args.seed)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)

    train_documents, held_documents = read_documents()
    tokenizer = train_tokenizer(train_documents)
    train, held_out = encode(tokenizer, train_documents), encode(tokenizer, held_documents)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters")
    print(f"{len(train):,} training tokens, {len(held_out):,} held out")
    before = mean_loss(model, train), mean_loss(model, held_out)
    train_model(model, train, held_out, args.steps)
    after = mean_loss(model, train), mean_loss(model, held_out)
    save(model, tokenizer, args.output)

    written: Any = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.bfloat16)
    reader = AutoTokenizer.from_pretrained(args.output)
    stored = mean_loss(written, train), mean_loss(written, held_out)
    torch.manual_seed(args.seed)
    prompt = reader(PROMPT, return_tensors="pt", return_token_type_ids=False)
    tokens = written.generate(**prompt, max_new_tokens=120, do_sample=True, temperature=0.7)
    sample = reader.decode(tokens[0], skip_special_tokens=True)
    for when, (training, held) in {"before": before, "after": after, "as stored": stored}.items():
        print(f"{when + ':':10} loss {training:.3f} on training text, {held:.3f} held out")
    print(f"\n{sample}")


if __name__ == "__main__":
    main()
