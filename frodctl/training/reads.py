"""How a model's own code uses a layer: whether it calls it, or reads its weight.

Some modules multiply by ``self.dt_proj.weight`` (Mamba), or hand ``self.out_proj.weight`` to a function (torch's
MultiheadAttention, fused kernels); others ask for ``self.wo.weight.dtype`` and call the layer (T5). The sources tell.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache

from torch import nn

#: What is asked of a weight without using its values.
_DESCRIPTIONS = {"dtype", "device", "shape", "ndim", "dim", "size", "numel", "requires_grad", "is_cuda", "itemsize"}
#: Attributes of a linear layer beside its weight; what else is done with a layer may be a call.
_OTHERS = {"bias", "in_features", "out_features"}


def weight_uses(model: nn.Module, path: str) -> frozenset[str]:
    """What the modules around a layer do with it, as far as the sources of their classes tell.

    Returns
    -------
    frozenset of str
        ``values``: its weight is read; ``description``: dtype, device or shape of the weight; ``layer``: it is
        called, or may be.
    """
    parts = path.split(".")
    name = next((part for part in reversed(parts) if not part.isdigit()), "")
    found: frozenset[str] = frozenset()
    for end in range(len(parts)):
        for kind in type(model.get_submodule(".".join(parts[:end]))).__mro__:
            if "forward" in vars(kind) and kind is not nn.Module:
                found |= _uses_in(kind).get(name, frozenset())
    return found


@cache
def _uses_in(kind: type) -> Mapping[str, frozenset[str]]:
    """For each attribute that the class's methods load, what they do with it."""
    uses: dict[str, set[str]] = {}
    source = _class(kind)
    for method in source.body if source else ():
        if isinstance(method, ast.FunctionDef) and "init" not in method.name:
            for name, use in _uses(method):
                uses.setdefault(name, set()).add(use)
    return {name: frozenset(found) for name, found in uses.items()}


def _uses(method: ast.AST) -> Iterator[tuple[str, str]]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            outer = parents[node]
            while isinstance(outer, ast.Subscript):  # self.layers[0].weight
                outer = parents[outer]
            if not isinstance(outer, ast.Attribute) or outer.attr not in {"weight", *_OTHERS}:
                yield node.attr, "layer"
            elif outer.attr == "weight":
                yield node.attr, "description" if _describes(parents[outer]) else "values"


def _describes(node: ast.AST) -> bool:
    """Whether it asks what a weight is, not for its values."""
    if isinstance(node, ast.Attribute):
        return node.attr in _DESCRIPTIONS
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "type")
    return isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)


def _class(kind: type) -> ast.ClassDef | None:
    """The class's definition; None where there is no source."""
    scope: ast.AST | None = _module(kind.__module__)
    for name in kind.__qualname__.split("."):
        if scope is not None and name != "<locals>":
            inner = (node for node in ast.walk(scope) if isinstance(node, ast.ClassDef | ast.FunctionDef))
            scope = next((node for node in inner if node.name == name and node is not scope), None)
    return scope if isinstance(scope, ast.ClassDef) else None


@cache
def _module(name: str) -> ast.Module | None:
    try:
        return ast.parse(inspect.getsource(sys.modules[name]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return None
