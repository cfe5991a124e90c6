"""Named taps: record what flows through a model, or change it on the way.

The names are those of the released code: `{layer}.attn.act_in|q|k|v|y|resid_delta`,
`{layer}.mlp.act_in|post_act|resid_delta`, `final_resid`. All are `(B, T, width)`, after AbsTopK
where there is one; `act_in` is what the sublayer's matrix reads, `resid_delta` what is added to the
residual stream. `final_resid` is the stream after the last block, before the last norm.

    with taps.record(model, ["0.mlp.post_act"]) as seen:
        model(tokens)
    with taps.intervene(model, {"0.mlp.post_act": torch.zeros_like}):
        logits = model(tokens)

Outside of such a block a model pays one comparison with None for each tap. Contexts nest:
interventions act in the order in which they were entered, recordings see their result.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from sparse_transformer.model import MLP, Attention, ModelConfig, Transformer

Intervention = Callable[[Tensor], Tensor]

_ATTENTION = ("act_in", "q", "k", "v", "y", "resid_delta")
_MLP = ("act_in", "post_act", "resid_delta")


class _Taps:
    """What one module's taps do, by local name; installed as the module's `tap`."""

    def __init__(self) -> None:
        self.interventions: list[tuple[str, Intervention]] = []
        self.recordings: list[tuple[str, Callable[[Tensor], None]]] = []

    def __call__(self, name: str, value: Tensor) -> Tensor:
        for wanted, change in self.interventions:
            if wanted == name:
                value = change(value)
        for wanted, note in self.recordings:
            if wanted == name:
                note(value)
        return value


def names(model: Transformer) -> list[str]:
    """All tap names of the model, in the order in which a forward reaches them."""
    return _names(model.config.n_layer)


def _names(n_layer: int) -> list[str]:
    found = []
    for layer in range(n_layer):
        found += [f"{layer}.attn.{name}" for name in _ATTENTION]
        found += [f"{layer}.mlp.{name}" for name in _MLP]
    return [*found, "final_resid"]


def widths(config: ModelConfig) -> dict[str, int]:
    """How many channels each tap has, in the order of `names`."""
    heads = config.heads * config.d_head
    local = dict.fromkeys(("q", "k", "v", "y"), heads) | {
        "act_in": config.d_model + config.positions,
        "post_act": config.neurons,
    }
    return {
        name: local.get(name.rsplit(".", 1)[-1], config.d_model) for name in _names(config.n_layer)
    }


@contextmanager
def record(model: Transformer, which: Iterable[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Yields a dict that each forward inside the block fills: tap name to tensor, the latest.

    Args:
        model: the model.
        which: tap names; None for all.

    The tensors are those of the forward itself, with their gradient history; detach what is kept.

    Raises:
        ValueError: a name that is no tap's; the message has the nearest ones.
    """
    seen: dict[str, Tensor] = {}
    chosen = names(model) if which is None else list(which)
    modules = _modules(model, chosen)
    added = []
    for name, (module, local) in zip(chosen, modules, strict=True):

        def note(value: Tensor, name: str = name) -> None:
            seen[name] = value

        added.append((module, (local, note)))
    try:
        for module, entry in added:
            _taps(module).recordings.append(entry)
        yield seen
    finally:
        for module, entry in added:
            _remove(module, _taps(module).recordings, entry)


@contextmanager
def intervene(model: Transformer, changes: Mapping[str, Intervention]) -> Iterator[None]:
    """Inside the block every forward uses `fn(activation)` at each named tap.

    Args:
        model: the model.
        changes: tap name to a function of the activation that returns a new one of its shape.

    Raises:
        ValueError: a name that is no tap's; the message has the nearest ones. In the forward: a
            function that returns another shape.
    """
    modules = _modules(model, changes)
    added = [
        (module, (local, _checked(name, change)))
        for (name, change), (module, local) in zip(changes.items(), modules, strict=True)
    ]
    try:
        for module, entry in added:
            _taps(module).interventions.append(entry)
        yield
    finally:
        for module, entry in added:
            _remove(module, _taps(module).interventions, entry)


def _modules(
    model: Transformer, chosen: Iterable[str]
) -> list[tuple[Transformer | Attention | MLP, str]]:
    """The module of each name, and its name there."""
    known = names(model)
    found: list[tuple[Transformer | Attention | MLP, str]] = []
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the taps are {known}"
            raise ValueError(f"the model has no tap {name!r}: {hint}")
        if name == "final_resid":
            found.append((model, name))
            continue
        layer, part, local = name.split(".")
        module = model.get_submodule(f"blocks.{layer}.{part}")
        assert isinstance(module, (Attention, MLP))
        found.append((module, local))
    return found


def _taps(module: Transformer | Attention | MLP) -> _Taps:
    if not isinstance(module.tap, _Taps):
        module.tap = _Taps()
    return module.tap


def _remove(module: Transformer | Attention | MLP, entries: list, entry: object) -> None:
    for place, held in enumerate(entries):
        if held is entry:
            del entries[place]
            break
    taps = _taps(module)
    if not taps.interventions and not taps.recordings:
        module.tap = None


def _checked(name: str, change: Intervention) -> Intervention:
    def checked(value: Tensor) -> Tensor:
        changed = change(value)
        if changed.shape != value.shape:
            raise ValueError(
                f"the function for tap {name!r} must return shape {tuple(value.shape)}, "
                f"got {tuple(changed.shape)}"
            )
        return changed

    return checked
