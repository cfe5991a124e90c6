"""One task asked of one model: its prompts, and the loss of any part of the model on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer import hooks
from sparse_transformer.circuits.edges import Edges
from sparse_transformer.circuits.nodes import Base, Places, frozen
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer
from sparse_transformer.tasks import Batch, Pair, Prompt, Task, collate

# Prompts of about equal length go together; a forward has at most this many tokens.
_MOST_TOKENS = 8192
_CALIBRATION_STEPS = 16
# Every second one of the shorter half of the fitting prompts.
_PROBE_STRIDE = 2


@dataclass(frozen=True)
class Part:
    """A part of a model: nodes, and the edges among them that are there.

    Attributes:
        keep: bool `(total,)`, the nodes.
        removed: bool `(E,)`, edges that are not there although both ends are; None for none.
    """

    keep: Tensor
    removed: Tensor | None = None


@dataclass(frozen=True)
class Calibration:
    """`scale` (above 0) and `shift` of the difference between the logits of the two answers.

    The difference is that of the positive prompt's answer over the negative's, so that a shift
    corrects a constant lean to one answer. A scale that could turn negative would let any part that
    answers wrongly count as one that answers rightly.
    """

    scale: float = 1.0
    shift: float = 0.0

    def apply(self, margin: Tensor, positive: Tensor) -> Tensor:
        """`margin`: the logit of the right answer minus that of the wrong one."""
        return margin * self.scale + torch.where(positive, self.shift, -self.shift)


@dataclass(frozen=True)
class Score:
    """Two-way cross-entropy in nats, and the share of prompts answered rightly."""

    loss: float
    accuracy: float


class Problem:
    """A model, a task and its prompts.

    Args:
        model: in evaluation; its parameters stop requiring gradients.
        task: the task.
        tokenizer: of the model.
        means: see means.py.
        train_pairs, fit_pairs, test_pairs: how many; masks are trained on the first, cut to the
            target loss on the second, and everything that is reported is measured on the third,
            which is of the other split of the task.
        max_tokens: prompts for training are at most this long, to save time.
        seed: draws the prompts.

    Raises:
        UserError: the task cannot be asked of this tokenizer.
    """

    def __init__(
        self,
        model: Transformer,
        task: Task,
        tokenizer: Tokenizer,
        means: Base,
        *,
        train_pairs: int = 512,
        fit_pairs: int = 96,
        test_pairs: int = 256,
        max_tokens: int | None = 96,
        seed: int = 0,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.task, self.means = task, means
        self.places, self.edges = Places.of(model.config), Edges.of(model)
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

    def everything(self) -> Part:
        """The whole model."""
        return Part(torch.ones(self.places.total, dtype=torch.bool))

    def batches(self, pairs: int, seed: int) -> Iterator[Batch]:
        """Training batches without end; pairs of about equal length go together."""
        ordered = sorted(self.train, key=_length)
        generator = torch.Generator().manual_seed(seed)
        count = max(1, len(ordered) // pairs)
        while True:
            for number in torch.randperm(count, generator=generator).tolist():
                yield collate(ordered[number * pairs : (number + 1) * pairs], self.pad)

    @torch.no_grad()
    def margins(
        self,
        pairs: Sequence[Pair],
        part: Part | None = None,
        base: Base | None = None,
        resample: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of each prompt, positive before negative: logit of right minus wrong; whether positive.

        Args:
            pairs: the prompts.
            part: what is left of the model; None for all of it.
            base: what the rest has instead; by default the means.
            resample: int64 `(2P,)`, for each prompt the number of another one, with any
                answer: what the rest has is then its activation there at the same position.
        """
        order = sorted(range(len(pairs)), key=lambda number: _length(pairs[number]))
        margins = torch.empty(2 * len(pairs))
        prompts = [prompt for pair in pairs for prompt in (pair.positive, pair.negative)]
        for numbers in _chunks(order, pairs):
            batch = collate([pairs[number] for number in numbers], self.pad)
            rows = torch.tensor([row for number in numbers for row in (2 * number, 2 * number + 1)])
            if resample is not None:
                others = [prompts[number] for number in resample[rows].tolist()]
                base = self._activations(others, batch.tokens.shape[1])
            with ExitStack() as stack:
                if part is not None:
                    self._enter(stack, part, base or self.means)
                margins[rows] = margin(self.model, batch)
        positive = torch.tensor([True, False]).repeat(len(pairs))
        return margins, positive

    def score(
        self,
        pairs: Sequence[Pair],
        part: Part | None = None,
        base: Base | None = None,
        *,
        calibration: Calibration | None = None,
        resample: Tensor | None = None,
    ) -> Score:
        """Loss and accuracy, calibrated if so."""
        margins, positive = self.margins(pairs, part, base, resample)
        return score(margins, positive, calibration)

    def calibrated_loss(self, part: Part, pairs: Sequence[Pair] | None = None) -> float:
        """Loss on the prompts that are for fitting, after calibrating on them."""
        margins, positive = self.margins(self.fit if pairs is None else pairs, part)
        return score(margins, positive, calibrate(margins, positive)).loss

    def probe(self) -> list[Pair]:
        """Some of the prompts for fitting, short ones, for what is measured very often."""
        return sorted(self.fit, key=_length)[: max(1, len(self.fit) // 2) : _PROBE_STRIDE]

    def fit_batches(self, part: Part) -> Iterator[tuple[Batch, Calibration]]:
        """The prompts for fitting, batch by batch, and the calibration of `part` on them."""
        calibration = calibrate(*self.margins(self.fit, part))
        order = sorted(range(len(self.fit)), key=lambda number: _length(self.fit[number]))
        for numbers in _chunks(order, self.fit):
            yield collate([self.fit[number] for number in numbers], self.pad), calibration

    @contextmanager
    def removing(self, removed: Tensor | None, base: Base | None = None) -> Iterator[None]:
        """Inside the block these edges are gone; see `Edges.without`."""
        if removed is None:
            yield
            return
        with self.edges.without(self.model, removed, base or self.means):
            yield

    def _enter(self, stack: ExitStack, part: Part, base: Base) -> None:
        stack.enter_context(frozen(self.model, part.keep, base))
        stack.enter_context(self.removing(part.removed, base))

    def _activations(self, prompts: Sequence[Prompt], width: int) -> Base:
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

    def control(self, seed: int) -> Problem:
        """The same prompts with random labels, one draw for each pair."""
        generator = torch.Generator().manual_seed(seed)
        made = object.__new__(Problem)
        made.__dict__.update(self.__dict__)
        for name in ("train", "fit", "test"):
            pairs = getattr(self, name)
            flips = torch.randint(2, (len(pairs),), generator=generator).tolist()
            setattr(
                made,
                name,
                [_swapped(pair) if flip else pair for pair, flip in zip(pairs, flips, strict=True)],
            )
        return made

    def need_solved(self, least: float) -> Score:
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


def margin(model: Transformer, batch: Batch) -> Tensor:
    """Logit of the right answer minus that of the wrong one, `(2P,)`."""
    logits = model(batch.tokens, at=batch.last).squeeze(1)
    found: Tensor = logits.gather(1, torch.stack([batch.right, batch.wrong], 1)).float()
    return found[:, 0] - found[:, 1]


def score(margins: Tensor, positive: Tensor, calibration: Calibration | None = None) -> Score:
    """Of margins `(2P,)`. A tie is not right, as in evaluate.py."""
    if calibration is not None:
        margins = calibration.apply(margins, positive)
    loss = torch.nn.functional.softplus(-margins).mean()
    return Score(float(loss), float((margins > 0).float().mean()))


def calibrate(margins: Tensor, positive: Tensor) -> Calibration:
    """The scale and shift of least loss, by 16 steps of L-BFGS."""
    wide = margins.detach().double()
    # The scale starts where margins are of size 1: a circuit's may be a thousandth of the model's.
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
