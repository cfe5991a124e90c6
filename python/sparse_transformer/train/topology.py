"""Changes of the pattern during training: annealed fan-in, rewiring by sampled gradients.

The published recipe anneals the density of a dense matrix and lets weights compete in it. Here a
dense matrix never exists. Every sparse layer starts with a multiple of its final fan, and every
`period` steps

- its fan shrinks to the schedule's: the smallest magnitudes of each row go;
- a share of each row's connections, again the smallest, is dropped, and as many are grown where the
  gradient of a random set of candidates is largest (the drop-and-grow of RigL, Evci et al. 2020,
  arXiv 1911.11134, whose gradient is dense). New weights and their optimizer state start at zero.

The gradient at the candidates is the `grad_weight` product over a layout of the candidates. Cost
and memory of all this follow the number of connections and candidates, not the matrices.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sparse_kernels as sk
from sparse_transformer.ranges import need_choices, need_number, need_whole
from sparse_transformer.train.distributed import average_


@dataclass(frozen=True)
class TopologyConfig:
    """When and how the pattern of sparse weights changes during training.

    `start_multiple=1, drop_share=0` keeps the initial random pattern.
    """

    start_multiple: float = 8.0
    """Initial fan-in over final fan-in, at most dense."""
    anneal_share: float = 0.5
    """Share of the run in which the fan-in falls linearly to its target."""
    period: int = 20
    """Steps between changes of the pattern."""
    stop_share: float = 0.75
    """Share of the run after which the pattern no longer changes."""
    drop_share: float = 0.3
    """Share of each row that the first change replaces; it falls as a half cosine."""
    candidates: float = 0.06
    """Share of columns sampled as candidates of each row; at least twice as many as grow."""
    grow: Literal["gradient", "random"] = "gradient"
    """Which candidates grow: those with the largest gradient, or random ones as a control."""
    seed: int = 0
    """Random seed of the candidates."""

    def __post_init__(self) -> None:
        need_number(self, "start_multiple", 1, math.inf)
        need_whole(self, "period", 1)
        for name in ("anneal_share", "stop_share", "drop_share", "candidates"):
            need_number(self, name, 0, 1)
        need_choices(self)
        need_whole(self, "seed", 0, 2**63 - 1)


def annealed_fraction(
    step: int, total: int, start_multiple: float, stop_share: float = 0.5, start_share: float = 0.01
) -> float:
    """L0 at `step` over L0 at the end: linear from `start_multiple` to 1 between the two shares."""
    start, stop = start_share * total, stop_share * total
    progress = min(max((step - start) / (stop - start), 0.0), 1.0) if stop > start else 1.0
    return start_multiple + (1 - start_multiple) * progress


def annealed_after(total: int, share: float) -> int:
    """The step at which annealing reaches the target."""
    return min(math.ceil(share * total), total - 1)


class Topology:
    """Anneals and rewires all sparse layers of a model.

    Per step: `if wants_gradients(step): with capture(): forward, backward`, then
    `optimizer.step()`, then `step(step)`. The choices depend on the weights, the gradients and
    `(seed, step, layer)` alone, so that there is no state to lose: a resumed run and every rank of
    a distributed one decide alike (the candidates' gradients are averaged over the ranks).

    Args:
        model: has `sparse_layers()` and `target_fan(name)`, as `Transformer` does; its fans are
            those of `fan(name, step)` when training starts.
        optimizer: of all its sparse weights.
        config: see `TopologyConfig`.
        total_steps: of the run.
        anneal_steps: of the run as it was when its annealing began; by default `total_steps`. A run
            that is extended afterwards does not anneal again.

    Where the embedding is tied, its candidates are scored by the lookup's gradient alone.

    The layers are watched by forward hooks, which a compiled model does not call: run the steps
    with `wants_gradients` on the model itself.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer | None,
        config: TopologyConfig,
        total_steps: int,
        anneal_steps: int | None = None,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self._optimizer = optimizer
        self._layers: dict[str, sk.SparseLinear] = dict(model.sparse_layers())
        self._targets = {name: int(model.target_fan(name)) for name in self._layers}
        self.anneal_steps = total_steps if anneal_steps is None else anneal_steps
        self._last_shrink = annealed_after(self.anneal_steps, config.anneal_share)
        self._armed = -1
        self._candidates: dict[str, sk.FanInLayout] = {}
        self._gradients: dict[str, Tensor] = {}

    def fraction(self, step: int) -> float:
        """L0 at `step` over L0 at the end, as scheduled, before caps and rounding."""
        return annealed_fraction(
            step,
            self.anneal_steps,
            self.config.start_multiple,
            self.config.anneal_share,
            start_share=0.0,
        )

    def fan(self, name: str, step: int) -> int:
        """The fan, in elements, of layer `name` after a change at `step`."""
        layout, target = self._layers[name].layout, self._targets[name]
        if step >= self._last_shrink:
            return target
        extent = layout.block[1]
        wanted = round(target * self.fraction(step) / extent) * extent
        return min(max(wanted, target), layout.in_features)

    def replaced_share(self, step: int) -> float:
        """Share of each row that a change at `step` replaces: half a cosine down to 0."""
        stop = self.config.stop_share * self.total_steps
        if step >= stop:
            return 0.0
        return self.config.drop_share * 0.5 * (1 + math.cos(math.pi * step / stop))

    def changes(self, step: int) -> bool:
        """Whether `step(step)` changes anything."""
        if step == self._last_shrink:
            return self.config.start_multiple > 1
        due = step > 0 and step % self.config.period == 0
        shrinks = self.config.start_multiple > 1 and step < self._last_shrink
        return due and (shrinks or self.replaced_share(step) > 0)

    def wants_gradients(self, step: int) -> bool:
        """Whether forward and backward of `step` must run inside `capture()`; arms it."""
        wanted = (
            self.changes(step) and self.config.grow == "gradient" and self.replaced_share(step) > 0
        )
        self._armed = step if wanted else -1
        return wanted

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Gathers the gradient at the candidates during forward and backward of the armed step.

        Several forwards and backwards inside (gradient accumulation) add up.
        """
        if self._armed < 0:
            raise RuntimeError("capture() needs a step whose wants_gradients(step) is True")
        self._gradients = {}
        self._candidates = {
            name: self._draw(name, index, self._armed) for index, name in enumerate(self._layers)
        }
        handles = [
            layer.register_forward_hook(self._watcher(name)) for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _draw(self, name: str, index: int, step: int) -> sk.FanInLayout:
        """Random candidates for every row of a layer, some of which exist already.

        A row's columns are cut into as many ranges as it has candidates, of equal widths up to one,
        and one column is drawn from each: distinct and in order without a sort.
        """
        layout = self._layers[name].layout
        rows, columns = layout.block_rows, layout.block_cols
        _, replaced = self._blocks(name, step)
        count = min(max(round(self.config.candidates * columns), 2 * replaced, 1), columns)
        generator = _generator(layout.device, self.config.seed, step, index)
        drawn = torch.rand(rows, count, generator=generator, device=layout.device)
        bounds = torch.arange(count + 1, device=layout.device) * columns // count
        indices = bounds[:-1] + (drawn * bounds.diff()).long()
        # Rounding may lift the product to the width of its range.
        indices = torch.minimum(indices, bounds[1:] - 1)
        return sk.FanInLayout(indices, layout.in_features, layout.out_features, layout.block)

    def _blocks(self, name: str, step: int) -> tuple[int, int]:
        """Blocks of each row after a change at `step`, and how many of them are to be new."""
        fan = self.fan(name, step) // self._layers[name].layout.block[1]
        return fan, round(self.replaced_share(step) * fan)

    def _watcher(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def watch(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = sk.remember(inputs[0])
                output.register_hook(lambda grad: self._accumulate(name, x(), grad))

        return watch

    def _accumulate(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        layer, candidates = self._layers[name], self._candidates[name]
        if x.is_floating_point():
            outputs, inputs = grad_output, x.to(grad_output.dtype)
            if layer.transpose:  # the layout is that of the transposed matrix
                outputs, inputs = inputs, outputs
            gradient = sk.grad_weight(outputs, inputs, candidates, layer.backend)
        else:
            gradient = _embedding_gradient_at(candidates, x, grad_output)
        gradient = gradient.float()
        if name in self._gradients:
            self._gradients[name] += gradient
        else:
            self._gradients[name] = gradient

    @torch.no_grad()
    def step(self, step: int) -> bool:
        """Shrinks, drops and grows what is due at `step`; call it after `optimizer.step()`.

        Returns whether anything changed. Where fans changed the weights have new shapes. A
        RuntimeError if gradients are due and were not captured.
        """
        if not self.changes(step):
            return False
        share = self.replaced_share(step)
        by_gradient = share > 0 and self.config.grow == "gradient"
        if by_gradient and (self._armed != step or set(self._gradients) != set(self._layers)):
            missing = ", ".join(sorted(set(self._layers) - set(self._gradients))) or "all layers"
            raise RuntimeError(
                f"step {step} grows by gradient, which was not captured for {missing}: run its "
                f"forward and backward inside capture(), on the model that is not compiled"
            )
        if by_gradient:
            average_(list(self._gradients.values()))
        for index, (name, layer) in enumerate(self._layers.items()):
            candidates = scores = None
            if by_gradient:
                candidates, scores = self._candidates[name], self._gradients[name].abs()
            elif share > 0:
                candidates = self._draw(name, index, step)
                scores = torch.ones(candidates.values_shape, device=candidates.device)
            fan, replaced = self._blocks(name, step)
            new = rewired(layer.weight, layer.layout, fan, replaced, candidates, scores)
            sk.rewire_(layer, self._optimizer, new)
        self._armed, self._gradients, self._candidates = -1, {}, {}
        return True

    def hash(self) -> str:
        """SHA-256 over all patterns, in the order of the layers; the same on every rank."""
        digest = hashlib.sha256()
        for layer in self._layers.values():
            digest.update(layer.layout.indices.cpu().numpy().tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, str]:
        """A hash; the patterns themselves are in the model's state."""
        return {"hash": self.hash()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Raises ValueError unless the model has the patterns that were there when it was saved."""
        if state["hash"] != self.hash():
            raise ValueError(
                "the model's connections are not those that the checkpoint's topology was saved "
                "with: load the model's tensors of the same checkpoint first"
            )


def rewired(
    weight: Tensor,
    layout: sk.FanInLayout,
    fan: int,
    replaced: int,
    candidates: sk.FanInLayout | None = None,
    scores: Tensor | None = None,
) -> sk.FanInLayout:
    """The pattern after one change: of each row the largest stay, the best candidates join.

    Args:
        weight: `layout.values_shape`.
        layout: the pattern now, of F blocks a row.
        fan: blocks of each row afterwards, at most F.
        replaced: how many of them are to be new.
        candidates: layout of the same matrix and block whose blocks may join; those that exist
            already cannot. A row with too few that can keeps more of its own.
        scores: `candidates.values_shape`, not negative; a block's score is its sum.

    Among equals `torch.topk` chooses: alike on ranks that run the same software on the same device.
    """
    if fan > layout.blocks_per_row:
        raise ValueError(
            f"fans can only shrink: {layout} has {layout.blocks_per_row} blocks in a row, and the "
            f"schedule says {fan}; make the model with fan_multiple = start_multiple"
        )
    spare = 0
    if candidates is None or scores is None:
        replaced = 0
    else:
        replaced = min(replaced, fan, candidates.blocks_per_row)
        columns = candidates.indices
        place = torch.searchsorted(layout.indices, columns).clamp_(max=layout.blocks_per_row - 1)
        exists = layout.indices.gather(1, place) == columns
        score, best = (
            scores.flatten(2).sum(2).masked_fill_(exists, -1.0).topk(replaced, dim=1, sorted=False)
        )
        fails = score < 0  # (R, replaced): a place for which a row has no candidate left
        if replaced:
            spare = int(fails.sum(1).max())
    magnitude = weight.detach().abs().flatten(2).sum(2)  # (R, F)
    # Where candidates run out, the next largest of the row's own stay: then the order matters.
    kept = fan - replaced
    largest = magnitude.topk(kept + spare, dim=1, sorted=spare > 0).indices
    own = layout.indices.gather(1, largest)
    chosen = own[:, :kept]
    if replaced:
        new = columns.gather(1, best)
        if spare:
            following = kept + fails.cumsum(1).sub_(1).clamp_(min=0)
            new = torch.where(fails, own.gather(1, following), new)
        chosen = torch.cat([chosen, new], 1)
    indices = chosen.sort(dim=1).values
    return sk.FanInLayout(indices, layout.in_features, layout.out_features, layout.block)


def _embedding_gradient_at(layout: sk.FanInLayout, tokens: Tensor, grad_output: Tensor) -> Tensor:
    """That of a lookup: `dW[v, c] = sum of grad_output[t, c] over the tokens t that are v`.

    `layout` has a row for each of the V tokens and C blocks in it: memory of M x C and V x C.
    """
    ids = tokens.flatten()
    at = grad_output.reshape(ids.numel(), -1).gather(1, layout.indices[ids].long())  # (M, C)
    total = torch.zeros(layout.indices.shape, dtype=torch.float32, device=at.device)
    return total.index_add_(0, ids, at.float())[:, :, None, None]


def _generator(device: torch.device, *key: int) -> torch.Generator:
    """Seeded by all of `key`; unlike a sum, no two keys share a stream."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
