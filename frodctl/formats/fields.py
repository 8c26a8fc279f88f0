"""What a number in the metadata of a file, which may be anybody's, must be."""

from __future__ import annotations

from typing import TypeGuard


def is_seed(value: object) -> TypeGuard[int]:
    """An integer that torch's generators take."""
    return type(value) is int and -(2**63) <= value < 2**64


def is_rate(value: object) -> TypeGuard[float]:
    """A share, between 0 and 1."""
    return _is_number(value) and 0 <= value <= 1


def is_alpha(value: object) -> TypeGuard[float]:
    """A regularisation: positive and finite."""
    return _is_number(value) and 0 < value < float("inf")


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float)


def is_text_map(value: object) -> TypeGuard[dict[str, str]]:
    """A JSON object of strings."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
