"""Declaration of options: fields of dataclasses that a command line shows with a help text, and limits of values."""

from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, field
from functools import partial
from typing import Any, TypeVar, overload

T = TypeVar("T")
Limit = tuple[Callable[[Any], bool], str]  # whether a value is allowed, and the allowed values in words

# Limits of numbers; None, the default of some of them, is allowed.
ABOVE_0: Limit = (lambda value: value is None or value > 0, "above 0")
AT_LEAST_0: Limit = (lambda value: value is None or value >= 0, "0 or more")
AT_LEAST_1: Limit = (lambda value: value is None or value >= 1, "1 or more")
SHARE: Limit = (lambda value: 0 <= value <= 1, "in [0, 1]")
BELOW_1: Limit = (lambda value: 0 <= value < 1, "in [0, 1)")


@overload
def option(default: T, help: str) -> T: ...


@overload
def option(*, help: str) -> Any: ...


def option(default: Any = MISSING, help: str = "") -> Any:
    """A field with a default (lists are copied) and the help text of its option; without a default it is required."""
    if isinstance(default, list):
        return field(default_factory=partial(copy, default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
