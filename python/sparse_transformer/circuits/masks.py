"""Masks on nodes and on edges, trained as published (Gao et al. 2025, section 2.2, appendix A.5).

One parameter per node, a step in the forward, the derivative of a sigmoid in the backward, a price
per node that is kept. Edges are masked in the same way, which the paper leaves to others.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparse_transformer.circuits.ablation import (
    keep_nodes,
    mask_nodes,
    remove_edges,
    sigmoid_slope,
)
from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.edge_attribution import EdgeGradients
from sparse_transformer.circuits.objective import TaskLoss, logit_diff
from sparse_transformer.tasks import Batch

# Smoothing of the training loss that the price follows, and the largest change of the price in a
# step.
_SMOOTHING = 0.2
_PRICE_RATE = 0.05
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


class Trained(NamedTuple):
    """Masks, float `(G, count)` in [-1, 1]; what has a value above 0 is kept.

    `share` is that of the steps for which there was time.
    """

    masks: Tensor
    share: float


class Masked(Protocol):
    """What masks are trained on: the nodes of a model, or its edges."""

    task: TaskLoss
    count: int

    def applied(
        self, masks: Tensor, temperature: Tensor
    ) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Inside the block what has a mask `(G, count)` of at most 0 is ablated, group by group.

        Yields a function that, after the backward, takes the prices `(G, 1)` and returns the
        gradient in the masks `(G, count)` of the loss and of the price of all that is kept.
        """


class NodeMasks:
    """All nodes of a model."""

    def __init__(self, task: TaskLoss) -> None:
        self.task, self.count = task, task.nodes.total

    @contextmanager
    def applied(self, masks: Tensor, temperature: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        masks = masks.requires_grad_(True)

        @torch.no_grad()
        def gradient(price: Tensor) -> Tensor:
            assert masks.grad is not None
            share = torch.sigmoid(masks / temperature)
            return masks.grad + price * share * (1 - share) / temperature

        with mask_nodes(self.task.model, masks, self.task.means, temperature):
            yield gradient


class EdgeMasks:
    """The edges between the nodes of `keep`, bool `(total,)`; one mask at a time."""

    def __init__(self, task: TaskLoss, keep: Tensor) -> None:
        self.task, self._keep = task, keep
        self.between = task.edges.between(keep)
        self.count = int(self.between.sum())

    @contextmanager
    def applied(self, masks: Tensor, temperature: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        (mask,) = masks
        removed = torch.zeros_like(self.between)
        removed[self.between] = mask <= 0
        task = self.task
        with (
            EdgeGradients(task) as gradients,
            remove_edges(task.model, task.edges, removed, task.means),
            keep_nodes(task.model, self._keep, task.means),
        ):
            yield (
                lambda price: (
                    sigmoid_slope(masks, temperature) * (gradients.take()[self.between] + price)
                )
            )


def train_masks(
    masked: Masked,
    configs: Sequence[MaskConfig],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trained:
    """Trains one mask for each of `configs`, all of them in the same forwards.

    Args:
        masked: what has masks.
        configs: G of them, with equal `steps` and `pairs`.
        seed: of the masks and the batches.
        progress: ends the training when its time is over; the learning rate falls to zero by then.
    """
    steps, pairs = configs[0].steps, configs[0].pairs
    if any((config.steps, config.pairs) != (steps, pairs) for config in configs):
        raise ValueError("configs must have the same steps and pairs")
    G = len(configs)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(masked.count, generator=generator)
    masks = [
        (config.start + config.noise * noise).clamp(-1, 1).requires_grad_(True)
        for config in configs
    ]
    # The logits' scale and shift are learned along: only their difference decides.
    scales = [torch.zeros(2, requires_grad=True) for _ in configs]
    optimizer = torch.optim.AdamW(
        [
            {"params": [mask], "lr": config.learning_rate, "weight_decay": config.weight_decay}
            for mask, config in zip(masks, configs, strict=True)
        ]
        + [{"params": scales, "lr": _SCALE_RATE, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    temperature = torch.tensor([[config.temperature] for config in configs])
    prices = [Price(config) for config in configs]
    batches = masked.task.batches(pairs, seed)
    progress = progress or Progress()
    began, seconds = time.monotonic(), max(progress.left, 1e-3)
    for step in itertools.count():
        done = max(step / steps, (time.monotonic() - began) / seconds if step else 0.0)
        if done >= 1:
            break
        progress.advance(done)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - done)
        batch = _repeat(next(batches), G)
        with masked.applied(torch.stack(masks).detach(), temperature) as gradient:
            diffs = logit_diff(masked.task.model, batch).view(G, -1)
            scale = torch.stack(scales)
            sign = torch.where(batch.positive.view(G, -1), 1.0, -1.0)
            calibrated = diffs * scale[:, :1].exp() + sign * scale[:, 1:]
            losses = torch.nn.functional.softplus(-calibrated).mean(1)
            losses.sum().backward()
            now = [[price.after(loss)] for price, loss in zip(prices, losses.tolist(), strict=True)]
            grads = gradient(torch.tensor(now))
        with torch.no_grad():
            for mask, grad, config in zip(masks, grads, configs, strict=True):
                mask.grad = grad.clone()
                torch.nn.utils.clip_grad_norm_([mask], config.clip)
            optimizer.step()
            optimizer.zero_grad()
            for mask in masks:
                mask.clamp_(-1, 1)
    return Trained(torch.stack(masks).detach(), step / steps)


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


def _repeat(batch: Batch, count: int) -> Batch:
    """The same prompts `count` times, group after group."""
    return Batch(
        **{field.name: torch.cat([getattr(batch, field.name)] * count) for field in fields(batch)}
    )
