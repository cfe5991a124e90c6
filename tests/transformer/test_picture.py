"""The pictures: boxes apart, nothing from outside, nothing lost, and a page that answers.

The last tests drive a real Chromium. They need the package `playwright` and a browser:
SPARSE_CHROMIUM names it, otherwise it is looked for in PATH.
"""

import dataclasses
import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import networkx as nx
import numpy as np
import pytest
from drawn import PROOF, channel, circuits, hostile, large, quotes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparse_transformer.circuits import picture
from sparse_transformer.circuits.circuit import Circuit, Edge, Node
from sparse_transformer.circuits.picture import image, order, page, text
from sparse_transformer.circuits.picture.facts import facts
from sparse_transformer.circuits.picture.layout import lay_out
from sparse_transformer.circuits.picture.numbers import points_of
from sparse_transformer.errors import UserError

# --- geometry ---------------------------------------------------------------------------------


def overlap(one, other):
    return (
        min(one.x + one.width, other.x + other.width) - max(one.x, other.x) > 1e-6
        and min(one.y + one.height, other.y + other.height) - max(one.y, other.y) > 1e-6
    )


def check_geometry(circuit):
    layout = lay_out(circuit)
    assert set(layout.boxes) == {node.id for node in circuit.nodes}
    for one, other in itertools.combinations(layout.boxes.values(), 2):
        assert not overlap(one, other)
    for one, other in itertools.combinations(layout.frames, 2):
        assert not overlap(one, other)
    in_heads = {node.id for node in circuit.nodes if node.kind in "qkv"}
    for id, box in layout.boxes.items():
        assert box.x >= layout.gutter
        assert box.x + box.width <= layout.width
        # In exactly one band, and in a frame if it is of a head and only then.
        holders = [b for b in layout.bands if b.y < box.y and box.y + box.height < b.y + b.height]
        assert len(holders) == 1
        assert sum(overlap(box, frame) for frame in layout.frames) == (id in in_heads)
    for lower, upper in itertools.pairwise(layout.bands):
        assert upper.y + upper.height < lower.y
    rows = [(box.row, box.x) for box in layout.boxes.values()]
    assert rows == sorted(rows)
    assert len(layout.routes) == len(circuit.edges)
    for edge, route in zip(circuit.edges, layout.routes, strict=True):
        source, target = layout.boxes[edge.source], layout.boxes[edge.target]
        (x0, y0), (x1, y1) = route.points[0], route.points[-1]
        assert y0 == source.y
        assert source.x <= x0 <= source.x + source.width
        assert y1 == target.y + target.height
        assert target.x <= x1 <= target.x + target.width
    assert layout == lay_out(circuit)


@given(circuits())
def test_boxes_are_apart_and_stages_ascend(circuit):
    check_geometry(circuit)


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_real_circuits_too(make):
    check_geometry(make())


def test_no_line_passes_under_a_box():
    """What lanes are for: between its ends an edge keeps clear of all boxes."""
    for circuit in (quotes(), large()):
        layout = lay_out(circuit)
        ids = list(layout.boxes)
        low = np.array([(box.x, box.y) for box in layout.boxes.values()])
        high = low + [(box.width, box.height) for box in layout.boxes.values()]
        for edge, route in zip(circuit.edges, layout.routes, strict=True):
            for start, end in itertools.pairwise(route.points):
                points = points_of(start, end, np.linspace(0, 1, 50))[:, None]
                inside = ((low < points) & (points < high)).all(-1).any(0)
                crossed = {ids[place] for place in np.flatnonzero(inside)}
                assert crossed <= {edge.source, edge.target}, edge


def test_stages_are_those_that_have_nodes():
    labels = [" ".join(band.label) for band in lay_out(quotes()).bands]
    assert labels == [
        "tokens", "MLP reads", "neurons", "MLP writes", "attention reads", "heads",
        "attention writes", "answers",
    ]  # fmt: skip
    layers = [band.label for band in lay_out(quotes()).layers]
    assert layers == [("layer 0",), ("layer 1",)]
    assert [frame.label for frame in lay_out(quotes()).frames] == ["head 1"]


def test_numbers_of_a_usual_circuit_are_all_free():
    circuit = quotes()
    layout = lay_out(circuit)
    for edge, route in zip(circuit.edges, layout.routes, strict=True):
        assert bool(route.number) == (edge.kind not in ("residual", "attention"))
        assert route.free or not route.number
    assert layout.routes[3].number == "−0.71"


def test_edges_do_not_cross_where_they_need_not():
    """Two chains whose channels are numbered crosswise come out side by side."""
    nodes, edges = [], []
    for chain, numbers in (("a", (1, 9, 1)), ("b", (9, 1, 9))):
        places = ("0.mlp.act_in", "0.mlp.post_act", "0.mlp.resid_delta")
        kinds = ("read", "neuron", "write")
        made = [channel(*it, label=chain) for it in zip(places, numbers, kinds, strict=True)]
        nodes += made
        edges += [Edge(a.id, b.id, 1.0) for a, b in itertools.pairwise(made)]
    circuit = dataclasses.replace(quotes(), nodes=tuple(nodes), edges=tuple(edges))
    boxes = lay_out(circuit).boxes
    left = {node.label for node in nodes if boxes[node.id].centre < 180}
    xs = {
        label: {round(boxes[n.id].centre, 3) for n in nodes if n.label == label} for label in "ab"
    }
    assert len(left) == 1
    assert {len(found) for found in xs.values()} == {1}


@given(st.data())
def test_spread_is_the_nearest_that_keeps_the_gaps(data):
    count = data.draw(st.integers(1, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    wanted, weights, gaps = (
        rng.normal(0, 3, count),
        rng.uniform(0.1, 4, count),
        rng.random(count - 1),
    )
    found = np.array(order.spread(wanted, weights, gaps))
    assert (np.diff(found) >= gaps - 1e-9).all()
    cost = (weights * (found - wanted) ** 2).sum()
    for _ in range(50):
        steps = np.maximum(np.diff(found) + rng.normal(0, 0.3, count - 1), gaps)
        other = np.concatenate([[0], np.cumsum(steps)]) + found[0] + rng.normal(0, 0.3)
        assert (weights * (other - wanted) ** 2).sum() >= cost - 1e-9


def test_an_edge_to_nowhere_is_refused():
    circuit = dataclasses.replace(quotes(), edges=(Edge("token:5", "gone", 1.0),))
    with pytest.raises(ValueError, match="token:5 -> gone"):
        lay_out(circuit)


def test_kinds_that_are_not_known_are_refused():
    circuit = quotes()
    edge = dataclasses.replace(circuit.edges[0], kind='"><script>')
    with pytest.raises(ValueError, match=r"kind of the edge token:5 -> .* must be"):
        picture.write_html(dataclasses.replace(circuit, edges=(edge,)), "never.html")
    node = dataclasses.replace(circuit.nodes[0], kind="head")
    with pytest.raises(ValueError, match="kind of the node token:5 must be"):
        lay_out(dataclasses.replace(circuit, nodes=(node,), edges=()))


def test_names_of_channels_are_said_once():
    """A head's frame has its number, and what is called by its channel has no second line."""
    named = {"1.attn.q:18": "q 2 of head 1", "1.attn.k:20": "k 4 of head 1", "1.attn.v:21": "type"}
    nodes = tuple(
        dataclasses.replace(node, label=named.get(node.id, node.label)) for node in quotes().nodes
    )
    boxes = lay_out(dataclasses.replace(quotes(), nodes=nodes)).boxes
    shown = {id: (boxes[id].lines, boxes[id].note) for id in named}
    assert shown == {
        "1.attn.q:18": (("q 2",), ""),
        "1.attn.k:20": (("k 4",), ""),
        "1.attn.v:21": (("type",), "v 21"),
    }


# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ('("', '("'), (" in", "·in"), ("   ", "···"), ("\n", "⏎"), ("\t\tx ", "⇥⇥x·"), ("", "∅"),
        ("a b", "a b"), ("\x00", "\\u0000"), ("\u202e", "\\u202e"), ("漢", "漢"),
    ],
)  # fmt: skip
def test_visible(token, shown):
    assert text.visible(token) == shown


@given(st.text(max_size=60).map(text.visible), st.integers(30, 200), st.integers(1, 3))
def test_wrap_loses_nothing_but_what_has_no_line(words, limit, lines):
    found = text.wrap(words, 12, limit, lines=lines)
    assert 1 <= len(found) <= lines
    assert all(len(line) == 1 or text.width(line, 12) <= limit for line in found)
    if not found[-1].endswith("…"):
        assert "".join(found).replace(" ", "") == words.replace(" ", "")


def sentences(**changes):
    said = facts(dataclasses.replace(quotes(), proof={**PROOF, **changes}))
    return {
        verdict.sentence.split(":")[0].split(",")[0]: verdict.holds for verdict in said.verdicts
    }


def test_what_fails_is_said():
    assert sentences() == {"Sufficient": True, "Necessary": True, "Control passed": True}
    failed = sentences(
        sufficient=False, necessary=False, control={**PROOF["control"], "passed": False}
    )
    assert failed == {"Not sufficient": False, "Not necessary": False, "Control failed": False}


@pytest.mark.parametrize("nothing", [{}, dict.fromkeys(PROOF), {"circuit": {"mean": None}}])
def test_a_proof_may_lack_anything(nothing):
    circuit = dataclasses.replace(quotes(), proof=nothing)
    said = facts(circuit)
    assert not said.verdicts
    assert not said.rows
    assert "<table>" not in page.render(circuit)


def test_all_of_the_proof_is_shown():
    said = facts(
        dataclasses.replace(quotes(), proof={**PROOF, "seeds": [1, 2], "extra": {"a": 0.5}})
    )
    assert said.columns == ("loss", "recalibrated loss", "accuracy")
    assert len(said.rows) == 7
    assert said.rows[0] == ("whole model", ("0.081", "–", "98.4%"))
    assert said.rows[4] == ("model, the circuit at its mean", ("2.914", "0.693", "49.8%"))
    assert said.others == (("pairs", "1024"), ("seeds", "1, 2"), ("extra", "a 0.500"))


# --- the page as a file -----------------------------------------------------------------------


class Elements(HTMLParser):
    """Tags with their attributes, and the text of each script by its id."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.scripts, self.inside = [], {}, None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.inside = dict(attributes).get("id", "code")
            self.scripts[self.inside] = ""

    def handle_endtag(self, tag):
        self.inside = None if tag == "script" else self.inside

    def handle_data(self, data):
        if self.inside is not None:
            self.scripts[self.inside] += data


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_the_page_holds_all_of_the_circuit_and_needs_nothing_else(make, tmp_path):
    circuit = make()
    path = tmp_path / "circuit.html"
    picture.write_html(circuit, path)
    found = Elements(path.read_text(encoding="utf-8"))
    assert Circuit.from_json(found.scripts["circuit"]) == circuit
    assert set(found.scripts) == {"circuit", "code"}
    links = [
        value
        for _, attributes in found.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data", "poster")
    ]
    assert links == ["data:,"]
    assert not any(tag in ("img", "iframe", "object", "base") for tag, _ in found.tags)
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    code = found.scripts["code"] + page._template("page.css")
    assert not re.search(r"https?:|@import|url\(|fetch\(|innerHTML|localStorage", code)
    named = [attributes for tag, attributes in found.tags if "data-node" in attributes]
    assert len(named) == len(circuit.nodes)
    assert all(attributes["aria-label"] for attributes in named)


@given(st.lists(st.text(), min_size=1, max_size=6), st.text())
def test_any_text_survives_the_page(labels, task):
    nodes = tuple(Node(f"token:{n}", "token", label, channel=n) for n, label in enumerate(labels))
    circuit = dataclasses.replace(
        quotes(), task=task, nodes=nodes, edges=(), examples=(), snippets={}
    )
    found = Elements(page.render(circuit))
    assert Circuit.from_json(found.scripts["circuit"]) == circuit
    names = [attributes["aria-label"] for _, attributes in found.tags if "data-node" in attributes]
    assert {name.rsplit(", token ", 1)[0] for name in names} == set(map(text.visible, labels))


# --- networkx ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_networkx_and_back(make):
    circuit = make()
    graph = picture.to_networkx(circuit)
    assert isinstance(graph, nx.DiGraph)
    assert set(graph.nodes) == {node.id for node in circuit.nodes}
    assert picture.from_networkx(graph) == circuit
    stored = json.dumps(nx.node_link_data(graph, edges="edges"))
    again = nx.node_link_graph(json.loads(stored), edges="edges")
    assert picture.from_networkx(again) == circuit


@given(circuits())
def test_networkx_and_back_for_any(circuit):
    assert picture.from_networkx(picture.to_networkx(circuit)) == circuit


def test_the_graph_can_be_computed_with():
    graph = picture.to_networkx(quotes())
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.has_path(graph, "token:5", "answer:7")
    assert graph.edges["1.attn.act_in:31", "1.attn.k:20"]["weight"] == 1.63
    graph.remove_node("1.attn.act_in:3")
    graph.add_edge("token:6", "1.attn.act_in:31", weight=0.5, kind="embedding")
    changed = picture.from_networkx(graph)
    assert len(changed.nodes) == len(quotes().nodes) - 1
    assert changed.edges[-1] == Edge("token:6", "1.attn.act_in:31", 0.5, "embedding")


def test_what_a_digraph_cannot_hold_is_refused():
    circuit = quotes()
    twice = dataclasses.replace(circuit, edges=(*circuit.edges, circuit.edges[0]))
    with pytest.raises(ValueError, match="more than one edge token:5"):
        picture.to_networkx(twice)
    with pytest.raises(ValueError, match="more than one node token:5"):
        picture.to_networkx(dataclasses.replace(circuit, nodes=circuit.nodes + circuit.nodes))
    with pytest.raises(UserError, match="cannot read the circuit"):
        picture.from_networkx(nx.DiGraph())


# --- images -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_png(make, tmp_path):
    circuit = make()
    path = tmp_path / "circuit.png"
    picture.write_image(circuit, path)
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
        dpi = round(opened.info["dpi"][0])
    # Small, and sharp; one of hundreds of edges is small enough that its numbers can be read.
    assert path.stat().st_size <= image.MOST_BYTES or (make, dpi) == (large, 100)
    assert dpi == (100 if make is large else 200)
    assert pixels.shape[1] >= lay_out(circuit).width * dpi / 100
    # Light, not blank, and with both signs of weights.
    assert 200 < pixels.mean() < 254
    for color in (image._POSITIVE, image._NEGATIVE):
        wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(-1) < 24).sum() > 50


def test_png_says_in_red_what_failed():
    def red(circuit):
        with Image.open(io.BytesIO(image.render(circuit, ".png"))) as opened:
            pixels = np.asarray(opened.convert("RGB")).astype(int)
        return (np.abs(pixels - [179, 20, 15]).max(-1) < 24).sum()

    nothing = dataclasses.replace(quotes(), nodes=(), edges=())
    assert red(nothing) == 0
    assert red(dataclasses.replace(nothing, proof={**PROOF, "necessary": False})) > 200


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_svg_has_text_as_text(make, tmp_path):
    circuit = make()
    path = tmp_path / "circuit.svg"
    picture.write_image(circuit, path)
    root = ElementTree.parse(path).getroot()
    words = ["".join(found.itertext()) for found in root.iter("{http://www.w3.org/2000/svg}text")]
    layout = lay_out(circuit)
    for box in layout.boxes.values():
        for line in box.lines:
            if all(ord(char) < 0x250 for char in line):
                assert line in words
    for route in layout.routes:
        if route.number and route.free:
            assert route.number in words
    # The same circuit gives the same file.
    assert make is large or path.read_bytes() == image.render(circuit, ".svg")


def test_names_fit_their_boxes():
    circuit = large()
    labels = (
        "Would it wrap?",
        "quote detector",
        "MMMM WWWW",
        "if … else :",
        "closing ](){}",
        "nnnnnnnnnn",
    )
    # Tokens and answers have another font.
    nodes = tuple(
        dataclasses.replace(node, label=label) if node.place else node
        for node, label in zip(circuit.nodes, itertools.cycle(labels), strict=False)
    )
    circuit = dataclasses.replace(circuit, nodes=nodes)
    widths = {}
    for box in lay_out(circuit).boxes.values():
        for line in (*box.lines, box.note):
            widths[line] = min(box.width, widths.get(line, 1e9))
    figure = image._draw(circuit)
    renderer = figure.canvas.get_renderer()
    checked = 0
    for found in figure.axes[0].texts:
        if found.get_text() in widths and found.get_text():
            wide = found.get_window_extent(renderer).width * 100 / figure.dpi
            assert wide <= widths[found.get_text()] - 4, found.get_text()
            checked += 1
    assert checked > len(nodes)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a \.png or an \.svg"):
        picture.write_image(quotes(), tmp_path / "circuit.pdf")
    assert not list(tmp_path.iterdir())
