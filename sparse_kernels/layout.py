"""The pattern of a fixed-fan-in block-sparse matrix: which blocks exist, validated once.

A matrix `W` of shape `(N, K)` is cut into blocks of `(block_out, block_in)` elements. Every
block-row keeps exactly `F` blocks (`fan_in = F * block_in` inputs of every output), so the pattern
is one rectangular table, `indices (N/block_out, F)`, and the values are one dense tensor next to
it, `values (N/block_out, F, block_out, block_in)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sparse_kernels import checks

try:
    from _sparse_kernels_cpu import checksum as _checksum
    from _sparse_kernels_cpu import has_content as _has_content
except ImportError:  # no extension, or an old one: `cpu` says which
    _checksum = _has_content = None


@dataclass(frozen=True)
class Problem:
    """What a backend is asked to run; `why_not(problem)` of each backend answers from this alone.

    `product` is the name of the backends' function. The geometry is that of the layout and stays at
    its defaults for operations that have none.
    """

    device: str
    dtype: torch.dtype
    product: str
    out_features: int = 0
    in_features: int = 0
    fan_in: int = 0
    block: tuple[int, int] = (1, 1)


class Transposed(NamedTuple):
    """For each input block column: the block-rows that read it (ascending), and the slot in each.

    Column `c` owns the entries `offsets[c]:offsets[c + 1]` of `rows` and `slots`; entry `e` is the
    block `values[rows[e], slots[e]]`.
    """

    offsets: Tensor  # (C + 1,) int64
    rows: Tensor  # (R * F,) int32
    slots: Tensor  # (R * F,) int32


def _distinct(
    rows: int, columns: int, count: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """(rows, count) int64: in each row a uniform choice of `count` distinct columns, sorted.

    Draws all entries, then redraws repeated ones until none is left. A row is then the first
    `count` distinct values of a sequence of independent uniform draws: a uniform subset.
    """
    chosen = torch.randint(columns, (rows, count), generator=generator, device=device)
    chosen = chosen.sort(dim=1).values
    pending = torch.arange(rows, device=device)
    while True:
        candidates = chosen[pending]
        repeated = candidates[:, 1:] == candidates[:, :-1]
        hit = repeated.any(dim=1)
        pending, candidates, repeated = pending[hit], candidates[hit], repeated[hit]
        if pending.numel() == 0:
            return chosen
        redraws = (int(repeated.sum()),)
        fresh = torch.randint(columns, redraws, generator=generator, device=device)
        candidates[:, 1:][repeated] = fresh
        chosen[pending] = candidates.sort(dim=1).values


def _first(hits: Tensor) -> tuple[int, ...]:
    """The position of the first true element, to name it in a message."""
    return tuple(int(i) for i in hits.nonzero()[0])


def _check_indices(indices: object, block_rows: int | None, block_cols: int) -> Tensor:
    """Returns an int32 contiguous copy of `indices`, or raises and says what is wrong with it."""
    indices = checks.check_strided("indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}")
    if indices.dim() != 2:
        raise ValueError(
            f"indices must have two dimensions (out_features / block_out, fan_in / block_in), "
            f"got shape {tuple(indices.shape)}"
        )
    checks.check_has_values("indices", indices)
    rows, width = indices.shape
    if block_rows is not None and rows != block_rows:
        raise ValueError(
            f"indices must have out_features / block_out = {block_rows} rows, "
            f"got shape {tuple(indices.shape)}"
        )
    if rows < 1 or not 1 <= width <= block_cols:
        raise ValueError(
            f"indices must have at least one row and 1 to in_features / block_in = {block_cols} "
            f"columns, got shape {tuple(indices.shape)}"
        )
    checks.check_num_blocks(rows, width)
    outside = (indices < 0) | (indices >= block_cols)
    if outside.any():
        row, slot = _first(outside)
        raise ValueError(
            f"indices must lie in [0, {block_cols}) (in_features / block_in), "
            f"got {int(indices[row, slot])} at [{row}, {slot}]"
        )
    falling = indices[:, 1:] <= indices[:, :-1]
    if falling.any():
        row, slot = _first(falling)
        pair = (int(indices[row, slot]), int(indices[row, slot + 1]))
        kind = "a duplicate" if pair[0] == pair[1] else "out of order"
        raise ValueError(
            f"indices must be strictly increasing along each row, "
            f"got {pair[0]} then {pair[1]} ({kind}) at [{row}, {slot}:{slot + 2}]"
        )
    # A normal tensor even when built in inference mode, so that training may follow.
    with torch.inference_mode(False), checks.outside_transforms(indices):
        return indices.detach().to(torch.int32).clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False, repr=False)
class FanInLayout:
    """Which blocks of an `(out_features, in_features)` matrix exist; immutable.

    The matrix is `W[r * block_out + a, indices[r, f] * block_in + b] = values[r, f, a, b]`, zero
    elsewhere. The layout keeps its own validated copy of `indices`: writing to the tensor that it
    was made from changes nothing here. Do not write to the tensors that its attributes return.

    Args:
        indices: int32 or int64 `(out_features / block_out, F)`, the kept input blocks of each
            output block-row, strictly increasing, in `[0, in_features / block_in)`. The attribute
            is int32 and contiguous.
        in_features: columns `K` of the matrix, a multiple of `block_in`.
        out_features: rows `N`, a multiple of `block_out`; by default `len(indices) * block_out`.
        block: `(block_out, block_in)`, the smallest unit kept or dropped.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, size or index, or more than
            2^31 - 1 blocks. The message names the argument, what it got and what it needs.
    """

    indices: Tensor
    in_features: int
    out_features: int = None  # type: ignore[assignment]  # set in __post_init__
    block: tuple[int, int] = (1, 1)
    # What is computed from the pattern, by "transposed" or "<backend>.<lists>"; see `derive`.
    cache: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        out_features = cast("int | None", self.out_features)
        if out_features is None:
            # Without rows `_check_indices` says what is wrong.
            shape = getattr(self.indices, "shape", None) or (1,)
            out_features = max(shape[0], 1) * checks.check_block(self.block)[0]
        block = checks.check_geometry(out_features, self.in_features, self.block)
        out_features, in_features = int(out_features), int(self.in_features)
        indices = _check_indices(self.indices, out_features // block[0], in_features // block[1])
        self.__dict__.update(
            indices=indices, in_features=in_features, out_features=out_features, block=block
        )

    @classmethod
    def _wrap(cls, indices: Tensor, in_features: int, block: tuple[int, int]) -> FanInLayout:
        """A layout over tensors that are known to be valid: no copy, no check."""
        layout = object.__new__(cls)
        layout.__dict__.update(
            indices=indices,
            in_features=in_features,
            out_features=indices.shape[0] * block[0],
            block=block,
            cache={},
        )
        return layout

    @classmethod
    def random(
        cls,
        out_features: int,
        in_features: int,
        fan_in: int,
        block: tuple[int, int] = (1, 1),
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> FanInLayout:
        """A layout whose block-rows are independent uniform choices without replacement.

        Args:
            out_features: rows of the matrix.
            in_features: columns of the matrix.
            fan_in: inputs of each output in elements, a multiple of `block_in`.
            block: `(block_out, block_in)`.
            generator: makes the pattern reproducible; by default torch's global CPU generator.
                The pattern is drawn on the generator's device, for any `device`.
            device: where the layout's tensors live, by default torch's default device.

        Memory and time are proportional to the blocks kept, not to the matrix.

        Raises:
            TypeError, ValueError: a size or block that does not fit; the message names it.
        """
        block = checks.check_geometry(out_features, in_features, block)
        out_features, in_features = int(out_features), int(in_features)
        rows, columns = out_features // block[0], in_features // block[1]
        count = checks.check_fan_in(fan_in, in_features, block[1])
        checks.check_num_blocks(rows, count)
        where = torch.get_default_device() if device is None else torch.device(device)
        checks.check_has_values("a random layout", torch.empty(0, device=where))
        source = torch.device("cpu") if generator is None else generator.device
        with torch.inference_mode(False):
            if 2 * count <= columns:
                indices = _distinct(rows, columns, count, generator, source)
            else:
                # Draw the columns that are dropped: they are fewer, and redrawing is short.
                dropped = _distinct(rows, columns, columns - count, generator, source)
                kept = torch.ones(rows, columns, dtype=torch.bool, device=source)
                indices = kept.scatter_(1, dropped, False).nonzero()[:, 1].view(rows, count)
            return cls._wrap(indices.to(where, torch.int32).contiguous(), in_features, block)

    @property
    def blocks_per_row(self) -> int:
        """`F`, blocks kept in each block-row."""
        return self.indices.shape[1]

    @property
    def fan_in(self) -> int:
        """Inputs kept by each output, in elements: `F * block_in`."""
        return self.indices.shape[1] * self.block[1]

    @property
    def block_rows(self) -> int:
        """`R = out_features / block_out`."""
        return self.indices.shape[0]

    @property
    def block_cols(self) -> int:
        """`C = in_features / block_in`."""
        return self.in_features // self.block[1]

    @property
    def num_blocks(self) -> int:
        """Blocks kept in all, `R * F`."""
        return self.block_rows * self.blocks_per_row

    @property
    def nnz(self) -> int:
        """Elements kept in all (L0): `out_features * fan_in`."""
        return self.out_features * self.fan_in

    @property
    def density(self) -> float:
        """Kept elements over all elements: `fan_in / in_features`."""
        return self.fan_in / self.in_features

    @cached_property
    def values_shape(self) -> tuple[int, int, int, int]:
        """The shape that `values` must have: `(R, F, block_out, block_in)`."""
        return (self.indices.shape[0], self.indices.shape[1], *self.block)

    @property
    def device(self) -> torch.device:
        """Where the layout's tensors live."""
        return self.indices.device

    @property
    def transposed(self) -> Transposed:
        """The same pattern by input block column; built at first use, cached, deterministic."""
        return cast("Transposed", self.derive("transposed", _transpose))

    def derive(self, key: str, build: Callable[[FanInLayout], Any]) -> Any:
        """`cache[key]`, made by `build(self)` at first use: tensors, or an object of a backend."""
        found = self.cache.get(key)
        if found is None:
            checks.refuse_capture(self.device)
            with torch.inference_mode(False), checks.outside_transforms(self.indices):
                found = build(self)
            if _can_keep(found):
                checks.finish(self.device)
                return self.cache.setdefault(key, found)  # another thread may have been faster
        return found

    def to(self, device: torch.device | str) -> FanInLayout:
        """The same pattern on `device`, without the cache; itself if it is there."""
        indices = self.indices.to(device)
        if indices is self.indices:
            return self
        checks.check_has_values("a layout", indices)
        return FanInLayout._wrap(indices, self.in_features, self.block)

    def __eq__(self, other: object) -> bool:
        """True if the other layout describes the same pattern, on any device."""
        if not isinstance(other, FanInLayout):
            return NotImplemented
        if self is other:
            return True
        mine = (self.out_features, self.in_features, self.block, self.indices.shape)
        theirs = (other.out_features, other.in_features, other.block, other.indices.shape)
        return mine == theirs and torch.equal(self.indices, other.indices.to(self.device))

    def __hash__(self) -> int:
        return hash((self.out_features, self.in_features, self.block, self.checksum))

    @cached_property
    def checksum(self) -> int:
        """`checksum(indices)`."""
        return checksum(self.indices)

    def is_held_by(self, indices: Tensor) -> bool:
        """Whether `indices` has the dtype, device and content of this layout's own.

        On a CPU it reads `indices` once, at the speed of memory, and compares checksums.
        """
        same = None
        if _has_content is not None and indices.is_cpu:
            same = _has_content(indices, self.indices, self.checksum)
        if same is None:
            alike = indices.dtype == torch.int32 and indices.device == self.device
            same = alike and torch.equal(indices, self.indices)
        return same

    def __copy__(self) -> FanInLayout:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FanInLayout:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructor validates what was stored. Caches are not stored.
        return FanInLayout, (self.indices, self.in_features, self.out_features, self.block)

    def __repr__(self) -> str:
        return (
            f"FanInLayout(out_features={self.out_features}, in_features={self.in_features}, "
            f"fan_in={self.fan_in}, block={self.block}, device='{self.device}')"
        )


def _transpose(layout: FanInLayout) -> Transposed:
    # A stable sort keeps the entries of a column in the order of the table: row by row.
    columns, entries = layout.indices.flatten().sort(stable=True)
    bounds = torch.arange(layout.block_cols + 1, device=layout.device, dtype=torch.int32)
    width = layout.blocks_per_row
    return Transposed(
        torch.searchsorted(columns, bounds),
        torch.div(entries, width, rounding_mode="floor").to(torch.int32),
        (entries % width).to(torch.int32),
    )


class Pattern(NamedTuple):
    """What the operations need of a layout while they are traced: its `indices` are a tensor."""

    indices: Tensor
    in_features: int
    block: tuple[int, int]

    @property
    def out_features(self) -> int:
        """`N`."""
        return self.indices.shape[0] * self.block[0]

    @property
    def values_shape(self) -> tuple[int, int, int, int]:
        """`(R, F, block_out, block_in)`."""
        return (self.indices.shape[0], self.indices.shape[1], *self.block)


Layout = FanInLayout | Pattern


def check_layout(name: str, layout: object) -> None:
    """Raises TypeError unless `layout` is a FanInLayout."""
    checks.check_type(name, layout, FanInLayout, "a FanInLayout")


def checksum(indices: Tensor) -> int:
    """64 bits of the content of an int32 tensor, the same on every machine."""
    if not (indices.is_cpu and indices.is_contiguous()):
        indices = indices.cpu().contiguous()
    if _checksum is None:
        content = indices.numpy().tobytes()
        return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
    found: int = _checksum(indices)
    return found


def _can_keep(found: object) -> bool:
    """False for the tensors of a tracer, which are valid only during the trace."""
    tensors = found if isinstance(found, tuple) else ()
    return not torch.compiler.is_dynamo_compiling() and all(
        type(tensor) is Tensor for tensor in tensors
    )


# torch.load(weights_only=True) may build a layout, because the constructor validates.
torch.serialization.add_safe_globals([FanInLayout])
