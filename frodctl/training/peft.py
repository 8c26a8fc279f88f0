"""The bridge to PEFT: its own FRoD model with V from a file, and with the U that belongs to that V.

PEFT decomposes the base again whenever it builds or loads a FRoD model, on the CPU, and derives U from the V that it
finds; a V loaded afterwards leaves that U. Where the two V differ (another machine, dtype or version) the model is
silently wrong. Here V is in place before U is derived. Written against peft 0.21.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from frodctl.adapted import opening
from frodctl.adapted.positions import positions_of
from frodctl.arrays import to_torch
from frodctl.checkpoint import names
from frodctl.checkpoint.records import Location
from frodctl.errors import FrodctlError, InvalidInput
from frodctl.formats.adapter import base_scales_key, lambda_key, open_adapter, shared_keys
from frodctl.formats.basis_file import BasisFile
from frodctl.training.attached import require_module
from frodctl.training.choice import choose

#: How far U may be from the one that V gives, relative, before `repair` takes it for another.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def get_peft_model(
    model: nn.Module, basis: str | Path | BasisFile, *, adapter_name: str = "default", **options: Any
) -> Any:
    """PEFT's FRoD model over the basis file's V and pattern, without a decomposition.

    For layers on the CPU U, of the weight's size, is derived in the first forward pass, or as the model moves to a
    GPU. With a 16-bit model λ' may change in its last bits then: it becomes the norms of W V⁻ᵀ for the rounded V.

    Parameters
    ----------
    model : Module
        The base model.
    basis : path or BasisFile
    adapter_name : str
    **options
        Further fields of PEFT's ``FrodConfig``. ``target_modules``, names or a regular expression, is by default
        all that the basis has.

    Returns
    -------
    peft.PeftModel

    Raises
    ------
    InvalidInput
        PEFT's categories are not the basis file's, or the model is not the basis file's.
    FrodctlError
        peft is not installed, or does not work as this version of frodctl knows it.
    """
    require_module(model)
    peft, layers = _modules()
    opened = opening.opened(basis)
    if note := opening.without_digests(opened):
        warnings.warn(note, stacklevel=2)
    choice = choose(model, opened, options.pop("target_modules", None))
    chosen = {}
    for name, record in choice.modules.items():
        (place, *others) = choice.places[name]
        if others or place.rows is not None:
            raise InvalidInput(f"{record.name}: {place.path} has rows of it, or of others too, which PEFT cannot train")
        chosen[place.path] = record
    for path, record in chosen.items():
        if names.peft_category(path) != record.category:
            hint = (
                "; decompose without `share_input` for PEFT" if record.category in opened.metadata.share_input else ""
            )
            raise InvalidInput(
                f"{path}: its category is {record.category} in {opened.path}, which PEFT cannot have{hint}"
            )
    categories = sorted({record.category for record in chosen.values()})
    metadata, indices = opened.metadata, opened.indices()
    config = peft.FrodConfig(
        **{
            "target_modules": sorted(chosen, key=names.natural_key),
            "sparse_rate": max(metadata.sparsity[category] for category in categories),
            "projection_prng_key": metadata.seed,
            "regularization_alpha": metadata.alpha,
            "progressbar": False,
            **options,
        }
    )
    projections = {c: (to_torch(opened.tensor(f"V.{c}")), to_torch(indices[c])) for c in categories}
    scales = {model.get_submodule(path): to_torch(opened.tensor(f"lambda.{r.name}")) for path, r in chosen.items()}
    return layers.build(model, config, adapter_name, projections, scales, fresh=True)


def load(
    model: nn.Module,
    folder: str | Path,
    basis: str | Path | BasisFile | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> Any:
    """A saved adapter, PEFT's or frodctl's, as PEFT's FRoD model: the V that was trained, and its U.

    Parameters
    ----------
    model : Module
        The base model.
    folder : path
        The adapter, or a Hub id.
    basis : path or BasisFile, optional
        For an adapter that does not hold V; by default as for `frodctl.load_adapter`, with the same warning.
    adapter_name : str
    is_trainable : bool

    Returns
    -------
    peft.PeftModel

    Raises
    ------
    InvalidInput
        The adapter holds no V and no basis file is given or near it, or not the one it was trained with; or one of
        them is damaged.
    """
    require_module(model)
    peft, layers = _modules()
    adapter = open_adapter(Location(str(folder)))
    if adapter.provenance is not None and adapter.provenance.live_prefix is not None:
        raise InvalidInput(
            f"{adapter.name}: has a checkpoint's names, some of which {type(model).__name__} calls otherwise; "
            "load it with frodctl.load_adapter, or merge it"
        )
    given = None if basis is None else opening.opened(basis)
    opened = opening.open_source(adapter, given).basis
    if opened is not None and given is None:
        warnings.warn(opening.found_near(adapter, opened), stacklevel=2)
    if note := opening.without_digests(adapter, opened):
        warnings.warn(note, stacklevel=2)
    for module in adapter.modules:
        if names.peft_category(module.module) != module.category:
            raise InvalidInput(f"{module.module}: its category is {module.category}, which PEFT cannot have")
    indices = positions_of(adapter, opened)
    projections = {c: (to_torch(opening.V_of(adapter, opened, c)), to_torch(indices[c])) for c in adapter.categories}
    known = peft.FrodConfig.__dataclass_fields__
    settings = {key: value for key, value in adapter.config.items() if key in known and key != "peft_type"}
    ours = {base_scales_key(module.module) for module in adapter.modules}
    ours |= {info.name for shared in (adapter.V, adapter.indices, adapter.sizes) for info in shared.values()}
    state = {key: to_torch(adapter.tensor(info)) for key, info in adapter.tensors.items() if key not in ours}
    for category, (V, positions) in projections.items():
        state |= dict(zip(shared_keys(category), (V, positions, torch.tensor([len(V)] * 2)), strict=True))
    live = dict(model.named_modules())
    scales = {live[m.module]: state[lambda_key(m.module)] for m in adapter.modules if m.module in live}
    try:
        config = peft.FrodConfig(**settings)
        config.inference_mode, config.save_projection, config.progressbar = not is_trainable, True, False
        result = layers.build(model, config, adapter_name, projections, scales, fresh=False)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInput(f"{adapter.name}: PEFT cannot make it of {type(model).__name__}: {reason}") from None
    found = peft.set_peft_model_state_dict(result, state, adapter_name=adapter_name)
    unmatched = [key for key in found.unexpected_keys if "frod_" in key]  # of others PEFT saves some twice
    if unmatched:
        raise InvalidInput(f"{adapter.name}: {unmatched[0]} matches nothing in {type(model).__name__}")
    return result if is_trainable else result.requires_grad_(False).eval()


def check(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """For each FRoD layer of a PEFT model the distance ‖U − U(V)‖/‖U(V)‖ of its U from the one that its V gives.

    About the rounding of the model's dtype where all is well; around 1 where PEFT loaded an adapter with another V. A
    U that was not derived yet is derived first.
    """
    return {path: _distance(U, right) for path, U, right in _derived(model, adapter_name)}


@torch.no_grad()
def repair(model: nn.Module, adapter_name: str = "default") -> list[str]:
    """Give the layers of a PEFT model, which loaded an adapter itself, the U that belongs to their V.

    Returns
    -------
    list of str
        The layers whose U was another.
    """
    repaired = []
    for path, U, right in _derived(model, adapter_name):
        if not _distance(U, right) <= TOLERANCE[U.dtype]:
            U.copy_(right)
            repaired.append(path)
    return repaired


def _derived(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each FRoD layer its path, its U, and the one that its V gives."""
    require_module(model)
    _, layers = _modules()
    derive = layers.Derivation()
    for path, layer in layers.frod_layers(model).items():
        if adapter_name in layer.frod_U:
            U = layer.frod_U[adapter_name]
            yield path, U, derive(layer, adapter_name)[0].to(U)


def _distance(U: Tensor, right: Tensor) -> float:
    return float((U.float() - right.float()).norm() / right.float().norm().clamp(min=1e-30))


def _modules() -> tuple[Any, Any]:
    """peft, and what needs it."""
    try:
        import peft

        from frodctl.training import peft_layers
    except (ImportError, AttributeError):
        raise FrodctlError(
            "the bridge needs PEFT with its FRoD tuner, as in 0.21: pip install 'frodctl[peft]'"
        ) from None
    return peft, peft_layers
