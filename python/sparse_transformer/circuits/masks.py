"""Masks on nodes and on edges, trained as published (Gao et al. 2025, section 2.2, appendix A.5).

One parameter per node, a step in the forward, the derivative of a sigmoid in the backward, a price
per node that is kept. The same for edges, which the paper leaves to others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_transformer.circuits.gradients import EdgeGradients
from sparse_transformer.circuits.nodes import masked
from sparse_transformer.circuits.problem import Problem, margin
from sparse_transformer.tasks import Batch

# Smoothing of the training loss that the price follows, and the largest change of the price in a
# step.
_SMOOTHING = 0.2
_PRICE_RATE = 0.05


@dataclass(frozen=True)
class PruneConfig:
    """How masks are trained; the defaults are the published starting values but for `steps`.

    Attributes:
        steps: of AdamW, with a learning rate that falls linearly to zero.
        pairs: prompts of a step, in pairs.
        price: what a kept node costs, in nats (k_coef).
        learning_rate, weight_decay: of AdamW.
        start, noise: mean and deviation of the masks at the beginning.
        temperature: of the sigmoid whose derivative stands for the step's.
        clip: the norm at which gradients of a mask are clipped.
        aim: None keeps the price as published; a loss, and the price rises while the training loss
            is below it and falls while it is above, by a few percent a step.
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


def train_masks(
    problem: Problem,
    configs: Sequence[PruneConfig],
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Tensor:
    """Trains one mask for each of `configs`, all of them in the same forwards.

    Args:
        configs: G of them, with equal `steps` and `pairs`.
        seed: draws the masks and the batches.
        progress: show a progress bar; by default where stderr is a terminal.

    Returns:
        float `(G, total)` in [-1, 1]: a node whose value is above 0 is kept.
    """
    steps, pairs = configs[0].steps, configs[0].pairs
    if any((config.steps, config.pairs) != (steps, pairs) for config in configs):
        raise ValueError("configs must have the same steps and pairs")
    G = len(configs)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(problem.places.total, generator=generator)
    masks = [
        (config.start + config.noise * noise).clamp(-1, 1).requires_grad_(True)
        for config in configs
    ]
    # The logits' scale and shift are learned along: it is their difference that must decide.
    scales = [torch.zeros(2, requires_grad=True) for _ in configs]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [mask],
                "lr": config.learning_rate,
                "weight_decay": config.weight_decay,
            }
            for mask, config in zip(masks, configs, strict=True)
        ]
        + [{"params": scales, "lr": 1e-2, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    temperature = torch.tensor([[config.temperature] for config in configs])
    prices = [Price(config) for config in configs]
    batches = problem.batches(pairs, seed)
    disable = None if progress is None else not progress
    for step in tqdm(range(steps), "masks", unit=" steps", disable=disable, leave=False):
        batch = _repeat(next(batches), G)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        stacked = torch.stack(masks)
        with masked(problem.model, stacked, problem.means, temperature):
            margins = margin(problem.model, batch).view(G, -1)
        scale = torch.stack(scales)
        sign = torch.where(batch.positive.view(G, -1), 1.0, -1.0)
        calibrated = margins * scale[:, :1].exp() + sign * scale[:, 1:]
        losses = torch.nn.functional.softplus(-calibrated).mean(1)
        losses.sum().backward()
        with torch.no_grad():
            for mask, config, price, loss in zip(
                masks, configs, prices, losses.tolist(), strict=True
            ):
                assert mask.grad is not None
                share = torch.sigmoid(mask / config.temperature)
                mask.grad += price.after(loss) * share * (1 - share) / config.temperature
                torch.nn.utils.clip_grad_norm_([mask], config.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mask in masks:
                mask.clamp_(-1, 1)
    return torch.stack(masks).detach()


def train_edges(
    problem: Problem,
    keep: Tensor,
    config: PruneConfig,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Tensor:
    """The algorithm of `train_masks` for the edges between the nodes of `keep`.

    Returns:
        float `(E,)` in [-1, 1]; -1 for edges that are not between these nodes.
    """
    between = problem.edges.between(keep)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(int(between.sum()), generator=generator)
    mask = (config.start + config.noise * noise).clamp(-1, 1).requires_grad_(True)
    scale = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [mask], "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": [scale], "lr": 1e-2, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    price = Price(config)
    batches = problem.batches(config.pairs, seed)
    whole = torch.where(keep, 1.0, -1.0).unsqueeze(0)
    disable = None if progress is None else not progress
    with EdgeGradients(problem) as gradients:
        for step in tqdm(range(config.steps), "edges", unit=" steps", disable=disable, leave=False):
            batch = next(batches)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / config.steps)
            removed = torch.zeros_like(between)
            removed[between] = mask.detach() <= 0
            with (
                problem.removing(removed),
                masked(problem.model, whole, problem.means, 1.0),
            ):
                margins = margin(problem.model, batch)
                sign = torch.where(batch.positive, 1.0, -1.0)
                loss = torch.nn.functional.softplus(
                    -(margins * scale[0].exp() + sign * scale[1])
                ).mean()
                loss.backward()
            with torch.no_grad():
                share = torch.sigmoid(mask / config.temperature)
                slope = share * (1 - share) / config.temperature
                mask.grad = slope * (gradients.take()[between] + price.after(float(loss)))
                torch.nn.utils.clip_grad_norm_([mask], config.clip)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                mask.clamp_(-1, 1)
    found = torch.full((len(between),), -1.0)
    found[between] = mask.detach()
    return found


class Price:
    """What a node or edge costs now; see `PruneConfig.aim`."""

    def __init__(self, config: PruneConfig) -> None:
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
