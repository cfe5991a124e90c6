"""How well a model does the binary tasks.

A prompt is right if its right answer has the larger of the two logits, a pair if both of its
prompts are. The loss is the cross-entropy over the two answers alone, in nats; random answers have
log 2 = 0.69. Pairs are drawn independently and the two prompts of a pair are not, so all intervals,
of 95 %, are about pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_transformer.errors import UserError
from sparse_transformer.tasks import Pair, collate
from sparse_transformer.tasks.task import by_length

# A task is solved by a model that gets this share of the prompts right.
SOLVED_ACCURACY = 0.95

# Limits of one forward pass.
_BATCH_PAIRS = 64
_BATCH_TOKENS = 16384
# Normal quantile of a 95 % interval.
_Z = 1.959964


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Score:
    """How a model does a task.

    Attributes:
        accuracy: share of the prompts whose right answer has the larger logit.
        pair_accuracy: share of the pairs of which both prompts do.
        loss: mean cross-entropy over the two answers, in nats.
        pairs: how many pairs were asked.
    """

    accuracy: Interval
    pair_accuracy: Interval
    loss: Interval
    pairs: int

    @property
    def solved(self) -> bool:
        """Whether the accuracy is at least `SOLVED_ACCURACY`."""
        return self.accuracy.value >= SOLVED_ACCURACY


@torch.inference_mode()
def evaluate_task(
    model: Callable[..., Tensor],
    pairs: Sequence[Pair],
    *,
    pad: int = 0,
    device: torch.device | str = "cpu",
) -> Score:
    """Scores `model` on `pairs`.

    Args:
        model: called as `model(tokens, at=last)`, returns logits `(B, 1, V)`.
        pairs: at least 2, in any order.
        pad: a token to pad with; which one makes no difference to a causal model.

    Raises:
        UserError: a logit is not a number.
        ValueError: fewer than 2 pairs, which have no spread.
    """
    if len(pairs) < 2:
        raise ValueError(f"a score needs at least 2 pairs, got {len(pairs)}")
    margins = torch.empty(len(pairs), 2, dtype=torch.float64)
    for places in by_length(pairs, _BATCH_TOKENS, _BATCH_PAIRS):
        batch = collate([pairs[place] for place in places], pad).to(device)
        logits = model(batch.tokens, at=batch.last)[:, 0]  # (2P, V)
        right, wrong = logits.gather(1, batch.answers).double().cpu().unbind(1)
        margins[torch.tensor(places)] = (right - wrong).view(-1, 2)
    if not margins.isfinite().all():
        raise UserError("the model's logits are not finite: choose another checkpoint with --step")
    return score(margins)


def score(margins: Tensor) -> Score:
    """The score of logit differences, right minus wrong, float64 `(P, 2)`."""
    P = margins.shape[0]
    right = (margins > 0).double()
    losses = torch.nn.functional.softplus(-margins).mean(1)  # (P,)
    mean, spread = float(losses.mean()), float(losses.std())
    half = _Z * spread / math.sqrt(P)
    return Score(
        accuracy=share(right.mean(1)),
        pair_accuracy=share(right.prod(1)),
        loss=Interval(mean, max(0.0, mean - half), mean + half),
        pairs=P,
    )


def share(shares: Tensor) -> Interval:
    """The mean of `shares`, `(P,)` of independent values in [0, 1], with Wilson's interval.

    Wilson's is that of independent yes-or-no draws. How many of these P shares are worth follows
    from their spread: P where the two prompts of a pair are right or wrong together, 2 P where they
    have nothing to do with each other; never fewer or more.
    """
    P = shares.shape[0]
    p = float(shares.mean())
    variance = float(shares.var())
    worth = 0.0
    if 0 < p < 1:
        worth = p * (1 - p) / variance if variance > 0 else 2.0
    n = P * min(2.0, max(1.0, worth))
    center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Interval(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)))
