"""What the circuit for bracket counting predicts.

Gao et al. 2025 (arXiv 2511.13653) read it as an attention head that *averages* detectors of open
brackets over the context: so longer texts dilute the depth, and open brackets that do not belong to
the list raise it. An algorithm that counts would do neither.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.experiments.predictions.dose_response import (
    Prediction,
    Tokens,
    dose_response,
    logit_diff_of,
    logit_diffs_of,
    mean_and_error,
    padded,
    single_token,
)
from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.errors import UserError
from sparse_transformer.interventions import Patch
from sparse_transformer.model import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The node of the depth must give back at least so much of what a longer list costs.
RESTORED = 0.5
_BRACKETS = "bracket_counting"
_NAMES = ("values", "rows", "data", "items", "table", "result", "x", "args")
# How many of `_MOST` things before a list are distractors.
_DISTRACTORS, _MOST = (0, 1, 2, 4, 8), 8


def bracket_counting(
    model: Transformer,
    tokenizer: Tokenizer,
    circuit: Circuit | None = None,
    *,
    prompts: int = 32,
    seed: int = 0,
) -> list[Prediction]:
    """What follows from averaging: five trends, and with a circuit the node that holds the depth.

    Args:
        model: in evaluation.
        tokenizer: the model's.
        circuit: of this task, or None.
        prompts: how many for each amount, at least 2.
        seed: draws their names and numbers.

    Raises:
        UserError: the model's context is too short for the prompts.
    """
    lists = _Lists.draw(tokenizer, prompts, seed)
    answers = torch.tensor([single_token(tokenizer, text) for text in ("]]", "]")])
    found = []
    for asked in _ASKED:
        made = _fitting(model, lists, asked)
        diffs = {amount: logit_diffs_of(model, texts, answers) for amount, texts in made.items()}
        direction = -1 if asked.opening == "[[" else 1
        first = min(made)
        other = lists.prompts("[" if asked.opening == "[[" else "[[", asked, first)
        gap = (logit_diffs_of(model, other, answers) - diffs[first]).mean() * direction
        found.append(
            dose_response(asked.name, _BRACKETS, asked.sentence, diffs, direction, float(gap))
        )
    if circuit is not None:
        made = _fitting(model, lists, _LONGER)
        found.append(_depth_node(model, circuit, made[min(made)], made[max(made)], answers))
    return found


@dataclass(frozen=True)
class _Asked:
    """A trend of brackets.

    Attributes:
        name, sentence: as of the prediction.
        opening: of the list, `[[` or `[`; the trend leads away from what closes it.
        amounts: what to vary.
        length: how many numbers the list has, of the amount.
        before: what stands before it, of the amount.
    """

    name: str
    sentence: str
    opening: str
    amounts: tuple[int, ...]
    length: Callable[[int], int]
    before: Callable[[int], str]


def _comment(distractor: str, count: int) -> str:
    """A line of `_MOST` words, of which the first `count` are distractors."""
    return f"# {' '.join([distractor] * count + ['x'] * (_MOST - count))}\n"


_LONGER = _Asked(
    "longer_list",
    "the more numbers stand in a nested list, the less is ]] preferred to ]",
    "[[",
    (2, 4, 8, 16, 32, 64, 128),
    lambda n: n,
    lambda n: "",
)


_ASKED = (
    _LONGER,
    _Asked(
        "text_before",
        "the more words without brackets stand before a nested list, the less is ]] preferred",
        "[[",
        (0, 8, 16, 32, 64, 128),
        lambda n: 4,
        lambda n: f"#{' x' * n}\n",
    ),
    _Asked(
        "open_brackets_before",
        f"the more of {_MOST} words before a flat list are [ in a comment, the more is ]] "
        f"preferred",
        "[",
        _DISTRACTORS,
        lambda n: 4,
        lambda n: _comment("[", n),
    ),
    _Asked(
        "double_brackets_before",
        f"the more of {_MOST} words before a flat list are [[ in a comment, the more is ]] "
        f"preferred",
        "[",
        _DISTRACTORS,
        lambda n: 4,
        lambda n: _comment("[[", n),
    ),
    _Asked(
        "closed_lists_before",
        f"the more of {_MOST} lines before a flat list have closed lists and not parentheses, the "
        f"more is ]] preferred",
        "[",
        _DISTRACTORS,
        lambda n: 4,
        lambda n: "a = [[1]]\n" * n + "a = ((1))\n" * (_MOST - n),
    ),
)


@dataclass(frozen=True)
class _Lists:
    """Names and numbers of lists; the prompts of all trends are made of the same ones."""

    tokenizer: Tokenizer
    drawn: list[tuple[str, list[str]]]

    @classmethod
    def draw(cls, tokenizer: Tokenizer, count: int, seed: int) -> _Lists:
        source = random.Random(seed)
        longest = max(asked.length(amount) for asked in _ASKED for amount in asked.amounts)
        return cls(
            tokenizer,
            [
                (source.choice(_NAMES), [str(source.randrange(100)) for _ in range(longest)])
                for _ in range(count)
            ],
        )

    def prompts(self, opening: str, asked: _Asked, amount: int) -> list[Tokens]:
        """Open lists, of one amount."""
        before, length = asked.before(amount), asked.length(amount)
        texts = [
            f"{before}{name} = {opening}{', '.join(numbers[:length])}"
            for name, numbers in self.drawn
        ]
        return [self.tokenizer.encode(text).ids for text in texts]


def _fitting(model: Transformer, lists: _Lists, asked: _Asked) -> dict[int, list[Tokens]]:
    """The prompts of each amount, up to the first that does not fit the context."""
    context = model.config.context
    made: dict[int, list[Tokens]] = {}
    for amount in asked.amounts:
        prompts = lists.prompts(asked.opening, asked, amount)
        if max(map(len, prompts)) > context:
            break
        made[amount] = prompts
    if len(made) < 3:
        raise UserError(
            f"a context of {context} tokens is too short for the prompts of {_BRACKETS}: "
            f"use a model with a longer one"
        )
    return made


def _depth_node(
    model: Transformer,
    circuit: Circuit,
    short: Sequence[Tokens],
    long: Sequence[Tokens],
    answers: Tensor,
) -> Prediction:
    """Chosen on the first half of the prompts, measured on the second."""
    half = len(short) // 2
    before = logit_diffs_of(model, long, answers)
    costs = logit_diffs_of(model, short, answers) - before

    def restored(node: str, some: slice) -> float:
        """What the node of the shorter lists gives back, of what the longer ones cost."""
        tokens, last = padded(model, long[some])
        patch = Patch(node, *padded(model, short[some]), at="-1")
        gain = logit_diff_of(model, tokens, answers, [patch], last) - before[some]
        cost = float(costs[some].mean())
        return float(gain.mean()) / cost if cost > 0 else 0.0

    shares = {node.id: restored(node.id, slice(half)) for node in circuit.nodes if node.place}
    chosen = max(shares, key=shares.__getitem__, default=None)
    share = restored(chosen, slice(half, None)) if chosen is not None else 0.0
    cost, error = mean_and_error(costs)
    return Prediction(
        "depth_node",
        _BRACKETS,
        "one node of the circuit, given at the last token what it has after a short list, gives "
        "back most of the preference for ]] that a long list costs",
        share >= RESTORED and cost > 2 * error,
        {
            "node": chosen,
            "restored": share,
            "cost": cost,
            "cost_error": error,
            "tried": len(shares),
            "prompts": len(short) - half,
        },
    )
