"""The objective of a search: the loss of any part of a model on the prompts of one task."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer import hooks
from sparse_transformer.circuits.ablation import Baseline, keep_nodes, remove_edges
from sparse_transformer.circuits.graph import Edges, Nodes
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer
from sparse_transformer.tasks import Batch, Pair, Prompt, Task, collate

# Prompts of about equal length go together; a forward has at most this many tokens.
_MOST_TOKENS = 8192
_CALIBRATION_STEPS = 16
# Every second one of the shorter half of the fitting prompts.
_PROBE_STRIDE = 2


@dataclass(frozen=True)
class Subgraph:
    """A part of a model.

    Attributes:
        keep: bool `(total,)`, its nodes.
        removed: bool `(E,)`, edges that it lacks although it has both ends; None for none.
    """

    keep: Tensor
    removed: Tensor | None = None


@dataclass(frozen=True)
class Calibration:
    """`scale` (above 0) and `shift` of the difference between the logits of the two answers.

    The difference is the positive prompt's answer minus the negative's, so a shift corrects a
    constant preference for one answer. A scale that could turn negative would let any part that
    answers wrongly count as one that answers correctly.
    """

    scale: float = 1.0
    shift: float = 0.0

    def apply(self, logit_diff: Tensor, positive: Tensor) -> Tensor:
        """`logit_diff`: the logit of the right answer minus that of the wrong one."""
        return logit_diff * self.scale + torch.where(positive, self.shift, -self.shift)


@dataclass(frozen=True)
class TaskScore:
    """Binary cross-entropy over the two answers, in nats, and the share of correct answers."""

    loss: float
    accuracy: float


class TaskLoss:
    """The loss of parts of a model on a task.

    Args:
        model: in evaluation mode; its parameters stop requiring gradients.
        task: the task.
        tokenizer: the model's.
        means: the mean activations, see activations.py.
        train_pairs, fit_pairs, test_pairs: number of pairs. Masks are trained on the first, pruned
            to the target loss on the second, and validated on the third, which come from the
            task's other split.
        max_tokens: the longest prompt for training, to save time.
        seed: of the prompts.

    Raises:
        UserError: the task cannot be asked with this tokenizer.
    """

    def __init__(
        self,
        model: Transformer,
        task: Task,
        tokenizer: Tokenizer,
        means: Baseline,
        *,
        train_pairs: int = 512,
        fit_pairs: int = 96,
        test_pairs: int = 256,
        max_tokens: int | None = 96,
        seed: int = 0,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.task, self.means = task, means
        self.nodes, self.edges = Nodes.of(model.config), Edges.of(model)
        self.pad = model.config.vocab_size - 1
        context = model.config.context
        self.train = task.pairs(
            tokenizer,
            train_pairs,
            split="train",
            seed=seed,
            context=context,
            max_tokens=max_tokens,
        )
        self.fit = task.pairs(tokenizer, fit_pairs, split="train", seed=seed + 1, context=context)
        self.test = task.pairs(tokenizer, test_pairs, split="test", seed=seed, context=context)

    def batches(self, pairs: int, seed: int) -> Iterator[Batch]:
        """Endless training batches; pairs of about equal length go together."""
        ordered = sorted(self.train, key=_length)
        generator = torch.Generator().manual_seed(seed)
        count = max(1, len(ordered) // pairs)
        while True:
            for number in torch.randperm(count, generator=generator).tolist():
                yield collate(ordered[number * pairs : (number + 1) * pairs], self.pad)

    @torch.no_grad()
    def logit_diffs(
        self,
        pairs: Sequence[Pair],
        subgraph: Subgraph | None = None,
        baseline: Baseline | None = None,
        resample: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Right minus wrong logit of each prompt, positive before negative; and which are positive.

        Args:
            pairs: the prompts.
            subgraph: what is left of the model; None for all of it.
            baseline: of the ablated rest; None for the means.
            resample: int64 `(2P,)`, for each prompt the number of another one, with any answer:
                the rest then has its activation in that prompt, at the same position.
        """
        order = sorted(range(len(pairs)), key=lambda number: _length(pairs[number]))
        found = torch.empty(2 * len(pairs))
        prompts = [prompt for pair in pairs for prompt in (pair.positive, pair.negative)]
        for numbers in _chunks(order, pairs):
            batch = collate([pairs[number] for number in numbers], self.pad)
            rows = torch.tensor([row for number in numbers for row in (2 * number, 2 * number + 1)])
            if resample is not None:
                others = [prompts[number] for number in resample[rows].tolist()]
                baseline = self._activations(others, batch.tokens.shape[1])
            with ExitStack() as stack:
                if subgraph is not None:
                    rest = baseline or self.means
                    stack.enter_context(keep_nodes(self.model, subgraph.keep, rest))
                    removed = subgraph.removed
                    stack.enter_context(remove_edges(self.model, self.edges, removed, rest))
                found[rows] = logit_diff(self.model, batch)
        positive = torch.tensor([True, False]).repeat(len(pairs))
        return found, positive

    def score(self, pairs: Sequence[Pair], subgraph: Subgraph | None = None) -> TaskScore:
        """Loss and accuracy, not calibrated."""
        return score(*self.logit_diffs(pairs, subgraph))

    def calibrated_loss(self, subgraph: Subgraph, pairs: Sequence[Pair] | None = None) -> float:
        """Loss on `pairs`, by default those for fitting, after calibration on them."""
        diffs, positive = self.logit_diffs(self.fit if pairs is None else pairs, subgraph)
        return score(diffs, positive, calibrate(diffs, positive)).loss

    def probe(self) -> list[Pair]:
        """A few short prompts of those for fitting, for what is measured very often."""
        return sorted(self.fit, key=_length)[: max(1, len(self.fit) // 2) : _PROBE_STRIDE]

    def fit_batches(self, subgraph: Subgraph) -> Iterator[tuple[Batch, Calibration]]:
        """The prompts for fitting, batch by batch, and the calibration of `subgraph` on them."""
        calibration = calibrate(*self.logit_diffs(self.fit, subgraph))
        order = sorted(range(len(self.fit)), key=lambda number: _length(self.fit[number]))
        for numbers in _chunks(order, self.fit):
            yield collate([self.fit[number] for number in numbers], self.pad), calibration

    def present_edges(self, subgraph: Subgraph) -> Tensor:
        """bool `(E,)`: the edges of a subgraph."""
        between = self.edges.between(subgraph.keep)
        return between if subgraph.removed is None else between & ~subgraph.removed

    def size(self, subgraph: Subgraph) -> int:
        """How many edges a subgraph has."""
        return int(self.present_edges(subgraph).sum())

    def with_random_labels(self, seed: int) -> TaskLoss:
        """The same prompts with random labels, one draw for each pair."""
        generator = torch.Generator().manual_seed(seed)
        made = copy.copy(self)
        for name in ("train", "fit", "test"):
            pairs = getattr(self, name)
            flips = torch.randint(2, (len(pairs),), generator=generator).tolist()
            setattr(
                made,
                name,
                [_swapped(pair) if flip else pair for pair, flip in zip(pairs, flips, strict=True)],
            )
        return made

    def need_solved(self, least: float) -> TaskScore:
        """The whole model's score on the test prompts.

        Raises:
            UserError: its accuracy is below `least`.
        """
        found = self.score(self.test)
        if found.accuracy < least:
            raise UserError(
                f"the model does not solve {self.task.name}: its accuracy is "
                f"{found.accuracy:.1%} on {len(self.test)} pairs, below {least:.0%}, "
                f"so there is no circuit to find: train it longer or choose another task"
            )
        return found

    def _activations(self, prompts: Sequence[Prompt], width: int) -> Baseline:
        """Of all nodes in these prompts at `width` positions; the last one's where they end."""
        last = torch.tensor([len(prompt.tokens) - 1 for prompt in prompts])
        tokens = torch.full((len(prompts), int(last.max()) + 1), self.pad)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
        with hooks.recording(self.model) as seen:
            self.model(tokens, last_only=True)
        where = torch.arange(width).expand(len(tokens), -1).minimum(last.unsqueeze(1))
        return {
            name: value.gather(1, where.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
            for name, value in seen.items()
        }


def logit_diff(model: Transformer, batch: Batch) -> Tensor:
    """Logit of the right answer minus that of the wrong one, `(2P,)`."""
    logits = model(batch.tokens, at=batch.last).squeeze(1)
    found: Tensor = logits.gather(1, torch.stack([batch.right, batch.wrong], 1)).float()
    return found[:, 0] - found[:, 1]


def score(diffs: Tensor, positive: Tensor, calibration: Calibration | None = None) -> TaskScore:
    """Of logit differences `(2P,)`. A tie is not correct, as in evaluation."""
    if calibration is not None:
        diffs = calibration.apply(diffs, positive)
    loss = torch.nn.functional.softplus(-diffs).mean()
    return TaskScore(float(loss), float((diffs > 0).float().mean()))


def calibrate(diffs: Tensor, positive: Tensor) -> Calibration:
    """The scale and shift of least loss, by 16 steps of L-BFGS."""
    wide = diffs.detach().double()
    # The scale starts where differences have size 1: a circuit's may be 1000 times smaller.
    size = max(float(wide.abs().mean()), 1e-12)
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=_CALIBRATION_STEPS, line_search_fn="strong_wolfe"
    )
    sign = torch.where(positive, 1.0, -1.0).double()

    def loss() -> Tensor:
        optimizer.zero_grad()
        shifted = wide * (parameters[0].exp() / size) + sign * parameters[1]
        value = torch.nn.functional.softplus(-shifted).mean()
        value.backward()
        return value

    optimizer.step(loss)
    log_scale, shift = parameters.detach().tolist()
    return Calibration(math.exp(min(log_scale, 50.0)) / size, shift)


def _swapped(pair: Pair) -> Pair:
    positive, negative = pair.positive, pair.negative
    return replace(
        pair,
        positive=replace(positive, right=positive.wrong, wrong=positive.right),
        negative=replace(negative, right=negative.wrong, wrong=negative.right),
    )


def _length(pair: Pair) -> int:
    return max(len(pair.positive.tokens), len(pair.negative.tokens))


def _chunks(order: Sequence[int], pairs: Sequence[Pair]) -> Iterator[list[int]]:
    chunk: list[int] = []
    for number in order:
        if chunk and 2 * (len(chunk) + 1) * _length(pairs[number]) > _MOST_TOKENS:
            yield chunk
            chunk = []
        chunk.append(number)
    if chunk:
        yield chunk
