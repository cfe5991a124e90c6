"""`circuit.png` and `circuit.svg`: the picture through matplotlib, with what the page says."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from sparse_transformer.circuits.circuit import Circuit, Edge, Node
from sparse_transformer.circuits.picture import text
from sparse_transformer.circuits.picture.facts import Facts, facts
from sparse_transformer.circuits.picture.layout import (
    LABEL,
    LABEL_LINE,
    NOTE,
    NOTE_LINE,
    NUMBER,
    SIDE,
    Box,
    Layout,
    Point,
    Route,
    curve,
    lay_out,
)

# A PNG of more bytes is drawn with fewer pixels, as long as its numbers can be read.
MOST_BYTES = 300_000
# More are not tried where fewer can be read, and not made at all.
_USUAL_PIXELS, _MOST_PIXELS = 12e6, 30e6

# The colours of page.css on a light background.
_PAPER, _BAND, _LINE, _OUTLINE = "#ffffff", "#f5f6f8", "#d5d9df", "#8a94a3"
_INK, _SOFT, _BAD = "#1b2027", "#5a6472", "#b3140f"
_POSITIVE, _NEGATIVE, _RESIDUAL = "#1f5fa8", "#b4540a", "#a3abb6"
_INKS = (_INK, _SOFT, _BAD, _POSITIVE, _NEGATIVE, _RESIDUAL, _OUTLINE, _LINE)
# In units of the line's width.
_DASHES: dict[str, Any] = {"residual": (0, (3.6, 3.6)), "attention": (0, (0.1, 2.4))}

# Pixels of the layout to an inch of the figure, and points to a pixel.
_INCH = 100.0
_POINT = 72 / _INCH
_MARGIN, _LEAST_WIDTH = 24.0, 640.0
_SANS, _MONO = "DejaVu Sans", "DejaVu Sans Mono"


def render(circuit: Circuit, suffix: str) -> bytes:
    """The content of the file.

    Args:
        circuit: what is drawn.
        suffix: `.png` or `.svg`.

    Raises:
        ValueError: another suffix; an edge from or to a node that is not there.
    """
    if suffix not in (".png", ".svg"):
        raise ValueError(f"a picture is a .png or an .svg, not {suffix!r}")
    import matplotlib

    figure = _draw(circuit)
    if suffix == ".png":
        return _png(figure)
    file = io.BytesIO()
    # Text stays text; ids and date would differ from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "circuit"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _png(figure: Any) -> bytes:
    """At the highest resolution that keeps the file small, or at the lowest that can be read.

    What is too large for that is an overview.
    """
    from PIL import Image

    found = b""
    area = figure.get_figwidth() * figure.get_figheight()
    least = min(100.0, math.sqrt(_MOST_PIXELS / area))
    for dpi in (200.0, 160.0, 130.0, least):
        if dpi > least and area * dpi**2 > _USUAL_PIXELS:
            continue
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=dpi)
        flat = Image.open(raw).convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE)
        file = io.BytesIO()
        flat.save(file, format="png", optimize=True, dpi=(dpi, dpi))
        found = file.getvalue()
        if len(found) <= MOST_BYTES:
            break
    return found


def _palette() -> Any:
    """A PIL image with the few colours that there are, and their steps to that of the paper."""
    from matplotlib.colors import to_rgb
    from PIL import Image

    paper = np.array(to_rgb(_PAPER))
    inks = np.array([to_rgb(ink) for ink in _INKS])
    steps = [paper + part * (inks - paper) for part in (0.25, 0.5, 0.75, 1.0)]
    colors = np.concatenate([[paper, to_rgb(_BAND)], *steps])
    image = Image.new("P", (1, 1))
    image.putpalette((255 * colors).round().astype(int).ravel().tolist())
    return image


def _draw(circuit: Circuit) -> Any:
    """A matplotlib Figure."""
    layout, said = lay_out(circuit), facts(circuit)
    width = max(layout.width + 2 * _MARGIN, _LEAST_WIDTH)
    above, below = _above(said, width - 2 * _MARGIN), _below(said, width - 2 * _MARGIN)
    top = _MARGIN + sum(line.step for line in above) + 12
    legend = top + layout.height + 28
    foot = legend + 34
    canvas = _Canvas(width, foot + sum(line.step for line in below) + _MARGIN - 6)
    canvas.lines(above, _MARGIN)
    canvas.shift = max(_MARGIN, (width - layout.width) / 2), top
    _background(canvas, layout)
    for edge, route in zip(circuit.edges, layout.routes, strict=True):
        canvas.route(edge, route)
    for edge, route in zip(circuit.edges, layout.routes, strict=True):
        if route.number and route.free:
            color = _color(edge)
            canvas.text(
                route.at, route.number, NUMBER, color=color, align="center", zorder=4, bbox=_HALO
            )
    nodes = {node.id: node for node in circuit.nodes}
    for id, box in layout.boxes.items():
        _box(canvas, nodes[id], box)
    canvas.shift = 0.0, 0.0
    hidden = sum(bool(route.number) and not route.free for route in layout.routes)
    _legend(canvas, legend, hidden)
    canvas.lines(below, foot)
    return canvas.figure


# Under a number, so that no line crosses it out.
_HALO: dict[str, Any] = {"boxstyle": "square,pad=0.12", "facecolor": _PAPER, "edgecolor": "none"}


class _Line:
    """A line of text at the left edge, and how far below it the next one is."""

    def __init__(self, words: str, size: float, color: str = _INK, *, bold: bool = False) -> None:
        self.words, self.size, self.color, self.bold = words, size, color, bold
        self.step = size * 1.4


def _above(said: Facts, limit: float) -> list[_Line]:
    lines = [_Line(line, 20, bold=True) for line in _wrap(said.task, 20, limit * 0.9)]
    lines += [_Line(line, 13) for line in _wrap(said.description, 13, limit)]
    if lines:
        lines[-1].step += 4
    for words in (said.size, said.model):
        lines += [_Line(line, SIDE, _SOFT) for line in _wrap(words, SIDE, limit)]
    return lines


def _below(said: Facts, limit: float) -> list[_Line]:
    lines = []
    for verdict in said.verdicts:
        color = _SOFT if verdict.holds else _BAD
        wrapped = _wrap(verdict.sentence, 12, limit)
        lines += [_Line(line, 12, color, bold=not verdict.holds) for line in wrapped]
        lines[-1].step += 4
    return lines


def _wrap(words: str, size: float, limit: float) -> tuple[str, ...]:
    return text.wrap(words, size, limit) if words else ()


def _background(canvas: _Canvas, layout: Layout) -> None:
    for band in layout.bands:
        canvas.rectangle(
            layout.gutter,
            band.y,
            layout.width - layout.gutter,
            band.height,
            6,
            face=_BAND,
            zorder=1,
        )
        middle = band.y + band.height / 2 - (len(band.label) - 1) * (SIDE + 2) / 2
        for place, line in enumerate(band.label):
            canvas.text((34, middle + place * (SIDE + 2)), line, SIDE, color=_SOFT)
    for layer in layout.layers:
        canvas.path([(24, layer.y + 3), (24, layer.y + layer.height - 3)], [1, 2], _LINE, 1.5, 1)
        at = 15.0, layer.y + layer.height / 2
        canvas.text(at, layer.label[0], SIDE, color=_SOFT, align="center", rotation=90)
    for frame in layout.frames:
        canvas.rectangle(frame.x, frame.y, frame.width, frame.height, 8, edge=_LINE, zorder=1)
        at = frame.x + 11, frame.y + 11
        canvas.text(
            at, frame.label, SIDE, color=_SOFT, zorder=2.5, bbox=_HALO | {"facecolor": _BAND}
        )


def _box(canvas: _Canvas, node: Node, box: Box) -> None:
    end = node.kind in ("token", "answer")
    radius = box.height / 2 if end else 5
    edge = _INK if node.kind == "neuron" else _OUTLINE
    canvas.rectangle(box.x, box.y, box.width, box.height, radius, _PAPER, edge, zorder=3)
    height = len(box.lines) * LABEL_LINE + (NOTE_LINE if box.note else 0)
    at = box.y + (box.height - height) / 2
    for line in box.lines:
        middle = box.centre, at + LABEL_LINE / 2
        canvas.text(middle, line, LABEL, align="center", fixed=end)
        at += LABEL_LINE
    if box.note:
        middle = box.centre, at + NOTE_LINE / 2
        canvas.text(middle, box.note, NOTE, color=_SOFT, align="center")


def _legend(canvas: _Canvas, y: float, hidden: int) -> None:
    entries = [
        ("positive weight", _POSITIVE, 3.0, ""),
        ("negative weight", _NEGATIVE, 3.0, ""),
        ("residual stream", _RESIDUAL, 1.1, "residual"),
        ("attention, q and k to v", _SOFT, 1.8, "attention"),
    ]
    x = _MARGIN
    for name, color, stroke, dashes in entries:
        canvas.path([(x, y), (x + 28, y)], [1, 2], color, stroke, 1, dashes)
        canvas.text((x + 35, y), name, SIDE, color=_SOFT)
        x += 35 + text.width(name, SIDE) + 14
    if hidden:
        words = f"without {hidden} of the numbers, for which there was no room; the page has them"
        canvas.text((_MARGIN, y + 16), words, NOTE, color=_SOFT)


def _color(edge: Edge) -> str:
    if edge.kind in ("residual", "attention"):
        return _RESIDUAL if edge.kind == "residual" else _SOFT
    return _NEGATIVE if edge.weight < 0 else _POSITIVE


class _Canvas:
    """A figure whose units are the pixels of the layout, with its origin at `shift`."""

    def __init__(self, width: float, height: float) -> None:
        # Without pyplot, which would look for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width / _INCH, height / _INCH), facecolor=_PAPER)
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()
        self.shift = 0.0, 0.0

    def text(
        self,
        at: Point,
        words: str,
        size: float,
        *,
        color: str = _INK,
        align: str = "left",
        fixed: bool = False,
        weight: str = "normal",
        zorder: float = 5,
        **options: Any,
    ) -> None:
        """One line whose middle is at that height."""
        family = _MONO if fixed else _SANS
        self.axes.text(
            at[0] + self.shift[0], at[1] + self.shift[1], _drawable(words, family, weight),
            fontsize=size * _POINT, color=color, ha=align, va="center_baseline", family=family,
            weight=weight, zorder=zorder, parse_math=False, **options,
        )  # fmt: skip

    def lines(self, lines: Iterable[_Line], y: float) -> None:
        """Below one another, from that height on."""
        for line in lines:
            weight = "bold" if line.bold else "normal"
            at = _MARGIN, y + line.size * 0.7
            self.text(at, line.words, line.size, color=line.color, weight=weight)
            y += line.step

    def rectangle(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        radius: float,
        face: str = "none",
        edge: str = "none",
        *,
        zorder: float,
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        radius = min(radius, width / 2, height / 2)
        corner = x + self.shift[0], y + self.shift[1]
        style = f"round,pad=0,rounding_size={radius}"
        patch = FancyBboxPatch(
            corner,
            width,
            height,
            style,
            facecolor=face,
            edgecolor=edge,
            linewidth=_POINT,
            zorder=zorder,
        )
        self.axes.add_patch(patch)

    def path(
        self,
        points: Sequence[Point],
        codes: Sequence[int],
        color: str,
        stroke: float,
        zorder: float,
        dashes: str = "",
    ) -> None:
        """A line along points with the codes of matplotlib's Path."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        moved = [(x + self.shift[0], y + self.shift[1]) for x, y in points]
        patch = PathPatch(
            Path(moved, codes), fill=False, edgecolor=color, linewidth=stroke * _POINT,
            linestyle=_DASHES.get(dashes, "-"), zorder=zorder,
            capstyle="round" if dashes == "attention" else "butt",
        )  # fmt: skip
        self.axes.add_patch(patch)

    def route(self, edge: Edge, route: Route) -> None:
        points, codes = [route.points[0]], [1]
        for start, end in zip(route.points, route.points[1:], strict=False):
            points += [*curve(start, end), end]
            codes += [4, 4, 4]
        self.path(points, codes, _color(edge), route.stroke, 2, edge.kind)


@cache
def _characters(family: str, weight: str) -> frozenset[int]:
    """What the font has."""
    from matplotlib import font_manager

    path = font_manager.findfont(font_manager.FontProperties(family=family, weight=weight))
    return frozenset(font_manager.get_font(path).get_charmap())


def _drawable(words: str, family: str, weight: str) -> str:
    """A sign in place of each character that the font has not; matplotlib would warn of each."""
    known = _characters(family, weight)
    return "".join(char if ord(char) in known else "\ufffd" for char in words)
