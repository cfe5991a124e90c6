"""Edits of a sparse model's residual stream that steer a dense model across a bridge.

An edit is a vector over the channels of the sparse stream, zero in all but a few, that points from
a task's negative prompts to its positive ones. Against it a positive prompt should be answered as a
negative one, along it the reverse; it changes the last token alone. It is found in the sparse model
by itself. The decoder, without its bias, makes a change of the dense stream of it.

Shapes: P pairs of prompts; S and D channels of the sparse and the dense stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_transformer.bridges.bridge import Bridge, recorded, replaced
from sparse_transformer.errors import UserError
from sparse_transformer.evaluation import Interval, share
from sparse_transformer.model import Transformer
from sparse_transformer.tasks import Batch

_STRENGTHS = (1.0, 2.0, 4.0, 8.0)
# Draws of other channels.
_DRAWS = 4


@dataclass(frozen=True)
class Edit:
    """What is found of a task at a site of the sparse model.

    Attributes:
        values: of the edit, `(1, S)`.
        elsewhere: the same numbers in other channels, which also vary: `(draws, S)`.
    """

    values: Tensor
    elsewhere: Tensor


@dataclass(frozen=True)
class Steering:
    """Changes of the dense stream at a site, `(n, D)` each and all of one norm.

    They are those of the edit and of two controls: its numbers in other channels, and the edits of
    other tasks.
    """

    site: int
    strength: float
    changes: dict[str, Tensor]


def find(sparse: Transformer, batch: Batch, site: int, channels: int) -> Edit:
    """The mean difference of positive and negative prompts, in the channels that matter most.

    Those are the ones with the largest products of the difference and the mean derivative of the
    positive answer's logit minus the negative one's.
    """
    side = torch.where(batch.positive, 1.0, -1.0)
    with recorded(sparse) as streams, torch.no_grad():
        sparse(batch.tokens, at=batch.last)
    stream = streams[site][torch.arange(len(side)), batch.last]  # (2P, S)
    difference = 2 * (stream * side[:, None]).mean(0)
    none = torch.zeros_like(stream, requires_grad=True)
    (slope,) = torch.autograd.grad((margins(sparse, batch, site, none) * side).sum(), none)
    chosen = (slope.mean(0) * difference).topk(channels).indices
    values = torch.zeros(1 + _DRAWS, len(difference))
    values[0, chosen] = difference[chosen]
    # Channels that do not vary are taken where no others are left.
    weight = (stream.std(0) > 0) + 1e-6
    weight[chosen] = 0
    generator = torch.Generator().manual_seed(0)
    for row in values[1:]:
        row[torch.multinomial(weight, channels, generator=generator)] = difference[chosen]
    return Edit(values[:1], values[1:])


def margins(model: Transformer, batch: Batch, site: int, change: Tensor) -> Tensor:
    """Logits of the right answers minus those of the wrong ones, `(2P,)`.

    `change (2P, width)` is added to the stream of each prompt's last token at `site`.
    """
    rows = torch.arange(len(batch.last))

    def add(stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[rows, batch.last] += change
        return stream

    with replaced(model, site, add):
        logits = model(batch.tokens, at=batch.last)[:, 0]
    right, wrong = logits.gather(1, batch.answers).unbind(1)
    return right - wrong


@torch.no_grad()
def flips(
    model: Transformer, batch: Batch, site: int, changes: Tensor, strength: float
) -> Interval:
    """The share of answers that flip, of all changes together, with an interval over the pairs.

    Only pairs of which the model answers both prompts right without a change are counted; a
    UserError if there are none.

    Args:
        changes: `(n, width)`; each is made by itself, times `strength`: subtracted in positive
            prompts, added in negative ones.
    """
    against = torch.where(batch.positive, -strength, strength)[:, None]
    right = (margins(model, batch, site, 0 * against * changes[0]) > 0).view(-1, 2).all(1)
    if not right.any():
        raise UserError("a model answers no pair of prompts right: choose --tasks that both solve")
    flipped = [margins(model, batch, site, against * change) < 0 for change in changes]
    shares = torch.stack(flipped).double().mean(0).view(-1, 2).mean(1)  # (P,)
    return share(shares[right])


def choose(
    dense: Transformer,
    bridge: Bridge,
    batch: Batch,
    edits: dict[int, Edit],
    others: Sequence[dict[int, Edit]],
) -> Steering:
    """The site and strength that flip most answers of the dense model beyond either control.

    Args:
        batch: prompts that are not asked later.
        edits: of the task, by site.
        others: of the other tasks.
    """
    tried = []
    for site, edit in edits.items():
        decoder = bridge.decoders[site].get_parameter("weight").T  # (S, D)
        values = {
            "edit": edit.values,
            "other channels": edit.elsewhere,
            "other tasks": torch.cat([other[site].values for other in others]),
        }
        norm = (edit.values @ decoder).norm()
        changes = {
            name: norm * torch.nn.functional.normalize(v @ decoder) for name, v in values.items()
        }
        for strength in _STRENGTHS:
            own, *rest = (flips(dense, batch, site, c, strength).value for c in changes.values())
            tried.append((own - max(rest), Steering(site, strength, changes)))
    return max(tried, key=lambda each: each[0])[1]
