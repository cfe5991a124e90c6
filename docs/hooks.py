"""MkDocs hook: publishes the plots of `benchmarks/results/` and the pages of the gallery."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.circuits.viz.page import render

_DOCS = Path(__file__).parent
_RESULTS = _DOCS.parent / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds every plot as `results/NAME.png`, and beside each circuit of the gallery its page."""
    for plot in sorted(_RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    for path in sorted(_DOCS.glob("gallery/*/*.json")):
        address = path.relative_to(_DOCS).with_suffix(".html").as_posix()
        circuit = Circuit.from_json(path.read_text(encoding="utf-8"))
        files.append(File.generated(config, address, content=render(circuit)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points image links, which are written for the repository, at the published plots."""
    return markdown.replace("](../benchmarks/results/", "](results/")
