"""Texts as they are shown: tokens, numbers, names of nodes."""

from __future__ import annotations

from typing import Any

from sparse_transformer.circuits.circuit import Node

# The kinds of nodes that are a channel of a block.
_CHANNELS = ("read", "q", "k", "v", "neuron", "write")


def visible(text: str) -> str:
    """A token's text with a sign for whatever could not be seen; common.js has the same function.

    Line ends become ⏎, tabs ⇥, spaces at either end ·, other characters that do not print \\uXXXX,
    and no text at all ∅.
    """
    if not text:
        return "∅"
    start = len(text) - len(text.lstrip(" "))
    end = len(text.rstrip(" "))
    return "".join(_sign(char) if start <= at < end else "·" for at, char in enumerate(text))


def _sign(char: str) -> str:
    if char in "\n\t":
        return "⏎" if char == "\n" else "⇥"
    return char if char.isprintable() else f"\\u{ord(char):04x}"


def line(text: str) -> str:
    """A text of several words on one line; "" stays so."""
    words = " ".join(text.split())
    return visible(words) if words else ""


def channel(node: Node) -> str:
    """Which channel of its kind, such as `neuron 137`; "" for tokens and answers."""
    return f"{node.kind} {node.channel}" if node.kind in _CHANNELS else ""


def signed(value: float) -> str:
    """A weight: its sign, two decimals or one digit; common.js has the same function."""
    size = abs(value)
    digits = f"{size:.2f}" if size == 0 or 0.005 <= size < 1000 else f"{size:.0e}"
    return ("−" if value < 0 else "+") + digits.replace("e-0", "e-").replace("e+0", "e+")


def fact(value: Any) -> str:
    """A value of any JSON type."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) >= 1e4 or 0 < abs(value) < 1e-3 else f"{value:.3f}"
    return visible(str(value))


def named(kind: str, label: str) -> str:
    """What a node is called whose activations have this label."""
    somewhere = label.startswith(("after ", "in ", "inside "))
    where = label if somewhere else f"at {label}"
    return {
        "read": f"reads {label}",
        "neuron": f"{'active' if somewhere else 'detects'} {label}",
        "q": f"query {where}",
        "k": f"key {where}",
        "v": f"value {where}",
        "write": f"writes {where}",
        "residual": f"large {where}",
    }[kind]
