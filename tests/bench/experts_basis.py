"""One V for the experts of all layers, or one for each layer's: which holds more of a fine-tuning, at the same bytes?

    python tests/bench/experts_basis.py WORK        seven minutes on two cores; goes on from what is in the folder WORK

A Qwen3-MoE of 6 layers with 8 experts each (hidden size 128, experts of 64, two a token) learns Python's standard
library byte by byte, and then, as a whole, its documentation (`pydoc_data/topics.py`). What that changed in the experts
is fitted over either basis (`frodctl.extract`, the best positions) at several sizes: V, λ', S and its positions
together, in numbers of float32. Shown is the share of ‖ΔW‖² that is explained, over all experts; in the last column
with as large an S as over one V for all layers.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import frodctl
from frodctl.method.fidelity import Fidelity, together

LAYERS, EXPERTS, HIDDEN, INNER = 6, 8, 128, 64
ROLES = {"gate_proj": HIDDEN, "up_proj": HIDDEN, "down_proj": INNER}
SIZES = (0.1, 0.2, 0.4)  #: of the experts' parameters


def texts() -> tuple[bytes, bytes]:
    """The standard library, and its documentation."""
    library = Path(sysconfig.get_path("stdlib"))
    code = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    return code, (library / "pydoc_data" / "topics.py").read_text().encode().decode("unicode_escape").encode()


def trained(model: Qwen3MoeForCausalLM, text: bytes, seconds: float, lr: float) -> float:
    """Train all of the model for so long; the mean loss of the last steps."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses, began = [0.0], time.monotonic()
    while time.monotonic() - began < seconds:
        starts = torch.randint(0, len(data) - 129, (16,))
        rows = torch.stack([data[start : start + 128] for start in starts]).long()
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{len(losses) - 1} steps, loss {sum(losses[-20:]) / 20:.3f}", flush=True)
    return losses[-1]


def models(work: Path, seconds: float) -> tuple[Path, Path]:
    """The checkpoint and the fine-tuned one."""
    base, tuned = work / "base", work / "tuned"
    code, documentation = texts()
    torch.manual_seed(0)
    if not base.exists():
        heads: dict[str, int] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        config = Qwen3MoeConfig(
            **heads, vocab_size=256, hidden_size=HIDDEN, moe_intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_experts=EXPERTS, num_experts_per_tok=2,
            output_router_logits=True, router_aux_loss_coef=0.01,
        )  # fmt: skip
        model = Qwen3MoeForCausalLM(config)
        trained(model, code, seconds, 2e-3)
        model.save_pretrained(base)
    if not tuned.exists():
        model = Qwen3MoeForCausalLM.from_pretrained(base)
        trained(model, documentation, seconds / 3, 5e-4)
        model.save_pretrained(tuned)
    return base, tuned


def sparsity(role: str, bases: int, numbers: float) -> float:
    """Of S, where so many numbers are V's, λ's, S's and its positions', which are as two each, once for each V."""
    n, experts = ROLES[role], LAYERS * EXPERTS
    return min(1.0, (numbers - bases * n * n - experts * n) / (experts + 2 * bases) / (n * n))


def kept(work: Path, base: Path, tuned: Path, role: str, per_layer: bool, share: float) -> str:
    """The share of ‖ΔW‖² that is explained at this sparsity."""
    if share <= 0:
        return "–"
    fidelities: list[Fidelity] = []
    for number in map(str, range(LAYERS)) if per_layer else [f"0-{LAYERS - 1}"]:
        basis, target = work / f"{role}.{number}.safetensors", f".*experts.*{role}"
        if not basis.exists():
            frodctl.decompose(base, basis, target_modules=target, layers=number)
        found = frodctl.extract(
            base, tuned, work / "adapter", as_="frod", basis=basis, target_modules=target, layers=number,
            sparsity=share, force=True,
        )  # fmt: skip
        fidelities += found.fidelities
    return f"{together(fidelities).kept:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--seconds", type=float, default=200, help="of training, a third of that of fine-tuning")
    arguments = parser.parse_args()
    base, tuned = models(arguments.work, arguments.seconds)
    print("| role | numbers, of the experts' | one V for all layers | one V a layer | the same, its V for nothing |")
    print(f"|{'---|' * 5}")
    for role in ROLES:
        for size in SIZES:
            numbers = size * LAYERS * EXPERTS * HIDDEN * INNER
            one, several = (sparsity(role, bases, numbers) for bases in (1, LAYERS))
            ways = ((False, one), (True, several), (True, one))
            shares = (kept(arguments.work, base, tuned, role, per_layer, share) for per_layer, share in ways)
            print(f"| {role} | {size:.0%} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
