"""Refusals of settings: each names the setting, its range and what it got."""

from __future__ import annotations

import math
from typing import Literal, get_args, get_origin, get_type_hints

# No size or count of anything is larger; tensors of more elements could not be indexed anyway.
LARGEST = 2**40


def need(holds: bool, name: str, needed: str, got: object) -> None:
    """Raises ValueError unless `holds`."""
    if not holds:
        raise ValueError(f"{name} must be {needed}, got {got!r}")


def need_choices(config: object) -> None:
    """Raises ValueError unless each attribute of a Literal type, or bool, has one of its values."""
    for name, kind in get_type_hints(type(config)).items():
        if kind is bool:
            value = getattr(config, name)
            need(isinstance(value, bool), name, "True or False", value)
            continue
        # A Literal, or a union of one with None.
        literal = next((k for k in (kind, *get_args(kind)) if get_origin(k) is Literal), None)
        if literal is not None:
            choices = (*get_args(literal), *((None,) if literal is not kind else ()))
            value = getattr(config, name)
            need(value in choices, name, " or ".join(map(str, choices)), value)


def need_whole(config: object, name: str, least: int, most: int = LARGEST) -> None:
    """Raises ValueError unless the attribute is an integer from `least` to `most`."""
    value = getattr(config, name)
    need(isinstance(value, int) and not isinstance(value, bool), name, "an integer", value)
    need(value >= least, name, f"at least {least}", value)
    need(value <= most, name, f"at most {most}", value)


def need_number(
    config: object, name: str, least: float, most: float, *, above: bool = False
) -> None:
    """Raises ValueError unless the attribute is a number from `least` to `most`, never NaN.

    Args:
        config: whose attribute it is.
        name: of the attribute.
        least, most: the range; `most` may be infinite, the attribute is always finite.
        above: `least` itself is refused.
    """
    value = getattr(config, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and least <= value <= most
    low = f"above {least:g}" if above else f"at least {least:g}"
    high = "finite" if math.isinf(most) else f"at most {most:g}"
    need(inside and not (above and value == least), name, f"{low} and {high}", value)
