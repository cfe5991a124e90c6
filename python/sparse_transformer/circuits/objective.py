"""The objective of a search: the loss of any part of a model on the prompts of one task."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer import hooks
from sparse_transformer.circuits.ablation import (
    Baseline,
    keep_nodes,
    remove_edges,
)
from sparse_transformer.circuits.forward import Skipped, answer_logits
from sparse_transformer.circuits.graph import Edges, Nodes, rows_of
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer
from sparse_transformer.tasks import Batch, Pair, Prompt, Task, collate
from sparse_transformer.tasks.task import by_length, prompts

# Prompts of about equal length go together; a forward has at most this many tokens.
_MOST_TOKENS = 8192
_CALIBRATION_STEPS = 16
# The least scale of a calibration, in units of one over the mean size of the differences.
_LEAST_SCALE = 1e-3
# Every fourth one of the fitting prompts, by length.
_PROBE_STRIDE = 4
# What the rest of a model has in place of its activations: the mean over the corpus; zero; its
# activations in another prompt of about this length; or in the other prompt of the pair. In
# "random" a random part of the rest has its mean. Other prompts are aligned at the last token.
ABLATIONS = ("mean", "zero", "resample", "pair", "random")
# Under which of them a circuit is pruned: it must reach the target under the mean, a multiple of it
# under the others. In "adversarial" all but the part that hurts most has its mean.
PRUNED_UNDER = {"mean": ("mean",), "mixture": ("mean", "pair", "random", "adversarial")}
ROBUST_FACTOR = 2.0


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
        means: the mean activations, see activations.py.
        train_pairs, fit_pairs, test_pairs: number of pairs. Masks are trained on the first, pruned
            to the target loss on the second, and validated on the third, which come from the
            task's other split.
        test_seeds: as many draws of test pairs.
        max_tokens: the longest prompt for training, to save time.
        seed: of the prompts.
        pruned_under: ablations under all of which a part must perform the task while it is pruned.

    Attributes:
        adversaries: bool `(total,)` each: under adversarial ablation these are not ablated, one
            after another. None are known to begin with.
        test: the test pairs of all draws, one draw after another; no prompt is in two of them.

    A UserError if the task cannot be asked with this tokenizer.
    """

    def __init__(
        self,
        model: Transformer,
        task: Task,
        tokenizer: Tokenizer,
        means: Baseline,
        *,
        train_pairs: int = 512,
        fit_pairs: int = 256,
        test_pairs: int = 128,
        test_seeds: int = 3,
        max_tokens: int = 96,
        seed: int = 0,
        pruned_under: Sequence[str] = ("mean",),
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.task, self.means = task, means
        self.nodes, self.edges = Nodes.of(model.config), Edges.of(model)
        self.pad = model.config.vocab_size - 1
        self.pruned_under = tuple(pruned_under)
        self.adversaries: tuple[Tensor, ...] = ()
        context = model.config.context
        # Seeds apart from those of the prompts that a model may have been trained on.
        unseen = 2**40 + 2 * seed
        self.train = task.pairs(
            tokenizer,
            train_pairs,
            split="train",
            seed=unseen,
            context=context,
            max_tokens=max_tokens,
        )
        self.fit = task.pairs(tokenizer, fit_pairs, split="train", seed=unseen + 1, context=context)
        seen: dict[str, tuple[int, Pair]] = {}
        for draw in range(test_seeds):
            drawn = task.pairs(
                tokenizer, test_pairs, split="test", seed=seed + draw, context=context
            )
            for pair in drawn:
                seen.setdefault(pair.positive.text, (draw, pair))
        self.test = [pair for _, pair in seen.values()]
        self._ends: tuple[Tensor, Tensor] | None = None
        self.draws = torch.tensor([draw for draw, _ in seen.values()])

    def batches(self, pairs: int, seed: int) -> Iterator[Batch]:
        """Endless training batches; pairs of about equal length go together."""
        ordered = sorted(self.train, key=lambda pair: pair.length)
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
        ablation: str = "mean",
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Right minus wrong logit of each prompt, positive before negative; and which are positive.

        Args:
            pairs: the prompts.
            subgraph: what is left of the model; None for all of it.
            ablation: of `ABLATIONS`, what the rest has.
            seed: of the random part of the rest.
        """
        if subgraph is not None and ablation == "random":
            subgraph = self.with_random_rest(subgraph, seed)
        found = torch.empty(2 * len(pairs))
        for numbers in by_length(pairs, _MOST_TOKENS):
            batch = collate([pairs[number] for number in numbers], self.pad)
            rows = torch.tensor([row for number in numbers for row in (2 * number, 2 * number + 1)])
            found[rows] = self._batch_diffs(batch, subgraph, ablation)
        positive = torch.tensor([True, False]).repeat(len(pairs))
        return found, positive

    def baseline(self, batch: Batch, ablation: str = "mean") -> Baseline:
        """What is ablated has these activations in the prompts of `batch`."""
        if ablation in ("mean", "random", "adversarial"):
            return self.means
        if ablation == "zero":
            return {name: torch.zeros_like(mean) for name, mean in self.means.items()}
        rows = torch.arange(len(batch.last))
        # The neighbours of a pair are about as long; of those, the prompt with either answer.
        others = rows ^ 1 if ablation == "pair" else (rows + 2 + rows // 2 % 2) % len(rows)
        return self._activations(batch.pick(others), batch)

    def with_random_rest(self, subgraph: Subgraph, seed: int) -> Subgraph:
        """The subgraph and a random share of the rest, itself random between none and all."""
        generator = torch.Generator().manual_seed(seed)
        share = torch.rand((), generator=generator)
        chosen = torch.rand(len(subgraph.keep), generator=generator) < share
        return replace(subgraph, keep=subgraph.keep | chosen)

    def score(self, pairs: Sequence[Pair], subgraph: Subgraph | None = None) -> TaskScore:
        """Loss and accuracy, not calibrated."""
        return score(*self.logit_diffs(pairs, subgraph))

    def calibrated_loss(self, subgraph: Subgraph, pairs: Sequence[Pair] | None = None) -> float:
        """Loss on `pairs`, by default those for fitting, after calibration on them.

        It is the largest of those under the ablations of `pruned_under`, each but the mean divided
        by `ROBUST_FACTOR`.
        """
        losses = []
        for ablation in self.pruned_under:
            parts, allowed = [subgraph], 1.0 if ablation == "mean" else ROBUST_FACTOR
            if ablation == "adversarial":
                parts = [replace(subgraph, keep=subgraph.keep | live) for live in self.adversaries]
                ablation = "mean"
            for part in parts:
                found = self.logit_diffs(self.fit if pairs is None else pairs, part, ablation)
                losses.append(score(*found, calibrate(*found)).loss / allowed)
        return max(losses)

    def probe(self) -> list[Pair]:
        """A few of the prompts for fitting, for what is measured very often."""
        return sorted(self.fit, key=lambda pair: pair.length)[::_PROBE_STRIDE]

    def fit_batches(self, subgraph: Subgraph) -> Iterator[tuple[Batch, Calibration]]:
        """The prompts for fitting, batch by batch, and the calibration of `subgraph` on them."""
        calibration = calibrate(*self.logit_diffs(self.fit, subgraph))
        for numbers in by_length(self.fit, _MOST_TOKENS):
            yield collate([self.fit[number] for number in numbers], self.pad), calibration

    def present_edges(self, subgraph: Subgraph) -> Tensor:
        """bool `(E,)`: the edges of a subgraph."""
        between = self.edges.between(subgraph.keep)
        return between if subgraph.removed is None else between & ~subgraph.removed

    def size(self, subgraph: Subgraph) -> int:
        """How many edges a subgraph has."""
        return int(self.present_edges(subgraph).sum())

    def with_answers(self, answers: dict[int, int] | None) -> TaskLoss:
        """The same prompts with other tokens for their answers; None swaps right and wrong."""

        def changed(prompt: Prompt) -> Prompt:
            if answers is None:
                return replace(prompt, right=prompt.wrong, wrong=prompt.right)
            return replace(prompt, right=answers[prompt.right], wrong=answers[prompt.wrong])

        pairs = {
            name: [Pair(changed(p.positive), changed(p.negative)) for p in getattr(self, name)]
            for name in ("train", "fit", "test")
        }
        return self._with(**pairs, _ends=None)

    def under(self, *ablations: str) -> TaskLoss:
        """The same, pruned under other ablations."""
        return self._with(pruned_under=ablations)

    def against(self, live: Tensor) -> TaskLoss:
        """The same with one more adversary."""
        return self._with(adversaries=(*self.adversaries, live))

    def with_model(self, model: Transformer, means: Baseline) -> TaskLoss:
        """The same prompts for another model of the same configuration."""
        model = model.eval().requires_grad_(False)
        return self._with(model=model, means=means, edges=Edges.of(model), _ends=None)

    def _with(self, **changes: Any) -> TaskLoss:
        made = copy.copy(self)
        vars(made).update(changes)
        return made

    def ends(self) -> tuple[Tensor, Tensor]:
        """bool `(D,)` twice: channels that tokens of the prompts write, that answers read."""
        if self._ends is None:
            asked = prompts(self.train + self.fit)
            model, tokens = self.model, sorted({t for prompt in asked for t in prompt.tokens})
            answers = sorted({prompt.right for prompt in asked})
            written = rows_of(model.embed, tokens)
            read = rows_of(model.unembed or model.embed, answers)
            self._ends = (written != 0).any(0), (read != 0).any(0)
        return self._ends

    def need_solved(self, least: float) -> TaskScore:
        """The whole model's score on the test prompts; a UserError if it answers too few right."""
        found = self.score(self.test)
        if found.accuracy < least:
            raise UserError(
                f"the model does not solve {self.task.name}: its accuracy is "
                f"{found.accuracy:.1%} on {len(self.test)} pairs, below {least:.0%}, "
                "so there is no circuit to find: train it with --task-pairs, or longer, or choose "
                "another task"
            )
        return found

    def _batch_diffs(self, batch: Batch, subgraph: Subgraph | None, ablation: str) -> Tensor:
        if subgraph is None:
            return logit_diff(self.model, batch)
        rest = self.baseline(batch, ablation)
        skipped = Skipped.without(self.nodes, subgraph.keep, rest)
        with ExitStack() as stack:
            stack.enter_context(keep_nodes(self.model, subgraph.keep, rest))
            stack.enter_context(remove_edges(self.model, self.edges, subgraph.removed, rest))
            return logit_diff(self.model, batch, skipped, shared=not by_position(rest))

    @torch.no_grad()
    def _activations(self, others: Batch, batch: Batch) -> Baseline:
        """Of all nodes in `others` at the positions of `batch`, aligned at the last token."""
        with hooks.recording(self.model) as seen:
            answer_logits(self.model, others.tokens, others.last, shared=False)
        ahead = (others.last - batch.last).unsqueeze(1)
        where = (torch.arange(batch.tokens.shape[1]) + ahead).clamp_min(0)
        where = where.minimum(others.last.unsqueeze(1)).unsqueeze(-1)
        return {
            # Behind the last attention there is one position.
            name: value
            if value.shape[1] < batch.tokens.shape[1]
            else value.gather(1, where.expand(-1, -1, value.shape[-1]))
            for name, value in seen.items()
        }


def by_position(baseline: Baseline) -> bool:
    """Whether it differs between positions."""
    return any(activation.dim() > 1 for activation in baseline.values())


def logit_diff(
    model: Transformer, batch: Batch, skipped: Skipped | None = None, *, shared: bool = True
) -> Tensor:
    """Logit of the right answer minus that of the wrong one, `(2P,)`; see `answer_logits`."""
    logits = answer_logits(model, batch.tokens, batch.last, skipped, shared=shared)
    right, wrong = logits.gather(1, batch.answers).float().unbind(1)
    return right - wrong


def score(diffs: Tensor, positive: Tensor, calibration: Calibration | None = None) -> TaskScore:
    """Of logit differences `(2P,)`. A tie is not correct, as in evaluation."""
    if calibration is not None:
        diffs = calibration.apply(diffs, positive)
    loss = torch.nn.functional.softplus(-diffs).mean()
    return TaskScore(float(loss), float((diffs > 0).float().mean()))


def calibrate(diffs: Tensor, positive: Tensor) -> Calibration:
    """The scale and shift of least loss, by 16 steps of Newton's method: the loss is convex."""
    wide = diffs.detach().double()
    # In units in which differences have size 1: a circuit's may be 1000 times smaller.
    size = max(float(wide.abs().mean()), 1e-12)
    sign = torch.where(positive, 1.0, -1.0).double()
    features = torch.stack([wide / size, sign])
    now = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def loss(at: Tensor) -> float:
        return float(torch.nn.functional.softplus(-(at @ features)).mean())

    least = loss(now)
    for _ in range(_CALIBRATION_STEPS):
        wrong = torch.sigmoid(-(now @ features))
        slope = (features @ wrong) / len(wide)
        curvature = (features * (wrong * (1 - wrong))) @ features.T / len(wide)
        curvature.diagonal().add_(1e-9)
        if now[0] <= _LEAST_SCALE and slope[0] < 0:
            # The best scale would be negative: the least one stays.
            slope[0] = curvature[0, 1] = curvature[1, 0] = 0.0
        step = torch.linalg.solve(curvature, slope)
        for _ in range(8):
            then = now + step
            then[0].clamp_min_(_LEAST_SCALE)
            reached = loss(then)
            if reached < least:
                break
            step = step / 2
        else:
            break
        now, done, least = then, least - reached < 1e-9, reached
        if done:
            break
    scale, shift = now.tolist()
    return Calibration(scale / size, shift)
