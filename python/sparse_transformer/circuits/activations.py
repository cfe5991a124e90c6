"""Recorded activations: their means, by which nodes are ablated, where they are largest, attention.

Means are kept in the user's cache, under a hash of the model's weights and of the tokens.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sparse_transformer import hooks
from sparse_transformer.attention import attention_pattern, attention_scores
from sparse_transformer.circuits.circuit import Snippet
from sparse_transformer.circuits.graph import Nodes
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer

_ROWS = 16
_CONTEXT_BEFORE, _CONTEXT_AFTER = 12, 4


def mean_activations(
    model: Transformer,
    tokens: Tensor,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """The mean over all tokens by hook point, `{layer}.attn.y` included; float32 `(C,)` each.

    Args:
        tokens: int64 `(rows, context)`.
        cache_dir: where to keep the result and to look for it; None does neither. A UserError if it
            cannot be written.
        progress: show a progress bar; by default where stderr is a terminal.
    """
    path = None
    if cache_dir is not None:
        taken = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12]
        path = Path(cache_dir, f"means-{fingerprint(model)}-{taken}.safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            pass  # missing or damaged: compute it again
    nodes = Nodes.of(model.config)
    names = [*nodes.names, *(name[:-1] + "y" for name in nodes.names if name.endswith(".v"))]
    sums: dict[str, Tensor] = {}
    for seen in _recorded(model, tokens, names, None if progress is None else not progress):
        for name, value in seen.items():
            total = value.double().sum((0, 1))
            sums[name] = total if name not in sums else sums[name] + total
    means = {name: (total / tokens.numel()).float() for name, total in sums.items()}
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                save_file(means, file.name)
            os.replace(file.name, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the means cannot be written to {path.parent} ({error}): "
                f"choose another --cache-dir"
            ) from error
    return means


def fingerprint(model: Transformer) -> str:
    """A hash of everything in the model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def record_nodes(
    model: Transformer, tokens: Tensor, nodes: Sequence[tuple[str, int]]
) -> list[Tensor]:
    """The activations of each node, hook point and channel, on `tokens`: float `(rows, T)`."""
    places: dict[str, list[int]] = {}
    for place, channel in nodes:
        places.setdefault(place, []).append(channel)
    parts: dict[str, list[Tensor]] = {place: [] for place in places}
    for seen in _recorded(model, tokens, list(places)):
        for place, channels in places.items():
            parts[place].append(seen[place][..., channels].float().cpu())
    whole = {place: torch.cat(found).movedim(-1, 0).contiguous() for place, found in parts.items()}
    return [whole[place][places[place].index(channel)] for place, channel in nodes]


def top_snippets(
    model: Transformer,
    tokens: Tensor,
    nodes: Sequence[tuple[str, int]],
    texts: Sequence[str],
    *,
    count: int = 4,
) -> dict[str, tuple[Snippet, ...]]:
    """Where in `tokens` each node's activation is largest in magnitude, by `hook:channel`.

    There are `count` snippets of each, from different rows; `texts` are those of the vocabulary.
    """
    found = zip(nodes, record_nodes(model, tokens, nodes), strict=True)
    return {
        f"{place}:{channel}": _snippets(values, tokens, texts, count)
        for (place, channel), values in found
    }


def attention_of(
    model: Transformer, layer: int, q: Tensor, k: Tensor, heads: Sequence[int] | None = None
) -> Tensor:
    """The attention of a layer, `(B, H, T, T)`; what is missing to 1 in a row goes to the sink.

    Args:
        q, k: as recorded, `(B, T, W)`.
        heads: of these alone.
    """
    chosen = slice(None) if heads is None else list(heads)
    d, sinks = model.config.d_head, None
    q, k = (x.float().unflatten(-1, (-1, d)).transpose(1, 2)[:, chosen] for x in (q, k))
    if model.config.sinks:
        sinks = model.get_parameter(f"blocks.{layer}.attn.sinks").detach()[chosen].to(q)
    return attention_pattern(attention_scores(q, k), sinks)


def _snippets(
    values: Tensor, tokens: Tensor, texts: Sequence[str], count: int
) -> tuple[Snippet, ...]:
    peaks, places = values.abs().max(1)  # (rows,)
    snippets = []
    for row in peaks.topk(min(count, len(peaks))).indices.tolist():
        if peaks[row] == 0:
            break
        at = int(places[row])
        first = max(0, at - _CONTEXT_BEFORE)
        part = slice(first, at + _CONTEXT_AFTER + 1)
        snippets.append(
            Snippet(
                tuple(texts[token] for token in tokens[row, part].tolist()),
                at - first,
                tuple(round(value, 4) for value in values[row, part].tolist()),
            )
        )
    return tuple(snippets)


@torch.no_grad()
def _recorded(
    model: Transformer, tokens: Tensor, names: Sequence[str], disable: bool | None = True
) -> Iterator[dict[str, Tensor]]:
    """The activations at these hook points, some rows at a time."""
    device = model.norm.weight.device
    for rows in tqdm(tokens.split(_ROWS), "means", unit=" batches", disable=disable, leave=False):
        with hooks.recording(model, names) as seen:
            model(rows.to(device), last_only=True)
        yield seen
