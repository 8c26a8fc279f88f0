"""Fine-tune a causal model with FRoD in a plain PyTorch loop, on text that ships with Python: turtle's docstrings.

frodctl decompose examples/tiny-llama --target-modules all-linear -o basis.safetensors
python examples/train.py examples/tiny-llama basis.safetensors adapter
"""

import argparse
import ast
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import frodctl
from frodctl.training import trainable_parameters

CONTEXT = 128


def text_of(module: str) -> str:
    """All docstrings of a standard-library module, without importing it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(Path(spec.origin).read_text())) if isinstance(node, kinds)]
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("basis")
    parser.add_argument("adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rho", type=float, default=1e-2, help="learning rate, relative to the scales")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype="auto")
    tokens = torch.tensor(tokenizer(text_of("turtle"))["input_ids"])
    blocks = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    held_out, blocks = blocks[::10], blocks[torch.arange(len(blocks)) % 10 != 0]

    def evaluate() -> float:
        with torch.no_grad():
            return float(model(input_ids=held_out, labels=held_out).loss)

    before = evaluate()
    frodctl.attach(model, arguments.basis)
    trained, total = trainable_parameters(model)
    print(f"training {trained:,} of {total:,} numbers ({trained / total:.2%})")
    print(f"held-out loss {before:.4f} before attach, {evaluate():.4f} after: nothing has changed")

    groups = frodctl.parameter_groups(model, rho_lambda=arguments.rho, rho_sparse=arguments.rho)
    optimizer = torch.optim.Adam(groups)
    began = time.perf_counter()
    for _ in range(arguments.steps):
        batch = blocks[torch.randint(len(blocks), (arguments.batch,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    rate = arguments.steps * arguments.batch * CONTEXT / (time.perf_counter() - began)
    print(f"held-out loss {evaluate():.4f} after {arguments.steps} steps, {rate:,.0f} tokens/s")
    frodctl.save_adapter(model, arguments.adapter)


if __name__ == "__main__":
    main()
