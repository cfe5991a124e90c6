"""Pictures of a circuit: a page to explore, an image for a talk, a graph to compute with."""

from __future__ import annotations

from pathlib import Path

from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.circuits.picture import image, page
from sparse_transformer.circuits.picture.graph import from_networkx, to_networkx
from sparse_transformer.circuits.picture.layout import Layout, lay_out

__all__ = ["Layout", "from_networkx", "lay_out", "to_networkx", "write_html", "write_image"]


def write_html(circuit: Circuit, path: Path | str) -> None:
    """Writes the page, one file that needs no other and no network.

    Raises:
        OSError: the file cannot be written.
        ValueError: an edge from or to a node that is not there.
    """
    Path(path).write_text(page.render(circuit), encoding="utf-8", newline="\n")


def write_image(circuit: Circuit, path: Path | str) -> None:
    """Writes a PNG or an SVG, which the path's suffix says.

    Raises:
        OSError: the file cannot be written.
        ValueError: another suffix; an edge from or to a node that is not there.
    """
    path = Path(path)
    path.write_bytes(image.render(circuit, path.suffix.lower()))
