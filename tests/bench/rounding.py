"""What rounding to bfloat16 leaves of an update: merged models against the live one, and against W' rounded once.

    python tests/bench/rounding.py [--rho 1e-2 1e-3 1e-4] [--tokens 1024]

examples/train.py trains tiny-llama in bfloat16 at several learning rates ρ. W' is computed in float64 from the stored
V. Printed: of all trained weights how far they moved, how many of their elements differ once merged, what of
ΔW = W' − W the merged ones have along it and off it, and the mean Kullback–Leibler divergence from the live model (nats
a token of other text) of the base, of W' rounded once, and of the merged model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import frodctl
import frodctl.training
from frodctl.arrays import to_torch

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = EXAMPLES / "tiny-llama"


def exact_weights(base: dict[str, Tensor], adapter: Path, basis: frodctl.BasisFile) -> dict[str, Tensor]:
    """W' = W + (W D) diag(λ)⁻¹ (S + diag(λ' − λ)) Vᵀ in float64, from the files."""
    trained = load_file(adapter / "adapter_model.safetensors")
    indices, result = basis.indices(), {}
    for record in basis.metadata.modules:
        W, V = base[f"{record.name}.weight"].double(), to_torch(basis.tensor(f"V.{record.category}")).double()
        prefix, start = f"base_model.model.{record.name}", to_torch(basis.tensor(f"lambda.{record.name}")).double()
        M = torch.diag(trained[f"{prefix}.frod_lambda_l"].double() - start)
        rows, columns = indices[record.category]
        M[rows, columns] += trained[f"{prefix}.frod_lambda_s_values"].double()
        result[f"{record.name}.weight"] = W + W @ torch.linalg.inv(V).T / start @ M @ V.T
    return result


def divergence(model: torch.nn.Module, live: Tensor, tokens: Tensor) -> float:
    """Mean of KL(live ‖ model) over the tokens, in nats."""
    with torch.no_grad():
        found = model(input_ids=tokens).logits.double().log_softmax(-1)
    return float((live.exp() * (live - found)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4])
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print("| ρ | ‖ΔW‖/‖W‖ | elements changed | ⟨ΔŴ, ΔW⟩/‖ΔW‖² | ‖ΔŴ − ΔW‖/‖ΔW‖ | KL: base | W' rounded once | merged |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        basis = frodctl.decompose(str(BASE), Path(work, "basis.safetensors"), target_modules="all-linear").output
        for rho in arguments.rho:
            print(f"| {rho:g} | {' | '.join(row(Path(work, str(rho)), basis, rho, arguments.tokens))} |")


def row(work: Path, basis: Path, rho: float, tokens: int) -> list[str]:
    """Train, merge and compare at one learning rate."""
    adapter = work / "adapter"
    command = [sys.executable, EXAMPLES / "train.py", BASE, basis, adapter, "--rho", rho]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    frodctl.merge(str(BASE), str(adapter), work / "merged", basis=str(basis))
    ids = held_out(tokens)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    exact = exact_weights(base, adapter, frodctl.open_basis(basis))
    merged = load_file(work / "merged" / "model.safetensors")
    frodctl.load_adapter(model, adapter, basis)
    with torch.no_grad():
        live = model(input_ids=ids).logits.double().log_softmax(-1)
    frodctl.training.detach(model)
    divergences = []
    for weights in (base, {name: W.bfloat16() for name, W in exact.items()}, {name: merged[name] for name in exact}):
        model.load_state_dict(base | weights)
        divergences.append(divergence(model, live, ids))
    W, wanted, found = (torch.cat([t[name].double().flatten() for name in exact]) for t in (base, exact, merged))
    delta, kept = wanted - W, found - W
    return [
        f"{delta.norm() / W.norm():.4f}",
        f"{(kept != 0).double().mean():.1%}",
        f"{kept @ delta / (delta @ delta):.2%}",
        f"{(kept - delta).norm() / delta.norm():.3f}",
        *(f"{value:.3e}" for value in divergences),
    ]


def held_out(tokens: int) -> Tensor:
    """Text that the model was not trained on, in rows."""
    sys.path.insert(0, str(EXAMPLES))
    from train import CONTEXT, text_of

    ids = AutoTokenizer.from_pretrained(BASE)(text_of("tkinter"))["input_ids"]
    return torch.tensor(ids[: tokens // CONTEXT * CONTEXT]).view(-1, CONTEXT)


if __name__ == "__main__":
    main()
