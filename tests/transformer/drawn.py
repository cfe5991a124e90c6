"""Circuits to draw: a plausible one, a large one, one of hostile texts, any."""

import dataclasses
import itertools
import random
import re

from hypothesis import strategies as st

from sparse_transformer.circuits.circuit import (
    PARTS,
    Ablated,
    Circuit,
    Control,
    Edge,
    Example,
    Node,
    Snippet,
    Trace,
    Validation,
)


def ablated(loss, accuracy):
    return Ablated(loss, accuracy, round(0.9 * loss, 4), round(1.05 * loss, 4), (loss, loss))


VALIDATION = Validation(
    pairs=1024,
    draws=3,
    edges=9,
    model=ablated(0.081, 0.984),
    circuit={
        "mean": ablated(0.142, 0.961),
        "zero": ablated(0.218, 0.934),
        "resample": ablated(0.163, 0.953),
        "pair": ablated(0.191, 0.953),
        "random": ablated(0.171, 0.953),
        "adversarial": ablated(0.271, 0.93),
        "edges": ablated(0.149, 0.96),
    },
    without={
        "mean": ablated(0.693, 0.498),
        "zero": ablated(0.691, 0.507),
        "resample": ablated(0.688, 0.513),
        "pair": ablated(0.693, 0.02),
        "edges": ablated(0.692, 0.51),
    },
    sufficient=True,
    necessary=True,
    robust=True,
    controls=(
        Control("answers 1", 0.51, 0.12, 150, 189, reached=True, complete=True),
        Control("labels swapped", 0.693, 0.688, 31, 87, reached=False, complete=True),
    ),
)


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
        channel(
            "0.mlp.act_in",
            12,
            "read",
            "reads `(\"`, `('`",
            score=0.99,
            sources=(('("', 0.81), ("('", 0.78), (" in", -0.2)),
        ),
        channel("0.mlp.act_in", 45, "read"),
        channel("0.mlp.post_act", 137, "neuron", "quote detector", score=0.97),
        channel("0.mlp.post_act", 201, "neuron", "quote type"),
        channel("0.mlp.resid_delta", 31, "write"),
        channel("0.mlp.resid_delta", 77, "write"),
        channel("1.attn.act_in", 31, "read"),
        channel("1.attn.act_in", 77, "read"),
        channel("1.attn.act_in", 3, "read"),
        Node("1.attn.q:mean of 1", "frozen", "q at its mean", "", 1, 1, 1),
        channel("1.attn.k", 20, "k", head=1),
        channel("1.attn.v", 21, "v", head=1),
        Node("1.attn.head:1", "head", 'looks at `("` (94%)', "", 1, 1, 1),
        channel("1.attn.resid_delta", 90, "write", promotes=('")',), suppresses=("')", " in")),
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
        Edge("1.attn.act_in:3", "1.attn.k:20", 0.52),
        Edge("1.attn.act_in:31", "1.attn.k:20", 1.63),
        Edge("1.attn.act_in:77", "1.attn.v:21", -1.21),
        Edge("1.attn.q:mean of 1", "1.attn.head:1", 1.0, "attention"),
        Edge("1.attn.k:20", "1.attn.head:1", 1.0, "attention"),
        Edge("1.attn.head:1", "1.attn.v:21", 1.0, "attention"),
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
            if node.kind in PARTS
        }
        sign = 1 if double else -1
        activations["0.mlp.post_act:201"] = tuple(3.1 * sign * ("(" in t) for t in tokens)
        activations["0.mlp.post_act:137"] = tuple(2.4 * ("(" in t) for t in tokens)
        right, wrong = ('")', "')") if double else ("')", '")')
        difference = -0.4 if (call, double) == ("\tlog", False) else 4.21
        attention = {"1.attn.head:1": tuple(0.94 if "(" in t else 0.01 for t in tokens)}
        model = Trace(3.5, activations, attention)
        alone = {id: tuple(value / 2 for value in values) for id, values in activations.items()}
        circuit = Trace(difference, alone, attention)
        note = "the circuit is wrong" if difference < 0 else "the shortest prompts"
        examples.append(Example(tokens, right, wrong, double, note, model, circuit))
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
        "l0": 57_344,
        "edges": 15_000,
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
        validation=VALIDATION,
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
                    id = f"{layer}.attn.head:{head}"
                    hub = Node(id, "head", "looks at", "", layer, head, head)
                    nodes[hub.id] = hub
                    join(q + k, [hub], 9, "attention")
                    join([hub], v, 1, "attention")
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
    "🙂", "\u202eevil", "]]>", "a\r\nb", "`<b>`", "``", "`",
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
        nodes=tuple(
            dataclasses.replace(
                node,
                label=next(words),
                sources=tuple((next(words), weight) for _, weight in node.sources),
                promotes=tuple(next(words) for _ in node.promotes),
            )
            for node in base.nodes
        ),
        validation=dataclasses.replace(
            VALIDATION,
            circuit=VALIDATION.circuit | {word: ablated(0.1, 0.9) for word in HOSTILE},
            controls=tuple(
                dataclasses.replace(VALIDATION.controls[0], name=word) for word in HOSTILE
            ),
        ),
        examples=tuple(
            dataclasses.replace(
                example,
                tokens=tuple(next(words) for _ in example.tokens),
                right=next(words),
                wrong=next(words),
                note=next(words),
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
        "head": ("attn.head",),
        "frozen": ("attn.q", "attn.k"),
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
            head = (
                draw(st.sampled_from((None, 0, 1)))
                if kind in ("q", "k", "v", "head", "frozen")
                else None
            )
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
