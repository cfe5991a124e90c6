"""The places of a model at which hooks.py records and replaces what flows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Replacement = Callable[[Tensor], Tensor]
Recording = Callable[[Tensor], None]


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
            return self._through(self.names[0], x)
        parts = zip(self.names, x.unbind(2), strict=True)
        return torch.stack([self._through(name, part) for name, part in parts], 2)

    def _through(self, name: str, x: Tensor) -> Tensor:
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
