"""Attaching trainable layers to a live model, and taking them off again."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from frodctl import values
from frodctl.adapted import opening
from frodctl.adapted.conversion import Place
from frodctl.adapted.positions import drawn
from frodctl.arrays import to_torch
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats.basis_file import BasisFile, ModuleRecord
from frodctl.training import stacks, trainer
from frodctl.training.attached import (
    Attached,
    Attachment,
    added_prefixes,
    attachment_of,
    every_update,
    forget,
    frod_layers,
    keep,
    require_attachment,
    require_module,
    saved_modules,
)
from frodctl.training.check import Held, check_gradient, check_layer
from frodctl.training.choice import choose
from frodctl.training.experts import ExpertsUpdate, FrodExperts, OneExpert, Part, Stacks
from frodctl.training.fused import FusedFrodLinear, Parts
from frodctl.training.layer import (
    FORMS,
    Basis,
    FrodLinear,
    Pattern,
    SavedModule,
    Update,
    changes,
    holds_matrix,
    in_features,
    is_dense,
    is_transposed,
    multiplies,
)
from frodctl.training.located import as_stored
from frodctl.training.reads import weight_uses
from frodctl.training.shared import SharedProduct

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

#: Heads that a checkpoint of the bare model lacks, by their names and by the classes that have them.
_HEADS = ("classifier", "score", "qa_outputs")
_WITH_A_NEW_HEAD = re.compile(r"For(Sequence|Token|Image|Audio)Classification$|ForQuestionAnswering$")

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    basis: values.PathLike | BasisFile,
    *,
    target_modules: values.Names | None = None,
    exclude_modules: values.Names | None = None,
    sparsity: values.Number | Mapping[str, values.Number] | None = None,
    seed: int | str | None = None,
    modules_to_save: values.Names = (),
    dropout: values.Number = 0.0,
    adapter_name: str = "default",
    only_available: bool = False,
    form: str = "auto",
) -> Model:
    """Make a model trainable at full rank with few numbers: y = W (x + D diag(λ)⁻¹ (S + diag(λ' − λ)) Vᵀ x).

    The layers of the basis, or those asked for, are replaced in place by `FrodLinear`, which holds the layer that
    was there. δ = λ' − λ and the values of S are trained, in float32 and from 0, so that the model's outputs are at
    first the base's, bit for bit; everything else is frozen. V and D are held once for each category. As long as
    adapters are attached, ``model.save_pretrained`` (and so transformers' Trainer) saves the adapter, not the base.
    A saved adapter is taken up again by `load_adapter`.

    Parameters
    ----------
    model : Module
        Any model whose targeted modules compute W x (`torch.nn.Linear`, transformers' Conv1D, quantized layers). One
        that multiplies by a layer's ``weight`` instead of calling the layer (Mamba's ``dt_proj``) gets W' there.
    basis : path or BasisFile
        The shared-basis file of the model's checkpoint (``frodctl decompose``).
    target_modules : str or iterable of str, optional
        Names of modules, or a regular expression for their whole path, in the model or in the checkpoint; by
        default, and for ``all-linear``, all that the basis has; for ``default`` those of them that ``frodctl
        decompose`` would take by default.
    exclude_modules : str or iterable of str, optional
        Names or a regular expression of modules to leave out.
    sparsity : float or mapping by category, optional
        Share of S that is trained; by default the basis file's.
    seed : int, optional
        Of the pattern; by default the basis file's.
    modules_to_save : str or iterable of str
        Names of modules that are trained as a whole, in their own dtype: a new head.
    dropout : float
        Probability with which an element of a correction's input is dropped in training.
    adapter_name : str
        Attaching again under another name adds a second adapter and makes it the active one.
    only_available : bool
        Train what can be trained of what is asked for, and warn of the rest, instead of refusing all of it.
    form : {"auto", "input", "weight", "weight+U"}
        How a layer is computed; all give the same outputs and gradients. ``input``: W (x + …) as above, which works on
        every layer and keeps nothing of the weight's size. ``weight``: W' x, where W' = W + W D diag(λ)⁻¹ (…) Vᵀ is
        formed once a step and kept beside W; fewer operations for many tokens, on dense layers only. ``weight+U``:
        that, with W D = U diag(λ) kept too, which saves up to half of the forming. ``auto``: of the first two the one
        that takes fewer operations for the tokens at hand. `frodctl.training.print_step_cost` shows what each costs.

    Returns
    -------
    Module
        ``model`` itself.

    Raises
    ------
    UsageError
        Nothing, or one of several names, matches; or an option makes no sense. The model is as it was then.
    InvalidInput
        The model is not the one that the basis was made from, or has layers that cannot be trained, or not in the form.

    Examples
    --------
    >>> import frodctl
    >>> model = frodctl.attach(model, "my-model.frod.safetensors")  # doctest: +SKIP
    """
    require_module(model)
    opened = opening.opened(basis)
    if note := opening.without_digests(opened):
        warnings.warn(note, stacklevel=2)
    only_available = values.flag(only_available, "only_available")
    chosen = choose(model, opened, target_modules, exclude_modules, only_available=only_available)
    seed, rates, indices = _patterns(opened, {r.category for r in chosen.modules.values()}, sparsity, seed)
    saved = values.names(modules_to_save, "modules_to_save")
    attached = Attached(
        basis=opened,
        modules=chosen.modules,
        places=chosen.places,
        sparsity=rates,
        seed=seed,
        modules_to_save=saved,
        dropout=checked_dropout(dropout),
        live_prefix=chosen.live_prefix,
        form=checked_form(form, dropout),
    )
    install(model, attached, indices, adapter_name)
    _warn_of_what_is_left_out(chosen.left_out)
    _warn_of_a_frozen_head(model, saved)
    return model


def _warn_of_what_is_left_out(left_out: Mapping[str, str]) -> None:
    """Say which modules are not trained, grouped by why not."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, modules in by_reason.items():
        warnings.warn(f"left out: {', '.join(modules)}: {reason}", stacklevel=3)


def _warn_of_a_frozen_head(model: nn.Module, saved: tuple[str, ...]) -> None:
    """PEFT trains the head of a classifier unasked; here one that is new would stay as it was drawn."""
    heads = [name for name, _ in model.named_children() if name in _HEADS]
    if heads and not saved and _WITH_A_NEW_HEAD.search(type(model).__name__):
        warnings.warn(
            f"{type(model).__name__}: {heads[0]} is frozen as it is, and not saved; if it is new, "
            f"`modules_to_save={heads}` trains it",
            stacklevel=3,
        )


def install(model: Model, attached: Attached, indices: Mapping[str, HostArray], adapter_name: str) -> Model:
    """Put an adapter's layers into the model and make it the active one; nothing is changed where that fails."""
    attachment = attachment_of(model)
    if checked_name(adapter_name) in (attachment.adapters if attachment else ()):
        raise UsageError(f"an adapter called {adapter_name} is attached already; give another `adapter_name`")
    gives_weight = _check_uses(model, attached)
    bases, scales = _Bases(model, attached, indices), _Scales(attached.basis)
    layers = _by_path(model, attached, _updates(model, attached, bases, scales))
    layers |= _stacks(model, attached, bases, scales)
    saved = _saved_modules(model, attached)
    if attachment is None:
        attachment = Attachment(frozenset(n for n, p in model.named_parameters() if p.requires_grad))
        keep(model, attachment)
        trainer.prepare(model)
    for path, update in layers.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, FrodLinear):
            layer = _replace(model, path, _kind(update)(layer, gives_weight.get(path, True)))
        layer.adapters[adapter_name] = update
    for path in saved:
        module = model.get_submodule(path)
        if not isinstance(module, SavedModule):
            module = _replace(model, path, SavedModule(module))
        module.modules_to_save[adapter_name] = copy.deepcopy(module.original_module)
    attachment.adapters[adapter_name] = attached
    trainer.leave_buffers_to_each_process(model)
    set_adapter(model, adapter_name)
    return model


def _kind(update: Update | Parts | Stacks) -> type[FrodLinear]:
    """The layer that is trained so."""
    if isinstance(update, Stacks):
        return FrodExperts
    return FusedFrodLinear if isinstance(update, Parts) else FrodLinear


def set_adapter(model: nn.Module, name: str) -> None:
    """Make an attached adapter the active one: it alone is applied, and trained."""
    attachment = require_attachment(model)
    if values.text(name, "name") not in attachment.adapters:
        raise UsageError(f"no adapter called {name} is attached; there are: {', '.join(attachment.adapters)}")
    attachment.active = name
    model.requires_grad_(False)
    for layer in frod_layers(model).values():
        layer.activate(name)
        if name in layer.adapters:
            layer.adapters[name].requires_grad_(True)
    for module in saved_modules(model).values():
        module.active = name
        if name in module.modules_to_save:
            module.modules_to_save[name].requires_grad_(True)


def set_scale(model: nn.Module, scale: values.Number) -> None:
    """Apply s times what the active adapter changes: W + s (W' − W). Modules trained as a whole are not scaled."""
    attachment = require_attachment(model)
    factor = values.share(scale, "scale")
    for update in every_update(model, attachment.active):
        update.scale = factor


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model is the base model."""
    require_attachment(model)
    switches: list[FrodLinear | SavedModule] = [*frod_layers(model).values(), *saved_modules(model).values()]
    before = [switch.enabled for switch in switches]
    try:
        for switch in switches:
            switch.enabled = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.enabled = value


def detach(model: Model) -> Model:
    """Take all adapters off again: the base model as it was, its own layers in their places."""
    attachment = require_attachment(model)
    for path, layer in frod_layers(model).items():
        _replace(model, path, layer.base_layer.train(layer.training))
    for path, module in saved_modules(model).items():
        _replace(model, path, module.original_module)
    forget(model)
    trainer.restore(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in attachment.trainable)
    return model


@torch.no_grad()
def merge_(model: Model) -> Model:
    """Fold the active adapter into the base layers' weights, in place, and take all adapters off.

    Every weight is rounded once, to its own dtype. Modules trained as a whole replace the originals.

    Raises
    ------
    UsageError
        A base layer holds no floating-point matrix (a quantized one), or does something else than multiply by it:
        merge the saved adapter into the checkpoint instead (`frodctl.merge`). Nothing is changed then.
    """
    attachment = require_attachment(model)
    layers = {path: layer for path, layer in frod_layers(model).items() if attachment.active in layer.adapters}
    for path, layer in layers.items():
        base = layer.base_layer
        if isinstance(layer, FrodExperts):
            continue
        if not holds_matrix(base):
            raise UsageError(f"{path}: not a floating-point weight; merge the saved adapter instead (frodctl merge)")
        if not multiplies(base):
            kind = type(base).__name__
            raise UsageError(
                f"{path}: {kind} does not compute W x + b; merge the saved adapter instead (frodctl merge)"
            )
    for layer in layers.values():
        if isinstance(layer, FrodExperts):
            layer.merge_()
        elif isinstance(layer, FusedFrodLinear):
            _copy(layer.base_layer, layer.merged_weight(attachment.active))
        elif (update := layer.update(attachment.active)) and changes(update):
            _copy(layer.base_layer, update.merged_weight(layer.base_layer))
    for module in saved_modules(model).values():
        module.original_module = module.chosen()
    return detach(model)


def _copy(base: nn.Module, merged: torch.Tensor) -> None:
    weight: Any = base.weight
    weight.copy_(merged)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers are trained, and how many the model has without its adapters."""
    require_module(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = added_prefixes(model)
    return trained, sum(_numel(p) for name, p in model.named_parameters() if not name.startswith(added))


def _numel(parameter: Tensor) -> int:
    """Numbers that it stands for: 4-bit weights are packed."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else int(torch.Size(shape).numel())


def _replace(model: nn.Module, path: str, module: Any) -> Any:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return module


def _base_layer(model: nn.Module, path: str) -> nn.Module:
    found = model.get_submodule(path)
    return found.base_layer if isinstance(found, FrodLinear) else found


def _patterns(
    opened: BasisFile, categories: set[str], sparsity: values.Number | Mapping[str, values.Number] | None, given: object
) -> tuple[int | None, dict[str, float], dict[str, HostArray]]:
    """Seed, sparsity and positions by category; the seed None where the positions are the basis file's alone."""
    rates = {category: float(opened.metadata.sparsity[category]) for category in categories}
    seed = None if given is None else values.seed(given, "seed")
    if sparsity is None and seed is None:
        found = opened.indices()
        stored = any(f"indices.{category}" in opened for category in found)
        replayable = not stored and categories == set(found)
        return opened.metadata.seed if replayable else None, rates, {c: found[c] for c in categories}
    if isinstance(sparsity, Mapping):
        for category, rate in sparsity.items():
            values.require(
                category in categories, "sparsity", category, f"the categories are {', '.join(sorted(categories))}"
            )
            rates[category] = values.share(rate, "sparsity", at_least=0, at_most=1)
    elif sparsity is not None:
        rates = dict.fromkeys(categories, values.share(sparsity, "sparsity", at_least=0, at_most=1))
    seed = opened.metadata.seed if seed is None else seed
    return seed, rates, drawn({category: opened.width(category) for category in rates}, rates, seed)


def checked_name(adapter_name: object) -> str:
    """The name of an adapter: of a module and of a folder, too."""
    name = values.text(adapter_name, "adapter_name")
    values.require(not set(name) & set("./\\"), "adapter_name", name, "must be a name without dots and slashes")
    values.require(not hasattr(nn.ModuleDict(), name), "adapter_name", name, "torch.nn.ModuleDict takes no such name")
    return name


def checked_dropout(dropout: object) -> float:
    """A probability below 1."""
    found = values.number(dropout, "dropout", at_least=0)
    values.require(found < 1, "dropout", dropout, "must be below 1")
    return found


def checked_form(form: object, dropout: object) -> str:
    """How layers are computed; by W' there is no input of a correction to drop elements of."""
    found = values.choice(*FORMS)(form, "form")
    drops = checked_dropout(dropout) > 0
    values.require(not (drops and found.startswith("weight")), "form", found, "has no `dropout`; leave one of them")
    return found


def _check_uses(model: nn.Module, attached: Attached) -> dict[str, bool]:
    """By path whether the layer's weight must be W': not where the model asks for its dtype, device or shape alone."""
    gives = {}
    for path in (p.path for places in attached.places.values() for p in places if p.expert is None):
        uses = weight_uses(model, path)
        gives[path] = "values" in uses or "description" not in uses
        if "values" in uses and "layer" not in uses and not holds_matrix(_base_layer(model, path)):
            parent = type(model.get_submodule(path.rpartition(".")[0])).__name__
            raise InvalidInput(
                f"{path}: {parent} multiplies by its weight instead of calling it, which can be trained only where the "
                "weight is a floating-point matrix; leave it out with `exclude_modules`"
            )
    return gives


def _updates(model: nn.Module, attached: Attached, bases: _Bases, scales: _Scales) -> dict[str, Update]:
    """An update for each weight that layers of its own hold, which are checked."""
    opened = attached.basis
    projections: dict[tuple[object, ...], SharedProduct] = {}
    uses = _uses(model)
    updates = {}
    for module, record in attached.modules.items():
        category, places = record.category, attached.places[module]
        if places[0].expert is not None:
            continue
        layers = [Held(_base_layer(model, place.path), place) for place in places]
        for layer in layers:
            _check_module(layer.place.path, layer.base, opened.width(category), uses)
            _check_form(attached.form, layer)
        dtype, device = _placement(model, layers)
        basis, pattern = bases.of(category, dtype, device)
        parent = places[0].path.rpartition(".")[0]
        projection = projections.setdefault((category, dtype, device, parent), SharedProduct(category))
        updates[module] = Update(basis, pattern, scales.of(record), attached.dropout, attached.form, projection)
        alike = scales.of_category(category, device) if attached.live_prefix is not None else None
        with _training(layers):
            _check_layers(model, layers, updates[module], record, str(opened.path), alike)
    return updates


def _stacks(model: nn.Module, attached: Attached, bases: _Bases, scales: _Scales) -> dict[str, Stacks]:
    """What is trained of each layer of stacked experts, by its path; every expert's weight is checked."""
    opened = attached.basis

    def make(base: nn.Module, part: Part, records: Sequence[ModuleRecord]) -> ExpertsUpdate:
        category = records[0].category
        if attached.form.startswith("weight"):
            raise InvalidInput(f"{records[0].name}: is an expert among others; leave `form` at auto, or say input")
        named = zip(stacks.layers_of(base, part), records, strict=True)
        held = [Held(layer, Place(f"{record.name}.weight")) for layer, record in named]
        _check_module(records[0].name, held[0].base, opened.width(category), {})
        dtype, device = _placement(model, held[:1])
        basis, pattern = bases.of(category, dtype, device)
        update = ExpertsUpdate(basis, pattern, torch.stack(list(map(scales.of, records))), attached.dropout)
        alike = scales.of_category(category, device)
        for expert, record in enumerate(records):
            one = OneExpert(update, expert)
            _check_layers(model, held[expert : expert + 1], one, record, str(opened.path), alike)
        return update

    held = {m: (record, attached.places[m][0]) for m, record in attached.modules.items()}
    return stacks.trained(model, {m: found for m, found in held.items() if found[1].expert is not None}, make)


class _Bases:
    """V, D and positions of each category, made once, or taken from the model where it has them already."""

    def __init__(self, model: nn.Module, attached: Attached, indices: Mapping[str, HostArray]) -> None:
        self.attached, self.indices = attached, indices
        self._there = {(b.digest, b.V.dtype, b.V.device): b for b in model.modules() if isinstance(b, Basis)}
        self._made: dict[tuple[object, ...], tuple[Basis, Pattern]] = {}

    def of(self, category: str, dtype: torch.dtype, device: torch.device) -> tuple[Basis, Pattern]:
        key = category, dtype, device
        if key not in self._made:
            recorded, opened = self.attached.V_digests[category], self.attached.basis
            basis = self._there.get((recorded, dtype, device))
            if basis is None:
                layers = sum(record.category == category for record in opened.metadata.modules)
                basis = Basis(opened.tensor(f"V.{category}"), category, recorded, layers, dtype, device)
            self._made[key] = basis, Pattern(self.indices[category], basis.n, device)
        return self._made[key]


class _Scales:
    """λ of a basis, each read once."""

    def __init__(self, opened: BasisFile) -> None:
        self.opened = opened
        self._read: dict[str, Tensor] = {}
        self._together: dict[tuple[str, torch.device], Tensor] = {}

    def of(self, record: ModuleRecord) -> Tensor:
        if record.name not in self._read:
            self._read[record.name] = to_torch(self.opened.tensor(f"lambda.{record.name}"))
        return self._read[record.name]

    def of_category(self, category: str, device: torch.device) -> Tensor:
        """Of all weights of a category, (N, n)."""
        if (category, device) not in self._together:
            of_all = [self.of(record) for record in self.opened.metadata.modules if record.category == category]
            self._together[category, device] = torch.stack(of_all).to(device)
        return self._together[category, device]


@contextmanager
def _training(layers: Sequence[Held]) -> Iterator[None]:
    """Layers in training: in evaluation some quantized ones repack their weights for good."""
    modes = [layer.base.training for layer in layers]
    try:
        for layer in layers:
            layer.base.train()
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.base.train(mode)


def _check_layers(
    model: nn.Module,
    layers: Sequence[Held],
    update: Update | OneExpert,
    record: ModuleRecord,
    where: str,
    alike: Tensor | None,
) -> None:
    """See that these layers hold the recorded weight, and pass gradients."""
    given = _input_dtype(model, layers[0].base)
    device = update.basis.V.device
    check_layer(layers, update.basis, update.base_scales, record, given, where, alike)
    for layer in layers:
        if not is_dense(layer.base):
            check_gradient(layer.base, update.basis.n, given, device, layer.place.path)


def _by_path(model: nn.Module, attached: Attached, updates: Mapping[str, Update]) -> dict[str, Update | Parts | Stacks]:
    """What is trained of each layer: an update of its weight, or one for each of several parts."""
    held: dict[str, list[tuple[Place, str]]] = {}
    for module in updates:
        for place in attached.places[module]:
            held.setdefault(place.path, []).append((place, module))
    found: dict[str, Update | Parts | Stacks] = {}
    for path, parts in held.items():
        parts.sort(key=lambda part: part[0].rows or (0, 0))
        rows = [place.rows for place, _ in parts if place.rows is not None]
        overlap = any(stop > start for (_, stop), (start, _) in itertools.pairwise(rows))
        if overlap or (len(rows) < len(parts) and len(parts) > 1):
            raise InvalidInput(
                f"{parts[0][1]} and {parts[1][1]} are both {path} here; leave one out (`exclude_modules`)"
            )
        there = model.get_submodule(path)
        if isinstance(there, FrodLinear) and isinstance(there, FusedFrodLinear) != bool(rows):
            raise InvalidInput(
                f"{path}: one adapter trains it whole, and one in parts; they need bases of one checkpoint"
            )
        if rows and is_transposed(_base_layer(model, path)):
            raise InvalidInput(f"{path}: holds several weights side by side, which are not trained yet")
        own = [_for_place(updates[module], place, attached.places[module]) for place, module in parts]
        found[path] = Parts(own, rows) if rows else own[0]
    return found


def _for_place(update: Update, place: Place, places: Sequence[Place]) -> Update:
    """The update of a weight as one of its places has it: with the same trained numbers, and what it keeps its own."""
    if place is places[0]:
        return update
    shared = (update.basis, update.pattern, update.delta, update.values)
    return copy.deepcopy(update, {id(one): one for one in shared})


def _check_form(form: str, layer: Held) -> None:
    if form.startswith("weight") and (layer.place.rows is not None or not is_dense(layer.base)):
        what = "is trained in parts" if layer.place.rows is not None else f"is a {type(layer.base).__name__}, not dense"
        raise InvalidInput(f"{layer.place.path}: {what}; leave `form` at auto, or say input")


def _check_module(path: str, base: nn.Module, n: int, uses: Mapping[int, int]) -> None:
    found = in_features(base)
    if found not in (None, n):
        raise InvalidInput(f"{path}: takes {found} features, but its basis is of width {n}: another model")
    weight = getattr(base, "weight", None)
    if weight is not None and uses.get(id(weight), 1) > 1:
        raise InvalidInput(f"{path}: its weight is tied to another module's; leave it out with `exclude_modules`")


def _uses(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _input_dtype(model: nn.Module, base: nn.Module) -> torch.dtype:
    """The dtype that the layer is given: its weight's if that is a matrix, else what most of the model computes in."""
    if holds_matrix(base):
        weight: Any = base.weight
        return weight.dtype  # type: ignore[no-any-return]
    of_layer = getattr(base, "compute_dtype", None)
    if isinstance(of_layer, torch.dtype) and of_layer.is_floating_point:
        return of_layer
    floating = (p.dtype for p in model.parameters() if type(p) is nn.Parameter and p.is_floating_point())
    return next(floating, torch.get_default_dtype())


def _placement(model: nn.Module, layers: Sequence[Held]) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the layers' V and D."""
    path, dtype = layers[0].place.path, _input_dtype(model, layers[0].base)
    tensors = [next(iter([*one.base.parameters(), *one.base.buffers(), *model.parameters()])) for one in layers]
    tensor = tensors[0]
    if any(other.device != tensor.device for other in tensors):
        raise InvalidInput(f"{path}: has rows of a weight whose other rows are on another device; keep them together")
    if tensor.device.type == "meta":
        raise InvalidInput(f"{path}: has no weights yet (meta device); load the model first")
    return torch.float32 if dtype == torch.float16 else dtype, tensor.device


def _saved_modules(model: nn.Module, attached: Attached) -> list[str]:
    """Paths of the modules to train as a whole."""
    uses = _uses(model)
    inner = tuple(f"{path}." for path in (*frod_layers(model), *saved_modules(model)))
    outer = [path for path, _ in model.named_modules() if not path.startswith(inner)]
    found = []
    for name in attached.modules_to_save:
        paths = [p for p in outer if p == name or p.endswith(f".{name}")]
        if not paths:
            raise UsageError(f"`modules_to_save` {name}: no such module in {type(model).__name__}")
        for path in paths:
            module = model.get_submodule(path)
            targeted = [target for target in attached.modules if target == path or target.startswith(f"{path}.")]
            if targeted:
                raise UsageError(f"`modules_to_save` {name}: {targeted[0]} in it is a target; leave one of them out")
            original = module.original_module if isinstance(module, SavedModule) else module
            inside = _uses(original)
            if any(uses[key] > count for key, count in inside.items()) and not isinstance(module, SavedModule):
                raise UsageError(f"`modules_to_save` {name}: {path} is tied to another module; untie it first")
            if any(not p.is_floating_point() for p in original.parameters()):
                raise UsageError(f"`modules_to_save` {name}: {path} is quantized and cannot be trained")
            if attached.live_prefix is not None:
                _check_is_stored(model, name, path, original)
        found += paths
    return found


def _check_is_stored(model: nn.Module, name: str, path: str, module: nn.Module) -> None:
    """`UsageError` where a checkpoint, whose names the adapter has, calls a module to save otherwise, or divides it."""
    tensors = {f"{path}.{key}": tensor for key, tensor in module.state_dict().items()}
    stored = as_stored(model, tensors)
    same = sorted(tuple(tensor.shape) for tensor in stored.values()) == sorted(tuple(t.shape) for t in tensors.values())
    if not same or any(f".{name}." not in f".{key}" for key in stored):
        raise UsageError(
            f"`modules_to_save` {name}: {path} of the live model cannot be saved as a checkpoint has it, "
            f"{next(iter(stored))}"
        )
