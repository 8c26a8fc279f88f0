"""What a number in the metadata of a file, which may be anybody's, must be."""

from __future__ import annotations

from typing import Any, TypeGuard


def is_seed(value: Any) -> TypeGuard[int]:
    """An integer that torch's generators take."""
    return type(value) is int and -(2**63) <= value < 2**64


def is_rate(value: Any) -> TypeGuard[float]:
    """A share, between 0 and 1."""
    return type(value) in (int, float) and 0 <= value <= 1


def is_alpha(value: Any) -> TypeGuard[float]:
    """A regularisation: positive and finite."""
    return type(value) in (int, float) and 0 < value < float("inf")


def is_text_map(value: Any) -> TypeGuard[dict[str, str]]:
    """A JSON object of strings."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
