"""What the page of a model shows: its nodes, its edges, and what a corpus says about each node."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from sparse_transformer import hooks
from sparse_transformer.circuits import words
from sparse_transformer.circuits.activations import attention_of, record_nodes
from sparse_transformer.circuits.examples import mass_of, strongest
from sparse_transformer.circuits.graph import Edges, Nodes, rows_of
from sparse_transformer.circuits.labels import Texts, label_activations, quoted
from sparse_transformer.config import ModelConfig
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer

# Labels take a few milliseconds a node; a larger page would also be slow to open.
MOST_NODES, MOST_EDGES = 20_000, 400_000
# Snippets of a node, each from another window, and the tokens before and after its peak.
_SNIPPETS, _BEFORE, _AFTER = 4, 12, 4
# Tokens that the embedding writes to a residual direction, and the unembedding reads from it.
_LENS = 6
# Windows on which it is measured where heads look, and the share for which a place names a head.
_HEAD_ROWS, _OFFSET_SHARE = 16, 0.5


@dataclass(frozen=True)
class Place:
    """Nodes that belong together: the channels of a hook point, or the heads of a layer.

    Attributes:
        name: of the hook point, or `{layer}.attn.head`; a node's id is `name:number`.
        kind: read, q, k, v, neuron, write, head or residual.
        width: how many.
    """

    name: str
    kind: str
    width: int


@dataclass(frozen=True)
class Content:
    """N nodes in the order of their places, E edges, S snippets a node, W tokens a snippet.

    Attributes:
        places: first those of `graph.Nodes`, whose numbers the edges have.
        d_head: width of a head.
        texts: of the vocabulary.
        corpus: int64 `(rows, T)`, where the snippets are from.
        names: N; "" for a node without a label.
        scores: float `(N,)`, the balanced accuracy of the label; 0 for none.
        means: float `(N,)`, of the activation; for a head the share of attention that goes to the
            sink.
        active: float `(N,)`, the share of the corpus where the activation is not zero.
        peaks: int64 `(N, S)`, places in the flattened corpus; -1 for none.
        snippets: float `(N, S, W)`, the activations around each peak.
        source, target, weight: `(E,)`, the nonzero weights of the blocks.
        embedded, raised, lowered: for each residual direction pairs of token and weight: the
            embedding's, and the unembedding's above and below zero, with the last norm.
        example: the ids of a text's L tokens.
        patterns: `(layers, H, L, L)`, the attention on it; what is missing to 1 goes to the sink.
    """

    places: tuple[Place, ...]
    d_head: int
    texts: list[str]
    corpus: Tensor
    names: list[str]
    scores: Tensor
    means: Tensor
    active: Tensor
    peaks: Tensor
    snippets: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    embedded: list[list[tuple[int, float]]]
    raised: list[list[tuple[int, float]]]
    lowered: list[list[tuple[int, float]]]
    example: list[int]
    patterns: Tensor

    def to_json(self) -> dict[str, Any]:
        """As browse.js reads it: arrays are base64 of little-endian numbers."""
        largest = self.snippets.abs().amax((1, 2))  # (N,)
        steps = self.snippets / largest.clamp_min(1e-30)[:, None, None] * 127
        query, key = torch.tril_indices(len(self.example), len(self.example))
        return {
            "places": [[place.name, place.kind, place.width] for place in self.places],
            "dHead": self.d_head,
            "texts": self.texts,
            "names": self.names,
            "context": self.corpus.shape[1],
            "before": _BEFORE,
            "shape": self.snippets.shape[1:],
            "corpus": _packed(self.corpus, torch.int32),
            "scores": _packed(self.scores, torch.float32),
            "means": _packed(self.means, torch.float32),
            "active": _packed(self.active, torch.float32),
            "peaks": _packed(self.peaks, torch.int32),
            "largest": _packed(largest, torch.float32),
            "snippets": _packed(steps.round(), torch.int8),
            "source": _packed(self.source, torch.int32),
            "target": _packed(self.target, torch.int32),
            "weight": _packed(self.weight, torch.float32),
            "embedded": self.embedded,
            "raised": self.raised,
            "lowered": self.lowered,
            "example": self.example,
            "patterns": _packed((self.patterns[..., query, key] * 255).round(), torch.uint8),
        }


def need_small(config: ModelConfig, edges: int = 0) -> None:
    """Raises UserError for a model that is too large for a page."""
    nodes = sum(place.width for place in _places(config))
    for count, most, noun in ((nodes, MOST_NODES, "nodes"), (edges, MOST_EDGES, "edges")):
        if count > most:
            raise UserError(
                f"the page shows at most {most:,} {noun}, and this model has {count:,}: "
                "choose a smaller or a sparser model"
            )


@torch.no_grad()
def describe(
    model: Transformer, tokenizer: Tokenizer, corpus: Tensor, example: list[int]
) -> Content:
    """Looks at a model in evaluation, on the CPU; a UserError if it is too large.

    Args:
        corpus: int64 `(rows, T)`; labels are fitted on even rows and scored on odd ones.
        example: ids of the tokens on which attention is shown.
    """
    config = model.config
    need_small(config)
    edges = Edges.of(model)
    need_small(config, len(edges.weight))
    texts = Texts(tokenizer, config.vocab_size)
    found = [
        _heads(model, corpus[:_HEAD_ROWS], texts, int(place.name.split(".")[0]))
        if place.kind == "head"
        else _channels(model, corpus, texts, place)
        for place in tqdm(_places(config), "nodes", unit=" places", disable=None, leave=False)
    ]
    embedding = rows_of(model.embed, range(config.vocab_size))  # (V, D)
    unembedding = rows_of(model.unembed or model.embed, range(config.vocab_size))
    unembedding = unembedding * model.norm.weight
    return Content(
        places=_places(config),
        d_head=config.d_head,
        texts=texts.texts,
        corpus=corpus,
        names=[name for part in found for name in part.names],
        scores=torch.cat([part.scores for part in found]),
        means=torch.cat([part.means for part in found]),
        active=torch.cat([part.active for part in found]),
        peaks=torch.cat([part.peaks for part in found]),
        snippets=torch.cat([part.snippets for part in found]),
        source=edges.source,
        target=edges.target,
        weight=edges.weight,
        embedded=_largest(embedding, embedding.abs()),
        raised=_largest(unembedding, unembedding),
        lowered=_largest(unembedding, -unembedding),
        example=example,
        patterns=torch.stack([found[0] for found in patterns(model, torch.tensor([example]))]),
    )


def patterns(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """The attention `(B, H, T, T)` of each layer; what is missing to 1 goes to the sink."""
    layers = range(model.config.n_layer)
    with hooks.recording(model, [f"{n}.attn.{kind}" for n in layers for kind in "qk"]) as seen:
        model(tokens, last_only=True)
    return [attention_of(model, n, seen[f"{n}.attn.q"], seen[f"{n}.attn.k"]) for n in layers]


@dataclass(frozen=True)
class _Part:
    """The nodes of one place, as in `Content`."""

    names: list[str]
    scores: Tensor
    means: Tensor
    active: Tensor
    peaks: Tensor
    snippets: Tensor


def _places(config: ModelConfig) -> tuple[Place, ...]:
    nodes = Nodes.of(config)
    found = [
        Place(name, nodes.kind(name), width)
        for name, width in zip(nodes.names, nodes.widths, strict=True)
    ]
    found += [Place(f"{n}.attn.head", "head", config.heads) for n in range(config.n_layer)]
    return (*found, Place("final_resid", "residual", config.d_model))


def _channels(model: Transformer, corpus: Tensor, texts: Texts, place: Place) -> _Part:
    recorded = record_nodes(model, corpus, [(place.name, at) for at in range(place.width)])
    labels = label_activations(recorded, corpus, texts)
    peaks, snippets = zip(*(_snippets(values) for values in recorded), strict=True)
    return _Part(
        [words.named(place.kind, label.text) if label.text else "" for label in labels],
        torch.tensor([label.score or 0.0 if label.text else 0.0 for label in labels]),
        torch.stack([values.mean() for values in recorded]),
        torch.stack([(values != 0).float().mean() for values in recorded]),
        torch.stack(peaks),
        torch.stack(snippets),
    )


def _snippets(values: Tensor) -> tuple[Tensor, Tensor]:
    """Where activations `(rows, T)` are largest, `(S,)`, and those around, `(S, W)`."""
    T = values.shape[1]
    largest, places = values.abs().max(1)  # (rows,)
    rows = largest.topk(min(_SNIPPETS, len(largest))).indices
    at = places[rows]
    around = (at[:, None] + torch.arange(-_BEFORE, _AFTER + 1)).clamp(0, T - 1)
    peaks = torch.where(largest[rows] > 0, rows * T + at, -1)
    return peaks, values[rows[:, None], around]


def _heads(model: Transformer, corpus: Tensor, texts: Texts, layer: int) -> _Part:
    """Heads are called by where they look on average; shares leave out the sink."""
    pattern = patterns(model, corpus)[layer]  # (rows, H, T, T)
    rows, H, T, _ = pattern.shape
    alike = (torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]).sum(0) / T
    everywhere = mass_of(corpus, alike.expand(rows, T) / rows, len(texts.texts))
    names = []
    for own in pattern.unbind(1):
        own = own / own.sum().clamp_min(1e-9)
        same, previous = (float(own.diagonal(-back, 1, 2).sum()) for back in (0, 1))
        chosen, share = strongest(mass_of(corpus, own.sum(1), len(texts.texts)), everywhere)
        name = f"{quoted(texts.texts[token] for token in chosen)} ({share:.0%})" if chosen else ""
        if max(same, previous) >= _OFFSET_SHARE:
            which = "its own" if same > previous else "the previous"
            name = f"{which} token ({max(same, previous):.0%})"
        names.append(f"looks at {name}" if name else "")
    width = _BEFORE + _AFTER + 1
    kept = min(_SNIPPETS, len(corpus))
    sink = 1 - pattern.sum(-1).mean((0, 2))
    none = torch.zeros(H)
    peaks = torch.full((H, _SNIPPETS), -1)
    return _Part(names, none, sink, none, peaks[:, :kept], torch.zeros(H, kept, width))


def _largest(table: Tensor, by: Tensor) -> list[list[tuple[int, float]]]:
    """For each column of `(V, D)` the rows that have most, with their values."""
    top = by.topk(min(_LENS, len(by)), 0)
    values = table.gather(0, top.indices) * (top.values > 0)
    return [
        [(token, round(value, 4)) for token, value in zip(tokens, column, strict=True) if value]
        for tokens, column in zip(top.indices.T.tolist(), values.T.tolist(), strict=True)
    ]


def _packed(values: Tensor, dtype: torch.dtype) -> str:
    array = values.to(dtype).contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
