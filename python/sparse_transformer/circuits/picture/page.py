"""`circuit.html`: the picture as a page that needs nothing but itself.

The page is page.html with page.css, page.js, the picture as inline SVG and `circuit.json` filled
in; what moves is in page.js. All that comes from a circuit goes through `escape`, and page.js
writes it as text, never as markup.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources

from sparse_transformer.circuits.circuit import Circuit, Node
from sparse_transformer.circuits.picture import text
from sparse_transformer.circuits.picture.facts import Facts, facts
from sparse_transformer.circuits.picture.layout import (
    LABEL,
    LABEL_LINE,
    NOTE_LINE,
    NUMBER,
    SIDE,
    Box,
    Layout,
    Route,
    curve,
    lay_out,
)

# With more numbers than that they are shown for the node or edge that is looked at.
MOST_NUMBERS = 60


def render(circuit: Circuit) -> str:
    """The whole page.

    Raises:
        ValueError: an edge from or to a node that is not there.
    """
    said = facts(circuit)
    parts = {
        "title": escape(said.task or "circuit"),
        "style": _template("page.css"),
        "script": _template("page.js"),
        "description": escape(said.description),
        "model": escape(said.model),
        "size": escape(said.size),
        "verdicts": "".join(_verdicts(said)),
        "picture": picture(circuit, lay_out(circuit)),
        "proof": "".join(_proof(said)),
        "circuit": embedded(circuit),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _template("page.html"))


def escape(words: str) -> str:
    """Text for an element or an attribute; lone surrogates, which no file can hold, become "?"."""
    return html.escape(words.encode("utf-8", "replace").decode())


def embedded(circuit: Circuit) -> str:
    """`circuit.json` on one line, without what could end the element that it stands in."""
    data = json.loads(circuit.to_json())
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def picture(circuit: Circuit, layout: Layout) -> str:
    """The `<svg>` element. Nodes and edges have the index that they have in the circuit."""
    numbers = sum(bool(route.number) for route in layout.routes)
    quiet = " quiet" if numbers > MOST_NUMBERS else ""
    return "\n".join(
        [
            f'<svg id="picture" class="picture{quiet}" viewBox="0 0 {_n(layout.width)} '
            f'{_n(layout.height)}" width="{_n(layout.width)}" height="{_n(layout.height)}" '
            'role="group" aria-labelledby="task" aria-describedby="description how">',
            *_background(layout),
            *_edges(circuit, layout),
            *_nodes(circuit, layout),
            *_gutter(layout),
            "</svg>",
        ]
    )


def _template(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _background(layout: Layout) -> Iterator[str]:
    yield '<g aria-hidden="true">'
    for band in layout.bands:
        yield (
            f'<rect class="band" x="{_n(layout.gutter)}" y="{_n(band.y)}" rx="6" '
            f'width="{_n(layout.width - layout.gutter)}" height="{_n(band.height)}"/>'
        )
    for frame in layout.frames:
        yield (
            f'<rect class="frame" x="{_n(frame.x)}" y="{_n(frame.y)}" rx="8" '
            f'width="{_n(frame.width)}" height="{_n(frame.height)}"/>'
        )
    yield "</g>"


def _gutter(layout: Layout) -> Iterator[str]:
    """Names of layers and stages; page.js keeps them in sight."""
    yield '<g class="gutter" aria-hidden="true">'
    yield (
        f'<rect class="paper" x="0" y="0" width="{_n(layout.gutter - 4)}" '
        f'height="{_n(layout.height)}"/>'
    )
    for layer in layout.layers:
        middle = layer.y + layer.height / 2
        yield (
            f'<path class="bracket" d="M24 {_n(layer.y + 3)}V{_n(layer.y + layer.height - 3)}"/>'
            f'<text class="layer" transform="translate(15 {_n(middle)}) rotate(-90)">'
            f"{escape(layer.label[0])}</text>"
        )
    for band in layout.bands:
        yield _lines(band.label, "stage", 34, band.y + band.height / 2, SIDE + 2)
    yield "</g>"


def _lines(lines: tuple[str, ...], kind: str, x: float, middle: float, step: float) -> str:
    """Lines of text around a height."""
    first = middle - (len(lines) - 1) * step / 2 + 0.35 * SIDE
    return "".join(
        f'<text class="{kind}" x="{_n(x)}" y="{_n(first + place * step)}">{escape(line)}</text>'
        for place, line in enumerate(lines)
    )


def _edges(circuit: Circuit, layout: Layout) -> Iterator[str]:
    """Lines of the edges, then what no line may cross out: names of heads, and numbers."""
    names = [f"{edge.kind} {_sign(edge.weight)}" for edge in circuit.edges]
    yield '<g aria-hidden="true">'
    for place, (name, route) in enumerate(zip(names, layout.routes, strict=True)):
        path = _path(route)
        yield (
            f'<g class="edge {name}" data-edge="{place}"><path class="line" '
            f'stroke-width="{_n(route.stroke)}" d="{path}"/><path class="near" d="{path}"/></g>'
        )
    for frame in layout.frames:
        yield (
            f'<text class="head" x="{_n(frame.x + 11)}" y="{_n(frame.y + 15)}">'
            f"{escape(frame.label)}</text>"
        )
    for place, (name, route) in enumerate(zip(names, layout.routes, strict=True)):
        if route.number:
            crowded = "" if route.free else " crowded"
            x, y = route.at
            width = text.width(route.number, NUMBER)
            yield (
                f'<g class="number {name}{crowded}" data-edge="{place}">'
                f'<rect x="{_n(x - width / 2)}" y="{_n(y - 6.5)}" width="{_n(width)}" height="13"/>'
                f'<text x="{_n(x)}" y="{_n(y + 3.7)}">{escape(route.number)}</text></g>'
            )
    yield "</g>"


def _sign(weight: float) -> str:
    return "negative" if weight < 0 else "positive"


def _path(route: Route) -> str:
    path = f"M{_n(route.points[0][0])} {_n(route.points[0][1])}"
    for start, end in zip(route.points, route.points[1:], strict=False):
        corners = (*curve(start, end), end)
        path += "C" + " ".join(f"{_n(x)} {_n(y)}" for x, y in corners)
    return path


def _nodes(circuit: Circuit, layout: Layout) -> Iterator[str]:
    index = {node.id: place for place, node in enumerate(circuit.nodes)}
    arriving = Counter(edge.target for edge in circuit.edges)
    leaving = Counter(edge.source for edge in circuit.edges)
    yield "<g>"
    for order, (id, box) in enumerate(layout.boxes.items()):
        node = circuit.nodes[index[id]]
        name = f"{text.name(node)}, {text.place(node)}, {arriving[id]} in, {leaving[id]} out"
        yield (
            f'<g class="node {escape(node.kind)}" data-node="{index[id]}" data-row="{box.row}" '
            f'data-x="{_n(box.centre)}" data-place="{escape(text.place(node))}" '
            f'role="button" aria-pressed="false" '
            f'tabindex="{-1 if order else 0}" aria-label="{escape(name)}">'
            f"{_box(node, box)}</g>"
        )
    yield "</g>"


def _box(node: Node, box: Box) -> str:
    radius = box.height / 2 if node.kind in ("token", "answer") else 5
    shape = (
        f'<rect x="{_n(box.x)}" y="{_n(box.y)}" width="{_n(box.width)}" '
        f'height="{_n(box.height)}" rx="{_n(radius)}"/>'
    )
    height = len(box.lines) * LABEL_LINE + (NOTE_LINE if box.note else 0)
    at = box.y + (box.height - height) / 2
    words = ""
    for line in box.lines:
        words += (
            f'<text class="label" x="{_n(box.centre)}" y="{_n(at + LABEL)}">{escape(line)}</text>'
        )
        at += LABEL_LINE
    if box.note:
        words += (
            f'<text class="note" x="{_n(box.centre)}" y="{_n(at + 9)}">{escape(box.note)}</text>'
        )
    return shape + words


def _verdicts(said: Facts) -> Iterator[str]:
    for verdict in said.verdicts:
        kind = "holds" if verdict.holds else "fails"
        yield f'<li class="{kind}">{escape(verdict.sentence)}</li>'


def _proof(said: Facts) -> Iterator[str]:
    if said.rows:
        heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in said.columns)
        yield f'<table><thead><tr><th scope="col">what runs</th>{heads}</tr></thead><tbody>'
        for name, values in said.rows:
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
            yield f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
        yield "</tbody></table>"
    if said.others:
        yield "<dl>"
        for name, value in said.others:
            yield f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        yield "</dl>"
