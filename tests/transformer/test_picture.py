"""The pictures: boxes apart, nothing from outside, nothing lost, and a page that answers.

The last tests drive a real Chromium. They need the package `playwright` and a browser:
SPARSE_CHROMIUM names it, otherwise it is looked for in PATH.
"""

import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparse_transformer.circuits import picture
from sparse_transformer.circuits.circuit import Circuit, Edge, Example, Node, Snippet
from sparse_transformer.circuits.picture import image, order, page, text
from sparse_transformer.circuits.picture.facts import facts
from sparse_transformer.circuits.picture.layout import lay_out
from sparse_transformer.circuits.picture.numbers import points_of
from sparse_transformer.errors import UserError

# --- circuits ---------------------------------------------------------------------------------

PROOF = {
    "model_loss": 0.081,
    "model_accuracy": 0.984,
    "circuit": {
        "mean": {"loss": 0.142, "accuracy": 0.961},
        "zero": {"loss": 0.218, "accuracy": 0.934},
        "resample": {"loss": 0.163, "accuracy": 0.953},
    },
    "without": {
        "mean": {"loss": 2.914, "recalibrated_loss": 0.693, "accuracy": 0.498},
        "zero": {"loss": 3.377, "recalibrated_loss": 0.691, "accuracy": 0.507},
        "resample": {"loss": 2.52, "recalibrated_loss": 0.688, "accuracy": 0.513},
    },
    "sufficient": True,
    "necessary": True,
    "control": {
        "loss": 0.688, "reached": False, "nodes": 31, "edges": 87, "limit": 90, "passed": True
    },
    "pairs": 1024,
}  # fmt: skip


def channel(place, number, kind, label="", **fields):
    layer = int(place.split(".")[0])
    importance = round(random.Random(f"{place}{number}").uniform(0.01, 0.6), 3)
    return Node(
        f"{place}:{number}", kind, label or f"{kind} {number}", place, layer, number,
        mean=0.12, importance=importance, **fields,
    )  # fmt: skip


def quotes() -> Circuit:
    """What the paper found for string_closing: a detector as key, the type as value."""
    nodes = (
        Node("token:5", "token", '("', channel=5),
        Node("token:6", "token", "('", channel=6),
        channel("0.mlp.act_in", 12, "read"),
        channel("0.mlp.act_in", 45, "read"),
        channel("0.mlp.post_act", 137, "neuron", "quote detector"),
        channel("0.mlp.post_act", 201, "neuron", "quote type"),
        channel("0.mlp.resid_delta", 31, "write"),
        channel("0.mlp.resid_delta", 77, "write"),
        channel("1.attn.act_in", 31, "read"),
        channel("1.attn.act_in", 77, "read"),
        channel("1.attn.act_in", 3, "read"),
        channel("1.attn.q", 18, "q", head=1),
        channel("1.attn.k", 20, "k", head=1),
        channel("1.attn.v", 21, "v", head=1),
        channel("1.attn.resid_delta", 90, "write"),
        Node("answer:7", "answer", '")', layer=2, channel=7),
        Node("answer:8", "answer", "')", layer=2, channel=8),
    )
    edges = (
        Edge("token:5", "0.mlp.act_in:12", 0.81, "embedding"),
        Edge("token:6", "0.mlp.act_in:12", 0.78, "embedding"),
        Edge("token:5", "0.mlp.act_in:45", 0.66, "embedding"),
        Edge("token:6", "0.mlp.act_in:45", -0.71, "embedding"),
        Edge("token:5", "1.attn.act_in:3", 0.04, "embedding"),
        Edge("0.mlp.act_in:12", "0.mlp.post_act:137", 1.92),
        Edge("0.mlp.act_in:45", "0.mlp.post_act:201", 1.37),
        Edge("0.mlp.act_in:12", "0.mlp.post_act:201", -0.34),
        Edge("0.mlp.post_act:137", "0.mlp.resid_delta:31", 1.14),
        Edge("0.mlp.post_act:201", "0.mlp.resid_delta:77", -0.95),
        Edge("0.mlp.resid_delta:31", "1.attn.act_in:31", 1.0, "residual"),
        Edge("0.mlp.resid_delta:77", "1.attn.act_in:77", 1.0, "residual"),
        Edge("1.attn.act_in:3", "1.attn.q:18", 0.52),
        Edge("1.attn.act_in:31", "1.attn.k:20", 1.63),
        Edge("1.attn.act_in:77", "1.attn.v:21", -1.21),
        Edge("1.attn.q:18", "1.attn.v:21", 1.0, "attention"),
        Edge("1.attn.k:20", "1.attn.v:21", 1.0, "attention"),
        Edge("1.attn.v:21", "1.attn.resid_delta:90", 1.48),
        Edge("1.attn.resid_delta:90", "answer:7", 0.88, "unembedding"),
        Edge("1.attn.resid_delta:90", "answer:8", -0.93, "unembedding"),
    )
    pairs = [
        ("print", "hello"),
        ("\tlog", "it is < 3 & > 2"),
        ("raise ValueError", "no\nsuch thing"),
    ]
    examples = []
    for (call, inside), double in itertools.product(pairs, (True, False)):
        words = [word for word in re.split(r"(?<=\n)|(?= )", inside) if word]
        tokens = (call, '("' if double else "('", *words)
        activations = {
            node.id: tuple(round(random.Random(f"{node.id}{t}").gauss(0, 0.4), 3) for t in tokens)
            for node in nodes
            if node.place
        }
        sign = 1 if double else -1
        activations["0.mlp.post_act:201"] = tuple(3.1 * sign * ("(" in t) for t in tokens)
        activations["0.mlp.post_act:137"] = tuple(2.4 * ("(" in t) for t in tokens)
        right, wrong = ('")', "')") if double else ("')", '")')
        difference = -0.4 if (call, double) == ("\tlog", False) else 4.21
        examples.append(Example(tokens, right, wrong, double, difference, activations))
    snippets = {
        node.id: tuple(
            Snippet(("def", " f", "(", "x", "=", '("', " a", '")', "):", "\n    "), 5, peak)
            for peak in ((0.0, 0.1, 0.4, 0.0, -0.2, 3.3, 1.2, 0.0, 0.0, 0.1),) * 3
        )
        for node in nodes
        if node.kind == "neuron"
    }
    model = {
        "checkpoint": "runs/quotes-17",
        "linear": "sparse",
        "d_model": 256,
        "n_layer": 2,
        "L0": 15000,
    }
    return Circuit(
        task="string_closing",
        description="Closes a string with the quote that opened it.",
        model=model,
        target_loss=0.15,
        scale=1.2,
        shift=-0.1,
        nodes=nodes,
        edges=edges,
        edges_before=41,
        proof=PROOF,
        examples=tuple(examples),
        snippets=snippets,
    )


def large(seed: int = 0, layers: int = 4, width: int = 7) -> Circuit:
    """About 150 nodes and 400 edges, with what circuits have: few inputs, long residual edges."""
    rng = random.Random(seed)
    nodes: dict[str, Node] = {}
    edges: dict[tuple[str, str], Edge] = {}
    writes: list[Node] = []

    def add(place, kind, count, **fields):
        found = []
        for number in rng.sample(range(64), count):
            head = {"head": number // 16} if kind in "qkv" else {}
            found.append(channel(place, number, kind, **head))
        nodes.update((node.id, node) for node in found)
        return found

    def join(sources, targets, fan, kind="weight"):
        for target in targets:
            for source in rng.sample(sources, min(fan, len(sources))):
                weight = 1.0 if kind in ("residual", "attention") else round(rng.gauss(0, 1), 3)
                edges[source.id, target.id] = Edge(source.id, target.id, weight, kind)

    tokens = [
        Node(f"token:{n}", "token", t, channel=n) for n, t in enumerate(("for", " in", ":", "\n"))
    ]
    nodes.update((node.id, node) for node in tokens)
    for layer in range(layers):
        for part in ("attn", "mlp"):
            reads = add(f"{layer}.{part}.act_in", "read", width)
            join(tokens, reads if layer == 0 else reads[:1], 2, "embedding")
            join(writes, reads, 1, "residual")
            if part == "attn":
                qkv = [add(f"{layer}.attn.{kind}", kind, 3) for kind in "qkv"]
                for found in qkv:
                    join(reads, found, 3)
                for head in range(4):
                    q, k, v = ([n for n in found if n.head == head] for found in qkv)
                    join(q + k, v, 9, "attention")
                middle = qkv[2]
            else:
                middle = add(f"{layer}.mlp.post_act", "neuron", width)
                join(reads, middle, 4)
            written = add(f"{layer}.{part}.resid_delta", "write", 4)
            join(middle, written, 3)
            writes += written
    answers = [
        Node(f"answer:{n}", "answer", t, layer=layers, channel=n)
        for n, t in enumerate((" in", ":"))
    ]
    nodes.update((node.id, node) for node in answers)
    join(writes, answers, 12, "unembedding")
    return Circuit(
        "for_while", "Whether a loop is a for or a while.", {"d_model": 64}, 0.15, 1.0, 0.0,
        tuple(nodes.values()), tuple(edges.values()), 2 * len(edges),
    )  # fmt: skip


HOSTILE = (
    "</script><script>document.title='broken'</script>", '"><img src=x onerror=alert(1)>', "<!--",
    "&amp;", "'", "\n", "\t", "  ", "", "\x00\x1f\u2028", "{{circuit}}", "$x^2$", "\\", "漢字",
    "🙂", "\u202eevil", "]]>", "a\r\nb",
)  # fmt: skip


def hostile() -> Circuit:
    """Every text of `quotes()` replaced by one that could break out of where it stands."""
    base = quotes()
    words = itertools.cycle(HOSTILE)
    return dataclasses.replace(
        base,
        task=HOSTILE[0],
        description=" ".join(HOSTILE),
        model={word: word for word in HOSTILE},
        nodes=tuple(dataclasses.replace(node, label=next(words)) for node in base.nodes),
        proof={**PROOF, **{word: {word: word} for word in HOSTILE}},
        examples=tuple(
            dataclasses.replace(
                example,
                tokens=tuple(next(words) for _ in example.tokens),
                right=next(words),
                wrong=next(words),
            )
            for example in base.examples
        ),
        snippets={"0.mlp.post_act:137": (Snippet(HOSTILE, 3, (0.5,) * len(HOSTILE)),)},
    )


@st.composite
def circuits(draw):
    """Any nodes, joined in any way, also in ways that no model could."""
    places = {
        "read": ("attn.act_in", "mlp.act_in"),
        "write": ("attn.resid_delta", "mlp.resid_delta"),
        "q": ("attn.q",),
        "k": ("attn.k",),
        "v": ("attn.v",),
        "neuron": ("mlp.post_act",),
    }
    nodes = {}
    for _ in range(draw(st.integers(0, 40))):
        kind = draw(st.sampled_from((*places, "token", "answer")))
        number, label = draw(st.integers(0, 99)), draw(st.text(max_size=30))
        if kind in places:
            layer = draw(st.integers(0, 3))
            place = f"{layer}.{draw(st.sampled_from(places[kind]))}"
            head = draw(st.sampled_from((None, 0, 1))) if kind in "qkv" else None
            node = Node(f"{place}:{number}", kind, label, place, layer, number, head)
        else:
            node = Node(f"{kind}:{number}", kind, label, channel=number)
        nodes[node.id] = node
    ends = st.sampled_from(sorted(nodes)) if nodes else st.nothing()
    kinds = st.sampled_from(("weight", "residual", "attention", "embedding", "unembedding"))
    weights = st.floats(allow_nan=False, allow_infinity=False)
    edge = st.builds(Edge, ends, ends, weights, kinds)
    edges = draw(st.lists(edge, max_size=60, unique_by=lambda e: (e.source, e.target)))
    return dataclasses.replace(
        quotes(), nodes=tuple(nodes.values()), edges=tuple(edges), examples=(), snippets={}
    )


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
    with pytest.raises(UserError, match="no circuit"):
        picture.from_networkx(nx.DiGraph())


# --- images -----------------------------------------------------------------------------------


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


# --- the page in a browser --------------------------------------------------------------------


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = [shutil.which(name) for name in names]
    return next((path for path in (os.environ.get("SPARSE_CHROMIUM"), *found) if path), None)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium: neither in SPARSE_CHROMIUM nor in PATH")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a circuit's page; at the end there may be no message and no request beside the file."""
    contexts, messages, requests = [], [], []

    def opened(circuit, width=1360, height=900, **options):
        path = tmp_path / "circuit.html"
        picture.write_html(circuit, path)
        context = browser.new_context(
            viewport={"width": width, "height": height}, offline=True, **options
        )
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: messages.append(message.text))
        shown.on("pageerror", lambda error: messages.append(str(error)))
        shown.on("request", lambda request: requests.append(request.url))
        shown.goto(path.as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()
    assert not messages
    assert all(url.startswith(("file:", "data:")) for url in requests), requests


def node_of(shown, circuit, id):
    index = next(place for place, node in enumerate(circuit.nodes) if node.id == id)
    return shown.locator(f'.node[data-node="{index}"]')


def panel_name(shown):
    return shown.locator("#details h2").inner_text()


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_the_page_draws_every_node_and_edge(show, make):
    circuit = make()
    shown = show(circuit)
    assert shown.title() != "broken"
    boxes = shown.locator(".node")
    assert boxes.count() == len(circuit.nodes)
    assert shown.locator(".edge").count() == len(circuit.edges)
    # No text is wider than its box, whatever fonts this machine has.
    assert shown.evaluate(
        """() => [...document.querySelectorAll(".node text")].every((words) => {
            const box = words.parentNode.querySelector("rect").getBoundingClientRect();
            return words.getBoundingClientRect().width <= box.width;
        })"""
    )
    # Every node can be described.
    described = boxes.evaluate_all(
        "all => all.map(one => (one.focus(), document.querySelector('#details h2').textContent))"
    )
    assert sorted(described) == sorted(text.name(node) for node in circuit.nodes)
    assert shown.locator("img").count() == 0


def test_hover_lights_the_neighbours_and_opens_the_panel(show):
    circuit = quotes()
    shown = show(circuit)
    node_of(shown, circuit, "0.mlp.post_act:201").hover()
    assert panel_name(shown) == "quote type"
    lit = shown.locator(".node.lit").evaluate_all("all => all.map(one => +one.dataset.node)")
    assert {circuit.nodes[place].id for place in lit} == {
        "0.mlp.post_act:201", "0.mlp.act_in:45", "0.mlp.act_in:12", "0.mlp.resid_delta:77"
    }  # fmt: skip
    assert shown.locator("g.edge.lit").count() == 3
    details = shown.locator("#details")
    words = details.inner_text()
    for wanted in (
        "neuron 201, layer 0",
        "0.mlp.post_act:201",
        "reads (2)",
        "read by (1)",
        "+1.37",
        "−0.34",
    ):
        assert wanted in words
    strips = details.locator(".tokens")
    assert strips.count() == len(circuit.examples) + 3
    opening = strips.nth(0).locator("span").nth(1)
    assert opening.inner_text() == '("'
    assert opening.get_attribute("title") == '("  +3.10'
    assert opening.get_attribute("class") == "positive"
    assert strips.nth(1).locator("span").nth(1).get_attribute("class") == "negative"
    assert strips.last.locator(".peak").inner_text() == '("'
    assert "by −0.40, which is wrong" in words
    shown.mouse.move(2, 2)
    assert shown.locator(".lit").count() == 0
    assert panel_name(shown) == "quote type"


def test_a_click_pins_and_the_lists_lead_on(show):
    circuit = quotes()
    shown = show(circuit)
    detector = node_of(shown, circuit, "0.mlp.post_act:137")
    detector.click()
    assert detector.get_attribute("aria-pressed") == "true"
    node_of(shown, circuit, "answer:7").hover()
    assert panel_name(shown) == "quote detector"
    shown.locator(".ends button", has_text="write 31").click()
    assert panel_name(shown) == "write 31"
    assert node_of(shown, circuit, "0.mlp.resid_delta:31").get_attribute("aria-pressed") == "true"
    assert shown.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "write 31"
    )
    shown.keyboard.press("Escape")
    assert shown.locator('[aria-pressed="true"]').count() == 0


def test_all_of_it_with_the_keyboard(show):
    circuit = quotes()
    shown = show(circuit)

    def focused():
        return shown.evaluate("document.activeElement.ariaLabel") or ""

    for _ in range(8):
        shown.keyboard.press("Tab")
        if focused().startswith('("'):
            break
    # Both tokens are read by two channels below and one above.
    assert focused() == '(", token 5, 0 in, 3 out'
    assert panel_name(shown) == '("'
    outline = "getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth"
    assert shown.evaluate(outline) == "3px"
    shown.keyboard.press("ArrowRight")
    assert focused().startswith("(', token 6")
    shown.keyboard.press("ArrowRight")
    assert focused().startswith("(', token 6")
    seen = []
    for _ in range(12):
        shown.keyboard.press("ArrowUp")
        seen.append(focused().split(",")[0].split(" ")[0])
    assert seen[:4] == ["read", "quote", "write", "read"]
    assert seen[-1] in ('")', "')")
    shown.keyboard.press("Home")
    assert focused().startswith('("')
    shown.keyboard.press("Enter")
    pressed = shown.locator('[aria-pressed="true"]')
    assert pressed.get_attribute("aria-label").startswith('("')
    shown.keyboard.press("ArrowUp")
    assert panel_name(shown) == '("'
    shown.keyboard.press("Escape")
    assert pressed.count() == 0
    assert panel_name(shown).startswith("read")
    # One stop for all nodes: the next Tab leaves the picture.
    shown.keyboard.press("Tab")
    assert shown.evaluate("!document.activeElement.closest('#picture')")


def test_dark_is_the_readers_choice(show):
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(21, 24, 28)"
    shown = show(quotes(), color_scheme="light")
    assert shown.evaluate(background) == light
    shown.click("#theme")
    assert shown.evaluate(background) == dark
    assert shown.inner_text("#theme") == "Light"
    shown.click("#theme")
    assert shown.evaluate(background) == light
    shown = show(quotes(), color_scheme="dark")
    assert shown.evaluate(background) == dark
    assert shown.inner_text("#theme") == "Light"


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_a_narrow_screen_scrolls_the_picture_alone(show, make):
    circuit = make()
    shown = show(circuit, width=360, height=740)
    shown.locator(".node").first.focus()
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360
    panel, scroller = (
        shown.locator("#panel").bounding_box(),
        shown.locator("#scroller").bounding_box(),
    )
    assert panel["y"] >= scroller["y"] + scroller["height"]
    # Names stay legible rather than fit.
    assert shown.locator("#picture").bounding_box()["width"] >= 0.79 * lay_out(circuit).width


def test_many_numbers_wait_until_they_are_asked_for(show):
    circuit = large()
    shown = show(circuit)
    visible = "all => all.filter(one => getComputedStyle(one).visibility === 'visible').length"
    numbers = shown.locator(".number")
    assert numbers.evaluate_all(visible) == 0
    target = next(node for node in circuit.nodes if node.kind == "neuron")
    node_of(shown, circuit, target.id).focus()
    expected = sum(target.id in (edge.source, edge.target) for edge in circuit.edges)
    assert numbers.evaluate_all(visible) == expected
    # Or at the edge itself.
    shown.evaluate("document.activeElement.blur()")
    edge = next(place for place, edge in enumerate(circuit.edges) if edge.kind == "weight")
    x, y = shown.evaluate(
        """(edge) => {
            const line = document.querySelector(`g.edge[data-edge="${edge}"] .near`);
            line.scrollIntoView({ block: "center", inline: "center" });
            const point = line.getPointAtLength(line.getTotalLength() / 4);
            const { x, y } = point.matrixTransform(line.getScreenCTM());
            return [x, y];
        }""",
        edge,
    )
    shown.mouse.move(x, y)
    shown.mouse.move(x, y + 1)
    assert numbers.evaluate_all(visible) == 1


def test_names_of_stages_stay_in_sight(show):
    shown = show(large(), width=1000)
    shown.evaluate("document.getElementById('scroller').scrollLeft = 150")
    shown.wait_for_selector(
        '.gutter[transform]:not([transform="translate(0 0)"])', state="attached"
    )
    stages, scroller = shown.locator(".gutter"), shown.locator("#scroller")
    assert abs(stages.bounding_box()["x"] - scroller.bounding_box()["x"]) <= 1


def test_size_buttons(show):
    shown = show(quotes())
    width = "document.getElementById('picture').getBoundingClientRect().width"
    fitting = shown.evaluate(width)
    shown.click("#larger")
    assert shown.evaluate(width) == pytest.approx(1.25 * fitting, rel=0.01)
    shown.click("#fit")
    assert shown.evaluate(width) == pytest.approx(fitting)


def test_the_reasons_to_doubt_are_red(show):
    circuit = dataclasses.replace(
        quotes(),
        proof={**PROOF, "necessary": False, "control": {**PROOF["control"], "passed": False}},
    )
    shown = show(circuit, color_scheme="light")
    failed = shown.locator(".verdicts .fails")
    assert failed.count() == 2
    assert failed.first.evaluate("one => getComputedStyle(one).color") == "rgb(179, 20, 15)"
    assert failed.nth(1).inner_text().startswith("Control failed")


def test_words_are_the_same_in_both_languages(show):
    """`visible` exists twice: what the panel shows of a token is what its box shows."""
    circuit = hostile()
    shown = show(circuit)
    node_of(shown, circuit, "0.mlp.post_act:137").hover()
    spans = shown.locator("#details .tokens").last.locator("span")
    assert spans.all_text_contents() == [text.visible(token) for token in HOSTILE]
