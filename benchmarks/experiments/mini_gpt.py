"""Times a training step of SparseLab's largest published example with its layers, ours and dense.

    python -m benchmarks.experiments.mini_gpt --json FILE

The decoder has 8 layers, d_model 640, 10 heads, d_ff 2560 and 65 characters; a step is SGD on 8
random sequences of 128. Of the weights of the MLPs 90% are zero, of those of attention none
(`mlp`) or 70% (`all`), as in `examples/validate_40m_dw.py` of SparseLab. Everything else is
PyTorch's and the same for all, and so is the allocator, which keeps freed memory. The models take
turns in one process. First, the logits of ours must be those of dense layers with its weights.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_kernels as sk
from benchmarks import devices, report, run, timing
from sparse_transformer import keep_freed_memory, program

PROGRAM = "python -m benchmarks.experiments.mini_gpt"
CHARACTERS, CONTEXT, BATCH = 65, 128, 8
MLP_ZEROS, ATTENTION_ZEROS = 0.9, 0.7
LEARNING_RATE = 3e-3
BUDGET_S = 120.0

# Makes a layer from its inputs, outputs and the share of its weights that are zero.
Linear = Callable[[int, int, float], nn.Module]


@dataclass(frozen=True)
class Options:
    json: Path
    """Write the rows to this file."""
    smoke: bool = False
    """Two narrow layers, in seconds."""
    threads: int | None = None
    """Number of CPU threads; by default those of PyTorch."""


def dense(inputs: int, outputs: int, zeros: float) -> nn.Module:
    return nn.Linear(inputs, outputs, bias=False)


def ours(inputs: int, outputs: int, zeros: float) -> nn.Module:
    if not zeros:
        return dense(inputs, outputs, zeros)
    return sk.SparseLinear(inputs, outputs, fan_in=round(inputs * (1 - zeros)), bias=False)


def sparselab(inputs: int, outputs: int, zeros: float) -> nn.Module:
    import sparselab as peer

    if not zeros:
        return dense(inputs, outputs, zeros)
    layer: nn.Module = peer.SparseLinear(inputs, outputs, sparsity=zeros, bias=False)
    return layer


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; x `(B, T, D)`."""

    def __init__(self, d_model: int, heads: int, linear: Linear, attention_zeros: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(d_model), nn.LayerNorm(d_model)])
        self.qkv = linear(d_model, 3 * d_model, attention_zeros)
        self.out = linear(d_model, d_model, attention_zeros)
        self.up = linear(d_model, 4 * d_model, MLP_ZEROS)
        self.down = linear(4 * d_model, d_model, MLP_ZEROS)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        added: Tensor = self.down(F.gelu(self.up(self.norms[1](x))))
        return x + added


class Decoder(nn.Module):
    """int64 `(B, T)` to logits `(B, T, CHARACTERS)`."""

    def __init__(self, linear: Linear, attention_zeros: float, smoke: bool) -> None:
        super().__init__()
        layers, d_model, heads = (2, 64, 2) if smoke else (8, 640, 10)
        self.embed = nn.Embedding(CHARACTERS, d_model)
        self.positions = nn.Embedding(CONTEXT, d_model)
        self.blocks = nn.Sequential(
            *(Block(d_model, heads, linear, attention_zeros) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(d_model)
        self.unembed = nn.Linear(d_model, CHARACTERS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.unembed(self.norm(self.blocks(x)))
        return logits


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    optimizer.zero_grad()
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()


@torch.no_grad()
def check(model: nn.Module, tokens: Tensor) -> None:
    """Raises AssertionError unless the logits are those of the same weights in dense layers."""
    logits = model(tokens)
    torch.testing.assert_close(sk.densify_(model)(tokens), logits, rtol=1e-3, atol=1e-4)


def text(rows: Sequence[report.Row], style: report.Style = "terminal") -> str:
    """A line for each model."""
    best = {row["part"]: row["step_ms"] for row in rows if row["layers"] == "ours"}
    return report.table(
        [
            {
                "sparse": row["part"],
                "layers": row["layers"],
                "ms": report.number(row["step_ms"]),
                "iqr": report.number(row["spread_ms"]),
                "ours is faster by": report.ratio(row["step_ms"] / best[row["part"]])
                if row["layers"] != "ours"
                else None,
            }
            for row in rows
        ],
        style,
    )


def measure(smoke: bool) -> list[dict[str, Any]]:
    tokens = torch.randint(CHARACTERS, (BATCH, CONTEXT + 1))
    makers: dict[str, Linear] = {"ours": ours, "dense": dense}
    if importlib.util.find_spec("sparselab"):
        makers["SparseLab"] = sparselab
    rows = []
    for part, zeros in (("mlp", 0.0), ("all", ATTENTION_ZEROS)):
        check(Decoder(ours, zeros, smoke), tokens[:, :-1])
        calls: dict[str, timing.Candidate] = {}
        for name, linear in makers.items():
            model = Decoder(linear, zeros, smoke)
            optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
            calls[name] = functools.partial(step, model, optimizer, tokens)
        timings = timing.interleave(calls, budget_s=0.01 if smoke else BUDGET_S / 2)
        rows += [
            {
                "part": part,
                "layers": name,
                "step_ms": found.time_ms,
                "spread_ms": found.spread_ms,
                "samples": found.samples,
            }
            for name, found in timings.items()
        ]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    options, command = run.parse(Options, "experiments.mini_gpt", __doc__, arguments)
    keep_freed_memory()
    torch.manual_seed(0)
    machine = devices.Device().describe(command)
    print(report.machine_line(machine), flush=True)
    if machine["peers"]["sparselab"] is None:
        print("SparseLab is not compared: pip install --no-deps sparselab", flush=True)

    def measure_and_write() -> None:
        rows = measure(options.smoke)
        report.write_json(options.json, machine, rows, complete=True)
        print("", text(rows), sep="\n")

    return program.status(measure_and_write)


if __name__ == "__main__":
    sys.exit(main())
