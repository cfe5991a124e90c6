"""Sparse training algorithms over `rewire_`: which connections a model has, step by step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from sparse_kernels.checks import check_fan_in, check_int, check_type
from sparse_kernels.layout import FanInLayout
from sparse_kernels.linear import SparseLinear
from sparse_kernels.matmul import grad_weight
from sparse_kernels.rewire import rewire_


class Static:
    """Keeps the pattern: the control, and what the other algorithms share.

    Call `step()` after every `optimizer.step()`. Step t, counted from 0, changes the pattern if
    `0 < t < until` and t is a multiple of `every`. In each row A (the F blocks of an output
    block-row; of an input's in a fan-out layer) the algorithm replaces k blocks:

        D = the k blocks of A with the smallest |w|        k = round(share(t) * F)
        G = k blocks that are not in A                     (fewer where so many are not absent)
        A = (A - D) + G                                    which keeps F

    |w| and |dL/dw| of a block are sums over its elements. Weights and optimizer state of G start at
    zero, the others keep theirs (`rewire_`). Weights, gradients (summed over all ranks), `seed` and
    t determine all choices: a resumed run and ranks that hold the same model choose alike.
    Bad arguments, and what `rewire_` refuses, raise TypeError or ValueError at once.

    Args:
        model: its `SparseLinear` layers that are trained are rewired.
        optimizer: of their weights, or None, which carries no state.
        until: the step from which the pattern stays.
        every: steps between changes.
        drop: the largest share of a row that is replaced at once, in [0, 1].
        seed: random seed of the choices.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        until: int,
        every: int = 100,
        drop: float = 0.3,
        seed: int = 0,
    ) -> None:
        check_type("model", model, nn.Module, "a torch.nn.Module")
        self.until, self.every = check_int("until", until), check_int("every", every)
        self.drop, self.seed = drop, check_int("seed", seed, minimum=0)
        if not 0 <= drop <= 1:
            raise ValueError(f"drop must be in [0, 1], got {drop}")
        layers = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
        self.layers = {n: layer for n, layer in layers.items() if layer.weight.requires_grad}
        if not self.layers:
            raise ValueError("model must have a SparseLinear that is trained: see sparsify_")
        for layer in self.layers.values():
            rewire_(layer, optimizer, layer.layout)  # refuses what could not be rewired later
        self.optimizer, self.steps = optimizer, 0

    def share(self) -> float:
        """The share of each row that the next `step` replaces if it is due."""
        return 0.0

    @property
    def due(self) -> bool:
        """Whether the next `step` rewires; `Static` then gives all layers the pattern they have."""
        return 0 < self.steps < self.until and self.steps % self.every == 0

    @torch.no_grad()
    def step(self) -> bool:
        """Counts a step, rewires all layers if it is `due`, and returns whether it was."""
        layers = self.layers.items() if self.due else ()
        for layer, layout in [(layer, self._choose(name, layer)) for name, layer in layers]:
            rewire_(layer, self.optimizer, layout)
        self.load_state_dict({"steps": self.steps + 1})
        return bool(layers)

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs beside the states of model and optimizer."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was saved, with the model and the optimizer of then."""
        self.steps = state["steps"]

    def _choose(self, name: str, layer: SparseLinear) -> FanInLayout:
        layout, width = layer.layout, self._width(name, layer.layout)
        count = min(round(self.share() * width), layout.block_cols - layout.blocks_per_row)
        magnitude = layer.weight.abs().flatten(2).sum(2)
        kept = layout.indices.gather(1, magnitude.topk(width - count, dim=1).indices)
        new = self._grow(name, layer, count) if count else kept[:, :0]
        indices = torch.cat([kept, new], 1).sort(1).values
        return FanInLayout(indices, layout.in_features, block=layout.block)

    def _width(self, name: str, layout: FanInLayout) -> int:
        """Blocks of each row after a change."""
        return layout.blocks_per_row

    def _grow(self, name: str, layer: SparseLinear, count: int) -> Tensor:
        """`(R, count)`: different absent blocks of each row."""
        raise NotImplementedError

    def _random(self, name: str, layout: FanInLayout, count: int) -> Tensor:
        """`(R, count)` uniformly random absent blocks of each row, strictly increasing."""
        stream = random.Random(f"{self.seed} {self.steps} {name}").getrandbits(63)
        generator = torch.Generator(layout.device).manual_seed(stream)
        (rows, width), absent = layout.indices.shape, layout.block_cols - layout.blocks_per_row
        drawn = FanInLayout.random(rows, absent, count, generator=generator, device=layout.device)
        # Absent block n comes after n absent ones, and the kept ones that have at most n before.
        before = layout.indices - torch.arange(width, dtype=torch.int32, device=layout.device)
        return drawn.indices + torch.searchsorted(before, drawn.indices, right=True)


class SET(Static):
    """Sparse evolutionary training (Mocanu et al. 2018, arXiv 1707.04780): grows at random.

        share(t) = drop            G = k uniformly random absent blocks

    Arguments: see `Static`. The paper drops over a whole layer and starts new weights at random.
    """

    def share(self) -> float:
        return self.drop

    def _grow(self, name: str, layer: SparseLinear, count: int) -> Tensor:
        return self._random(name, layer.layout, count)


class RigL(Static):
    """RigL (Evci et al. 2020, arXiv 1911.11134): grows where the loss is steepest.

        share(t) = drop / 2 * (1 + cos(pi * t / until))
        G = the k absent blocks with the largest |dL/dw|, L being all that step t differentiates

    Arguments: see `Static`. The paper drops and grows over a whole layer, also what was just
    dropped. Scoring takes the time of a dense gradient, but holds a few rows of it, no more than
    the layer has weights. In a step that is `due`, hooks keep each layer's inputs and output
    gradients. Compiled models do not call them (RuntimeError): run that step on the model itself.
    """

    _handles: tuple[Any, ...] = ()

    def share(self) -> float:
        return self.drop / 2 * (1 + math.cos(math.pi * min(self.steps / self.until, 1.0)))

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        super().load_state_dict(state)
        for handle in self._handles:
            handle.remove()
        self._seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}
        layers = self.layers.items() if self.due and self.share() > 0 else ()
        self._handles = tuple(la.register_forward_hook(self._watcher(name)) for name, la in layers)

    def _watcher(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not inputs or not inputs[0].is_floating_point():
                raise TypeError(f"{name} must be called with one float tensor; for lookups use SET")
            is_copy = layer is not self.layers[name]
            if output.requires_grad and not is_copy and not torch.compiler.is_compiling():
                x, seen = inputs[0].detach(), self._seen[name]
                output.register_hook(lambda dy: seen.append((dy, x.to(dy.dtype))))

        return watch

    def _scores(self, name: str, layout: FanInLayout, first: int = 0) -> Tensor:
        """`(R, F)`: |dL/dw| of a layer's rows from `first` on, at the blocks of their `layout`."""
        if not self._seen[name]:
            raise RuntimeError(f"{name} saw no backward pass in a step that is due: see RigL")
        layer, rows = self.layers[name], slice(first, first + layout.out_features)
        total = torch.zeros(layout.values_shape, device=layout.device)
        for dy, x in self._seen[name]:
            # The layout of a fan-out layer is that of the transposed matrix.
            outputs, inputs = (x, dy) if layer.transpose else (dy, x)
            total += grad_weight(outputs[..., rows], inputs, layout, layer.backend)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        return total.abs().flatten(2).sum(2)

    def _grow(self, name: str, layer: SparseLinear, count: int) -> Tensor:
        layout, best = layer.layout, list[Tensor]()
        columns = torch.arange(layout.block_cols, device=layout.device)
        for own in layout.indices.split(max(1, layout.num_blocks // len(columns))):
            first = sum(map(len, best)) * layout.block[0]
            rows = FanInLayout(columns.expand(len(own), -1), layout.in_features, block=layout.block)
            scores = self._scores(name, rows, first).scatter_(1, own.long(), -1.0)
            best.append(scores.topk(count, dim=1).indices)
        return torch.cat(best)


class AnnealedRigL(RigL):
    """RigL on random candidates while the fan falls: how `sparse_transformer` is trained.

        F(t) = fan * (1 + (multiple - 1) * max(0, 1 - t / anneal))    in blocks, at most F(t - 1)
        D = all of A but the F(t) - k blocks with the largest |w|     k = round(share(t) * F(t))
        G = the k of `candidates` random absent blocks with the largest |dL/dw|

    L0 falls linearly as in the recipe of Gao et al. (2025, arXiv 2511.13653), which prunes dense
    matrices by magnitude; GraNet (Liu et al. 2021, arXiv 2106.10404) unites pruning and RigL. The
    time of a change follows the candidates, not the matrix. Make the model with larger fans, such
    as `multiple` times the final ones. For checkpoints and DistributedDataParallel see `rewire_`.

    Args:
        fan: the final fan in elements, of all layers or by their names; others are `Static`'s.
        multiple: the first fan of the schedule over the final one.
        anneal: the step from which changes give the final fan, by default two thirds of `until`.
        candidates: the share of a row's blocks that are candidates; k at least.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        *,
        fan: int | Mapping[str, int],
        multiple: float = 8.0,
        anneal: int | None = None,
        candidates: float = 0.06,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, **options)
        self.anneal = check_int("anneal", 2 * self.until // 3 if anneal is None else anneal)
        self.multiple, self.candidates, self._last = multiple, candidates, {}
        if self.until <= math.ceil(self.anneal / self.every) * self.every:
            raise ValueError(f"until={self.until} must be after the change that ends annealing")
        if multiple < 1 or not 0 <= candidates <= 1:
            raise ValueError("multiple must be at least 1, and candidates in [0, 1]")
        for name, layer in self.layers.items():
            last = fan.get(name) if isinstance(fan, Mapping) else fan
            most, extent = layer.layout.fan_in, layer.layout.block[1]
            self._last[name] = check_fan_in(last, most, extent, f"fan of {name}")

    def _width(self, name: str, layout: FanInLayout) -> int:
        fraction = 1 + (self.multiple - 1) * max(0.0, 1 - self.steps / self.anneal)
        return min(round(self._last[name] * fraction), layout.blocks_per_row)

    def _grow(self, name: str, layer: SparseLinear, count: int) -> Tensor:
        layout, wanted = layer.layout, round(self.candidates * layer.layout.block_cols)
        sampled = min(max(wanted, count), layout.block_cols - layout.blocks_per_row)
        indices = self._random(name, layout, sampled)
        candidates = FanInLayout(indices, layout.in_features, block=layout.block)
        return indices.gather(1, self._scores(name, candidates).topk(count, dim=1).indices)
