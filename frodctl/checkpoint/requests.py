"""What is asked for by names, regular expressions and block numbers; and what to say where there is no such thing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches

from frodctl.checkpoint import names
from frodctl.errors import UsageError

_NAMES = re.compile(r"\s*[\w.\-]+(\s*,\s*[\w.\-]+)*\s*")
_HEAD = re.compile(r"^(lm_)?head$|^embed_out$")
_MOST_NAMED = 8  #: runs of block numbers in a message
#: Why a linear layer is left out, where the targets are given by one word.
_WORDS = {"default": "not a default target", "all-linear": "outside the repeated blocks"}


class Request:
    """Which linear layers are wanted.

    Parameters
    ----------
    target_modules : str
        ``default``, ``all-linear``, names separated by commas, or a regular expression.
    exclude_modules, layers : str, optional
    modules : sequence of str
        The paths of all modules there are.
    default : str, optional
        What ``default`` stands for.

    Raises
    ------
    UsageError
        A block does not exist, or a regular expression is none.
    """

    def __init__(
        self,
        target_modules: str,
        exclude_modules: str | None,
        layers: str | None,
        modules: Sequence[str],
        default: str | None = None,
    ) -> None:
        self.target_modules, self.exclude_modules, self.layers = target_modules, exclude_modules, layers
        self.modules = modules
        self._asked = f"`target_modules` {target_modules}" + (f" ({default})" if default else "")
        self._wanted = names.in_block if target_modules == "all-linear" else module_matcher(default or target_modules)
        self._excluded = module_matcher(exclude_modules) if exclude_modules else lambda module: False
        self._in_blocks = _block_matcher(layers, modules) if layers else lambda block: True

    def reason_against(self, module: str) -> str | None:
        """Why this linear layer is left out; None if it is wanted."""
        if not self._wanted(module):
            return _WORDS.get(self.target_modules, "not a target")
        if self.target_modules == "all-linear" and _HEAD.match(module.rsplit(".", 1)[-1]):
            return "a head"
        if self._excluded(module):
            return "excluded"
        return None if self._in_blocks(names.layer_index(module)) else "in another block"

    def require_matches(self, linear: Sequence[str]) -> None:
        """`UsageError` if none of the linear layers is wanted, or a name stands for nothing."""
        if self.target_modules not in _WORDS:
            _require_matches(f"{self._asked}", self.target_modules, linear, linear)
        if self.exclude_modules:
            _require_matches(f"`exclude_modules` {self.exclude_modules}", self.exclude_modules, self.modules, linear)
        if not any(self.reason_against(module) is None for module in linear):
            raise UsageError(self._why_nothing(linear))

    def _why_nothing(self, linear: Sequence[str]) -> str:
        chosen = [module for module in linear if self._wanted(module)]
        left = [module for module in chosen if not self._excluded(module)]
        if chosen and not left:
            return f"`exclude_modules` {self.exclude_modules}: leaves nothing of {self._asked}"
        if left and self.layers:
            return f"`layers` {self.layers}: {self._asked} is not in there, but in blocks {_in_words(_blocks(left))}"
        return f"{self._asked}: matches nothing; {_there(linear)}"


def module_matcher(text: str) -> Callable[[str], bool]:
    """A test for module paths: comma-separated names match path endings, anything else is a regex."""
    if _NAMES.fullmatch(text):
        endings = _names(text)
        return lambda module: any(module == e or module.endswith("." + e) for e in endings)
    try:
        regex = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{text!r} is neither module names nor a regular expression ({error})") from None
    return lambda module: regex.fullmatch(module) is not None


def comma_hint(text: str) -> str:
    """What to say of names with spaces where commas belong; "" of anything else."""
    parts = re.split(r"[\s,]+", text.strip())
    if len(parts) == 1 or not all(map(_NAMES.fullmatch, parts)):
        return ""
    return f"names are separated by commas: {','.join(parts)}"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _require_matches(request: str, text: str, modules: Sequence[str], linear: Sequence[str]) -> None:
    """`UsageError` if the text matches none of the modules, or one of several names does not.

    The message says what was meant, as far as that can be seen, and which linear layers there are.
    """
    if not _NAMES.fullmatch(text):
        if not any(map(module_matcher(text), modules)):
            hint = comma_hint(text) or _whole_path(text, modules)
            raise UsageError(f"{request}: matches nothing; {hint}; {_there(linear)}")
        return
    missing = [name for name in _names(text) if not any(map(module_matcher(name), modules))]
    if missing:
        close = [found for name in missing for found in _closest(name, linear)]
        meant = f" (did you mean {', '.join(dict.fromkeys(close))}?)" if close else ""
        raise UsageError(f"{request}: nothing is called {', '.join(missing)}{meant}; {_there(linear)}")


def _closest(name: str, modules: Sequence[str]) -> list[str]:
    """The ending of a path, of as many parts, that is most like the name; none if none is."""
    parts = name.count(".") + 1
    endings = {".".join(module.split(".")[-parts:]) for module in modules}
    return get_close_matches(name, sorted(endings), n=1)


def _whole_path(text: str, modules: Sequence[str]) -> str:
    """What to do about a regular expression that matches no whole path."""
    for wider in (rf".*\.({text})", f".*({text}).*"):
        with suppress(UsageError):  # flags come first: (?i)q_proj
            if any(map(module_matcher(wider), modules)):
                return f"a regular expression must match the whole path, as '{wider}' does"
    return "a regular expression must match the whole path"


def _there(linear: Sequence[str]) -> str:
    roles = sorted({names.role(module).rsplit(".", 1)[-1] for module in linear})
    return f"linear layers here: {', '.join(roles)}" if roles else "there are no linear layers here"


def _block_matcher(text: str, modules: Sequence[str]) -> Callable[[int | None], bool]:
    """The test for a block's number; `UsageError` if the model has not all the blocks that are asked for."""
    blocks = _blocks(module for module in modules if names.in_block(module))
    wanted: list[range] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        if not match:
            raise UsageError(f"`layers` {text}: expected block numbers such as 0-11 or 0,2,8-11")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"`layers` {text}: {first}-{last} runs backwards")
        wanted.append(range(first, last + 1))
    missing = [gap for numbers in wanted for gap in _without(numbers, blocks)]
    if missing:
        there = f"blocks {_in_words(blocks)}" if blocks else "no numbered blocks"
        raise UsageError(f"`layers` {text}: there is no block {_in_words(missing)}; the model has {there}")
    return lambda block: any(block in numbers for numbers in wanted)


def _blocks(modules: Iterable[str]) -> list[range]:
    """The numbers of the blocks that hold the modules, in runs, ascending."""
    runs: list[range] = []
    for block in sorted({number for number in map(names.layer_index, modules) if number is not None}):
        start = runs.pop().start if runs and runs[-1].stop == block else block
        runs.append(range(start, block + 1))
    return runs


def _without(numbers: range, runs: Sequence[range]) -> list[range]:
    """What is left of the numbers without those in the runs, which ascend."""
    left, start = [], numbers.start
    for run in runs:
        left.append(range(start, min(run.start, numbers.stop)))
        start = max(start, run.stop)
    return [part for part in (*left, range(start, numbers.stop)) if part]


def _in_words(runs: Sequence[range]) -> str:
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:_MOST_NAMED]]
    return ", ".join([*shown, "…"] if len(runs) > _MOST_NAMED else shown)
