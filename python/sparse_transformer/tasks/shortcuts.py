"""How far a linear classifier gets on a task: what the tokens tell without their relations.

An answer `a` has the score `w[a] . x + b[a]` of the features `x` of a prompt. The larger score of
the two answers wins; the weights are fitted by logistic regression. The features are the last
tokens, each by its position, or the number of times that each token occurs. Where such a classifier
solves a task, a circuit for the task may do no more than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import add

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import embedding_bag, softplus

from sparse_transformer.tasks.task import Pair, Task, prompts

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
    """The share of test prompts that is answered rightly, by these kinds of `FEATURES`."""
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
    answers = torch.cat([asked.answers, held_out.answers])
    known, columns = answers.unique(return_inverse=True)
    columns, columns_test = columns.split([len(asked.answers), len(held_out.answers)])
    seen, features = asked.features.unique(return_inverse=True)
    # The prompts of each feature, by which its gradient is summed.
    order = features.argsort(stable=True)
    prompts = torch.searchsorted(asked.starts, order, right=True) - 1
    starts = torch.searchsorted(features[order], torch.arange(len(seen)))
    best = 0.0
    for penalty in _PENALTIES:
        weight = torch.zeros(len(seen), len(known))
        optimizer = torch.optim.LBFGS([weight], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss(weight: Tensor = weight, penalty: float = penalty) -> Tensor:
            scores = embedding_bag(features, weight, asked.starts, mode="sum").requires_grad_()
            value = softplus(-_margin(scores, columns)).mean()
            (grad,) = torch.autograd.grad(value, scores)
            weight.grad = embedding_bag(prompts, grad, starts, mode="sum") + 2 * penalty * weight
            return value.detach() + penalty * weight.square().sum()

        optimizer.step(loss)
        every = torch.zeros(1 + max(last, 1) * vocabulary, len(known))
        every[seen] = weight
        scores = embedding_bag(held_out.features, every, held_out.starts, mode="sum")
        margin = _margin(scores, columns_test)
        # Answers that training never had are a guess.
        best = max(best, float((margin > 0).double().mean() + (margin == 0).double().mean() / 2))
    return best


class _Prompts:
    """Prompts as features.

    Attributes:
        answers: `(P, 2)`, the right ones first.
        features: their numbers, prompt by prompt; each prompt has 0, whose weight is the bias.
        starts: `(P,)`, where those of each prompt begin.
    """

    def __init__(self, pairs: Sequence[Pair], last: int, vocabulary: int) -> None:
        asked = prompts(pairs)
        self.answers = torch.tensor([[p.right, p.wrong] for p in asked])
        features: list[int] = []
        starts: list[int] = []
        for prompt in asked:
            starts.append(len(features))
            tokens = prompt.tokens[::-1][: last or None]
            places = range(1, 1 + last * vocabulary, vocabulary) if last else [1] * len(tokens)
            features += [0, *map(add, places, tokens)]
        self.features, self.starts = torch.tensor(features), torch.tensor(starts)


def _margin(scores: Tensor, columns: Tensor) -> Tensor:
    """Of scores `(P, answers)` the right answer's minus the wrong one's, by their columns."""
    right, wrong = scores.gather(1, columns).unbind(1)
    return right - wrong
