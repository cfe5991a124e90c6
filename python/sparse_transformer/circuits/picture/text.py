"""Texts as they are shown: tokens, numbers, names of nodes, and how wide they are about."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from sparse_transformer.circuits.circuit import Node

# The kinds of nodes that are a channel of a block.
_CHANNELS = ("read", "q", "k", "v", "neuron", "write")
# Advances of DejaVu Sans in em, rounded up: it is among the widest that a browser may choose.
_NARROW, _SLIM, _USUAL, _CAPITAL, _WIDE = 0.34, 0.42, 0.64, 0.72, 1.0
_ADVANCES = (
    dict.fromkeys("ijlI.,:;'|!· ", _NARROW)
    | dict.fromkeys('frt()[]{}-"/\\`', _SLIM)
    | dict.fromkeys("ABCDEFGHJKLNOPQRSTUVXYZ&", _CAPITAL)
    | dict.fromkeys("mwMW@%…⏎⇥<>=+−#~^", _WIDE)
)


def visible(text: str) -> str:
    """A token's text with a sign for all that could not be seen; page.js has the same function.

    Line ends become ⏎, tabs ⇥, spaces at either end ·, other characters that do not print \\uXXXX,
    and no text at all ∅.
    """
    if not text:
        return "∅"
    start = len(text) - len(text.lstrip(" "))
    end = len(text.rstrip(" "))
    return "".join(_sign(char) if start <= place < end else "·" for place, char in enumerate(text))


def _sign(char: str) -> str:
    if char in "\n\t":
        return "⏎" if char == "\n" else "⇥"
    return char if char.isprintable() else f"\\u{ord(char):04x}"


def line(text: str) -> str:
    """A text of several words on one line; "" stays so."""
    words = " ".join(text.split())
    return visible(words) if words else ""


def name(node: Node) -> str:
    """What a reader calls the node, on one line."""
    return visible(node.label or channel(node))


def channel(node: Node) -> str:
    """Which channel of its kind, such as `neuron 137`; "" for the ends."""
    return f"{node.kind} {node.channel}" if node.kind in _CHANNELS else ""


def place(node: Node) -> str:
    """Where the node stands, such as `q 12, head 3, layer 0`."""
    if node.kind not in _CHANNELS:
        return f"{node.kind} {node.channel}"
    part = "" if node.head is None else f"head {node.head}, "
    if node.kind in ("read", "write"):
        part = "MLP, " if ".mlp." in node.place else "attention, "
    return f"{channel(node)}, {part}layer {node.layer}"


def signed(value: float) -> str:
    """A weight: its sign, two decimals or one digit; page.js has the same function."""
    size = abs(value)
    digits = f"{size:.2f}" if size == 0 or 0.005 <= size < 1000 else f"{size:.0e}"
    return ("−" if value < 0 else "+") + digits.replace("e-0", "e-").replace("e+0", "e+")


def fact(value: Any) -> str:
    """A value of any JSON type."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e6:
            return f"{value:.0f}"
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(str(key))} {fact(own)}" for key, own in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(fact, value))
    return visible(str(value))


def width(text: str, size: float, *, fixed: bool = False) -> float:
    """Width of a line in a font of that size, in its unit, and never much too small.

    Args:
        text: the line.
        size: of the font.
        fixed: whether the font is one in which all characters are as wide.
    """
    return size * sum(_advance(char, fixed) for char in text)


def _advance(char: str, fixed: bool) -> float:
    if unicodedata.east_asian_width(char) in "WF":
        return 1.25
    return _USUAL if fixed else _ADVANCES.get(char, _USUAL)


def wrap(
    text: str, size: float, limit: float, *, lines: int = 100, fixed: bool = False
) -> tuple[str, ...]:
    """Splits a text between its words into at most `lines` lines no wider than `limit`.

    A word that is wider than a line is split, and what remains after the last line becomes an
    ellipsis.
    """
    done: list[str] = []
    rest = text
    while rest and len(done) < lines:
        if width(rest, size, fixed=fixed) <= limit:
            done.append(rest)
            return tuple(done)
        fits = 1
        while width(rest[: fits + 1], size, fixed=fixed) <= limit:
            fits += 1
        # After the last space that fits, or where the line is full.
        at = rest.rfind(" ", 1, fits + 1)
        at = fits if at == -1 else at
        done.append(rest[:at].rstrip(" "))
        rest = rest[at:].lstrip(" ")
    if rest:
        last = done[-1]
        while len(last) > 1 and width(last + "…", size, fixed=fixed) > limit:
            last = last[:-1]
        done[-1] = last + "…"
    return tuple(done) or ("",)
