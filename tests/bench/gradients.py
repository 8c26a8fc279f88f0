"""How far gradients in bfloat16 are from those in float64, in each form of a layer and of a plain linear layer.

    python tests/bench/gradients.py [--width 768]

x, W and ∂L/∂y are random, and of bfloat16's numbers, so that only what is computed differs. V is the joint basis of
four random layers; the layer is trained away from where it began. Printed are ‖g − g₆₄‖/‖g₆₄‖: for the plain layer of
∂L/∂W and ∂L/∂x, for FRoD of δ, S and x. "bfloat16" is a model in that dtype, "autocast" a float32 model under autocast.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import frodctl
from frodctl.arrays import to_torch
from frodctl.training.layer import Basis, FrodLinear, Update

FORMS = ("input", "weight", "weight+U")
LAYERS = 4


class Block(nn.Module):
    """One layer under a name that decompose knows."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.up_proj = nn.Linear(W.shape[1], W.shape[0], bias=False)
        self.up_proj.weight = nn.Parameter(W)


def model_of(weights: list[Tensor], dtype: torch.dtype) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(Block(W.to(dtype)) for W in weights)
    return model


def gradients(layer: nn.Module, x: Tensor, G: Tensor, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
    """Of what is trained, in float64, and at last of x."""
    given = x.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(given)
    y.backward(G.to(y.dtype))
    trained = [parameter for parameter in layer.parameters() if parameter.grad is not None]
    return [tensor.grad.double() for tensor in (*trained, given) if tensor.grad is not None]


def attached(weights: list[Tensor], basis: Path, form: str, dtype: torch.dtype) -> nn.Module:
    """The first layer, trained."""
    model = frodctl.attach(model_of(weights, dtype), basis, form=form)
    layer: FrodLinear = model.layers[0].up_proj  # type: ignore[index, union-attr]
    update = layer.update()
    assert update is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (update.delta, update.values):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if dtype == torch.float64:  # with V as it is stored, in float64
        opened = frodctl.open_basis(basis)
        V = to_torch(opened.tensor("V.up_proj")).double().numpy()
        exact = Basis(V, "up_proj", "", LAYERS, dtype, torch.device("cpu"))
        replacement = Update(exact, update.pattern, update.base_scales, form=form)
        replacement.load_state_dict(update.state_dict())
        layer.adapters["default"] = replacement
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    n = parser.parse_args().width
    print("| layer (m × n) | dtype | form | δ | S | x |\n|---|---|---|---|---|---|")
    for m in (n // 3, n, 8 * n // 3):
        generator = torch.Generator().manual_seed(0)
        x, G = (torch.randn(4 * n, size, generator=generator).bfloat16().double() for size in (n, m))
        weights = [(0.02 * torch.randn(m, n, generator=generator)).bfloat16().double() for _ in range(LAYERS)]
        with tempfile.TemporaryDirectory() as work:
            base, basis = Path(work, "base"), Path(work, "basis.safetensors")
            base.mkdir()
            (base / "config.json").write_text('{"model_type": "llama"}')
            tensors = {f"layers.{i}.up_proj.weight": W.bfloat16() for i, W in enumerate(weights)}
            save_file(tensors, base / "model.safetensors", {"format": "pt"})
            frodctl.decompose(str(base), basis, target_modules="up_proj")
            exact = gradients(attached(weights, basis, "weight", torch.float64), x, G, torch.float64, False)
            plain = gradients(model_of(weights, torch.float64).layers[0].up_proj, x, G, torch.float64, False)  # type: ignore[index, union-attr]
            for name, dtype, autocast in (("bfloat16", torch.bfloat16, False), ("autocast", torch.float32, True)):
                layer = model_of(weights, dtype).layers[0].up_proj  # type: ignore[index, union-attr]
                of_W, of_x = errors(gradients(layer, x, G, dtype, autocast), plain)
                print(f"| {m} × {n} | {name} | nn.Linear | W: {of_W} | | {of_x} |")
                for form in FORMS:
                    found = gradients(attached(weights, basis, form, dtype), x, G, dtype, autocast)
                    print(f"| {m} × {n} | {name} | {form} | {' | '.join(errors(found, exact))} |")


def errors(found: list[Tensor], exact: list[Tensor]) -> list[str]:
    return [f"{float((a - b).norm() / b.norm()):.1e}" for a, b in zip(found, exact, strict=True)]


if __name__ == "__main__":
    main()
