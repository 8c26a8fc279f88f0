"""PEFT's own FRoD model from a basis file, and its adapters loaded so that U fits V.

python examples/peft_bridge.py examples/tiny-llama out

PEFT decomposes the base again when it loads an adapter, derives U from the V that it finds, and then puts the saved V
in that one's place. Where a column of the two has another sign, its U does not fit: the model is wrong, and nothing
says so. A column's sign is arbitrary. LAPACK's depend on the machine, frodctl's do not, so they differ as it is;
here the adapter is loaded as saved, and again with half of the signs turned in its file, which is the same model.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import CONTEXT, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import frodctl
from frodctl.training import peft as bridge


def with_other_signs(adapter: Path, target: Path) -> Path:
    """The same adapter, U (Λ + S) Vᵀ, in a basis half of whose columns have the other sign: (σU)(Λ + σSσ)(Vσ)ᵀ."""
    state = load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in state if key.startswith("base_model.frod_V.")]:
        category = key.rpartition(".")[2]
        signs = torch.ones(len(state[key]))
        signs[::2] = -1
        state[key] *= signs
        rows, columns = state[f"base_model.frod_s_indices.{category}"]
        for name in state:
            *_, parent, module, kind = name.split(".")
            if kind == "frod_lambda_s_values" and f"{parent}_{module}" == category:
                state[name] *= signs[rows] * signs[columns]
    target.mkdir(exist_ok=True)
    save_file(state, target / "adapter_model.safetensors", {"format": "pt"})
    (target / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("folder", type=Path, help="for the basis and the adapters")
    parser.add_argument("--basis", type=Path, help="the base's, where it has been decomposed before")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    rows = torch.stack(torch.tensor(tokenizer(text_of("turtle"))["input_ids"]).split(CONTEXT)[:-1])

    def base() -> Any:  # in float32: over bfloat16 PEFT's model is another one before it is trained
        return AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model.eval()(input_ids=rows[:4]).logits
        return found

    basis = arguments.basis or arguments.folder / "basis.safetensors"
    if arguments.basis is None:
        frodctl.decompose(arguments.base, basis, target_modules="all-linear", force=True)
    model = bridge.get_peft_model(base(), basis, task_type="CAUSAL_LM").train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(arguments.steps):
        batch = rows[torch.randint(len(rows), (arguments.batch,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model)

    def difference(other: Any) -> str:
        return f"{float((logits(other) - trained).abs().max()):.1e}"

    saved = arguments.folder / "adapter"
    model.save_pretrained(saved)
    adapters = [saved, with_other_signs(saved, arguments.folder / "other-signs")]
    theirs = [PeftModel.from_pretrained(base(), adapter) for adapter in adapters]
    table = {"PeftModel.from_pretrained": [difference(other) for other in theirs]}
    distances = [bridge.check(other) for other in theirs]
    repaired = [bridge.repair(other) for other in theirs]
    table["... after repair"] = [difference(other) for other in theirs]
    table["frodctl.training.peft.load"] = [difference(bridge.load(base(), adapter)) for adapter in adapters]

    print(f"training changed the logits by up to {difference(base())}; loaded again, they differ by up to")
    print(f"{'':28}{'as saved':>12}{'other signs':>12}")
    for label, values in table.items():
        print(f"{label:28}" + "".join(f"{value:>12}" for value in values))
    for found, mended in zip(distances, repaired, strict=True):
        print(f"check: U is off by up to {max(found.values()):.2f} of its norm; repair mended {len(mended)} layers")


if __name__ == "__main__":
    main()
