"""Interventions on named nodes: what a model does when neurons or channels are changed.

A node is `HOOK:CHANNEL`, a hook point's name (hooks.py) and a channel of it, such as
`0.mlp.post_act:137`. `HOOK:3-7` are five nodes, `HOOK` alone is all of them. A change is made at
all tokens or at some: `"3"` is the token at position 3, `"-1"` the last one of each prompt, `"2-5"`
are four tokens and `"-3--1"` the last three.

    with intervene(model, [Set("0.mlp.post_act:137", 2.0), Ablate("1.attn.v:12", at="-1")]):
        logits = model(tokens)

Shapes: B prompts of at most T tokens, padded on the right, so that each has its own `last`
position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_transformer import hooks
from sparse_transformer.errors import UserError, suggest
from sparse_transformer.hooks import Replacement
from sparse_transformer.model import Transformer

# No number of more digits could be a channel or a position.
_NODE = re.compile(r"([\w.]+)(?::(\d{1,12})(?:-(\d{1,12}))?)?", re.ASCII)
_POSITIONS = re.compile(r"(-?\d{1,12})(?:-(-?\d{1,12}))?", re.ASCII)


@dataclass(frozen=True)
class Nodes:
    """Channels `first` to `last`, both included, of a hook point with `width` channels."""

    place: str
    first: int
    last: int
    width: int

    @classmethod
    def parse(cls, model: Transformer, text: str) -> Nodes:
        """Reads HOOK, HOOK:CHANNEL or HOOK:FIRST-LAST; a UserError if there are none."""
        match = _NODE.fullmatch(text)
        if match is None:
            raise UserError(
                f"{text!r} is not a node: write HOOK:CHANNEL or HOOK:FIRST-LAST, such as "
                f"0.mlp.post_act:3-7"
            )
        place, known = match[1], hooks.names(model)
        if place not in known:
            names = [name for name in known if name.startswith("0.") or "." not in name]
            few = f"{', '.join(names)}, and so on for {model.config.n_layer} layers"
            hint = suggest(place, known, f"hook points are {few}")
            raise UserError(f"the model has no hook point {place!r}: {hint}")
        width = hooks.widths(model.config)[place]
        first = int(match[2] or 0)
        last = int(match[3] or match[2] or width - 1)
        if not first <= last < width:
            raise UserError(
                f"the model has no {text}: {place} has {width} channels, 0 to {width - 1}, and a "
                f"range begins with the smaller one"
            )
        return cls(place, first, last, width)

    @property
    def channels(self) -> slice:
        """Of the place's last axis."""
        return slice(self.first, self.last + 1)


@dataclass(frozen=True, eq=False)
class Set:
    """The nodes become `value`.

    Attributes:
        node: as above.
        value: a number, or a tensor that broadcasts to `(B, T, channels)`.
        at: positions as above; or bool `(B, T)`; None for all.
    """

    node: str
    value: float | Tensor
    at: str | Tensor | None = None

    def new(self, old: Tensor) -> Tensor:
        """What `old (B, T, channels)` becomes where it is changed."""
        return torch.as_tensor(self.value, dtype=old.dtype, device=old.device)


@dataclass(frozen=True, eq=False)
class Add(Set):
    """`value` is added to the nodes."""

    def new(self, old: Tensor) -> Tensor:
        return old + super().new(old)


@dataclass(frozen=True, eq=False)
class Scale(Set):
    """The nodes are multiplied by `value`."""

    def new(self, old: Tensor) -> Tensor:
        return old * super().new(old)


@dataclass(frozen=True, eq=False)
class Ablate(Set):
    """The nodes become zero, or `value` if it is given: their mean, say."""

    value: float | Tensor = 0.0


@dataclass(frozen=True, eq=False)
class Patch:
    """The nodes get the activation that they have in another prompt.

    The first chosen position gets that of the other prompt's first chosen position, and so on:
    `"-1"` takes the last from the last. Without positions both prompts must have as many tokens.

    Attributes:
        node: as above.
        tokens: int64 `(T',)` for all prompts, or `(B, T')`, one for each.
        last: int64 `(B,)`, the last position of each other prompt; None if they all have T' tokens.
        at: as for `Set`; a bool tensor chooses the same positions in both.
    """

    node: str
    tokens: Tensor
    last: Tensor | None = None
    at: str | Tensor | None = None


Intervention = Set | Patch


Changes = Intervention | Sequence[Intervention] | Mapping[str, Replacement]


@contextmanager
def intervene(
    model: Transformer, changes: Changes, *, last: Tensor | None = None
) -> Iterator[None]:
    """Inside the block every forward uses the changed nodes.

    Args:
        changes: one intervention or several, which act in this order where they are about the same
            node; or a function of the activation for each named place.
        last: int64 `(B,)`, the last position of each prompt; None if there is no padding.

    A patch's other prompt is read once, on entry, under what is active there but not under these.

    Raises:
        UserError: there is no such node. In the forward: there are no such positions.
    """
    if isinstance(changes, Mapping):
        with hooks.replacing(model, changes):
            yield
        return
    chosen = [changes] if isinstance(changes, Intervention) else changes
    replacements = [_change(model, intervention, last) for intervention in chosen]
    with ExitStack() as stack:
        for place, change in replacements:
            stack.enter_context(hooks.replacing(model, {place: change}))
        yield


@torch.no_grad()
def next_logits(
    model: Transformer,
    tokens: Tensor,
    interventions: Sequence[Intervention] = (),
    *,
    last: Tensor | None = None,
) -> Tensor:
    """Logits `(B, V)` of what follows each prompt's last token; arguments as for `answer`."""
    last = _last(tokens, last)
    with intervene(model, interventions, last=last):
        logits: Tensor = model(tokens, at=last)
    return logits.squeeze(1)


def answer(
    model: Transformer,
    tokens: Tensor,
    answers: Tensor | Sequence[int],
    interventions: Sequence[Intervention] = (),
    *,
    last: Tensor | None = None,
) -> Tensor:
    """Logits `(B, A)` of A answers at each prompt's last token, under the interventions.

    Args:
        tokens: int64 `(B, T)`, padded on the right.
        answers: token ids, A of them for all prompts, or `(B, A)`.
        interventions: see `intervene`.
        last: int64 `(B,)`, the position of each prompt's last token; None if there is no padding.
    """
    logits = next_logits(model, tokens, interventions, last=last)
    wanted = torch.as_tensor(answers, device=logits.device)
    return logits.gather(1, wanted.expand(len(logits), -1))


def _last(tokens: Tensor, last: Tensor | None) -> Tensor:
    """`(B,)`: `last`, or the end of `tokens (B, T, ...)`."""
    if last is not None:
        return last.to(tokens.device)
    return torch.full((tokens.shape[0],), tokens.shape[1] - 1, device=tokens.device)


def _change(
    model: Transformer, intervention: Intervention, last: Tensor | None
) -> tuple[str, Replacement]:
    """The hook point's name and the function for it."""
    nodes, at = Nodes.parse(model, intervention.node), intervention.at
    moved = _moved(model, intervention, nodes) if isinstance(intervention, Patch) else None

    def change(activation: Tensor) -> Tensor:
        ends = _last(activation, last)
        old = activation[..., nodes.channels]  # (B, T, channels)
        if isinstance(intervention, Set):
            new = intervention.new(old)
        else:
            assert moved is not None
            new = moved(old, ends)
        here = _chosen(at, activation.shape[1], ends).unsqueeze(-1)  # (B, T, 1)
        changed = activation.clone()
        changed[..., nodes.channels] = torch.where(here, new, old)
        return changed

    return nodes.place, change


def _moved(model: Transformer, patch: Patch, nodes: Nodes) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of `old (B, T, channels)` and `last (B,)`: the other prompt's, where it goes."""
    tokens = patch.tokens if patch.tokens.dim() == 2 else patch.tokens.unsqueeze(0)
    other_last = _last(tokens, patch.last)
    with torch.no_grad(), hooks.recording(model, [nodes.place]) as seen:
        model(tokens, at=other_last)
    other = seen[nodes.place][..., nodes.channels]  # (B or 1, T', channels)

    def moved(old: Tensor, last: Tensor) -> Tensor:
        B, T, C = old.shape
        shift = torch.zeros_like(last)
        if not isinstance(patch.at, Tensor):
            first, final = _span(patch.at, last)
            other_first, other_final = _span(patch.at, other_last.expand_as(last))
            shift = other_first - first
            if bool((final + shift != other_final).any()):
                raise UserError(
                    f"{patch.node} cannot be patched at all of these positions, which are not as "
                    f"many in the other prompt: choose some that both have, such as @-1"
                )
        positions = torch.arange(T, device=old.device) + shift.unsqueeze(1)  # (B, T)
        # What comes from outside of the other prompt is not chosen.
        positions = positions.clamp_(0, other.shape[1] - 1).unsqueeze(-1).expand(-1, -1, C)
        return other.expand(B, -1, -1).gather(1, positions)

    return moved


def _chosen(at: str | Tensor | None, T: int, last: Tensor) -> Tensor:
    """bool `(B, T)`."""
    if isinstance(at, Tensor):
        if at.shape != (len(last), T) or at.dtype != torch.bool:
            raise ValueError(
                f"at must be bool of shape {(len(last), T)}, got {at.dtype} of {tuple(at.shape)}"
            )
        return at
    first, final = _span(at, last)
    positions = torch.arange(T, device=last.device)
    return (positions >= first.unsqueeze(1)) & (positions <= final.unsqueeze(1))


def _span(at: str | None, last: Tensor) -> tuple[Tensor, Tensor]:
    """First and last chosen position of each prompt, `(B,)`."""
    if at is None:
        return torch.zeros_like(last), last
    match = _POSITIONS.fullmatch(at)
    if match is None:
        raise UserError(f"@{at} is not a position: write @3, @2-5, or @-1 for the last token")
    first, final = (
        torch.full_like(last, end) if end >= 0 else last + 1 + end
        for end in (int(match[1]), int(match[2] or match[1]))
    )
    outside = (first < 0) | (final > last) | (first > final)
    if bool(outside.any()):
        tokens = int(last[outside][0]) + 1
        raise UserError(
            f"there is no @{at} in a prompt of {tokens} tokens: positions are 0 to {tokens - 1}, "
            f"or -{tokens} to -1, the first one first"
        )
    return first, final
