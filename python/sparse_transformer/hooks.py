"""Hooks by name: record what flows through a model, or replace it on the way.

The names are those of the released code: `{layer}.attn.act_in|q|k|v|y|resid_delta`,
`{layer}.mlp.act_in|post_act|resid_delta`, `final_resid`. All are `(B, T, width)`, after AbsTopK
where there is one; `act_in` is what the sublayer's matrix reads, `resid_delta` what is added to the
residual stream. `final_resid` is the stream after the last block, before the last norm.

    activations = hooks.record(model, tokens)
    with hooks.recording(model, ["0.mlp.post_act"]) as seen:
        model(tokens)
    with hooks.replacing(model, {"0.mlp.post_act": torch.zeros_like}):
        logits = model(tokens)

The model has a `HookPoint`, an identity, at each of these places. Contexts nest: replacements act
in the order in which they were entered, recordings see their result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_transformer.config import ModelConfig
from sparse_transformer.errors import suggest

if TYPE_CHECKING:
    from sparse_transformer.model import Transformer

Replacement = Callable[[Tensor], Tensor]
Recording = Callable[[Tensor], None]

_ATTENTION = ("act_in", "q", "k", "v", "y", "resid_delta")
_MLP = ("act_in", "post_act", "resid_delta")


class HookPoint(nn.Module):
    """The identity, until a hook is attached.

    Args:
        names: one; or several, of the parts along axis 2 of what flows, `(B, T, parts, width)`.

    Attributes:
        replacements: `(name, function)`, which act in this order.
        recordings: `(name, function)`, which see what the replacements made.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.replacements: list[tuple[str, Replacement]] = []
        self.recordings: list[tuple[str, Recording]] = []

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        if not self.replacements and not self.recordings:
            return x
        if len(self.names) == 1:
            return self.through(self.names[0], x)
        parts = zip(self.names, x.unbind(2), strict=True)
        return torch.stack([self.through(name, part) for name, part in parts], 2)

    def through(self, name: str, x: Tensor) -> Tensor:
        """One part alone, `(B, T, width)`, to the same."""
        for wanted, replace in self.replacements:
            if wanted == name:
                x = replace(x)
        for wanted, record in self.recordings:
            if wanted == name:
                record(x)
        return x

    def extra_repr(self) -> str:
        """What `print(layer)` shows."""
        return ", ".join(self.names)


def names(model: Transformer) -> list[str]:
    """The names of all hook points, in the order in which a forward reaches them."""
    return list(widths(model.config))


def widths(config: ModelConfig) -> dict[str, int]:
    """How many channels flow through each hook point, in the order of `names`."""
    special = dict.fromkeys(("q", "k", "v", "y"), config.heads * config.d_head)
    special |= {"act_in": config.d_model + config.positions, "post_act": config.neurons}
    parts = (("attn", _ATTENTION), ("mlp", _MLP))
    found = {
        f"{layer}.{part}.{name}": special.get(name, config.d_model)
        for layer in range(config.n_layer)
        for part, names in parts
        for name in names
    }
    return found | {"final_resid": config.d_model}


@torch.no_grad()
def record(
    model: Transformer, tokens: Tensor, which: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Runs `model` on `tokens (B, T)` and returns its activations by name, without gradients.

    Args:
        tokens: int64 `(B, T)`.
        which: names; None for all.

    Raises:
        ValueError: a name that the model has not; the message has the nearest ones.
    """
    with recording(model, which) as seen:
        model(tokens)
    return seen


@contextmanager
def recording(
    model: Transformer, which: Iterable[str] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that each forward inside the block fills: name to tensor, the latest.

    The tensors are those of the forward itself, with their gradient history; detach what is kept.
    Names and errors are those of `record`.
    """
    seen: dict[str, Tensor] = {}
    chosen = names(model) if which is None else which
    with _attached(model, "recordings", {name: partial(seen.__setitem__, name) for name in chosen}):
        yield seen


@contextmanager
def replacing(model: Transformer, changes: Mapping[str, Replacement]) -> Iterator[None]:
    """Inside the block every forward uses `function(activation)` at each named place.

    Args:
        changes: name to a function of the activation that returns a new one of its shape.

    Raises:
        ValueError: as `record`. In the forward: a function that returns another shape.
    """
    checked = {name: _checked(name, change) for name, change in changes.items()}
    with _attached(model, "replacements", checked):
        yield


@contextmanager
def _attached(
    model: Transformer, kind: str, functions: Mapping[str, Callable[[Tensor], Any]]
) -> Iterator[None]:
    points = [_point(model, name) for name in functions]
    with ExitStack() as stack:
        for (point, local), function in zip(points, functions.values(), strict=True):
            entries, entry = getattr(point, kind), (local, function)
            entries.append(entry)
            stack.callback(_remove, entries, entry)
        yield


def _remove(entries: list[Any], entry: Any) -> None:
    # By identity: equal entries may be attached twice.
    del entries[next(place for place, held in enumerate(entries) if held is entry)]


def _point(model: Transformer, name: str) -> tuple[HookPoint, str]:
    """The hook point of that name, and the name there."""
    known = names(model)
    if name not in known:
        raise ValueError(f"the model has no hook point {name!r}: {suggest(name, known)}")
    *place, local = name.split(".")
    part = model.get_submodule(f"blocks.{'.'.join(place)}") if place else model
    points = (point for point in part.children() if isinstance(point, HookPoint))
    return next(point for point in points if local in point.names), local


def _checked(name: str, change: Replacement) -> Replacement:
    def checked(value: Tensor) -> Tensor:
        changed = change(value)
        if changed.shape != value.shape:
            raise ValueError(
                f"the function for {name!r} must return shape {tuple(value.shape)}, "
                f"got {tuple(changed.shape)}"
            )
        return changed

    return checked
