"""Validation of a circuit on held-out prompts, and the control tasks.

Sufficient: the circuit alone performs the task, everything else ablated. Necessary: without its
nodes, and without its edges, the task is lost. Every loss is recalibrated by cross-fitting: the
scale and shift of a draw of prompts are fitted for that very ablation on the other draws. Every
loss has an interval, and a verdict holds only where the whole interval speaks for it.

The controls ask the same search for what it should not find: other answers to the same prompts, the
two answers swapped, and the task in a model whose weights are permuted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparse_transformer.circuits.activations import mean_activations
from sparse_transformer.circuits.circuit import Ablated, Validation
from sparse_transformer.circuits.edge_attribution import node_effects
from sparse_transformer.circuits.objective import ROBUST_FACTOR, Subgraph, TaskLoss, calibrate
from sparse_transformer.tasks.task import prompts

# Without the circuit the loss must be at least this; ln 2 = 0.69 is what guessing has.
NECESSARY_LOSS = 0.6
_ROBUST = ("pair", "random", "adversarial")
# Random parts of the rest, and resamples of an interval of 95%.
_RANDOM_DRAWS, _RESAMPLES = 4, 2000
# The adversary's rounds, the numbers of nodes that it may change in one, and its prompts, in pairs.
_ROUNDS, _CHANGES, _ADVERSARY_PAIRS = 5, (1, 4, 16, 64, 256, 1024, 4096), 48


def validate(
    task: TaskLoss, subgraph: Subgraph, target: float, *, pairs: int | None = None, seed: int = 0
) -> Validation:
    """Losses and accuracies on the test prompts, without controls.

    Args:
        target: the loss that makes the circuit sufficient.
        pairs: how many of the test prompts of each draw; None for all.
        seed: of the random parts of the rest.
    """
    test = _Test(task, pairs)
    present = task.present_edges(subgraph)
    everything = torch.ones_like(subgraph.keep)
    complement = Subgraph(~subgraph.keep)
    only_edges, no_edges = Subgraph(everything, ~present), Subgraph(everything, present)
    named = ("mean", "zero", "resample", "pair")
    circuit = {name: test.measure((subgraph, name)) for name in named}
    draws = [task.with_random_rest(subgraph, seed + draw) for draw in range(_RANDOM_DRAWS)]
    circuit["random"] = test.measure(*((part, "mean") for part in draws))
    circuit["adversarial"] = test.measure((worst_rest(task, subgraph), "mean"))
    circuit["edges"] = test.measure((only_edges, "mean"))
    without = {name: test.measure((complement, name)) for name in named}
    without["edges"] = test.measure((no_edges, "mean"))
    robust = [_at_most(circuit[name], ROBUST_FACTOR * target) for name in _ROBUST]
    lost = [_at_least(without[name], NECESSARY_LOSS) for name in ("mean", "edges")]
    return Validation(
        pairs=len(test.pairs),
        draws=len(circuit["mean"].draws),
        edges=task.size(subgraph),
        model=test.measure((Subgraph(everything), "mean")),
        circuit=circuit,
        without=without,
        sufficient=_at_most(circuit["mean"], target),
        necessary=_all(lost),
        robust=_all(robust),
    )


def worst_rest(task: TaskLoss, subgraph: Subgraph) -> Subgraph:
    """The subgraph and that part of the rest which hurts it most, of those that were tried.

    A bounded greedy search: gradients estimate for every node outside the subgraph what it would
    do to be ablated or not; the best of several numbers of changes is made, until none hurts more.
    It starts from the whole model and from the subgraph alone. Losses are recalibrated, so that a
    constant preference for one answer does not count.
    """
    task = task.under("mean")
    pairs = task.fit[:_ADVERSARY_PAIRS]
    worst, highest = subgraph, -1.0
    for part in (subgraph, replace(subgraph, keep=torch.ones_like(subgraph.keep))):
        loss = task.calibrated_loss(part, pairs)
        for _ in range(_ROUNDS):
            effect = node_effects(task, part, everywhere=True)
            gain = torch.where(part.keep, effect, -effect)
            gain[subgraph.keep] = 0.0
            order = gain.argsort(descending=True)[: int((gain > 0).sum())]
            tried = []
            for count in sorted({min(count, len(order)) for count in _CHANGES} - {0}):
                keep = part.keep.clone()
                keep[order[:count]] ^= True
                changed = replace(part, keep=keep)
                tried.append((task.calibrated_loss(changed, pairs), count, changed))
            if not tried or max(tried)[0] <= loss:
                break
            loss, _, part = max(tried)
        if loss > highest:
            worst, highest = part, loss
    return worst


def control_tasks(
    task: TaskLoss, count: int, corpus: Tensor | None, seed: int = 0
) -> Iterator[tuple[str, TaskLoss]]:
    """Names and tasks of `count` other answers, of swapped labels and of permuted weights.

    Args:
        corpus: int64 `(rows, context)`, for the means of the permuted model; None: there is none.
    """
    asked = prompts(task.train + task.fit + task.test)
    answers = sorted({answer for prompt in asked for answer in (prompt.right, prompt.wrong)})
    # Tokens that the model knows from these very prompts, and any where those are too few.
    known = sorted({token for prompt in asked for token in prompt.tokens} - set(answers))
    rare = sorted(set(range(task.pad)) - set(known) - set(answers))
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        others = [
            tokens[place]
            for tokens in (known, rare)
            for place in torch.randperm(len(tokens), generator=generator).tolist()
        ]
        mapping = dict(zip(answers, others, strict=False))
        yield f"answers {number + 1}", task.with_answers(mapping)
    if count:
        yield "labels swapped", task.with_answers(None)
    if count and corpus is not None:
        model = copy.deepcopy(task.model)
        generator = torch.Generator().manual_seed(seed)
        for matrix in task.edges.matrices:
            weight = model.get_submodule(matrix.module).get_parameter("weight").data.view(-1)
            order = torch.randperm(len(matrix.position), generator=generator)
            weight[matrix.position] = matrix.weight[order].to(weight)
        yield "weights permuted", task.with_model(model, mean_activations(model, corpus))


class _Test:
    """The test prompts of a task, and how parts of the model do on them."""

    def __init__(self, task: TaskLoss, pairs: int | None) -> None:
        self._task = task
        first = torch.zeros(len(task.test), dtype=torch.bool)
        for draw in task.draws.unique():
            first[(task.draws == draw).nonzero().squeeze(1)[:pairs]] = True
        self._draws = task.draws[first]
        # Calibration of each part is fitted on the others: draws, or halves of the only one.
        several = len(self._draws.unique()) > 1
        parts = self._draws if several else torch.arange(len(self._draws)) % 2
        self._rows = [(parts == part).repeat_interleave(2) for part in parts.unique()]
        self.pairs = [task.test[number] for number in first.nonzero().squeeze(1).tolist()]
        generator = torch.Generator().manual_seed(0)
        count = len(self.pairs)
        self._resamples = torch.randint(count, (_RESAMPLES, count), generator=generator)

    def measure(self, *parts: tuple[Subgraph, str]) -> Ablated:
        """The mean over parts of the model with their ablation, each recalibrated by itself."""
        losses, correct = torch.zeros(len(self.pairs)), 0.0
        for part, ablation in parts:
            diffs, positive = self._task.logit_diffs(self.pairs, part, ablation)
            raw = diffs.clone()
            for rows in self._rows:
                calibration = calibrate(raw[~rows], positive[~rows])
                diffs[rows] = calibration.apply(raw[rows], positive[rows])
            losses += torch.nn.functional.softplus(-diffs).view(-1, 2).mean(1) / len(parts)
            correct += float((diffs > 0).float().mean()) / len(parts)
        means = losses[self._resamples].mean(1)
        low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
        draws = [float(losses[self._draws == draw].mean()) for draw in self._draws.unique()]
        return Ablated(float(losses.mean()), correct, low, high, tuple(draws))


def _at_most(found: Ablated, limit: float) -> bool | None:
    """Whether the loss is, with its whole interval; None where the interval has the limit in it."""
    return True if found.high <= limit else False if found.low > limit else None


def _at_least(found: Ablated, limit: float) -> bool | None:
    return True if found.low >= limit else False if found.high < limit else None


def _all(verdicts: list[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True
