"""The registry of cases: layer shapes of the published weight-sparse transformers, and their goals.

Widths 256 to 4096 (`d_model`), densities 1/16 to 1/1024 and never fewer than 4 inputs per output
(Gao et al., 2025, "Weight-sparse transformers have interpretable circuits", section 2 and the
released code). Each block of the model has four weight-sparse matrices: the fused q, k, v
projection, the attention output projection and the two of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product as every
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
TOKENS = (1, 64, 2048)
WIDTHS = (256, 512, 1024, 2048, 4096)
DENSITY_INVERSES = (16, 32, 64, 128, 256, 512, 1024)
# No neuron or channel of the published models keeps fewer.
MIN_FAN_IN = 4
# The least speed-ups of a step in float32, 1x1 blocks, by K, N and fan_in: over masked dense, over
# the best dense.
GOALS = {
    (1024, 1024, 64): (12.0, 2.5),
    (1024, 4096, 32): (25.0, 5.0),
    (4096, 1024, 128): (20.0, 4.0),
    (2048, 8192, 8): (100.0, 20.0),
}
GOAL_TOKENS = 2048
# On a GPU, over dense cuBLAS in bfloat16 with 16384 tokens. A density that no fan-in meets is
# rounded up to the next block: 10% of 4096 in blocks of 32 is 416.
GPU_GOALS = {
    (4096, 4096, 4, (1, 1)): {"forward": 6.0, "step": 4.0},
    (2048, 8192, 8, (1, 1)): {"forward": 3.0, "step": 2.0},
    (4096, 4096, 416, (32, 32)): {"forward": 3.0, "step": 2.5},
    (4096, 4096, 256, (64, 64)): {"forward": 6.0, "step": 5.0},
    (8192, 8192, 896, (128, 128)): {"forward": 5.0, "step": 5.0},
}
GPU_TOKENS = 16384
# The least speed-up of abs_topk's forward over torch, by tokens, width, k and dtype.
TOPK_GOALS = {(2048, 8192, 2048, "float32"): 12.0, (GPU_TOKENS, 8192, 2048, "bfloat16"): 20.0}


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
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def has_goal(self) -> bool:
        """Whether GOALS or GPU_GOALS names a speed for this case."""
        shape = (self.in_features, self.out_features, self.fan_in)
        if self.tokens == GPU_TOKENS:
            return (*shape, self.block) in GPU_GOALS and self.dtype == "bfloat16"
        return shape in GOALS and self.block == (1, 1) and self.tokens == GOAL_TOKENS

    @property
    def columns(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        decodes = self.tokens == 1 and (self.in_features, self.out_features) == (2048, 8192)
        return {
            "M": self.tokens,
            "K": self.in_features,
            "N": self.out_features,
            "fan_in": self.fan_in,
            "block": f"{self.block[0]}x{self.block[1]}",
            "dtype": self.dtype,
            "density": self.fan_in / self.in_features,
            "headline": self.has_goal or decodes or self.fan_in == 128,
        }

    def problems(self, device: str) -> list[Problem]:
        """What a backend must be able to run."""
        sizes = (self.out_features, self.in_features, self.fan_in, self.block)
        return [Problem(device, self.torch_dtype, product, *sizes) for product in PRODUCTS]

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
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def has_goal(self) -> bool:
        """Whether TOPK_GOALS names a speed for this case."""
        return (self.tokens, self.width, self.k, self.dtype) in TOPK_GOALS

    @property
    def columns(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        return {"M": self.tokens, "D": self.width, "k": self.k, "dtype": self.dtype}

    def problems(self, device: str) -> list[Problem]:
        """What a backend must be able to run."""
        return [Problem(device, self.torch_dtype, "abs_topk")]

    def __str__(self) -> str:
        return f"D={self.width} k={self.k} {self.dtype} M={self.tokens}"


def layer_shapes(width: int) -> tuple[tuple[int, int], ...]:
    """`(in_features, out_features)` of the sparse matrices of one block of width `d_model`.

    The attention output, the fused q, k, v, and the two of the MLP.
    """
    return ((width, width), (width, 3 * width), (width, 4 * width), (4 * width, width))


def published_layers() -> Iterator[tuple[int, tuple[int, int, int]]]:
    """`d_model` and `(in_features, out_features, fan_in)`: every layer, width and density."""
    for width in WIDTHS:
        for (in_features, out_features), inverse in every(layer_shapes(width), DENSITY_INVERSES):
            if in_features // inverse >= MIN_FAN_IN:
                yield width, (in_features, out_features, in_features // inverse)


def default_cases() -> list[Case]:
    """In about a minute: the goals, one shared index list, one token, one where dense wins."""
    return [
        *(Case(GOAL_TOKENS, *shape) for shape in GOALS),
        Case(GOAL_TOKENS, 1024, 4096, 32, dtype="bfloat16"),
        *(Case(GOAL_TOKENS, 1024, 1024, 128, block) for block in ((1, 1), (16, 1))),
        Case(1, 2048, 8192, 8),
        Case(GOAL_TOKENS, 1024, 1024, 768),
    ]


def wide_cases() -> list[Case]:
    """In minutes: the goals in both dtypes, every block, the range of densities and tokens."""
    cases = [Case(GOAL_TOKENS, *shape, dtype=dtype) for shape, dtype in every(GOALS, CPU_DTYPES)]
    # Blocks that share an index list, at one fan-in: what sharing is worth.
    for block in ((1, 1), (4, 1), (16, 1), (16, 16), (32, 32)):
        dtypes = CPU_DTYPES if block in ((1, 1), (16, 1)) else ("float32",)
        cases += [Case(2048, 1024, 1024, 128, block, dtype) for dtype in dtypes]
    # One shape over the densities, for the curve of each block (a 16x16 block keeps 16 inputs).
    for fan_in in (64, 16, 4):
        cases += [Case(2048, 1024, 4096, fan_in, block) for block in ((1, 1), (16, 1))]
    cases += [Case(2048, 1024, 4096, fan_in, (16, 16)) for fan_in in (64, 32, 16)]
    # The narrowest and the widest model, and the sparsest.
    narrow_and_wide = (
        (256, 1024, 16), (256, 1024, 4), (256, 768, 16), (1024, 256, 16), (2048, 2048, 32),
        (4096, 4096, 4),
    )  # fmt: skip
    cases += [Case(2048, *shape) for shape in narrow_and_wide]
    # Decoding, one token at a time and in small batches.
    shapes = ((2048, 8192, 8), (1024, 4096, 32))
    for tokens, shape, dtype in every((1, 64), shapes, CPU_DTYPES):
        cases.append(Case(tokens, *shape, dtype=dtype))
    return _grouped(cases)


def full_cases() -> list[Case]:
    """Every layer of every width at every density, in both dtypes; blocks at three widths."""
    cases = [*default_cases(), *wide_cases()]
    for width, shape in published_layers():
        for tokens, dtype in every(TOKENS, CPU_DTYPES):
            shares = width in (512, 1024, 2048) and tokens == GOAL_TOKENS
            for block in ((1, 1), (4, 1), (16, 1), (16, 16), (32, 32)) if shares else ((1, 1),):
                if shape[2] % block[1] == 0:
                    cases.append(Case(tokens, *shape, block, dtype))
    return _grouped(cases)


def smoke_cases() -> list[Case]:
    """Tiny: every kind of case in seconds."""
    cases = [Case(tokens, 64, 128, 8, dtype=dtype) for tokens in (1, 33) for dtype in CPU_DTYPES]
    cases += [Case(33, 64, 128, 16, block) for block in ((16, 1), (16, 16))]
    return [*cases, Case(2048, 64, 48, 4)]


def gpu_cases() -> list[Case]:
    """For a GPU, in some minutes: the goals, every block over the densities, decoding."""
    cases = [Case(GPU_TOKENS, *target, dtype="bfloat16") for target in GPU_GOALS]
    # The curve of each block at one shape, from a share that pays to one that does not.
    fan_ins = {
        (1, 1): (4, 16, 64, 128), (16, 16): (64, 128, 256, 512), (32, 32): (128, 256, 512, 1024),
        (64, 64): (128, 512, 1024), (128, 128): (128, 512, 1024), (16, 1): (16, 64),
    }  # fmt: skip
    for block, some in fan_ins.items():
        cases += [Case(GPU_TOKENS, 4096, 4096, fan_in, block, "bfloat16") for fan_in in some]
    # The other dtypes.
    for dtype in ("float32", "float16"):
        cases.append(Case(GPU_TOKENS, 2048, 8192, 8, dtype=dtype))
        cases.append(Case(GPU_TOKENS, 4096, 4096, 416, (32, 32), dtype))
    # The layers of a published model, d_model 2048 at 1/64 and 1/1024.
    layers = ((2048, 6144, 32), (8192, 2048, 8), (8192, 2048, 128))
    cases += [Case(GPU_TOKENS, *shape, dtype="bfloat16") for shape in layers]
    # Decoding.
    cases += [Case(tokens, 2048, 8192, 8, dtype="bfloat16") for tokens in (1, 64)]
    cases += [Case(tokens, 4096, 4096, 416, (32, 32), "bfloat16") for tokens in (1, 64)]
    return _grouped(cases)


def gpu_smoke_cases() -> list[Case]:
    """Tiny: every kind of case on a GPU in seconds."""
    cases = [Case(tokens, 64, 128, 8, dtype=dtype) for tokens in (1, 33) for dtype in DTYPES]
    blocks = ((16, 1), (16, 16), (32, 32))
    return cases + [Case(33, 64, 128, 32, block, "bfloat16") for block in blocks]


def matmul_cases(device: str, size: str) -> list[Case]:
    """The cases of `benchmarks.matmul`; `size` is "smoke", "default", "wide" or "full"."""
    if device == "cuda":
        return gpu_smoke_cases() if size == "smoke" else gpu_cases()
    functions = {"smoke": smoke_cases, "default": default_cases, "wide": wide_cases}
    return functions.get(size, full_cases)()


def topk_cases(device: str, size: str) -> list[TopkCase]:
    """The cases of `benchmarks.activation`; every `size` but "smoke" has the same."""
    many = GOAL_TOKENS if device == "cpu" else GPU_TOKENS
    tokens, widths = (33, (64, 300)) if size == "smoke" else (many, (*WIDTHS[2:], 8192, 16384))
    dtypes = CPU_DTYPES if device == "cpu" else tuple(DTYPES)
    return [
        TopkCase(tokens, width, width // share, dtype)
        for dtype, share, width in every(dtypes, (4, 16), widths)
    ]


def _grouped(cases: Iterable[Case]) -> list[Case]:
    """Without repetitions, grouped by shape in the order in which the shapes first appear."""
    groups: dict[tuple[int, int, int], list[Case]] = {}
    for case in dict.fromkeys(cases):
        groups.setdefault((case.tokens, case.in_features, case.out_features), []).append(case)
    return [case for group in groups.values() for case in group]
