"""The registry of cases: layer shapes of the published weight-sparse transformers, and their goals.

Widths 256 to 4096 (`d_model`), densities 1/16 to 1/1024 and never fewer than 4 inputs per output
(Gao et al., 2025, "Weight-sparse transformers have interpretable circuits", section 2 and the
released code). Each block of the model has four weight-sparse matrices: the fused q, k, v
projection, the attention output projection and the two of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from sparse_kernels.layout import Problem

PRODUCTS = ("forward", "grad_input", "grad_weight")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CPU_DTYPES = ("float32", "bfloat16")
TOKENS, GPU_TOKENS = 2048, 16384
BLOCKS = ((1, 1), (4, 1), (16, 1), (16, 16), (32, 32))
SQUARES = ((16, 16), (32, 32), (64, 64), (128, 128))
DENSITY_INVERSES = (16, 32, 64, 128, 256, 512, 1024)
# No neuron or channel of the published models keeps fewer.
MIN_FAN_IN = 4

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
        """What identifies the case in a row of results."""
        return {
            "M": self.tokens,
            "K": self.in_features,
            "N": self.out_features,
            "fan_in": self.fan_in,
            "block": f"{self.block[0]}x{self.block[1]}",
            "dtype": self.dtype,
            "density": self.fan_in / self.in_features,
        }

    def problems(self, device: str) -> list[Problem]:
        """What a backend must be able to run."""
        sizes = (self.out_features, self.in_features, self.fan_in, self.block)
        return [Problem(device, DTYPES[self.dtype], name, *sizes) for name in PRODUCTS]

    def __str__(self) -> str:
        return (
            f"{self.in_features}->{self.out_features} fan_in={self.fan_in} "
            f"{self.block[0]}x{self.block[1]} {self.dtype} M={self.tokens}"
        )


@dataclass(frozen=True)
class TopkCase:
    """abs_topk of `M` rows of `D` entries, of which `k` are kept."""

    tokens: int
    width: int
    k: int
    dtype: str

    @property
    def columns(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        return {"M": self.tokens, "D": self.width, "k": self.k, "dtype": self.dtype}

    def problems(self, device: str) -> list[Problem]:
        """What a backend must be able to run."""
        return [Problem(device, DTYPES[self.dtype], "abs_topk")]

    def __str__(self) -> str:
        return f"D={self.width} k={self.k} {self.dtype} M={self.tokens}"


AnyCase = Case | TopkCase


@dataclass(frozen=True)
class Goal:
    """The least speed-up of a product over a column `OVER_ms`, or over another case."""

    case: AnyCase
    product: str
    over: str | AnyCase
    least: float


def _goals() -> Iterator[Goal]:
    for shape, over_masked, over_dense in (
        ((1024, 1024, 64), 12.0, 2.5),
        ((1024, 4096, 32), 25.0, 5.0),
        ((4096, 1024, 128), 20.0, 4.0),
        ((2048, 8192, 8), 100.0, 20.0),
    ):
        case = Case(TOKENS, *shape)
        yield Goal(case, "step", "masked_dense", over_masked)
        yield Goal(case, "step", "best_dense", over_dense)
        yield Goal(replace(case, dtype="bfloat16"), "step", case, 1.3)
    for dtype in CPU_DTYPES:
        unshared = Case(TOKENS, 1024, 1024, 128, dtype=dtype)
        yield Goal(replace(unshared, block=(16, 1)), "step", unshared, 1.8)
        yield Goal(Case(1, 2048, 8192, 8, dtype=dtype), "forward", "dense", 20.0)
    # On a GPU, over cuBLAS. A density that no fan-in meets is rounded up to the next block: 10% of
    # 4096 in blocks of 32 is 416.
    for shape, side, forward, step in (
        ((4096, 4096, 4), 1, 6.0, 4.0),
        ((2048, 8192, 8), 1, 3.0, 2.0),
        ((4096, 4096, 416), 32, 3.0, 2.5),
        ((4096, 4096, 256), 64, 6.0, 5.0),
        ((8192, 8192, 896), 128, 5.0, 5.0),
    ):
        case = Case(GPU_TOKENS, *shape, (side, side), "bfloat16")
        yield Goal(case, "forward", "dense", forward)
        yield Goal(case, "step", "dense", step)
    yield Goal(TopkCase(TOKENS, 8192, 2048, "float32"), "abs_topk forward", "torch", 12.0)
    yield Goal(TopkCase(GPU_TOKENS, 8192, 2048, "bfloat16"), "abs_topk forward", "torch", 20.0)


GOALS = tuple(_goals())
WITH_GOAL = frozenset(goal.case for goal in GOALS)


def combine(
    tokens: Iterable[int],
    shapes: Iterable[Shape],
    blocks: Iterable[tuple[int, int]] = ((1, 1),),
    dtypes: Iterable[str] = ("float32",),
) -> list[Case]:
    """All combinations in which the block divides the fan-in."""
    every = product(tokens, shapes, blocks, dtypes)
    return [Case(m, *shape, block, d) for m, shape, block, d in every if shape[2] % block[1] == 0]


def published(widths: Iterable[int]) -> list[Shape]:
    """The attention output, fused q, k, v and MLP of these widths, at every density."""
    return [
        (in_features, out_features, in_features // inverse)
        for w in widths
        for in_features, out_features in ((w, w), (w, 3 * w), (w, 4 * w), (4 * w, w))
        for inverse in DENSITY_INVERSES
        if in_features // inverse >= MIN_FAN_IN
    ]


LAYERS_WITH_GOAL = [
    goal.case for goal in GOALS if isinstance(goal.case, Case) and goal.case.tokens == TOKENS
]
# In about a minute: the goals, one unshared index list, one token, one where dense wins.
DEFAULT = [
    *(case for case in LAYERS_WITH_GOAL if case.dtype == "float32"),
    *combine([TOKENS], [(1024, 4096, 32)], dtypes=["bfloat16"]),
    *combine([TOKENS], [(1024, 1024, 128), (1024, 1024, 768)]),
    *combine([1], [(2048, 8192, 8)]),
]
# In minutes: the goals in both dtypes, every block, the range of densities, widths and tokens.
WIDE = [
    *LAYERS_WITH_GOAL,
    *combine([TOKENS], [(1024, 1024, 128)], BLOCKS, CPU_DTYPES),
    *combine([TOKENS], [(1024, 4096, n) for n in (64, 16, 4)], ((1, 1), (16, 1), (16, 16))),
    *combine([TOKENS], [(256, 1024, 16), (256, 1024, 4), (1024, 256, 16), (4096, 4096, 4)]),
    *combine([1, 64], [(2048, 8192, 8), (1024, 4096, 32)], dtypes=CPU_DTYPES),
]
FULL = [
    *DEFAULT,
    *WIDE,
    *combine([1, 64, TOKENS], published((256, 512, 1024, 2048, 4096)), dtypes=CPU_DTYPES),
    *combine([TOKENS], published((512, 1024, 2048)), BLOCKS, CPU_DTYPES),
]
SMOKE = [
    *combine([1, 33], [(64, 128, 8)], dtypes=CPU_DTYPES),
    *combine([33], [(64, 128, 16)], ((16, 1), (16, 16))),
    *combine([TOKENS], [(64, 48, 4)]),
]
# In some minutes: the goals, every block from a density that pays to one that does not, decoding.
GPU = [
    *(goal.case for goal in GOALS if isinstance(goal.case, Case) and goal.case.tokens > TOKENS),
    *combine([GPU_TOKENS], [(4096, 4096, n) for n in (16, 128)], ((1, 1), (16, 1)), ["bfloat16"]),
    *combine([GPU_TOKENS], [(4096, 4096, n) for n in (128, 512, 1024)], SQUARES, ["bfloat16"]),
    *combine([GPU_TOKENS], [(2048, 8192, 8)], dtypes=("float32", "float16")),
    *combine([1, 64], [(2048, 8192, 8)], dtypes=["bfloat16"]),
    *combine([1, 64], [(4096, 4096, 416)], ((32, 32),), ["bfloat16"]),
]
# Every kernel on odd sizes.
GPU_SMOKE = [
    *combine([37], [(70, 45, 7)], dtypes=DTYPES),
    *combine([1], [(64, 33, 64)], dtypes=DTYPES),
    *combine([130], [(48, 64, 12)], ((4, 2),), DTYPES),
    *combine([65], [(96, 80, 32)], ((16, 1), (16, 16)), DTYPES),
    *combine([1, 97], [(256, 128, 128)], SQUARES[1:], DTYPES),
]


def matmul_cases(device: str, size: str) -> list[Case]:
    """The cases of `benchmarks.matmul`; `size` is "smoke", "default", "wide" or "full"."""
    if device == "cuda":
        cases = GPU_SMOKE if size == "smoke" else GPU
    else:
        cases = {"smoke": SMOKE, "default": DEFAULT, "wide": WIDE, "full": FULL}[size]
    return list(dict.fromkeys(cases))


def topk_cases(device: str, size: str) -> list[TopkCase]:
    """The cases of `benchmarks.activation`; every `size` but "smoke" has the same."""
    many = TOKENS if device == "cpu" else GPU_TOKENS
    tokens, widths = (33, (64, 300)) if size == "smoke" else (many, (1024, 2048, 4096, 8192, 16384))
    dtypes = CPU_DTYPES if device == "cpu" else tuple(DTYPES)
    return [
        TopkCase(tokens, width, width // share, dtype)
        for dtype, share, width in product(dtypes, (4, 16), widths)
    ]
