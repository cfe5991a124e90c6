"""The registry of cases: layer shapes of the published weight-sparse transformers, and their goals.

Widths 256 to 4096 (`d_model`), densities 1/16 to 1/1024 and never fewer than 4 inputs per output
(Gao et al., 2025, "Weight-sparse transformers have interpretable circuits", section 2 and the
released code). Each block of the model has four weight-sparse matrices: the fused q, k, v
projection, the attention output projection and the two of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

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
SQUARE = (1024, 1024)


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
    def density(self) -> float:
        return self.fan_in / self.in_features

    @property
    def nnz(self) -> int:
        return self.out_features * self.fan_in

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
    def block_name(self) -> str:
        return f"{self.block[0]}x{self.block[1]}"

    def __str__(self) -> str:
        return (
            f"{self.in_features}->{self.out_features} fan_in={self.fan_in} {self.block_name} "
            f"{self.dtype} M={self.tokens}"
        )


def layer_shapes(width: int) -> dict[str, tuple[int, int]]:
    """`(in_features, out_features)` of the sparse matrices of one block of width `d_model`."""
    return {
        "attention output": (width, width),
        "fused q, k, v": (width, 3 * width),
        "MLP in": (width, 4 * width),
        "MLP out": (4 * width, width),
    }


def layer_name(in_features: int, out_features: int) -> str:
    """Which layer of which published width has this shape, or an empty string."""
    for width in WIDTHS:
        for name, shape in layer_shapes(width).items():
            if shape == (in_features, out_features):
                return f"{name}, d_model {width}"
    return ""


def default_cases() -> list[Case]:
    """In about a minute: the goals, one shared index list, one token, one where dense wins."""
    return [
        *(Case(GOAL_TOKENS, *shape) for shape in GOALS),
        Case(GOAL_TOKENS, 1024, 4096, 32, dtype="bfloat16"),
        *(Case(GOAL_TOKENS, *SQUARE, 128, block) for block in ((1, 1), (16, 1))),
        Case(1, 2048, 8192, 8),
        Case(GOAL_TOKENS, *SQUARE, 768),
    ]


def wide_cases() -> list[Case]:
    """In minutes: the goals in both dtypes, every block, the range of densities and tokens."""
    cases = [Case(GOAL_TOKENS, *shape, dtype=dtype) for shape in GOALS for dtype in CPU_DTYPES]
    # Blocks that share an index list, at one fan-in: what sharing is worth.
    blocks = ((1, 1), (4, 1), (16, 1), (16, 16), (32, 32))
    cases += [
        Case(2048, 1024, 1024, 128, block, dtype)
        for block in blocks
        for dtype in (CPU_DTYPES if block in ((1, 1), (16, 1)) else ("float32",))
    ]
    # One shape over the densities, for the curve of each block (a 16x16 block keeps 16 inputs).
    for fan_in in (64, 16, 4):
        cases += [Case(2048, 1024, 4096, fan_in, block) for block in ((1, 1), (16, 1))]
    cases += [Case(2048, 1024, 4096, fan_in, (16, 16)) for fan_in in (64, 32, 16)]
    # The narrowest and the widest model, and the sparsest.
    cases += [
        Case(2048, 256, 1024, 16),
        Case(2048, 256, 1024, 4),
        Case(2048, 256, 768, 16),
        Case(2048, 1024, 256, 16),
        Case(2048, 2048, 2048, 32),
        Case(2048, 4096, 4096, 4),
    ]
    # Decoding, one token at a time and in small batches.
    for tokens in (1, 64):
        cases += [
            Case(tokens, *shape, dtype=dtype)
            for shape in ((2048, 8192, 8), (1024, 4096, 32))
            for dtype in CPU_DTYPES
        ]
    return _unique(cases)


def full_cases() -> list[Case]:
    """Every layer of every width at every density, in both dtypes; blocks at three widths."""
    cases = [*default_cases(), *wide_cases()]
    for width in WIDTHS:
        for in_features, out_features in layer_shapes(width).values():
            for inverse in DENSITY_INVERSES:
                fan_in = in_features // inverse
                if fan_in < MIN_FAN_IN:
                    continue
                for tokens in TOKENS:
                    for dtype in CPU_DTYPES:
                        for block in _blocks(width, tokens):
                            if fan_in % block[1] == 0:
                                shape = (in_features, out_features, fan_in)
                                cases.append(Case(tokens, *shape, block, dtype))
    return _unique(cases)


def _blocks(width: int, tokens: int) -> tuple[tuple[int, int], ...]:
    if width in (512, 1024, 2048) and tokens == GOAL_TOKENS:
        return ((1, 1), (4, 1), (16, 1), (16, 16), (32, 32))
    return ((1, 1),)


def smoke_cases() -> list[Case]:
    """Tiny: every kind of case in seconds."""
    cases = [Case(tokens, 64, 128, 8, dtype=dtype) for tokens in (1, 33) for dtype in CPU_DTYPES]
    cases += [Case(33, 64, 128, 16, block) for block in ((16, 1), (16, 16))]
    cases.append(Case(2048, 64, 48, 4))
    return cases


def gpu_cases() -> list[Case]:
    """For a GPU, in some minutes: the goals, every block over the densities, decoding."""
    cases = [Case(GPU_TOKENS, *target, dtype="bfloat16") for target in GPU_GOALS]
    # The curve of each block at one shape, from a share that pays to one that does not.
    for side, fan_ins in (
        (1, (4, 16, 64, 128)),
        (16, (64, 128, 256, 512)),
        (32, (128, 256, 512, 1024)),
        (64, (128, 512, 1024)),
        (128, (128, 512, 1024)),
    ):
        cases += [
            Case(GPU_TOKENS, 4096, 4096, fan_in, (side, side), "bfloat16") for fan_in in fan_ins
        ]
    cases += [Case(GPU_TOKENS, 4096, 4096, fan_in, (16, 1), "bfloat16") for fan_in in (16, 64)]
    # The other dtypes.
    for dtype in ("float32", "float16"):
        cases += [
            Case(GPU_TOKENS, 2048, 8192, 8, dtype=dtype),
            Case(GPU_TOKENS, 4096, 4096, 416, (32, 32), dtype),
        ]
    # The layers of a published model, d_model 2048 at 1/64 and 1/1024.
    cases += [Case(GPU_TOKENS, 2048, 6144, 32, dtype="bfloat16")]
    cases += [Case(GPU_TOKENS, 8192, 2048, fan_in, dtype="bfloat16") for fan_in in (8, 128)]
    # Decoding.
    cases += [Case(tokens, 2048, 8192, 8, dtype="bfloat16") for tokens in (1, 64)]
    cases += [Case(tokens, 4096, 4096, 416, (32, 32), "bfloat16") for tokens in (1, 64)]
    return _unique(cases)


def gpu_full_cases() -> list[Case]:
    """Every layer of every width at every density, 16384 tokens and one, in bfloat16."""
    cases = gpu_cases()
    for width in WIDTHS:
        for in_features, out_features in layer_shapes(width).values():
            for inverse in DENSITY_INVERSES:
                fan_in = in_features // inverse
                for side in (1, 16, 32, 64, 128):
                    if fan_in >= MIN_FAN_IN and fan_in % side == 0:
                        shape = (in_features, out_features, fan_in)
                        cases += [
                            Case(tokens, *shape, (side, side), "bfloat16")
                            for tokens in (1, GPU_TOKENS)
                        ]
    return _unique(cases)


def gpu_smoke_cases() -> list[Case]:
    """Tiny: every kind of case on a GPU in seconds."""
    cases = [Case(33, 64, 128, 8, dtype=dtype) for dtype in DTYPES]
    cases += [Case(33, 64, 128, 32, block, "bfloat16") for block in ((16, 1), (16, 16), (32, 32))]
    cases.append(Case(1, 64, 128, 8, dtype="bfloat16"))
    return cases


REGISTRY = {
    ("cpu", "default"): default_cases,
    ("cpu", "smoke"): smoke_cases,
    ("cpu", "full"): full_cases,
    ("cuda", "default"): gpu_cases,
    ("cuda", "smoke"): gpu_smoke_cases,
    ("cuda", "full"): gpu_full_cases,
}


def _unique(cases: Iterable[Case]) -> list[Case]:
    """Without repetitions, grouped by shape in the order in which the shapes first appear."""
    found = list(dict.fromkeys(cases))
    groups: dict[tuple[int, int, int], list[Case]] = {}
    for case in found:
        groups.setdefault((case.tokens, case.in_features, case.out_features), []).append(case)
    return [case for group in groups.values() for case in group]
