"""The registry of cases: layer shapes of the published weight-sparse transformers.

Widths 256 to 4096 (`d_model`), densities 1/16 to 1/1024 and never fewer than 4 inputs per output
(Gao et al., 2025, "Weight-sparse transformers have interpretable circuits", section 2 and the
released code). Each block of the model has four weight-sparse matrices: the fused q, k, v
projection, the attention output projection and the two of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from sparse_kernels.backends import PRODUCTS as PRODUCTS
from sparse_kernels.layout import Problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_DTYPES = ("float32", "bfloat16")
TOKENS, GPU_TOKENS = 2048, 16384
BLOCKS = ((1, 1), (4, 1), (16, 1), (16, 16), (32, 32))
SQUARES = ((16, 16), (32, 32), (64, 64), (128, 128))

Shape = tuple[int, int, int]  # in_features, out_features, fan_in


@dataclass(frozen=True)
class Case:
    """One matrix, one number of tokens, one dtype: all products of it are measured together."""

    tokens: int
    in_features: int
    out_features: int
    fan_in: int
    block: tuple[int, int] = (1, 1)
    dtype: str = "float32"

    @property
    def columns(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {"M": self.tokens, "K": self.in_features, "N": self.out_features}
        sizes |= {"fan_in": self.fan_in}
        block, density = f"{self.block[0]}x{self.block[1]}", self.fan_in / self.in_features
        return sizes | {"block": block, "dtype": self.dtype, "density": density}

    def problems(self, device: str) -> list[Problem]:
        sizes = (self.out_features, self.in_features, self.fan_in, self.block)
        return [Problem(device, DTYPES[self.dtype], name, *sizes) for name in PRODUCTS]

    def __str__(self) -> str:
        return name_of(self.columns)


@dataclass(frozen=True)
class TopkCase:
    """abs_topk of `M` rows of `D` entries, of which `k` are kept, or what is fused with it."""

    tokens: int
    width: int
    k: int
    dtype: str
    op: str = "abs_topk"

    @property
    def columns(self) -> dict[str, Any]:
        sizes = {"M": self.tokens, "D": self.width, "k": self.k}
        return {"op": self.op, **sizes, "dtype": self.dtype}

    def problems(self, device: str) -> list[Problem]:
        return [Problem(device, DTYPES[self.dtype], "abs_topk")]

    def __str__(self) -> str:
        return name_of(self.columns)


@dataclass(frozen=True)
class AttentionCase:
    """Causal attention with sinks: `B` sequences of `T` positions, `H` heads of `d` entries."""

    batch: int
    length: int
    heads: int
    d_head: int
    dtype: str

    @property
    def columns(self) -> dict[str, Any]:
        sizes = {"B": self.batch, "T": self.length, "H": self.heads, "d": self.d_head}
        return {"op": "attention", **sizes, "dtype": self.dtype}

    def problems(self, device: str) -> list[Problem]:
        return [Problem(device, DTYPES[self.dtype], "attention")]

    def __str__(self) -> str:
        return name_of(self.columns)


AnyCase = Case | TopkCase | AttentionCase


def name_of(row: Mapping[str, Any]) -> str:
    """The name of the case whose columns a row has; rows of older files lack `op`."""
    if "K" in row:
        return "{K}->{N} fan-in {fan_in} {block} {dtype} M={M}".format(**row)
    sizes = ("D", "k", "dtype", "M") if "D" in row else ("B", "T", "H", "d", "dtype")
    said = (row[name] if name == "dtype" else f"{name}={row[name]}" for name in sizes)
    return " ".join([row.get("op", "abs_topk"), *said])


def combine(
    tokens: Iterable[int],
    shapes: Iterable[Shape],
    blocks: Iterable[tuple[int, int]] = ((1, 1),),
    dtypes: Iterable[str] = ("float32",),
) -> list[Case]:
    """All combinations in which the block divides the fan-in."""
    every = product(tokens, shapes, blocks, dtypes)
    return [Case(m, *shape, block, d) for m, shape, block, d in every if shape[2] % block[1] == 0]


# Of an H200: how many times faster than cuBLAS, or torch.topk and scatter, forward and step are
# to be.
GOALS: dict[AnyCase, tuple[float, float | None]] = {
    Case(GPU_TOKENS, 4096, 4096, 4, dtype="bfloat16"): (6.0, 5.0),
    Case(GPU_TOKENS, 2048, 8192, 8, dtype="bfloat16"): (3.2, 3.0),
    Case(GPU_TOKENS, 4096, 4096, 416, (32, 32), "bfloat16"): (2.5, 2.2),
    Case(GPU_TOKENS, 4096, 4096, 256, (64, 64), "bfloat16"): (6.0, 5.0),
    Case(GPU_TOKENS, 8192, 8192, 896, (128, 128), "bfloat16"): (6.0, 6.0),
    TopkCase(GPU_TOKENS, 8192, 2048, "bfloat16"): (10.0, None),
}


# What else a step of the model does on an H200, at the width of the second goal.
FUSED: list[AnyCase] = [
    TopkCase(GPU_TOKENS, 8192, 2048, "bfloat16", "gelu_abs_topk"),
    TopkCase(GPU_TOKENS, 2048, 512, "bfloat16", "rms_norm_abs_topk"),
    AttentionCase(GPU_TOKENS // 256, 256, 128, 16, "bfloat16"),
]

# Tiny ones in their place, for a rehearsal on a CPU.
REHEARSED: list[AnyCase] = [
    Case(17, 24, 40, 3, dtype="bfloat16"),
    Case(9, 64, 64, 32, (32, 32), "bfloat16"),
    Case(9, 64, 64, 64, (64, 64), "bfloat16"),
    TopkCase(3, 64, 16, "bfloat16"),
]
REHEARSED_FUSED: list[AnyCase] = [
    TopkCase(5, 72, 18, "bfloat16", "gelu_abs_topk"),
    TopkCase(5, 72, 18, "bfloat16", "rms_norm_abs_topk"),
    AttentionCase(2, 9, 3, 8, "bfloat16"),
]


def goal_of(case: AnyCase, product: str) -> float | None:
    """How many times faster than the stock operation it is to be, if that is promised."""
    forward, step = GOALS.get(case, (None, None))
    return {"forward": forward, "abs_topk forward": forward, "step": step}.get(product)


# What the closing sentences and the table of README.md are about.
LAYERS = [(1024, 1024, 64), (1024, 4096, 32), (4096, 1024, 128), (2048, 8192, 8)]
HEADLINES: list[AnyCase] = [
    *combine([TOKENS], LAYERS, dtypes=CPU_DTYPES),
    *combine([TOKENS], [(1024, 1024, 128)], [(16, 1)], CPU_DTYPES),
    *combine([1], [(2048, 8192, 8)], dtypes=CPU_DTYPES),
    TopkCase(TOKENS, 8192, 2048, "float32"),
    *GOALS,
]

_HEADLINE_LAYERS = [case for case in HEADLINES if isinstance(case, Case)]
MATMUL_CASES: dict[tuple[str, str], list[Case]] = {
    ("cpu", "smoke"): [
        *combine([1, 33], [(64, 128, 8)], dtypes=CPU_DTYPES),
        *combine([33], [(64, 128, 16)], ((16, 1), (16, 16))),
        *combine([TOKENS], [(64, 48, 4)]),
    ],
    # In a minute: the headlines in float32, one where dense wins, one token.
    ("cpu", "default"): [
        *combine([TOKENS], LAYERS),
        *combine([TOKENS], [(1024, 1024, 128)], [(16, 1)]),
        *combine([TOKENS], [(1024, 1024, 768)]),
        *combine([1], [(2048, 8192, 8)]),
    ],
    # In minutes: also every block, a range of densities, other widths, few tokens.
    ("cpu", "full"): [
        *(case for case in _HEADLINE_LAYERS if case.tokens <= TOKENS),
        *combine([TOKENS], [(1024, 1024, 128)], BLOCKS, CPU_DTYPES),
        *combine([TOKENS], [(1024, 4096, n) for n in (64, 16, 4)], ((1, 1), (16, 1), (16, 16))),
        *combine([TOKENS], [(256, 1024, 16), (256, 1024, 4), (1024, 256, 16), (4096, 4096, 4)]),
        *combine([TOKENS], [(1024, 1024, 768)]),
        *combine([1, 64], [(2048, 8192, 8), (1024, 4096, 32)], dtypes=CPU_DTYPES),
    ],
    # Every kernel on odd sizes.
    ("cuda", "smoke"): [
        *combine([37], [(70, 45, 7)], dtypes=DTYPES),
        *combine([1], [(64, 33, 64)], dtypes=DTYPES),
        *combine([130], [(48, 64, 12)], ((4, 2),), DTYPES),
        *combine([65], [(96, 80, 32)], ((16, 1), (16, 16)), DTYPES),
        *combine([1, 97], [(256, 128, 128)], SQUARES[1:], DTYPES),
    ],
    ("cuda", "default"): [case for case in _HEADLINE_LAYERS if case.tokens == GPU_TOKENS],
    # In some minutes: also blocks from a density that pays to one that does not, few tokens.
    ("cuda", "full"): [
        *(case for case in _HEADLINE_LAYERS if case.tokens == GPU_TOKENS),
        *combine([GPU_TOKENS], [(4096, 4096, n) for n in (16, 128)], BLOCKS[:3:2], ["bfloat16"]),
        *combine([GPU_TOKENS], [(4096, 4096, n) for n in (128, 512, 1024)], SQUARES, ["bfloat16"]),
        *combine([GPU_TOKENS], [(2048, 8192, 8)], dtypes=("float32", "float16")),
        *combine([1, 64], [(2048, 8192, 8)], dtypes=["bfloat16"]),
        *combine([1, 64], [(4096, 4096, 416)], ((32, 32),), ["bfloat16"]),
    ],
}


def matmul_cases(device: str, size: str) -> list[Case]:
    """The cases of `benchmarks.matmul`; `size` is "smoke", "default" or "full"."""
    return list(dict.fromkeys(MATMUL_CASES[device, size]))


def topk_cases(device: str, size: str) -> list[TopkCase]:
    """The cases of `benchmarks.activation`: on a GPU, by default, the headline alone."""
    on_gpu = device == "cuda"
    if on_gpu and size == "default":
        return [case for case in GOALS if isinstance(case, TopkCase)]
    tokens = 33 if size == "smoke" else GPU_TOKENS if on_gpu else TOKENS
    widths = [64, 300] if size == "smoke" else [1024, 2048, 4096, 8192, 16384]
    every = product(DTYPES if on_gpu else CPU_DTYPES, (4, 16), widths)
    return [TopkCase(tokens, width, width // share, dtype) for dtype, share, width in every]


# The cases of a benchmark by its name, for a device and a size.
CASES: dict[str, Callable[[str, str], Sequence[AnyCase]]] = {
    "matmul": matmul_cases,
    "activation": topk_cases,
}
