"""`circuit.html`: the picture as a page that needs nothing but itself.

The page is page.html with page.css, page.js, the drawing as inline SVG and `circuit.json` filled
in. Everything that comes from a circuit is escaped here, and page.js writes it as text, never as
markup.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from importlib import resources

from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.circuits.viz.drawing import picture
from sparse_transformer.circuits.viz.summary import COLUMNS, Summary, summarize


def render(circuit: Circuit) -> str:
    """The whole page.

    Raises:
        ValueError: an edge from or to a node that does not exist; an unknown kind.
    """
    said = summarize(circuit)
    parts = {
        "title": _escape(said.task or "circuit"),
        "style": template("page.css"),
        "script": template("page.js"),
        "description": _escape(said.description),
        "story": "".join(f"<li>{_code(sentence)}</li>" for sentence in said.story),
        "model": _escape(said.model),
        "size": _escape(said.size),
        "verdicts": "".join(
            f'<li class="{"holds" if verdict.holds else "fails"}">{_escape(verdict.sentence)}</li>'
            for verdict in said.verdicts
        ),
        "picture": picture(circuit),
        "validation": "".join(_table(said)),
        "circuit": _embedded(circuit),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template("page.html"))


def template(name: str) -> str:
    """A file of this folder."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _escape(text: str) -> str:
    """For an element or an attribute; lone surrogates, which no file can hold, become "?"."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _code(text: str) -> str:
    """Escaped; what stands between two backquotes is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", _escape(text))


def _embedded(circuit: Circuit) -> str:
    """`circuit.json` on one line, without what could end the element that it stands in."""
    data = json.loads(circuit.to_json())
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _table(said: Summary) -> Iterator[str]:
    if not said.rows:
        return
    heads = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    yield f'<table><thead><tr><th scope="col">what runs</th>{heads}</tr></thead><tbody>'
    for name, values in said.rows:
        cells = "".join(f"<td>{_escape(value)}</td>" for value in values)
        yield f'<tr><th scope="row">{_escape(name)}</th>{cells}</tr>'
    yield f"</tbody></table><p>{_escape(said.note)}</p>"
