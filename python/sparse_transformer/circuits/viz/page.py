"""`circuit.html`: the picture as a page that needs nothing but itself.

The page is page.html with page.css, common.js, page.js, the drawing as inline SVG and
`circuit.json` filled in. Everything that comes from a circuit is escaped here, and the scripts
write it as text, never as markup.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources

from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.circuits.viz.drawing import picture
from sparse_transformer.circuits.viz.summary import COLUMNS, Summary, summarize


def render(circuit: Circuit) -> str:
    """The whole page."""
    said = summarize(circuit)
    parts = {
        "title": escape(said.task or "circuit"),
        "style": template("page.css"),
        "script": template("common.js") + template("page.js"),
        "description": escape(said.description),
        "story": "".join(f"<li>{_code(sentence)}</li>" for sentence in said.story),
        "model": escape(said.model),
        "size": escape(said.size),
        "verdicts": "".join(
            f'<li class="{"holds" if verdict.holds else "fails"}">{escape(verdict.sentence)}</li>'
            for verdict in said.verdicts
        ),
        "picture": picture(circuit),
        "validation": "".join(_table(said)),
        "circuit": embedded(json.loads(circuit.to_json())),
    }
    return fill(template("page.html"), parts)


def template(name: str) -> str:
    """A file of this folder."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def fill(text: str, parts: Mapping[str, str]) -> str:
    """The text with each `{{name}}` replaced by the part of that name."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], text)


def escape(text: str) -> str:
    """For an element or an attribute; lone surrogates, which no file can hold, become "?"."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _code(text: str) -> str:
    """Escaped; what stands between two backquotes is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def embedded(data: object) -> str:
    """JSON on one line, without what could end the element that it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _table(said: Summary) -> Iterator[str]:
    if not said.rows:
        return
    heads = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
    yield f'<table><thead><tr><th scope="col">what runs</th>{heads}</tr></thead><tbody>'
    for name, values in said.rows:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        yield f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    yield f"</tbody></table><p>{escape(said.note)}</p>"
