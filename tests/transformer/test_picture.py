"""The pictures: everything is drawn, nothing comes from outside, nothing is lost."""

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
from drawn import VALIDATION, ablated, channel, circuits, hostile, large, quotes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparse_transformer.circuits import viz, words
from sparse_transformer.circuits.circuit import Circuit, Edge, Node
from sparse_transformer.circuits.viz import drawing, page
from sparse_transformer.circuits.viz.summary import summarize
from sparse_transformer.errors import UserError

SVG = "{http://www.w3.org/2000/svg}"

# --- the drawing ------------------------------------------------------------------------------


def drawn(circuit):
    """The elements of the drawing by id, and the names of its rows."""
    root = ElementTree.fromstring(drawing.picture(circuit))
    groups = [group for group in root.iter(f"{SVG}g") if group.get("id")]
    rows = [texts(group) for group in groups if "row" in group.get("class", "").split()]
    return {group.get("id"): group for group in groups}, rows


def texts(group):
    return ["".join(found.itertext()) for found in group.iter(f"{SVG}text")]


def box_of(group):
    """Left, top, right, bottom of the frame of a node or a head."""
    numbers = re.findall(r"-?[\d.]+", group.find(f"{SVG}path").get("d"))
    points = np.array(numbers, dtype=float).reshape(-1, 2)
    return (*points.min(0), *points.max(0))


def boxes_of(circuit):
    elements, _ = drawn(circuit)
    return {node.id: box_of(elements[f"n{at}"]) for at, node in enumerate(circuit.nodes)}


def overlap(one, other):
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide > 0.5 and high > 0.5


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_every_node_and_edge_is_drawn_and_boxes_are_apart(make):
    circuit = make()
    elements, _ = drawn(circuit)
    for at, node in enumerate(circuit.nodes):
        assert node.kind in elements[f"n{at}"].get("class").split()
    for at, edge in enumerate(circuit.edges):
        found = elements[f"e{at}"].get("class").split()
        assert {edge.kind, "negative" if edge.weight < 0 else "positive"} <= set(found)
    boxes = boxes_of(circuit)
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not overlap(one, other)


@settings(max_examples=25)
@given(circuits())
def test_any_circuit_is_drawn(circuit):
    elements, _ = drawn(circuit)
    assert {f"n{at}" for at in range(len(circuit.nodes))} <= set(elements)
    assert {f"e{at}" for at in range(len(circuit.edges))} <= set(elements)


def test_rows_follow_the_forward_downward():
    circuit = quotes()
    _, rows = drawn(circuit)
    assert rows == [
        ["tokens"], ["MLP reads", "layer 0"], ["neurons", "layer 0"], ["MLP writes", "layer 0"],
        ["attention reads", "layer 1"], ["q and k", "layer 1"], ["looks at", "layer 1"],
        ["v", "layer 1"],
        ["attention writes", "layer 1"], ["answers"],
    ]  # fmt: skip
    boxes = boxes_of(circuit)
    for edge in circuit.edges:
        # y grows downward.
        assert boxes[edge.source][3] < boxes[edge.target][1], edge
    middles = {}
    for node in circuit.nodes:
        place = (drawing._row(node), round((boxes[node.id][1] + boxes[node.id][3]) / 2))
        middles.setdefault(place[0], set()).add(place[1])
    assert all(len(found) == 1 for found in middles.values())


def test_heads_are_framed_with_their_channels_alone():
    circuit = quotes()
    root = ElementTree.fromstring(drawing.picture(circuit))
    (frame,) = [g for g in root.iter(f"{SVG}g") if "frame" in g.get("class", "").split()]
    assert texts(frame) == ["head 1"]
    left, top, right, bottom = box_of(frame)
    for node in circuit.nodes:
        box = boxes_of(circuit)[node.id]
        inside = left < box[0] and box[2] < right and top < box[1] and box[3] < bottom
        assert inside == (node.kind in ("k", "v", "head", "frozen"))


def test_a_frozen_query_is_dashed_and_code_is_code():
    circuit = quotes()
    elements, _ = drawn(circuit)
    element = {node.id: elements[f"n{at}"] for at, node in enumerate(circuit.nodes)}
    dashed = {
        id for id, group in element.items() if group.find(f"{SVG}path").get("stroke-dasharray")
    }
    assert dashed == {"1.attn.q:mean of 1"}
    assert texts(element["1.attn.q:mean of 1"]) == ["q at its mean"]
    fonts = {
        text.text.strip(): text.get("font-family")
        for text in element["1.attn.head:1"].iter(f"{SVG}text")
    }
    assert fonts == {"looks at": "Helvetica,sans-Serif", '("': "Courier,monospace",
                     "(94%)": "Helvetica,sans-Serif"}  # fmt: skip
    assert "score 0.97" in texts(element["0.mlp.post_act:137"])[1]


def test_the_story_is_told_layer_by_layer():
    assert summarize(quotes()).story == (
        "Layer 0: neuron 137 quote detector.",
        'Layer 1: head 1 looks at `("` (94%); attention write 90.',
    )
    found = page.render(quotes())
    assert (
        "<li>Layer 1: head 1 looks at <code>(&quot;</code> (94%); attention write 90.</li>" in found
    )


def test_numbers_are_at_the_edges_that_have_a_weight_unless_there_are_many():
    circuit = quotes()
    elements, _ = drawn(circuit)
    for at, edge in enumerate(circuit.edges):
        weighted = edge.kind not in ("residual", "attention")
        shown = [text.strip() for text in texts(elements[f"e{at}"])]
        assert shown == ([words.signed(edge.weight)] if weighted else [])
    elements, _ = drawn(large())
    assert not any(texts(element) for id, element in elements.items() if id.startswith("e"))


def test_the_strongest_edge_of_a_kind_is_the_widest():
    circuit = quotes()
    elements, _ = drawn(circuit)
    widths = {
        at: float(elements[f"e{at}"].find(f"{SVG}path").get("stroke-width", 1))
        for at, edge in enumerate(circuit.edges)
        if edge.kind == "weight"
    }
    strongest = max(widths, key=lambda at: abs(circuit.edges[at].weight))
    assert widths[strongest] == max(widths.values()) == pytest.approx(4.2)
    assert min(widths.values()) < 2


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
    boxes = boxes_of(circuit)
    for row in range(3):
        left = nodes[row].id, nodes[3 + row].id
        assert (boxes[left[0]][0] < boxes[left[1]][0]) == (
            boxes[nodes[0].id][0] < boxes[nodes[3].id][0]
        )


def test_names_of_channels_are_said_once():
    """A head's frame has its number, and what is called by its channel has no second line."""
    named = {"1.attn.k:20": "k 4 of head 1", "1.attn.v:21": "type"}
    nodes = tuple(
        dataclasses.replace(node, label=named.get(node.id, node.label)) for node in quotes().nodes
    )
    elements, _ = drawn(dataclasses.replace(quotes(), nodes=nodes))
    shown = {node.id: texts(elements[f"n{at}"]) for at, node in enumerate(nodes)}
    assert shown["1.attn.k:20"] == ["k 4"]
    assert shown["1.attn.v:21"] == ["type", "v 21"]


def test_an_edge_to_nowhere_is_refused():
    circuit = dataclasses.replace(quotes(), edges=(Edge("token:5", "gone", 1.0),))
    with pytest.raises(ValueError, match="token:5 -> gone"):
        drawing.picture(circuit)


def test_kinds_that_are_not_known_are_refused():
    circuit = quotes()
    edge = dataclasses.replace(circuit.edges[0], kind='"><script>')
    with pytest.raises(ValueError, match=r"kind of the edge token:5 -> .* must be"):
        viz.write_html(dataclasses.replace(circuit, edges=(edge,)), "never.html")
    node = dataclasses.replace(circuit.nodes[0], kind="embedding")
    with pytest.raises(ValueError, match="kind of the node token:5 must be"):
        drawing.picture(dataclasses.replace(circuit, nodes=(node,), edges=()))


# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ('("', '("'), (" in", "·in"), ("   ", "···"), ("\n", "⏎"), ("\t\tx ", "⇥⇥x·"), ("", "∅"),
        ("a b", "a b"), ("\x00", "\\u0000"), ("\u202e", "\\u202e"), ("漢", "漢"),
    ],
)  # fmt: skip
def test_visible(token, shown):
    assert words.visible(token) == shown


def sentences(**changes):
    """What each verdict begins with, and whether it speaks for the circuit."""
    validation = dataclasses.replace(VALIDATION, **changes)
    said = summarize(dataclasses.replace(quotes(), validation=validation))
    return {re.split("[:,(]", one.sentence)[0].strip(): one.holds for one in said.verdicts}


def test_what_fails_is_said():
    headline = "Nonsense needs 21.0 times the edges of the task"
    assert list(sentences().items()) == [
        (headline, True), ("Sufficient", True), ("Necessary", True), ("Robust", True)
    ]  # fmt: skip
    near = dataclasses.replace(VALIDATION.controls[0], edges=12)
    failed = sentences(sufficient=False, necessary=False, robust=False, controls=(near,))
    assert failed == {
        "Nonsense needs 1.3 times the edges of the task": False,
        "Not sufficient": False,
        "Not necessary": False,
        "Not robust": False,
    }
    missed = sentences(controls=VALIDATION.controls[1:])
    assert missed["Nonsense does not reach the loss of the task"]


def test_what_is_undecided_does_not_hold():
    late = dataclasses.replace(VALIDATION.controls[1], complete=False)
    found = sentences(sufficient=None, necessary=None, robust=None, controls=(late,))
    assert list(found) == [
        "Undecided",
        "Undecided whether the circuit is sufficient",
        "Undecided whether the circuit is necessary",
        "Undecided whether the circuit is robust",
    ]
    assert not any(found.values())
    assert sentences(controls=())["No control was run"] is False


def test_a_circuit_may_lack_its_validation():
    circuit = dataclasses.replace(quotes(), validation=None)
    said = summarize(circuit)
    assert not said.verdicts
    assert not said.rows
    assert "<table>" not in page.render(circuit)


def test_all_of_the_validation_is_shown():
    said = summarize(quotes())
    rows = dict(said.rows)
    assert len(rows) == len(said.rows) == 1 + 7 + 5 + 2
    assert rows["whole model"] == ("0.081", "0.073 to 0.085", "98.4%")
    assert rows["circuit, the worst part of the rest at its mean"] == (
        "0.271", "0.244 to 0.285", "93.0%"
    )  # fmt: skip
    assert rows["without the circuit, which is at its mean"][0] == "0.693"
    assert rows["whole model, the circuit's edges at their mean"][0] == "0.692"
    assert rows["control: answers 1"] == ("0.120", "189 edges", "")
    assert rows["control: labels swapped"] == ("0.688", "target not reached", "")
    assert said.note.startswith("On 1024 held-out pairs of prompts in 3 draws")
    assert "L0 57,344" in said.model


# --- circuit.json -----------------------------------------------------------------------------


def test_json_has_the_validation_and_its_verdicts():
    proof = json.loads(quotes().to_json())["proof"]
    assert proof["circuit"]["mean"]["high"] == 0.1491
    assert proof["controls"][0]["edges"] == 189
    assert (proof["ratio"], proof["passed"], proof["robust"]) == (21.0, True, True)
    bare = dataclasses.replace(quotes(), validation=None)
    assert json.loads(bare.to_json())["proof"] == {}
    assert Circuit.from_json(bare.to_json()) == bare


def test_a_file_that_is_no_circuit_is_refused():
    data = json.loads(quotes().to_json())
    old = {**data, "schema": "sparse_transformer.circuit/2"}
    for broken in ([], old, {**data, "proof": {"circuit": {"mean": 1}}}):
        with pytest.raises(UserError, match="cannot read the circuit"):
            Circuit.from_json(json.dumps(broken))


def test_networkx_reads_the_file():
    data = json.loads(quotes().to_json())
    graph = nx.node_link_graph(data, directed=True, multigraph=False, edges="edges")
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.has_path(graph, "token:5", "answer:7")
    assert graph.edges["1.attn.act_in:31", "1.attn.k:20"]["weight"] == 1.63
    assert graph.nodes["0.mlp.post_act:137"]["label"] == "quote detector"


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
    viz.write_html(circuit, path)
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
    assert not any(tag in ("img", "iframe", "object", "base", "image") for tag, _ in found.tags)
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    code = found.scripts["code"] + page.template("page.css")
    assert not re.search(r"https:|@import|url\(|fetch\(|innerHTML|localStorage", code)
    assert re.findall(r"http://[^\"]*", code) == ["http://www.w3.org/2000/svg"]


@settings(max_examples=25)
@given(st.lists(st.text(), min_size=1, max_size=6), st.text())
def test_any_text_survives_the_page(labels, task):
    nodes = tuple(Node(f"token:{n}", "token", label, channel=n) for n, label in enumerate(labels))
    circuit = dataclasses.replace(
        quotes(), task=task, nodes=nodes, edges=(), examples=(), snippets={}
    )
    found = Elements(page.render(circuit))
    assert Circuit.from_json(found.scripts["circuit"]) == circuit
    assert [tag for tag, _ in found.tags].count("script") == 2


# --- images -----------------------------------------------------------------------------------


def pixels_of(circuit):
    with Image.open(io.BytesIO(drawing.render(circuit, "png", titled=True))) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def count(pixels, color):
    wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(-1) < 24).sum())


@pytest.mark.slow
@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_png(make, tmp_path):
    path = tmp_path / "circuit.png"
    viz.write_image(make(), path)
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    # Light, not blank, and with both signs of weights.
    assert 200 < pixels.mean() < 254
    for color in (drawing.POSITIVE, drawing.NEGATIVE):
        assert count(pixels, color) > 50


def test_png_says_in_red_what_failed():
    nothing = dataclasses.replace(quotes(), nodes=(), edges=())
    assert count(pixels_of(nothing), "#b3140f") == 0
    failed = dataclasses.replace(VALIDATION, necessary=False)
    assert count(pixels_of(dataclasses.replace(nothing, validation=failed)), "#b3140f") > 200


@pytest.mark.parametrize("make", [quotes, hostile])
def test_svg_has_text_as_text(make, tmp_path):
    circuit = make()
    path = tmp_path / "circuit.svg"
    viz.write_image(circuit, path)
    shown = texts(ElementTree.parse(path).getroot())
    assert any(text.startswith("Sufficient: ") for text in shown)
    if make is quotes:
        assert {"quote detector", "neuron 137, score 0.97", "string_closing"} <= set(shown)
    # The same circuit gives the same file.
    assert path.read_bytes() == drawing.render(circuit, "svg", titled=True)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a \.png or an \.svg"):
        viz.write_image(quotes(), tmp_path / "circuit.pdf")
    assert not list(tmp_path.iterdir())


def test_unknown_ablations_are_named_as_they_are():
    validation = dataclasses.replace(
        VALIDATION, circuit={**VALIDATION.circuit, "patch": ablated(0.2, 0.9)}
    )
    said = summarize(dataclasses.replace(quotes(), validation=validation))
    assert ("circuit alone, the rest patch", ("0.200", "0.180 to 0.210", "90.0%")) in said.rows
