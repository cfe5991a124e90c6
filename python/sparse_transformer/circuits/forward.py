"""The forward that a search repeats thousands of times: logits after the last token of prompts.

What they do not depend on is not computed, and nothing is computed twice: what depends on a token
alone, which is all before the first attention, once for each token; what depends on the tokens so
far, once for the beginning that the two prompts of a pair share; and what only the answers read,
which is the last block without its keys and values, at the last position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparse_transformer.attention import attention_pattern, attention_scores, causal_attention
from sparse_transformer.circuits.ablation import Baseline
from sparse_transformer.circuits.graph import Nodes
from sparse_transformer.layers import keep_part
from sparse_transformer.model import Attention, Block, Transformer


@dataclass(frozen=True)
class Skipped:
    """What need not be computed, because hooks replace it.

    Attributes:
        writes: by sublayer (`0.attn`): what it writes, `(D,)`, or `(B, T, D)` where it differs
            between positions.
        heads: by attention (`0.attn`): int64, the numbers of the heads that are computed; all where
            there is no entry.
    """

    writes: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def without(cls, nodes: Nodes, keep: Tensor, baseline: Baseline) -> Skipped:
        """Sublayers of which `keep`, bool `(total,)`, has no write, and heads without a v."""
        writes, heads = {}, {}
        for name, part in nodes.split(keep).items():
            sublayer, _, kind = name.rpartition(".")
            if kind == "resid_delta" and not bool(part.any()):
                writes[sublayer] = baseline[name]
            if kind == "v":
                heads[sublayer] = part.view(-1, nodes.d_head).any(1).nonzero().squeeze(1)
        return cls(writes, heads)


def answer_logits(
    model: Transformer,
    tokens: Tensor,
    last: Tensor,
    skipped: Skipped | None = None,
    *,
    shared: bool = True,
) -> Tensor:
    """Logits after position `last (B,)` of each sequence, `(B, V)`.

    Hooks see `(1, rows, C)`, where each row stands for all positions that have its activations;
    without `shared`, they see `(B, T, C)`. In the last block all but `act_in`, k and v of the
    attention see `(B, 1, C)`: the positions `last`.

    Args:
        tokens: int64 `(B, T)`; sequences 2i and 2i + 1 share the work of their common beginning.
        skipped: what is not computed.
        shared: what hooks put in place of activations is the same for all positions.
    """
    skipped, last_layer = skipped or Skipped(), model.config.n_layer - 1
    rows = _Rows(tokens, last, shared, by_token=model.positions is None)
    x = model.embed(rows.tokens)
    positions: Tensor | None = model.positions
    if positions is not None:
        positions = rows.select(positions[: tokens.shape[1]].expand(len(tokens), -1, -1))
        if model.config.added_positions:
            x, positions = x + positions, None
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        name = f"{layer}.attn"
        written, heads = skipped.writes.get(name), skipped.heads.get(name)
        if layer == last_layer:
            if written is None:
                written = _last_attention(block.attn, x, positions, rows, heads)
            x = rows.ends(x) + written
            positions = None if positions is None else rows.ends(positions)
        elif written is None:
            y = _attention(block.attn, x, positions, rows, heads)
            x = rows.by_prefix(x) + block.attn.write(y)
        else:
            x = x + written
        written = skipped.writes.get(f"{layer}.mlp")
        x = x + (block.mlp(x, positions) if written is None else written)
    logits: Tensor = model._logits(model.hook_final(x)).squeeze(1)
    if model.bigram is not None:
        logits = logits + nn.functional.embedding(tokens[rows.last], model.bigram)
    return logits


class _Rows:
    """Which row of what is computed, `(1, rows, C)`, has the activations of a position.

    Attributes:
        tokens: of the rows, `(1, rows)`; `(B, T)` where nothing is shared.
        last: the indices of the positions that are asked.
    """

    def __init__(self, tokens: Tensor, last: Tensor, shared: bool, by_token: bool) -> None:
        B, T = tokens.shape
        self.tokens, self.last = tokens, (torch.arange(B, device=tokens.device), last)
        self._where: Tensor | None = None
        if not shared:
            return
        pairs, at = B // 2, torch.arange(T, device=tokens.device)
        even, odd = tokens[: 2 * pairs : 2], tokens[1::2]
        again = (even == odd).cumprod(1).bool() & (at <= last[: 2 * pairs : 2, None])
        first = at <= last[:, None]
        first[1::2] &= ~again
        # Padding has the row before it, which no position that counts reads.
        self._prefixes = (first.view(-1).cumsum(0) - 1).view(B, T)
        self._prefixes[1::2] = self._prefixes[1::2].where(~again, self._prefixes[: 2 * pairs : 2])
        self._first = first.view(-1).nonzero().squeeze(1)
        if by_token:
            distinct, self._where = tokens.unique(return_inverse=True)
            self.tokens = distinct.unsqueeze(0)
        else:
            self._where = self._prefixes
            self.tokens = tokens.reshape(-1)[self._first].unsqueeze(0)

    def spread(self, x: Tensor) -> Tensor:
        """The rows, `(1, rows, C)`, at all positions, `(B, T, C)`."""
        return x if self._where is None else nn.functional.embedding(self._where, x[0])

    def select(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to one row for each beginning."""
        return x if self._where is None else x.flatten(0, 1).index_select(0, self._first)[None]

    def by_prefix(self, x: Tensor) -> Tensor:
        """Rows of tokens become rows of beginnings; as attention looks at what comes before."""
        if self._where is None or self._where is self._prefixes:
            return x
        x = nn.functional.embedding(self._where.view(-1)[self._first], x[0]).unsqueeze(0)
        self._where = self._prefixes
        return x

    def ends(self, x: Tensor) -> Tensor:
        """The positions that are asked, `(B, 1, C)`."""
        if self._where is None:
            return x[self.last].unsqueeze(1)
        return nn.functional.embedding(self._where[self.last], x[0]).unsqueeze(1)


def _attention(
    attn: Attention, x: Tensor, positions: Tensor | None, rows: _Rows, heads: Tensor | None
) -> Tensor:
    """What the heads find, `(1, rows, W)`, a row for each beginning."""
    qkv = attn.hook_qkv(attn.keep_qkv(attn.project(x, positions)))
    qkv = _chosen(attn, qkv, heads)  # (1, rows, 3, h, d)
    qkv = rows.spread(qkv.flatten(2)).unflatten(2, qkv.shape[2:])
    y = causal_attention(qkv, _sinks(attn, heads))
    return _all_heads(attn, rows.select(y.flatten(2)), heads)


def _last_attention(
    attn: Attention, x: Tensor, positions: Tensor | None, rows: _Rows, heads: Tensor | None
) -> Tensor:
    """What attention adds to the stream at the positions that are asked, `(B, 1, D)`."""
    projected = attn.project(x, positions)

    def part(name: str, made: Tensor) -> Tensor:
        kept = keep_part(attn.keep_qkv, made, "qkv".index(name))
        return _chosen(attn, attn.hook_qkv.through(name, kept), heads)

    q = part("q", rows.ends(projected[:, :, 0])).transpose(1, 2)  # (B, h, 1, d)
    k, v = (
        rows.spread(one.flatten(2)).unflatten(2, one.shape[2:]).transpose(1, 2)
        for one in (part("k", projected[:, :, 1]), part("v", projected[:, :, 2]))
    )
    later = torch.arange(k.shape[2], device=x.device) > rows.last[1][:, None, None, None]
    scores = attention_scores(q, k).masked_fill(later, -torch.inf)
    y = attention_pattern(scores, _sinks(attn, heads)) @ v
    return attn.write(_all_heads(attn, y.transpose(1, 2).flatten(2), heads))


def _chosen(attn: Attention, x: Tensor, heads: Tensor | None) -> Tensor:
    """`(..., W)` to the chosen heads, `(..., h, d)`."""
    x = x.unflatten(-1, (-1, attn.config.d_head))
    return x if heads is None else x.index_select(-2, heads)


def _sinks(attn: Attention, heads: Tensor | None) -> Tensor | None:
    return attn.sinks if attn.sinks is None or heads is None else attn.sinks[heads]


def _all_heads(attn: Attention, y: Tensor, heads: Tensor | None) -> Tensor:
    """`(B, T, h d)` to `(B, T, W)`: heads that hooks replace have zeros."""
    if heads is None:
        return y
    d = attn.config.d_head
    whole = y.new_zeros(*y.shape[:2], attn.config.heads, d)
    return whole.index_copy(2, heads, y.unflatten(2, (-1, d))).flatten(2)
