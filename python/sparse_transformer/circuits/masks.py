"""Masks on nodes and on edges, trained as published (Gao et al. 2025, section 2.2, appendix A.5).

One parameter per node, a step in the forward, the derivative of a sigmoid in the backward, a price
per node that is kept. Edges are masked in the same way, which the paper leaves to others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_transformer.circuits.ablation import (
    Baseline,
    keep_nodes,
    mask_nodes,
    remove_edges,
    sigmoid_slope,
)
from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.edge_attribution import EdgeGradients
from sparse_transformer.circuits.objective import (
    ROBUST_FACTOR,
    Subgraph,
    TaskLoss,
    by_position,
    logit_diff,
)

# Smoothing of the training loss that the price follows, and the largest change of the price in a
# step.
_SMOOTHING = 0.2
_PRICE_RATE = 0.05
# How fast the estimate of what hurts follows the gradients.
_HARM_SMOOTHING = 0.2
# Learning rate of the scale and shift of the logits.
_SCALE_RATE = 1e-2


@dataclass(frozen=True)
class MaskConfig:
    """How masks are trained; the defaults are the published starting values but for `steps`.

    Attributes:
        steps: of AdamW, with a learning rate that falls linearly to zero.
        pairs: prompts of a step, in pairs.
        price: what a kept node or edge costs, in nats (k_coef).
        learning_rate, weight_decay: of AdamW.
        start, noise: mean and deviation of the masks at the beginning.
        temperature: of the sigmoid whose derivative stands for the step's.
        clip: the norm at which gradients of a mask are clipped.
        aim: None keeps the price constant as published; with a loss, the price rises while the
            training loss is below it and falls while it is above, by a few percent a step.
    """

    steps: int = 300
    pairs: int = 32
    price: float = 1e-4
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    start: float = 1e-1
    noise: float = 1e-2
    temperature: float = 1.0
    clip: float = 1.0
    aim: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "pairs", "learning_rate", "temperature", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


class Masked(Protocol):
    """What a mask is trained on: the nodes of a model, or its edges.

    Attributes:
        ablations: of the rest, one after another.
    """

    task: TaskLoss
    count: int
    ablations: tuple[str, ...]

    def applied(
        self, mask: Tensor, temperature: float, rest: Baseline, live: Tensor | None
    ) -> AbstractContextManager[Callable[[float], Tensor]]:
        """Inside the block what has a mask `(count,)` of at most 0 is ablated.

        Yields a function that, after the backward, takes the price and returns the gradient in the
        mask of the loss and of the price of all that is kept.

        Args:
            rest: what is ablated has this.
            live: bool `(total,)`, nodes that are never ablated; None for none.
        """


class NodeMasks:
    """All nodes of a model."""

    def __init__(self, task: TaskLoss) -> None:
        self.task, self.count = task, task.nodes.total
        self.ablations = task.pruned_under

    @contextmanager
    def applied(
        self, mask: Tensor, temperature: float, rest: Baseline, live: Tensor | None
    ) -> Iterator[Callable[[float], Tensor]]:
        mask = mask.requires_grad_(True)

        @torch.no_grad()
        def gradient(price: float) -> Tensor:
            assert mask.grad is not None
            return mask.grad + price * sigmoid_slope(mask, temperature)

        with mask_nodes(self.task.model, mask, rest, temperature, live):
            yield gradient


class EdgeMasks:
    """The edges between the nodes of `keep`, bool `(total,)`."""

    def __init__(self, task: TaskLoss, keep: Tensor) -> None:
        self.task, self._keep = task, keep
        self.between = task.edges.between(keep)
        self.count = int(self.between.sum())
        # Gradients in edges are known where the rest has constants, not those in nodes.
        self.ablations = tuple(
            name for name in task.pruned_under if name not in ("pair", "adversarial")
        )

    @contextmanager
    def applied(
        self, mask: Tensor, temperature: float, rest: Baseline, live: Tensor | None
    ) -> Iterator[Callable[[float], Tensor]]:
        removed = torch.zeros_like(self.between)
        removed[self.between] = mask <= 0
        task = self.task
        keep = self._keep if live is None else self._keep | live
        with (
            EdgeGradients(task) as gradients,
            remove_edges(task.model, task.edges, removed, rest),
            keep_nodes(task.model, keep, rest),
        ):
            yield (
                lambda price: (
                    sigmoid_slope(mask, temperature) * (gradients.take()[self.between] + price)
                )
            )


def train_mask(
    masked: Masked,
    config: MaskConfig,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    watch: Callable[[float, float, Tensor], None] | None = None,
) -> Tensor:
    """A mask, float `(count,)` in [-1, 1]; what has a value above 0 is kept.

    Step by step the rest is ablated in the next of `masked.ablations`. In "adversarial" a random
    share of those nodes is not ablated which, by the gradients of the steps before, would then
    raise the loss.

    Args:
        masked: what has a mask.
        config: how it is trained.
        seed: of the mask, the batches and the random parts of the rest.
        watch: called after each step with the share of the steps that are done, the smoothed
            loss and the mask; it may raise an exception to end the training.
    """
    task, generator = masked.task, torch.Generator().manual_seed(seed)
    noise = torch.randn(masked.count, generator=generator)
    mask = (config.start + config.noise * noise).clamp(-1, 1)
    # The logits' scale and shift are learned along: only their difference decides.
    scale = torch.zeros(2, requires_grad=True)
    steer = _Adam(mask, config.learning_rate, config.weight_decay)
    steer_scale = _Adam(scale, _SCALE_RATE, 0.0)
    price, batches = Price(config), task.batches(config.pairs, seed)
    progress = progress or Progress()
    smooth = 0.0
    nothing = Subgraph(torch.zeros(task.nodes.total, dtype=torch.bool))
    harm = torch.zeros(masked.count)
    for step in range(config.steps):
        progress.advance(step / config.steps)
        batch = next(batches)
        ablation = masked.ablations[step % len(masked.ablations)]
        live = None
        if ablation == "random":
            live = task.with_random_rest(nothing, seed + step).keep
        elif ablation == "adversarial":
            live = task.with_random_rest(nothing, seed + step).keep & (harm > 0) & (mask <= 0)
        rest = task.baseline(batch, ablation)
        with masked.applied(mask.clone(), config.temperature, rest, live) as gradient:
            diffs = logit_diff(task.model, batch, shared=not by_position(rest))
            sign = torch.where(batch.positive, 1.0, -1.0)
            calibrated = diffs * scale[0].exp() + sign * scale[1]
            loss = torch.nn.functional.softplus(-calibrated).mean()
            loss.backward()
            now = float(loss.detach())
            smooth += (_SMOOTHING if step else 1.0) * (now - smooth)
            cost = price.after(now if ablation == "mean" else now / ROBUST_FACTOR)
            grad = gradient(cost)
        if "adversarial" in masked.ablations:
            effect = grad - cost * sigmoid_slope(mask, config.temperature)
            seen = torch.ones_like(harm) if live is None else (~live).float()
            harm += _HARM_SMOOTHING * seen * (effect / (effect.norm() + 1e-9) - harm)
        assert scale.grad is not None
        grad *= min(1.0, config.clip / (float(grad.norm()) + 1e-6))
        steer.step(grad, 1 - step / config.steps)
        steer_scale.step(scale.grad, 1 - step / config.steps)
        scale.grad = None
        mask.clamp_(-1, 1)
        if watch is not None:
            watch((step + 1) / config.steps, smooth, mask)
    return mask


class _Adam:
    """AdamW with betas 0.9 and 0.95; torch.optim would first import the compiler, for seconds."""

    def __init__(self, parameter: Tensor, rate: float, decay: float) -> None:
        self._parameter, self._rate, self._decay = parameter, rate, decay
        self._mean, self._square = torch.zeros_like(parameter), torch.zeros_like(parameter)
        self._steps = 0

    @torch.no_grad()
    def step(self, grad: Tensor, share: float) -> None:
        """Changes the parameter, by this share of the learning rate."""
        self._steps += 1
        self._mean.lerp_(grad, 1 - 0.9)
        self._square.lerp_(grad * grad, 1 - 0.95)
        spread = (self._square / (1 - 0.95**self._steps)).sqrt_().add_(1e-8)
        rate = share * self._rate
        self._parameter.mul_(1 - rate * self._decay)
        self._parameter.addcdiv_(self._mean, spread, value=-rate / (1 - 0.9**self._steps))


class Price:
    """What a node or edge costs now; see `MaskConfig.aim`."""

    def __init__(self, config: MaskConfig) -> None:
        self._now, self._aim = config.price, config.aim
        self._loss = config.aim

    def after(self, loss: float) -> float:
        """The price after a step with that loss."""
        if self._aim is not None and self._loss is not None:
            self._loss += _SMOOTHING * (loss - self._loss)
            self._now *= math.exp(_PRICE_RATE * max(-1.0, 1 - self._loss / self._aim))
        return self._now
