"""Activations over a corpus: the means that ablated nodes have, and where a node is most active.

Means are kept in the user's cache, under a hash of the model's weights and of the tokens.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sparse_transformer import hooks
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
        model: in evaluation.
        tokens: int64 `(rows, context)`.
        cache_dir: where to keep the result and to look for it; None does neither.
        progress: show a progress bar; by default where stderr is a terminal.

    Raises:
        UserError: `cache_dir` cannot be written.
    """
    path = None
    if cache_dir is not None:
        taken = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12]
        path = Path(cache_dir, f"means-{fingerprint(model)}-{taken}.safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            pass  # missing or damaged: compute it again
    sums: dict[str, Tensor] = {}
    for seen in _recorded(model, tokens, "means", progress):
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


def top_snippets(
    model: Transformer,
    tokens: Tensor,
    nodes: list[tuple[str, int]],
    texts: list[str],
    *,
    count: int = 4,
    progress: bool | None = None,
) -> dict[str, tuple[Snippet, ...]]:
    """Where in `tokens` each node's activation is largest in magnitude, by `hook:channel`.

    Args:
        nodes: hook point and channel of each.
        texts: of each token id.
        count: how many snippets, each from another row.
    """
    by_place: dict[str, list[int]] = {}
    for place, channel in nodes:
        by_place.setdefault(place, []).append(channel)
    kept: dict[str, list[Tensor]] = {place: [] for place in by_place}
    for seen in _recorded(model, tokens, "snippets", progress):
        for place, channels in by_place.items():
            kept[place].append(seen[place][..., channels].clone())
    found: dict[str, tuple[Snippet, ...]] = {}
    for place, channels in by_place.items():
        values = torch.cat(kept[place])  # (rows, T, channels)
        for column, channel in enumerate(channels):
            found[f"{place}:{channel}"] = _snippets(values[..., column], tokens, texts, count)
    return found


def _snippets(values: Tensor, tokens: Tensor, texts: list[str], count: int) -> tuple[Snippet, ...]:
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
    model: Transformer, tokens: Tensor, name: str, progress: bool | None
) -> Iterator[dict[str, Tensor]]:
    """The activations of all nodes, some rows at a time."""
    nodes = Nodes.of(model.config)
    names = [*nodes.names, *(name[:-1] + "y" for name in nodes.names if name.endswith(".v"))]
    disable = None if progress is None else not progress
    device = model.norm.weight.device
    for rows in tqdm(tokens.split(_ROWS), name, unit=" batches", disable=disable, leave=False):
        with hooks.recording(model, names) as seen:
            model(rows.to(device), last_only=True)
        yield seen
