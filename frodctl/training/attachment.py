"""Attaching trainable layers to a live model, and taking them off again."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from frodctl import values
from frodctl.adapted import opening
from frodctl.adapted.positions import drawn
from frodctl.arrays import to_torch
from frodctl.checkpoint.requests import comma_hint, module_matcher
from frodctl.checkpoint.targets import DEFAULT_TARGETS
from frodctl.errors import InvalidInput, UsageError
from frodctl.formats.basis_file import BasisFile, ModuleRecord
from frodctl.training import trainer
from frodctl.training.attached import (
    Attached,
    Attachment,
    added_prefixes,
    attachment_of,
    forget,
    frod_layers,
    keep,
    live_paths,
    require_attachment,
    require_module,
    saved_modules,
    updates_of,
)
from frodctl.training.check import check_gradient, check_layer
from frodctl.training.layer import (
    FORMS,
    Basis,
    FrodLinear,
    Pattern,
    SavedModule,
    Update,
    holds_matrix,
    in_features,
    is_dense,
    multiplies,
)
from frodctl.training.reads import weight_uses
from frodctl.training.shared import SharedProduct

if TYPE_CHECKING:
    from frodctl.arrays import HostArray

#: Heads that a checkpoint of the bare model lacks, by their names and by the classes that have them.
_HEADS = ("classifier", "score", "qa_outputs")
_WITH_A_NEW_HEAD = re.compile(r"For(Sequence|Token|Image|Audio)Classification$|ForQuestionAnswering$")

Model = TypeVar("Model", bound=nn.Module)
_NAME = re.compile(r"[\w.\-]+")


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
    chosen = choose(model, opened, target_modules, exclude_modules)
    seed, rates, indices = _patterns(opened, {r.category for r in chosen.values()}, sparsity, seed)
    saved = values.names(modules_to_save, "modules_to_save")
    attached = Attached(opened, chosen, rates, seed, saved, checked_dropout(dropout), form=checked_form(form, dropout))
    install(model, attached, indices, adapter_name)
    _warn_of_a_frozen_head(model, saved)
    return model


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
    gives_weight = _check_uses(model, attached.modules)
    layers = _layers(model, attached, indices)
    saved = _saved_modules(model, attached)
    if attachment is None:
        attachment = Attachment(frozenset(n for n, p in model.named_parameters() if p.requires_grad))
        keep(model, attachment)
        trainer.prepare(model)
    for path, update in layers.items():
        layer = model.get_submodule(path)
        if not isinstance(layer, FrodLinear):
            layer = _replace(model, path, FrodLinear(layer, gives_weight[path]))
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
    for update in updates_of(model, attachment.active).values():
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
    layers = updates_of(model, attachment.active)
    for path in layers:
        base = _base_layer(model, path)
        if not holds_matrix(base):
            raise UsageError(f"{path}: not a floating-point weight; merge the saved adapter instead (frodctl merge)")
        if not multiplies(base):
            kind = type(base).__name__
            raise UsageError(
                f"{path}: {kind} does not compute W x + b; merge the saved adapter instead (frodctl merge)"
            )
    for path, update in layers.items():
        base = _base_layer(model, path)
        if update.scale and (update.delta.any() or update.values.any()):
            weight: Any = base.weight
            weight.copy_(update.merged_weight(base))
    for module in saved_modules(model).values():
        module.original_module = module.chosen()
    return detach(model)


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


def choose(
    model: nn.Module,
    opened: BasisFile,
    target_modules: values.Names | None,
    exclude_modules: values.Names | None = None,
) -> dict[str, ModuleRecord]:
    """The modules to train, by path in the model."""
    records = {record.name: record for record in opened.metadata.modules}
    live = live_paths(model, records)

    def matching(given: values.Names, parameter: str) -> set[str]:
        found: set[str] = set()
        for part, matches in _tests(given, parameter, model):
            fits = {n for n in records if matches(re.sub(r"\[\d+\]$", "", n)) or matches(live.get(n, n))}
            said = filter(None, (f"matches no module of {opened.path}", comma_hint(part)))
            values.require(bool(fits), parameter, part, "; ".join(said))
            found |= fits
        return found

    wanted = set(records) if target_modules is None else matching(target_modules, "target_modules")
    if exclude_modules is not None:
        wanted -= matching(exclude_modules, "exclude_modules")
    if not wanted:
        raise UsageError("`target_modules`, `exclude_modules`: no module is left to train")
    for name in (name for name in records if name in wanted):
        if name.endswith("]"):
            raise InvalidInput(
                f"{name}: a slice of fused experts, which is no module of its own; leave it out with `exclude_modules`"
            )
        if name not in live:
            raise InvalidInput(
                f"{name}: {type(model).__name__} has no such module, or several; leave it out with `exclude_modules`, "
                f"or give the basis of this model instead of {opened.path}"
            )
    return {live[name]: record for name, record in records.items() if name in wanted}


def _tests(given: values.Names, parameter: str, model: nn.Module) -> list[tuple[str, Callable[[str], bool]]]:
    """What is asked for, part by part, each with its test for a module's path."""
    if isinstance(given, str):
        text = values.text(given, parameter).strip()
        if text == "all-linear":
            return [(text, lambda path: True)]
        if text == "default":
            return [(text, module_matcher(_default_targets(model, parameter)))]
        split = [part.strip() for part in text.split(",")]
        parts = split if all(map(_NAME.fullmatch, split)) else [text]
    else:
        parts = list(values.names(given, parameter))
        values.require(bool(parts), parameter, given, "names no module")
    try:
        return [(part, module_matcher(part)) for part in parts]
    except UsageError as error:
        raise UsageError(f"`{parameter}`: {error}") from None


def _default_targets(model: nn.Module, parameter: str) -> str:
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if model_type not in DEFAULT_TARGETS:
        raise UsageError(
            f"`{parameter}` default: there is none for model type {model_type!r}; say all-linear, or names of modules"
        )
    return DEFAULT_TARGETS[model_type]


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


def _check_uses(model: nn.Module, modules: Mapping[str, object]) -> dict[str, bool]:
    """By path whether the layer's weight must be W': not where the model asks for its dtype, device or shape alone."""
    gives = {}
    for path in modules:
        uses = weight_uses(model, path)
        gives[path] = "values" in uses or "description" not in uses
        if "values" in uses and "layer" not in uses and not holds_matrix(_base_layer(model, path)):
            parent = type(model.get_submodule(path.rpartition(".")[0])).__name__
            raise InvalidInput(
                f"{path}: {parent} multiplies by its weight instead of calling it, which can be trained only where the "
                "weight is a floating-point matrix; leave it out with `exclude_modules`"
            )
    return gives


def _layers(model: nn.Module, attached: Attached, indices: Mapping[str, HostArray]) -> dict[str, Update]:
    """An update for each module, its base checked; V and D are taken from the model where it has them already."""
    opened = attached.basis
    held = {(b.digest, b.V.dtype, b.V.device): b for b in model.modules() if isinstance(b, Basis)}
    counts: dict[str, int] = {}
    for record in opened.metadata.modules:
        counts[record.category] = counts.get(record.category, 0) + 1
    shared: dict[tuple[object, ...], tuple[Basis, Pattern]] = {}
    projections: dict[tuple[object, ...], SharedProduct] = {}
    uses = _uses(model)
    updates = {}
    for path, record in attached.modules.items():
        base, category = _base_layer(model, path), record.category
        _check_module(model, path, base, opened.width(category), uses)
        dtype, device = _placement(model, base, path)
        key = category, dtype, device
        if key not in shared:
            recorded = attached.V_digests[category]
            basis = held.get((recorded, dtype, device))
            if basis is None:
                V = opened.tensor(f"V.{category}")
                basis = Basis(V, category, recorded, counts[category], dtype, device)
            shared[key] = basis, Pattern(indices[category], basis.n, device)
        basis, pattern = shared[key]
        if attached.form.startswith("weight") and not is_dense(base):
            raise InvalidInput(f"{path}: {type(base).__name__} is no dense layer; leave `form` at auto, or say input")
        scales = to_torch(opened.tensor(f"lambda.{record.name}"))
        projection = projections.setdefault((*key, path.rpartition(".")[0]), SharedProduct(category))
        updates[path] = Update(basis, pattern, scales, attached.dropout, attached.form, projection)
        given, mode = _input_dtype(model, base), base.training
        try:
            base.train()  # in evaluation some quantized layers repack their weights for good
            check_layer(base, basis, updates[path].base_scales, record, given, path, str(opened.path))
            if not is_dense(base):
                check_gradient(base, basis.n, given, device, path)
        finally:
            base.train(mode)
    return updates


def _check_module(model: nn.Module, path: str, base: nn.Module, n: int, uses: Mapping[int, int]) -> None:
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


def _placement(model: nn.Module, base: nn.Module, path: str) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the layer's V and D."""
    dtype = _input_dtype(model, base)
    tensor = next(iter([*base.parameters(), *base.buffers(), *model.parameters()]))
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
        found += paths
    return found
