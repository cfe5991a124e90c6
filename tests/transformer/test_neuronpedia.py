"""The graph of a circuit on a prompt: it has the published form, and its links add up."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from test_model import make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sparse_transformer import ModelConfig, hooks, load_model
from sparse_transformer.circuits import neuronpedia
from sparse_transformer.circuits.circuit import Circuit, Edge, Node
from sparse_transformer.circuits.graph import Edges, Nodes, rows_of
from sparse_transformer.circuits.neuronpedia import to_neuronpedia
from sparse_transformer.errors import UserError

GALLERY = Path(__file__).parents[2] / "docs" / "gallery" / "python-small"
SMALL = ModelConfig(
    vocab_size=12,
    n_layer=2,
    d_model=12,
    context=16,
    d_head=4,
    d_mlp=16,
    density=0.4,
    embedding_density=0.5,
    active=0.5,
)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ANSWERS = [7, 8]


@pytest.fixture(scope="module")
def model():
    model = make(SMALL, dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks", "bigram")):
            parameter.normal_(0, 0.3, generator=generator)
    words = {f"w{number}": number for number in range(SMALL.vocab_size)}
    model.tokenizer = Tokenizer(WordLevel(words))
    model.tokenizer.pre_tokenizer = Whitespace()
    return model


def whole(model):
    """The circuit of all nodes and edges."""
    known, edges = Nodes.of(model.config), Edges.of(model)
    nodes = []
    for number in range(known.total):
        place, channel = known.locate(number)
        kind = known.kind(place)
        head = channel // known.d_head if kind in "qkv" else None
        layer = int(place.split(".")[0])
        nodes.append(Node(known.id(number), kind, kind, place, layer, channel, head))
    links = [
        Edge(known.id(s), known.id(t), w)
        for s, t, w in zip(
            edges.source.tolist(), edges.target.tolist(), edges.weight.tolist(), strict=True
        )
    ]
    order = {name: number for number, name in enumerate(known.names)}
    links += [
        Edge(write.id, read.id, 1.0, "residual")
        for write in nodes
        for read in nodes
        if (write.kind, read.kind) == ("write", "read")
        and write.channel == read.channel
        and order[write.place] < order[read.place]
    ]
    rows = rows_of(model.unembed, ANSWERS) * model.norm.weight
    for answer, row in zip(ANSWERS, rows, strict=True):
        nodes.append(Node(f"answer:{answer}", "answer", f"w{answer}", "", SMALL.n_layer, answer))
        links += [
            Edge(node.id, f"answer:{answer}", float(row[node.channel]), "unembedding")
            for node in nodes
            if node.kind == "write"
        ]
    facts = {"run": "small"}
    return Circuit("a_task", "", facts, 0.1, 1.0, 0.0, tuple(nodes), tuple(links), len(links))


@pytest.fixture(scope="module")
def graph(model):
    """Of the circuit of everything, with all links."""
    text = " ".join(f"w{token}" for token in PROMPT)
    return to_neuronpedia(whole(model), model, text, least_share=0)


def check_schema(graph):
    """What the JSON schema 1.0.0 of attribution graphs asks for, and that ids fit together."""
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    types = {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str}
    assert all(isinstance(graph["metadata"][name], kind) for name, kind in types.items())
    assert all(isinstance(text, str) for text in graph["metadata"]["prompt_tokens"])
    for name, kind in {"pinnedIds": list, "supernodes": list, "linkType": str}.items():
        assert isinstance(graph["qParams"][name], kind)
    required = {
        "node_id": str,
        "feature": int,
        "layer": str,
        "ctx_idx": int,
        "feature_type": str,
        "jsNodeId": str,
        "clerp": str,
    }
    for node in graph["nodes"]:
        assert all(type(node[name]) is kind for name, kind in required.items())
        assert node["activation"] is None or isinstance(node["activation"], float)
        assert 0 <= node["ctx_idx"] < len(graph["metadata"]["prompt_tokens"])
        # The viewer reads the probability of an answer from its label.
        assert node["feature_type"] != "logit" or "(p=" in node["clerp"]
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    assert graph["qParams"]["clickedId"] in nodes
    for link in graph["links"]:
        source, target = nodes[link["source"]], nodes[link["target"]]
        assert isinstance(link["weight"], float)
        assert source["ctx_idx"] <= target["ctx_idx"]
        assert source["layer"] == "E" or int(source["layer"]) < int(target["layer"])


def test_links_add_up_to_what_the_model_computes(model, graph):
    """Into reads, writes and answers, all but the biases."""
    check_schema(graph)
    assert graph["metadata"]["prompt_tokens"] == [f"w{token}" for token in PROMPT]
    seen = hooks.record(model, torch.tensor([PROMPT]))
    logits = model(torch.tensor([PROMPT]))[0, -1]
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    into = defaultdict(float)
    for link in graph["links"]:
        # The first-order effect of q and k is beside, not part of, what v brings.
        if not nodes[link["source"]]["clerp"].startswith(("q (", "k (")):
            into[link["target"]] += link["weight"]
    checked = defaultdict(int)
    for id, total in into.items():
        node, at, channel = nodes[id], nodes[id]["ctx_idx"], nodes[id]["feature"]
        if node["feature_type"] == "logit":
            wanted, kind = float(logits[channel]), "answer"
        else:
            place = node["clerp"].split("(")[1].split(":")[0]
            kind = place.split(".", 1)[1]
            value, layer = float(seen[place][0, at, channel]), place.split(".")[0]
            if kind not in ("attn.act_in", "mlp.act_in", "attn.resid_delta", "mlp.resid_delta"):
                continue
            writer = {"attn.resid_delta": "attn.out", "mlp.resid_delta": "mlp.down"}.get(kind)
            bias = model.get_parameter(f"blocks.{layer}.{writer}.bias") if writer else None
            wanted = value - (0.0 if bias is None else float(bias[channel]))
        assert total == pytest.approx(wanted, rel=1e-3, abs=1e-4), node["clerp"]
        checked[kind] += 1
    assert len(checked) == 5
    assert min(checked.values()) >= 2


def test_links_of_queries_and_keys_are_the_derivative_of_attention(model, graph):
    """Scaling q, or k, by 1 + e changes a write by e times the sum of its links."""
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    totals = {"q (0": defaultdict(float), "k (0": defaultdict(float)}
    for link in graph["links"]:
        kind = nodes[link["source"]]["clerp"][:4]
        if kind in totals:
            target = nodes[link["target"]]
            totals[kind][target["feature"], target["ctx_idx"]] += link["weight"]
    tokens, epsilon = torch.tensor([PROMPT]), 1e-2
    read = []
    for sign in (1, -1):
        factor = 1 + sign * epsilon
        with (
            hooks.replacing(model, {"0.attn.q": lambda q, f=factor: q * f}),
            hooks.recording(model, ["0.attn.y"]) as seen,
        ):
            model(tokens)
        read.append(model.get_submodule("blocks.0.attn.out")(seen["0.attn.y"])[0])
    slope = (read[0] - read[1]) / (2 * epsilon)  # (T, D)
    for found in totals.values():
        assert max(map(abs, found.values())) > 1e-3
        for (channel, at), total in found.items():
            assert total == pytest.approx(float(slope[at, channel]), rel=0.02, abs=2e-5)


@pytest.mark.parametrize("task", ["single_double_quote", "bracket_counting"])
def test_program_writes_what_the_viewer_lists(task, tmp_path, capsys):
    arguments = [f"--circuit={GALLERY / task}.json", "--checkpoint=python-small"]
    assert neuronpedia.main([*arguments, f"--out={tmp_path}"]) == 0
    assert neuronpedia.main([*arguments, f"--out={tmp_path}"]) == 0
    slug = task.replace("_", "-")
    graph = json.loads((tmp_path / f"{slug}.json").read_text())
    check_schema(graph)
    assert len(graph["links"]) > 50
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert listed == [graph["metadata"]]
    circuit = Circuit.from_json((GALLERY / f"{task}.json").read_text())
    assert graph["metadata"]["prompt_tokens"] == list(circuit.examples[0].tokens)
    # The answer of the example is the likeliest, and is shown first.
    clicked = graph["qParams"]["clickedId"]
    label = next(node["clerp"] for node in graph["nodes"] if node["node_id"] == clicked)
    assert label.startswith(f'Output "{circuit.examples[0].right}"')
    assert f"{len(graph['nodes'])} nodes" in capsys.readouterr().out


def test_bad_input_is_a_sentence(model, tmp_path, capsys):
    circuit = Circuit.from_json((GALLERY / "single_double_quote.json").read_text())
    with pytest.raises(UserError, match="give the checkpoint that the circuit is of"):
        to_neuronpedia(circuit, model, "w1")
    no_example = Circuit(**{**vars(circuit), "examples": ()})
    with pytest.raises(UserError, match="give a prompt"):
        to_neuronpedia(no_example, load_model("python-small"))
    circuit_file, checkpoint = f"--circuit={GALLERY}/none.json", "--checkpoint=python-small"
    assert neuronpedia.main([circuit_file, checkpoint, f"--out={tmp_path}"]) == 2
    assert "give a circuit.json" in capsys.readouterr().err
    assert neuronpedia.main([circuit_file, checkpoint, f"--out={tmp_path}", "--slug=a/b"]) == 2
    assert "letters, digits and hyphens" in capsys.readouterr().err
    (tmp_path / "graph-metadata.json").write_text("[]")
    whole_file = f"--circuit={GALLERY}/bracket_counting.json"
    assert neuronpedia.main([whole_file, checkpoint, f"--out={tmp_path}"]) == 2
    assert "choose another --out" in capsys.readouterr().err
