"""How far a linear classifier gets on a task: what the tokens tell without their relations.

An answer `a` has the score `w[a] . x + b[a]` of the features `x` of a prompt. The larger score of
the two answers wins; the weights are fitted by logistic regression. The features are the last
tokens, each by its position, or the number of times that each token occurs. Where such a classifier
solves a task, a circuit for the task may do no more than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import softplus

from sparse_transformer.tasks.task import Pair, Task

# By name: how many of the last tokens are seen, or 0 for the bag of all tokens.
FEATURES = {"last": 1, "last 2": 2, "last 4": 4, "bag": 0}
# No task without a declared shortcut is solved better than this.
LIMITS = {"last 4": 0.75, "bag": 0.85}
TRAIN_PAIRS, TEST_PAIRS = 1500, 512
# The best of these on the test pairs counts, so that none is too strict.
_PENALTIES = (1e-3, 1e-2)
_STEPS = 60


def accuracies(
    task: Task,
    tokenizer: Tokenizer,
    *,
    train_pairs: int = TRAIN_PAIRS,
    test_pairs: int = TEST_PAIRS,
    seed: int = 0,
    kinds: Iterable[str] = FEATURES,
) -> dict[str, float]:
    """The share of test prompts that is answered rightly, by these kinds of `FEATURES`.

    Raises:
        UserError: the task cannot be asked of this tokenizer.
    """
    train = task.pairs(tokenizer, train_pairs, split="train", seed=seed)
    test = task.pairs(tokenizer, test_pairs, split="test", seed=seed)
    size = tokenizer.get_vocab_size()
    return {name: _accuracy(train, test, FEATURES[name], size) for name in kinds}


def rows(tasks: Mapping[str, Task], tokenizer: Tokenizer) -> Iterator[list[str]]:
    """A table: each task's accuracies, and why it has a shortcut if it does."""
    yield ["task", *FEATURES, "shortcut"]
    for name, task in tasks.items():
        found = accuracies(task, tokenizer)
        yield [name, *(f"{found[kind]:.2f}" for kind in FEATURES), task.shortcut or "-"]


def _accuracy(train: Sequence[Pair], test: Sequence[Pair], last: int, vocabulary: int) -> float:
    asked, held_out = (_Prompts(pairs, last, vocabulary) for pairs in (train, test))
    features, answers = asked.x.any(0), torch.cat([asked.answers, held_out.answers], 1)
    known, rows = answers.unique(return_inverse=True)
    rows, rows_test = rows.split([asked.answers.shape[1], held_out.answers.shape[1]], 1)
    x, x_test = asked.x[:, features], held_out.x[:, features]  # (P, F)
    best = 0.0
    for penalty in _PENALTIES:
        weight = torch.zeros(len(known), x.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss(
            weight: Tensor = weight,
            penalty: float = penalty,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> Tensor:
            optimizer.zero_grad()
            margin = _margin(x, weight, rows)
            value = softplus(-margin).mean() + penalty * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        margin = _margin(x_test, weight.detach(), rows_test)
        # Answers that training never had are a guess.
        best = max(best, float((margin > 0).double().mean() + (margin == 0).double().mean() / 2))
    return best


class _Prompts:
    """The features `x`, `(P, F)`, and `answers`, `(2, P)`, the right ones first."""

    def __init__(self, pairs: Sequence[Pair], last: int, vocabulary: int) -> None:
        prompts = [prompt for pair in pairs for prompt in (pair.positive, pair.negative)]
        self.answers = torch.tensor([[p.right for p in prompts], [p.wrong for p in prompts]])
        self.x = torch.zeros(len(prompts), max(last, 1) * vocabulary)
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor(prompt.tokens[::-1])
            if last:
                tokens = tokens[:last] + vocabulary * torch.arange(len(tokens[:last]))
            self.x[row] = tokens.bincount(minlength=self.x.shape[1])


def _margin(x: Tensor, weight: Tensor, answers: Tensor) -> Tensor:
    """Score of the right answer minus that of the wrong one, `(P,)`."""
    scores = x @ weight[:, :-1].T + weight[:, -1]  # (P, answers)
    right, wrong = scores.gather(1, answers.T).unbind(1)
    return right - wrong
