"""What users give, from Python or the command line, as what the code works with: one reading of every kind of value.

Each function takes a value and the name of its parameter, and returns the value in its one form. What it cannot
read is a `UsageError` that names the parameter in backticks; the command line shows it as the flag.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Self, TypeAlias, TypeVar

from frodctl.errors import UsageError

#: What may be given where the name says so.
PathLike: TypeAlias = str | os.PathLike[str]
Number: TypeAlias = float | str
Names: TypeAlias = str | Iterable[str]
Blocks: TypeAlias = str | int | Iterable[int]
Scaled: TypeAlias = str | os.PathLike[str] | tuple[PathLike, Number]

T = TypeVar("T")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_NOT_A_NUMBER = (bool, complex)
_LARGEST_SEED = 2**64 - 1
_SMALLEST_SHARD = 1000  # bytes


def option(default: T, read: Callable[[object, str], T], *, repr: bool = True) -> T:
    """A field of `Options` with this default, read by one of the functions here."""
    return field(default=default, metadata={"read": read}, repr=repr)


@dataclass(frozen=True)
class Options:
    """What may be chosen about a job: a frozen dataclass whose fields, made by `option`, are read as they are set."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = item.metadata["read"](getattr(self, item.name), item.name)
            object.__setattr__(self, item.name, value)

    @classmethod
    def of(cls, **given: object) -> Self:
        """From values in any of the forms that are read."""
        return cls(**given)


def optional(read: Callable[[object, str], T]) -> Callable[[object, str], T | None]:
    """As ``read``, and None is None."""
    return lambda value, parameter: None if value is None else read(value, parameter)


def require(holds: bool, parameter: str, value: object, expected: str) -> None:
    """`UsageError` where the value of the parameter is not what is expected."""
    if not holds:
        raise UsageError(f"`{parameter}` {_shown(value)}: {expected}")


def flag(value: object, parameter: str) -> bool:
    """True or False."""
    if type(value).__name__ in ("bool", "bool_"):  # numpy's, too
        return bool(value)
    raise _wrong(value, parameter, "True or False")


def text(value: object, parameter: str) -> str:
    """A string that is not empty and that a file may hold."""
    if not isinstance(value, str):
        raise _wrong(value, parameter, "a string")
    require(bool(value.strip()), parameter, value, "must not be empty")
    return _encodable(value, parameter)


def text_or_nothing(value: object, parameter: str) -> str:
    """A string, which may be empty."""
    return "" if value is None or (isinstance(value, str) and not value) else text(value, parameter)


def device(value: object, parameter: str) -> str:
    """The name of a device, or a torch.device."""
    name = str(value) if type(value).__name__ == "device" else text(value, parameter)
    known = re.fullmatch(r"auto|(cpu|cuda|mps|meta|xpu|hpu|npu|xla)(:[0-9]{1,4})?", name)
    require(known is not None, parameter, value, "not a device; say auto, cpu, cuda or cuda:1")
    return name


def dtype(*choices: str) -> Callable[[object, str], str]:
    """One of these dtypes by name, or torch's own."""
    read = choice(*choices)

    def named(value: object, parameter: str) -> str:
        given = str(value) if type(value).__name__ == "dtype" else value
        return read(given.removeprefix("torch.") if isinstance(given, str) else given, parameter)

    return named


def choice(*choices: str) -> Callable[[object, str], str]:
    """One of these words."""

    def read(value: object, parameter: str) -> str:
        require(isinstance(value, str) and value in choices, parameter, value, f"one of {', '.join(choices)}")
        return str(value)

    return read


def number(
    value: object, parameter: str, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf
) -> float:
    """A finite number: an int or a float (numpy's, too), or text such as ``1e-3``."""
    found = _float(value.strip() if isinstance(value, str) else value)
    if found is None:
        raise _wrong(value, parameter, "a number")
    return _within(found, value, parameter, at_least, above, at_most)


def share(
    value: object, parameter: str, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf
) -> float:
    """A number, which may be given in per cent: ``0.0172`` or ``1.72%``."""
    given = value.strip() if isinstance(value, str) else value
    percent = given[:-1].strip() if isinstance(given, str) and given.endswith("%") else None
    found = _float(given if percent is None else percent)
    if found is None:
        raise _wrong(value, parameter, "a number such as 0.5, or per cent such as 50%")
    return _within(found if percent is None else found / 100, value, parameter, at_least, above, at_most)


def between(
    read: Callable[..., float], at_least: float = -math.inf, at_most: float = math.inf, *, above: float = -math.inf
) -> Callable[[object, str], float]:
    """As `number` or `share`, within bounds."""
    return lambda value, parameter: read(value, parameter, at_least=at_least, above=above, at_most=at_most)


def integer(value: object, parameter: str, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """A whole number, or text such as ``12``."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip()):
        value = int(value.strip())
    value = _scalar(value)
    if isinstance(value, _NOT_A_NUMBER) or not isinstance(value, Integral):
        raise _wrong(value, parameter, "a whole number")
    found = int(value)
    if at_least is not None:
        expected = {0: "must not be negative", 1: "must be positive"}.get(at_least, f"must be at least {at_least}")
        require(found >= at_least, parameter, value, expected)
    if at_most is not None:
        require(found <= at_most, parameter, value, f"must be at most {at_most}")
    return found


def seed(value: object, parameter: str) -> int:
    """A seed that torch's generator takes: of 64 bits."""
    return integer(value, parameter, at_least=0, at_most=_LARGEST_SEED)


def count(value: object, parameter: str) -> int:
    """A positive whole number."""
    return integer(value, parameter, at_least=1)


def size(value: object, parameter: str) -> int:
    """A number of bytes, or text: ``500000``, ``128MB`` (10⁶), ``2GiB`` (2³⁰)."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", value.upper(), re.ASCII)
        if not match or len(match[1]) > 18:
            raise _wrong(value, parameter, "a size such as 500000, 128MB or 2GiB")
        return int(float(match[1]) * _UNITS[match[2] or ""])
    if isinstance(value, float) and value.is_integer():  # 5e6
        value = int(value)
    if isinstance(value, _NOT_A_NUMBER) or not isinstance(value, Integral):
        raise _wrong(value, parameter, "a size such as 500000, 128MB or 2GiB")
    return integer(value, parameter, at_least=0)


def shard_size(value: object, parameter: str) -> int:
    """A number of bytes for a file: as `size`, but a bare small number would be a slip for megabytes."""
    found = size(value, parameter)
    require(found >= _SMALLEST_SHARD, parameter, value, f"at least {_SMALLEST_SHARD} bytes; say 500MB or 5GB")
    return found


def path(value: object, parameter: str) -> Path:
    """A path; ``~`` is the home folder."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise _wrong(value, parameter, "a path")
    given = os.fspath(value)
    require(bool(given.strip()), parameter, given, "must not be empty")
    try:
        encoded = os.fsencode(given)
    except UnicodeEncodeError:
        encoded = b"\0"
    require(b"\0" not in encoded, parameter, given, "holds a character that no path has")
    require(len(encoded) < 4096 and max(map(len, encoded.split(b"/"))) < 256, parameter, given, "too long for a path")
    try:
        return Path(given).expanduser()
    except RuntimeError:  # nobody of that name
        return Path(given)


def basis(value: object, parameter: str) -> str:
    """A path, a URL of the Hub, or what `frodctl.open_basis` gave, which has a path."""
    return model(getattr(value, "path", value) if not isinstance(value, os.PathLike) else value, parameter)


def model(value: object, parameter: str) -> str:
    """What names a model or an adapter: a path or a Hub id."""
    if not isinstance(value, (str, os.PathLike)):
        raise _wrong(value, parameter, "a path or a Hub id")
    path(value, parameter)
    return os.fspath(value)


def repository(value: object, parameter: str) -> str:
    """A repository on the Hub that is written to: ``org/name``."""
    known = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text(value, parameter), re.ASCII)
    require(known is not None, parameter, value, "expected org/name, or your own name before the slash")
    return str(value)


def models(value: object, parameter: str) -> tuple[str, ...]:
    """At least one of what `model` reads, in lists of any depth."""
    if isinstance(value, (str, os.PathLike)):
        return (model(value, parameter),)
    found: list[str] = []
    for item in _items(value, parameter, "paths or Hub ids"):
        found += models(item, parameter)
    require(bool(found), parameter, value, "names none")
    return tuple(found)


def names(value: object, parameter: str) -> tuple[str, ...]:
    """Names, one by one or separated by commas in a string."""
    if isinstance(value, str):
        items: Sequence[object] = [part.strip() for part in value.split(",")] if value else []
    else:
        items = _items(value, parameter, "names: a list of strings, or one string with commas")
    found = []
    for item in items:
        if not isinstance(item, str):
            raise _wrong(value, parameter, "names: a list of strings, or one string with commas")
        require(bool(item.strip()), parameter, value, "has an empty name")
        _encodable(item, parameter)
        found.append(item)
    return tuple(found)


def globs(value: object, parameter: str) -> tuple[str, ...]:
    """Patterns: one string (commas and all), or several."""
    return (text(value, parameter),) if isinstance(value, str) else names(value, parameter)


def modules(value: object, parameter: str) -> str:
    """Which modules: ``default``, ``all-linear``, names, or a regular expression; a list of names with commas."""
    return text(value, parameter) if isinstance(value, str) else text(",".join(names(value, parameter)), parameter)


def blocks(value: object, parameter: str) -> str:
    """Block numbers: ``0-11``, ``0,2,8-11``; a number, a range or a list of numbers from Python."""
    if isinstance(value, str):
        return text(value, parameter)
    single = isinstance(value, Integral) and not isinstance(value, bool)
    numbers = [value] if single else _items(value, parameter, "block numbers, such as 0-11 or [0, 1, 2]")
    require(bool(numbers), parameter, value, "names no block")
    return ",".join(str(integer(number, parameter, at_least=0)) for number in numbers)


def scaled(value: object, parameter: str) -> tuple[str, float]:
    """An adapter and how much of it: ``ADAPTER``, ``ADAPTER:0.4``, or a pair from Python."""
    if isinstance(value, (tuple, list)):
        require(len(value) == 2, parameter, value, "expected pairs of an adapter and its scale")
        return model(value[0], parameter), share(value[1], parameter)
    given = model(value, parameter)
    name, colon, scale = given.rpartition(":")
    if Path(given).exists() or not (colon and name) or _float(scale.strip().removesuffix("%")) is None:
        return given, 1.0
    return name, share(scale, parameter)


def several_scaled(value: object, parameter: str) -> tuple[tuple[str, float], ...]:
    """Adapters, each as `scaled` has it; one alone need not be in a list."""
    pair = isinstance(value, tuple) and len(value) == 2 and _float(value[1]) is not None
    if isinstance(value, (str, os.PathLike)) or pair:
        return (scaled(value, parameter),)
    return tuple(scaled(item, parameter) for item in _items(value, parameter, "adapters, such as ['other:0.3']"))


def _items(value: object, parameter: str, expected: str) -> list[object]:
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        raise _wrong(value, parameter, expected)
    try:
        return list(value)
    except TypeError:  # torch's and numpy's arrays without a dimension
        raise _wrong(value, parameter, expected) from None


def _scalar(value: object) -> object:
    """What torch or numpy holds in an array without a dimension; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _float(value: object) -> float | None:
    """The number; None where it is none."""
    value = _scalar(value)
    if isinstance(value, _NOT_A_NUMBER) or not isinstance(value, (Real, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _within(found: float, value: object, parameter: str, at_least: float, above: float, at_most: float) -> float:
    require(math.isfinite(found), parameter, value, "must be finite")
    low = max(at_least, above)
    if at_most < math.inf:
        expected = f"must lie between {low:g} and {at_most:g}"
    else:
        expected = "must be positive" if above == 0 else f"must be at least {low:g}"
    require(at_least <= found <= at_most and found > above, parameter, value, expected)
    return found


def _encodable(value: str, parameter: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"`{parameter}`: holds a character that is no text (a lone surrogate)") from None
    require("\0" not in value, parameter, value, "holds a zero character")
    return value


def _wrong(value: object, parameter: str, expected: str) -> UsageError:
    return UsageError(f"`{parameter}` {_shown(value)}: expected {expected}")


def _shown(value: object) -> str:
    """The value for a message: short, on one line."""
    if isinstance(value, str):
        shown = value if value.isprintable() and value.strip() == value and value else ascii(value)
    elif value is None or isinstance(value, (bool, int, float, bytes, tuple, list, dict, set, frozenset)):
        shown = ascii(value)
    elif isinstance(value, os.PathLike):
        shown = str(value)
    else:
        shown = f"of type {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."
