"""Masks on nodes, trained as published (Gao et al. 2025, section 2.2, appendix A.5).

One parameter per node, a step in the forward, the derivative of a sigmoid in the backward, a price
per node that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_transformer.circuits.ablation import mask_nodes, sigmoid_slope
from sparse_transformer.circuits.budget import Progress
from sparse_transformer.circuits.objective import (
    ROBUST_FACTOR,
    Subgraph,
    TaskLoss,
    by_position,
    logit_diff,
)
from sparse_transformer.ranges import need

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
        price: what a kept node costs, in nats (k_coef).
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
            need(getattr(self, name) > 0, name, "above 0", getattr(self, name))


def train_mask(
    task: TaskLoss,
    config: MaskConfig,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    watch: Callable[[float, float, Tensor], None] | None = None,
) -> Tensor:
    """A mask, float `(total,)` in [-1, 1]; nodes with a value above 0 are kept.

    Step by step the rest is ablated in the next of `task.pruned_under`. In "adversarial" a random
    share of those nodes is not ablated which, by the gradients of the steps before, would then
    raise the loss.

    Args:
        watch: called after each step with the share of the steps that are done, the smoothed
            loss and the mask; it may raise an exception to end the training.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(task.nodes.total, generator=generator)
    mask = (config.start + config.noise * noise).clamp(-1, 1)
    # The logits' scale and shift are learned along: only their difference decides.
    scale = torch.zeros(2, requires_grad=True)
    steer = _Adam(mask, config.learning_rate, config.weight_decay)
    steer_scale = _Adam(scale, _SCALE_RATE, 0.0)
    price, batches = Price(config), task.batches(config.pairs, seed)
    progress = progress or Progress()
    smooth = 0.0
    nothing = Subgraph(torch.zeros_like(mask, dtype=torch.bool))
    harm = torch.zeros_like(mask)
    for step in range(config.steps):
        progress.advance(step / config.steps)
        batch = next(batches)
        ablation = task.pruned_under[step % len(task.pruned_under)]
        live = None
        if ablation == "random":
            live = task.with_random_rest(nothing, seed + step).keep
        elif ablation == "adversarial":
            live = task.with_random_rest(nothing, seed + step).keep & (harm > 0) & (mask <= 0)
        rest = task.baseline(batch, ablation)
        leaf = mask.clone().requires_grad_(True)
        with mask_nodes(task.model, leaf, rest, config.temperature, live):
            diffs = logit_diff(task.model, batch, shared=not by_position(rest))
            sign = torch.where(batch.positive, 1.0, -1.0)
            calibrated = diffs * scale[0].exp() + sign * scale[1]
            loss = torch.nn.functional.softplus(-calibrated).mean()
            loss.backward()
        now = float(loss.detach())
        smooth += (_SMOOTHING if step else 1.0) * (now - smooth)
        cost = price.after(now if ablation == "mean" else now / ROBUST_FACTOR)
        effect = leaf.grad
        assert effect is not None
        grad = effect + cost * sigmoid_slope(mask, config.temperature)
        if "adversarial" in task.pruned_under:
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
    """What a node costs now; see `MaskConfig.aim`."""

    def __init__(self, config: MaskConfig) -> None:
        self._now, self._aim = config.price, config.aim
        self._loss = config.aim

    def after(self, loss: float) -> float:
        """The price after a step with that loss."""
        if self._aim is not None and self._loss is not None:
            self._loss += _SMOOTHING * (loss - self._loss)
            self._now *= math.exp(_PRICE_RATE * max(-1.0, 1 - self._loss / self._aim))
        return self._now
