"""Dose response: how the mean logit difference follows an amount that a prediction names, in nats.

The model must be able to do the task: at the first amount its gap, by which the difference is
larger where the first answer is right than where the second is, must be at least `GAP`. A constant
preference for one answer is ignored, as it is where circuits are calibrated. A prediction holds
when at least `ORDERED` of all pairs of amounts are ordered as predicted, and the change from the
first amount to the last goes as predicted, is more than two of its standard errors, and at least
the share `MATERIAL` of the gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_transformer.interventions import Intervention, answer
from sparse_transformer.model import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = Sequence[int]

# See above.
GAP, ORDERED, MATERIAL = 1.0, 0.8, 0.1
# How many tokens go through the model at once.
_MOST_TOKENS = 8192


@dataclass(frozen=True)
class Prediction:
    """A prediction and what was found.

    Attributes:
        name: short.
        task: whose circuit makes it.
        prediction: in a sentence.
        held: whether it came true.
        numbers: what was measured; lists go by `amount`.
    """

    name: str
    task: str
    prediction: str
    held: bool
    numbers: Mapping[str, Any]


def single_token(tokenizer: Tokenizer, text: str) -> int:
    (id,) = tokenizer.encode(text).ids
    return int(id)


def dose_response(
    name: str,
    task: str,
    sentence: str,
    diffs: Mapping[int, Tensor],
    direction: int,
    gap: float,
) -> Prediction:
    """Whether means of `diffs`, by amount `(prompts,)`, go in the `direction`, 1 or -1.

    The n-th prompts of all amounts belong together. What is predicted is always a mistake: a margin
    in the direction is a wrong answer.
    """
    amounts = sorted(diffs)
    table = torch.stack([diffs[amount] for amount in amounts]).double()  # (amounts, prompts)
    means = table.mean(1).tolist()
    steps = [direction * (later - earlier) > 0 for earlier, later in combinations(means, 2)]
    ordered = sum(steps) / len(steps)
    change, error = mean_and_error(table[-1] - table[0])
    numbers = {
        "amount": amounts,
        "logit_difference": means,
        "standard_error": [mean_and_error(row)[1] for row in table],
        "accuracy": [accuracy(row * -direction) for row in table],
        "gap": gap,
        "ordered": ordered,
        "change": change,
        "change_error": error,
        "prompts": table.shape[1],
    }
    clear = direction * change > 2 * error and direction * change >= MATERIAL * gap
    held = gap >= GAP and ordered >= ORDERED and clear
    return Prediction(name, task, sentence, held, numbers)


def accuracy(diffs: Tensor) -> float:
    """Share of right answers; diffs are right over wrong."""
    return float((diffs > 0).double().mean())


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def padded(model: Transformer, prompts: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """int64 `(B, T)`, and the last position of each, `(B,)`."""
    device = model.norm.weight.device
    tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    return tokens.to(device), last.to(device)


def logit_diffs_of(model: Transformer, prompts: Sequence[Tokens], answers: Tensor) -> Tensor:
    """The first answer's logit over the second's, `(B,)`; answers `(2,)` or `(B, 2)`."""
    rows = max(1, _MOST_TOKENS // max(map(len, prompts)))
    answers = answers.expand(len(prompts), 2)
    found = []
    for first in range(0, len(prompts), rows):
        some = slice(first, first + rows)
        tokens, last = padded(model, prompts[some])
        found.append(logit_diff_of(model, tokens, answers[some], (), last))
    return torch.cat(found)


def logit_diff_of(
    model: Transformer,
    tokens: Tensor,
    answers: Tensor,
    interventions: Sequence[Intervention],
    last: Tensor,
) -> Tensor:
    logits = answer(model, tokens, answers, interventions, last=last).float().cpu()
    return logits[:, 0] - logits[:, 1]
