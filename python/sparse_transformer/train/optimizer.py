"""AdamW as the published recipe uses it: parameter groups, gradient RMS, learning rate.

Gao et al. 2025 (arXiv 2511.13653), section 2.1 and appendix A, and the training script released
with it. Where the two disagree the script is followed, and the docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_transformer.ranges import need_number
from sparse_transformer.train.sharding import whole

# Parts of a parameter's qualified name that exempt it from weight decay.
_NO_DECAY = {"bigram", "sinks"}
_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the published constants; the learning rate is that of d_model 1024."""

    learning_rate: float = 1.28e-2
    """Peak learning rate, which the schedule reaches at the final L0."""
    beta1: float = 0.9
    """Decay of the mean of the gradients in a step."""
    beta2: float = 0.95
    """Decay of the mean of their squares in a step."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    eps: float = 0.1
    """Added to the root of the mean square; large, because gradients are normalized to RMS 1."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            need_number(self, name, 0, math.inf, above=True)
        for name in ("beta1", "beta2"):
            need_number(self, name, 0, 0.999999)
        need_number(self, "weight_decay", 0, math.inf)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that require a gradient; fused where every device has that.

    Two groups: weights (decayed), then everything that is not (biases, norms, sinks, bigram). The
    released script decays after the step and the projection, AdamW before: the same to first order
    in the learning rate.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_weight = parameter.dim() > 1 and not _NO_DECAY & set(name.split("."))
        (decayed if is_weight else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    devices = {parameter.device.type for parameter in decayed + exempt}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=devices <= _FUSED_DEVICES,
    )


@torch.no_grad()
def normalize_gradients_(parameters: Iterable[Tensor], *, clip_only: bool) -> float:
    """Divides all gradients by their common RMS, in place; returns the RMS before.

    `g <- g / (RMS + 1e-5)` as the released script does, or with `clip_only` `g <- g / max(RMS, 1)`
    as the paper says. `RMS = sqrt(sum g^2 / count)` over every element of every gradient that
    exists, on any rank. Call it after the gradients were reduced over the ranks.

    For a masked dense model these are the gradients at all positions, for a sparse one those at the
    kept positions. The root of a *mean* makes the two comparable: a weight that exists sees about
    the same gradient in both. But what is dense in both (the bigram table, whose gradients are
    small) weighs more in the mean of the sparse one, so that its weights' gradients come out larger
    after the division. Adam divides that out, up to eps.

    If the RMS is not finite the gradients are left unchanged; the caller must stop.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    count = sum(grad.numel() for grad in grads)
    if count == 0:
        return 0.0
    rms = float(whole(torch.nn.utils.get_total_norm(grads))) / count**0.5
    if math.isfinite(rms):
        torch._foreach_mul_(grads, 1 / max(rms, 1.0) if clip_only else 1 / (rms + 1e-5))
    return rms


def learning_rate(
    step: int, total: int, base: float, fraction: float, *, warmup_share: float = 0.01
) -> float:
    """The sharkfin: linear warmup, then linear decay to zero, over the root of the L0 fraction.

    Args:
        step: from 0; the first step of a warmup has rate 0, as in the released script.
        total: steps of the run.
        base: the peak rate at the target L0.
        fraction: L0 now over L0 at the target, at least 1: rate / sqrt(fraction).
        warmup_share: share of the run (rounded down to steps) that warms up.
    """
    warmup = int(warmup_share * total)
    rise = step / warmup if step < warmup else (total - step) / (total - warmup)
    return base * max(rise, 0.0) / fraction**0.5
