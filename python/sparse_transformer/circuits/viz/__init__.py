"""Pictures of a circuit: a page to explore, and images for a talk or a README."""

from __future__ import annotations

from pathlib import Path

from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.circuits.viz import drawing, page

__all__ = ["write_html", "write_image"]


def write_html(circuit: Circuit, path: Path | str) -> None:
    """Writes the page: one file that needs neither another nor the network.

    A ValueError for an edge from or to a node that does not exist, or an unknown kind.
    """
    Path(path).write_text(page.render(circuit), encoding="utf-8", newline="\n")


def write_image(circuit: Circuit, path: Path | str) -> None:
    """Writes a PNG or an SVG, by the path's suffix; a ValueError for another or as `write_html`."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"a picture is a .png or an .svg, not {path.suffix!r}")
    path.write_bytes(drawing.render(circuit, path.suffix.lower()[1:], titled=True))
