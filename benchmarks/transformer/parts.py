"""Splits the time of a step, or of a forward, into parts.

Where a part begins and where it ends, its input and its output pass through a function that does
nothing but tell a clock; in the backward, where gradients pass the other way, so does its
derivative. At any moment one part is running, so that the parts add up to the whole. The telling
itself takes some microseconds a time: some percent of a small step, less of a large one.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import Function

import sparse_kernels as sk
from sparse_transformer import model as transformer
from sparse_transformer.model import SparseEmbedding

# In the order in which they are shown. GELU and the blocks' norms belong to abs_topk where one
# kernel does both, else to the rest: residuals, embedding and loss.
PARTS = ("linears", "abs_topk", "attention", "rest", "optimizer", "topology")
# Where the model calls what is not a layer: holder, attribute, part.
_CALLS: tuple[tuple[Any, str, str], ...] = (
    (transformer._Keep, "__call__", "abs_topk"),
    (transformer._Keep, "of_norm", "abs_topk"),
    (transformer._KeepGelu, "__call__", "abs_topk"),
    (transformer, "causal_attention", "attention"),
    (transformer, "cached_attention", "attention"),
)

Call = Callable[..., Tensor]


class PartClock:
    """Adds up the time of each part; at any moment one of them is running.

    On a GPU every change of parts waits for the device, which makes the whole slower.
    """

    def __init__(self, device: str) -> None:
        self._waits = device != "cpu"
        self.part = "rest"
        self._since = 0.0
        self._seconds: dict[str, float] = defaultdict(float)

    def start(self) -> None:
        """Forgets what was measured, and begins with the rest."""
        self._seconds.clear()
        self.part = "rest"
        self._since = self._now()

    def switch(self, part: str) -> None:
        """From now on `part` is running."""
        now = self._now()
        self._seconds[self.part] += now - self._since
        self.part, self._since = part, now

    def stop(self) -> dict[str, float]:
        """Milliseconds of each part since `start`."""
        self.switch("rest")
        return {part: 1e3 * self._seconds[part] for part in PARTS}

    def _now(self) -> float:
        if self._waits:
            torch.cuda.synchronize()
        return time.perf_counter()


def scaled(samples: Sequence[Mapping[str, float]], whole_ms: float) -> dict[str, float]:
    """The parts of the quickest sample, all times one factor, so that they add up to `whole_ms`.

    The quickest is the one that other processes disturbed least; `whole_ms` is what the same takes
    when nobody listens.
    """
    least = min(samples, key=lambda sample: sum(sample.values()))
    factor = whole_ms / sum(least.values())
    return {part: least[part] * factor for part in PARTS}


@contextlib.contextmanager
def split(model: nn.Module, clock: PartClock) -> Iterator[None]:
    """Inside, the clock is told what the model does. Not for a compiled model."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            is_linear = isinstance(module, (sk.SparseLinear, nn.Linear))
            if is_linear and not isinstance(module, SparseEmbedding):
                timed = _timed(module.forward, clock, "linears", 0)
                stack.enter_context(mock.patch.object(module, "forward", timed))
        for holder, name, part in _CALLS:
            is_method = isinstance(holder, type)
            timed = _timed(getattr(holder, name), clock, part, int(is_method))
            stack.enter_context(mock.patch.object(holder, name, timed))
        yield


def _timed(call: Call, clock: PartClock, part: str, position: int) -> Call:
    """`call` of which the clock knows; its argument at `position` is the one with a gradient."""

    def run(*arguments: Any) -> Tensor:
        before = clock.part
        x = _tell(arguments[position], clock, part, before)
        y = call(*arguments[:position], x, *arguments[position + 1 :])
        return _tell(y, clock, before, part)

    return run


def _tell(x: Tensor, clock: PartClock, forward_part: str, backward_part: str) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = Tell.apply(x, clock, forward_part, backward_part)
        return y
    clock.switch(forward_part)
    return x


class Tell(Function):
    """`y = x`, and the clock is told which part comes next: after it, and before it in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clock: PartClock, forward_part: str, backward_part: str
    ) -> Tensor:
        ctx.clock, ctx.part = clock, backward_part
        clock.switch(forward_part)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.switch(ctx.part)
        return grad, None, None, None
