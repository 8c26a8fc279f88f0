"""Module names: which layer a module belongs to, and which category shares its basis.

The names are PEFT's (peft 0.21, ``tuners/frod``) wherever they tell roles apart, so that its adapters and
these bases speak of the same thing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

#: Of torch.compile, torch's checkpoint_wrapper and FullyShardedDataParallel.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def peft_category(module: str) -> str:
    """The category that PEFT gives the module at this path.

    >>> peft_category("model.layers.3.self_attn.q_proj")
    'self_attn_q_proj'
    >>> peft_category("encoder.layer.0.attention.output.dense")
    'attention_output'
    """
    parts = module.split(".")
    if len(parts) == 1:
        return parts[0]
    if parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def layer_index(module: str) -> int | None:
    """The number of the block that holds the module; None outside the blocks."""
    parts = module.split(".")
    numbers = [int(part) if _is_number(part) else None for part in parts]
    if "layers" in parts[:-1] and (after := numbers[parts.index("layers") + 1]) is not None:
        return after
    return next((number for number in numbers if number is not None), None)


def _is_number(part: str) -> bool:
    """Whether it is a number that blocks have; int() refuses some of what str.isdigit() takes."""
    return part.isascii() and part.isdigit() and len(part) < 19


def in_block(module: str) -> bool:
    """Whether the module stands inside a numbered block, rather than being a numbered item itself."""
    return any(part.isdigit() for part in module.split(".")[:-1])


def role(module: str) -> str:
    """The module's path without its numbers: equal for the same part of every block.

    >>> role("model.layers.3.mlp.experts.7.w1")
    'model.layers.mlp.experts.w1'
    """
    *parents, last = re.sub(r"\[\d+\]$", "", module).split(".")
    return ".".join([part for part in parents if not part.isdigit()] + [last])


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that orders numbers by value: layer 9 before layer 10."""
    parts: list[tuple[int, str]] = [(int(p), p) if _is_number(p) else (-1, p) for p in re.split(r"([0-9]+)", name)]
    return parts


def categories(widths: Mapping[str, int], joined: Mapping[str, str] = {}) -> tuple[dict[str, str], list[str]]:
    """Name the category of each module.

    Parameters
    ----------
    widths : mapping of str to int
        The targeted modules and their ``in_features``.
    joined : mapping of str to str
        By module the path that stands for it and others, which share a category then (`siblings.joined`).

    Returns
    -------
    names : dict of str to str
        For each module its category. Modules of one category have one width, and one role or one path in ``joined``.
        The name is PEFT's; where that stands for several roles or widths, each is qualified by what tells it apart.
    collisions : list of str
        PEFT's names that had to be qualified. PEFT has one basis for each, and cannot take ours.
    """
    groups: dict[str, dict[tuple[str, int], list[str]]] = {}
    for module, width in widths.items():
        path = joined.get(module, module)
        base = peft_category(re.sub(r"\[\d+\]$", "", path))
        groups.setdefault(base, {}).setdefault((role(path), width), []).append(module)
    names: dict[str, str] = {}
    collisions = []
    taken = {base for base, kinds in groups.items() if len(kinds) == 1}
    for base, kinds in sorted(groups.items()):
        labels = {next(iter(kinds)): base}
        if len(kinds) > 1:
            if not joined.keys() >= set().union(*kinds.values()):
                collisions.append(base)
            labels = _qualify(base, sorted(kinds), taken)
            taken.update(labels.values())
        for kind, modules in kinds.items():
            names.update(dict.fromkeys(modules, labels[kind]))
    return names, collisions


def _qualify(base: str, kinds: Sequence[tuple[str, int]], taken: Iterable[str]) -> dict[tuple[str, int], str]:
    """Names for the roles and widths that PEFT calls ``base``: distinct, and not among ``taken``."""
    paths = {path: path.split(".") for path, _ in kinds}
    shared = set.intersection(*(set(parts) for parts in paths.values()))
    several_widths = {path for path, _ in kinds if sum(path == other for other, _ in kinds) > 1}
    short, long, full = {}, {}, {}
    for path, width in kinds:
        own = [part for part in paths[path] if part not in shared]
        suffix = [str(width)] if path in several_widths else []
        short[path, width] = "_".join([*own, base, *suffix])
        long[path, width] = "_".join([*paths[path], str(width)])
        full[path, width] = f"{path}.{width}"  # distinct by construction: no other name has dots
    for labels in (short, long):
        if len(set(labels.values())) == len(kinds) and not set(labels.values()) & set(taken):
            return labels
    return full


def unwrapped(name: str) -> str:
    """The name without the modules that torch.compile, activation checkpointing and FSDP put around others."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def match(paths: Iterable[str], known: Collection[str]) -> dict[str, str | None]:
    """Find paths of a live model among a checkpoint's, which may lack the task model's prefix or have another.

    A path stands for itself, or for the one known path that differs from it by a prefix: one side has it and the
    other not (``transformer.h.0`` and ``h.0``), or both have the same parts in another order
    (``model.language_model.layers.0`` and ``language_model.model.layers.0``).

    Returns
    -------
    dict of str to str or None
        For each path the known one; None where there is none, or more than one.
    """
    paths, known = list(paths), set(known)
    if known.issuperset(paths):
        return {path: path for path in paths}
    by_ending: dict[str, list[str]] = {}  # of the known paths, under each of their endings
    by_parts: dict[object, list[str]] = {}
    for name in known:
        for ending in _endings(name):
            by_ending.setdefault(ending, []).append(name)
        by_parts.setdefault(_without_order(name), []).append(name)

    def candidates(path: str) -> set[str]:
        reordered = by_parts.get(_without_order(path), [])
        return {path} & known or {*(_endings(path) & known), *by_ending.get(path, []), *reordered}

    found = {path: candidates(path) for path in paths}
    return {path: next(iter(names)) if len(names) == 1 else None for path, names in found.items()}


def _endings(path: str) -> set[str]:
    """What is left of the path without a prefix, which has no number in it."""
    parts = path.split(".")
    first_number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return {".".join(parts[start:]) for start in range(1, first_number + 1)}


def _without_order(path: str) -> tuple[object, ...]:
    """Equal for paths of the same parts in another order; numbers and the last part keep theirs."""
    parts = path.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return tuple(sorted(part for part in parts[:-1] if not part.isdigit())), tuple(numbers), parts[-1]


def live_prefix(matches: Mapping[str, str | None]) -> str:
    """The prefix that all the live paths have and the checkpoint's lack, with its dot; "" if there is none."""
    prefixes = {path.removesuffix(name) if name and path.endswith("." + name) else "" for path, name in matches.items()}
    return prefixes.pop() if len(prefixes) == 1 else ""
