"""The gallery shows what its circuits are, and its models are there."""

import pytest

from docs import gallery
from sparse_transformer import load_model
from sparse_transformer.circuits.graph import Edges, Nodes

PAGES = list(gallery.pages())


@pytest.mark.parametrize(("path", "text"), PAGES, ids=[path.stem for path, _ in PAGES])
def test_pages_are_those_of_the_circuits(path, text):
    assert path.read_text(encoding="utf-8") == text, "run python -m docs.gallery"


def test_there_is_no_page_without_a_circuit():
    written = {path for path, _ in PAGES}
    assert set(gallery.GALLERY.rglob("*.md")) == written
    pictures = {path.with_suffix(".svg") for path in written if path.parent != gallery.GALLERY}
    assert set(gallery.GALLERY.rglob("*.svg")) == pictures


@pytest.mark.parametrize(("model", "circuits"), gallery.circuits().items())
def test_circuits_are_of_the_models_that_are_shipped(model, circuits):
    shipped = load_model(model)
    nodes, edges = Nodes.of(shipped.config), Edges.of(shipped)
    numbers = zip(edges.source.tolist(), edges.target.tolist(), strict=True)
    weights = dict(zip(numbers, edges.weight.tolist(), strict=True))
    for circuit in circuits.values():
        for edge in circuit.edges:
            if edge.kind == "weight":
                ends = nodes.index(edge.source), nodes.index(edge.target)
                assert edge.weight == pytest.approx(weights[ends], rel=1e-6)
