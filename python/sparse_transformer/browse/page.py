"""The page of a model: browse.html with the data, the style and the scripts filled in.

All text is data in JSON or escaped here, and the scripts write it as text, never as markup.
"""

from __future__ import annotations

from importlib import resources

from sparse_transformer.browse.content import Content
from sparse_transformer.circuits.viz.page import embedded, escape, fill, template


def render(name: str, facts: str, content: Content) -> str:
    """The whole page, which needs neither another file nor the network.

    `name` is the model's, `facts` a line about it, `content` what `describe` found.
    """
    own = resources.files(__package__)
    html, css, js = (
        (own / f"browse.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    parts = {
        "title": escape(name),
        "facts": escape(facts),
        "style": template("page.css") + css,
        "script": template("common.js") + js,
        "content": embedded(content.to_json()),
    }
    return fill(html, parts)
