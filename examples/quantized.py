"""QLoRA's place in FRoD: train over a quantized base, merge into the full-precision one, measure what that changes.

python examples/quantized.py examples/tiny-llama out --quantization nf4    # int8, llm-int8; needs .[peft,quantized]

With P = D diag(λ)⁻¹ (S + diag(λ' − λ)) Vᵀ the trained layer is W_q (I + P), W_q being the quantized weight, and the
merged one W (I + P). They differ by (W_q − W)(I + P), little more than W_q and W did before any training: so the two
untrained models are the yardstick. Merged with ``base_as="auto"`` it is W_q (I + P), rounded to the base's dtype.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train import CONTEXT, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import frodctl


def load_quantized(base: str, quantization: str) -> Any:
    """The model with its linear layers in bitsandbytes' or torchao's hands; embeddings and head stay as they are."""
    config: Any
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    elif quantization == "llm-int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-untyped]

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto", quantization_config=config)


def predictions(model: Any, rows: Tensor) -> Tensor:
    """Log-probabilities of every next token."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=rows).logits
    return logits[:, :-1].double().log_softmax(-1)


def loss(p: Tensor, rows: Tensor) -> float:
    return -float(p.gather(-1, rows[:, 1:, None]).mean())


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) a token, in nats."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def agreement(p: Tensor, q: Tensor) -> float:
    return float((p.argmax(-1) == q.argmax(-1)).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the full-precision checkpoint")
    parser.add_argument("folder", type=Path, help="for the basis, the adapter and the merged checkpoint")
    parser.add_argument("--basis", type=Path, help="the base's, where it has been decomposed before")
    parser.add_argument("--quantization", choices=["nf4", "int8", "llm-int8"], default="nf4")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    adapter, merged, as_trained = (arguments.folder / name for name in ("adapter", "merged", "merged-as-trained"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows = torch.stack(torch.tensor(tokenizer(text_of("turtle"))["input_ids"]).split(CONTEXT)[:-1])
    held_out = rows[::10]
    rows = rows[torch.arange(len(rows)) % 10 != 0]

    basis = arguments.basis or arguments.folder / "basis.safetensors"
    if arguments.basis is None:
        frodctl.decompose(arguments.base, basis, target_modules="all-linear", force=True)
    model = frodctl.attach(load_quantized(arguments.base, arguments.quantization), basis)
    quantized = [predictions(model, held_out)]
    optimizer = torch.optim.Adam(frodctl.parameter_groups(model, rho_lambda=1e-2, rho_sparse=1e-2))
    for _ in range(arguments.steps):
        batch = rows[torch.randint(len(rows), (arguments.batch,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    quantized.append(predictions(model, held_out))

    frodctl.save_adapter(model, adapter)
    frodctl.merge(arguments.base, str(adapter), merged, basis=basis, force=True)
    frodctl.merge(arguments.base, str(adapter), as_trained, basis=basis, base_as="auto", force=True)
    *full, same = [
        predictions(AutoModelForCausalLM.from_pretrained(path, dtype="auto"), held_out)
        for path in (arguments.base, merged, as_trained)
    ]

    print(f"{arguments.quantization}, {arguments.steps} steps".ljust(36) + f"{'untrained':>10} {'trained':>10}")
    for label, values in {
        "held-out loss, quantized": [f"{loss(p, held_out):.4f}" for p in quantized],
        "held-out loss, full precision": [f"{loss(q, held_out):.4f}" for q in full],
        "KL(quantized ‖ full precision)": [f"{divergence(p, q):.5f}" for p, q in zip(quantized, full, strict=True)],
        "same most likely token": [f"{agreement(p, q):.1%}" for p, q in zip(quantized, full, strict=True)],
        "KL(quantized ‖ merged as trained)": ["", f"{divergence(quantized[1], same):.5f}"],
        "same most likely token then": ["", f"{agreement(quantized[1], same):.1%}"],
    }.items():
        print(f"{label:36}" + " ".join(f"{value:>10}" for value in values))


if __name__ == "__main__":
    main()
