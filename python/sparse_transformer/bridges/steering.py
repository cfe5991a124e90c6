"""Edits of a sparse model's residual stream that steer a dense model across a bridge.

An edit is a vector over the channels of the sparse stream, zero in all but a few, that points from
a task's negative prompts to its positive ones. Against it a positive prompt should be answered as a
negative one, along it the reverse; it changes the last token alone. It is found in the sparse model
by itself. The decoder, without its bias, makes a change of the dense stream of it.

Shapes: P pairs of prompts; S and D channels of the sparse and the dense stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_transformer.bridges.bridge import Bridge, recorded, replaced
from sparse_transformer.evaluation import Interval, share
from sparse_transformer.model import Transformer
from sparse_transformer.tasks import Batch

STRENGTHS = (1.0, 2.0, 3.0)
# Draws of other channels.
_DRAWS = 5


@dataclass(frozen=True)
class Edit:
    """What is found of a task at a site of the sparse model.

    Attributes:
        values: of the edit, `(1, S)`.
        elsewhere: `(draws, S)`, the same numbers in other channels that vary from prompt to prompt.
    """

    values: Tensor
    elsewhere: Tensor


@dataclass(frozen=True)
class Steering:
    """A site, a strength, and changes of the dense stream there, all of one norm.

    Attributes:
        changes: `(n, D)` each, of the edit and of its two controls: the numbers in other channels,
            and the edits of other tasks.
    """

    site: int
    strength: float
    changes: dict[str, Tensor]


def find(sparse: Transformer, batch: Batch, site: int, channels: int, seed: int = 0) -> Edit:
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
    values = torch.zeros_like(difference)
    values[chosen] = difference[chosen]
    moving = stream.std(0) > 0
    moving[chosen] = False
    generator = torch.Generator().manual_seed(seed)
    elsewhere = torch.zeros(_DRAWS, len(values))
    for row in elsewhere:
        # At least one, where nothing else moves.
        weights = moving + 1e-9
        row[torch.multinomial(weights, channels, generator=generator)] = difference[chosen]
    return Edit(values[None], elsewhere)


def margins(model: Transformer, batch: Batch, site: int, change: Tensor) -> Tensor:
    """Logits of the right answers minus those of the wrong ones, `(2P,)`.

    Args:
        change: `(2P, width)`, added to the stream of each prompt's last token at `site`.
    """
    rows = torch.arange(len(batch.last))

    def add(stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[rows, batch.last] += change
        return stream

    with replaced(model, site, add):
        logits = model(batch.tokens, at=batch.last)[:, 0]
    answers = torch.stack([batch.right, batch.wrong], 1)
    right, wrong = logits.gather(1, answers).unbind(1)
    return right - wrong


@torch.no_grad()
def flips(
    model: Transformer, batch: Batch, site: int, changes: Tensor, strength: float
) -> Interval:
    """The share of answers that flip, of all changes together, with an interval over the pairs.

    Only pairs of which the model answers both prompts rightly without a change are counted.

    Args:
        changes: `(n, width)`; each is made by itself, times `strength`: subtracted in positive
            prompts, added in negative ones.
    """
    against = torch.where(batch.positive, -strength, strength)[:, None]
    right = margins(model, batch, site, 0 * against * changes[0]) > 0
    flipped = [margins(model, batch, site, against * change) < 0 for change in changes]
    shares = torch.stack(flipped).double().mean(0).view(-1, 2).mean(1)  # (P,)
    return share(shares[right.view(-1, 2).all(1)])


def choose(
    dense: Transformer,
    bridge: Bridge,
    batch: Batch,
    edits: dict[int, Edit],
    others: list[dict[int, Edit]],
) -> Steering:
    """The site and strength that flip most answers of the dense model beyond either control.

    Args:
        batch: prompts that are not asked later.
        edits: of the task, by site.
        others: of the other tasks.
    """
    best, gain = None, -torch.inf
    for site, edit in edits.items():
        decoder = bridge.decoders[site].get_parameter("weight").T  # (S, D)
        change = edit.values @ decoder
        controls = {
            "other channels": edit.elsewhere @ decoder,
            "other tasks": torch.cat([other[site].values for other in others]) @ decoder,
        }
        changes = {"edit": change}
        for name, control in controls.items():
            changes[name] = control * (change.norm() / control.norm(dim=1, keepdim=True))
        for strength in STRENGTHS:
            own, *rest = (flips(dense, batch, site, c, strength).value for c in changes.values())
            if own - max(rest) > gain:
                best, gain = Steering(site, strength, changes), own - max(rest)
    assert best is not None
    return best
