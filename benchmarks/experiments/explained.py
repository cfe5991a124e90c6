"""The share of a model's weights whose one-line explanation predicts when they matter.

    python -m benchmarks.experiments.explained --checkpoint NAME [--against NAME] --json FILE

The explanation of a weight is the labels of its two ends (`sparse_transformer.circuits.labels`),
which are fitted on training files. On held-out files, a weight from source i to target j

- matters at a token where |weight * activation of i| is above 0 and among the `TOP` largest of all
  tokens, and j is active as its label counts that: at least halfway from its median to its extreme;
- is predicted to matter where both labels say "active";
- is explained if precision and recall of this prediction are at least `LEAST`, and it matters at
  `FEWEST` tokens or more.

These thresholds were fixed before any model was measured. A weight that matters nowhere
counts as not explained. The source of a weight of `attn.out` is what attention read, not a v
channel. The control shuffles the labels' rules among the nodes of a hook point, and keeps the
activations.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import devices, report, run
from sparse_transformer import Transformer, keep_freed_memory, program
from sparse_transformer.circuits.activations import record_nodes
from sparse_transformer.circuits.graph import Edges, Nodes
from sparse_transformer.circuits.labels import Label, label_nodes
from sparse_transformer.data import prepare, sample
from sparse_transformer.evaluation import Interval
from sparse_transformer.run import load_run

# Share of the tokens; least precision and recall; tokens at which a weight must matter.
TOP, LEAST, FEWEST = 0.05, 0.5, 8
# Normal quantile of a 95% interval.
_Z = 1.959964

Node = tuple[str, int]  # hook point and channel


@dataclass(frozen=True)
class Options:
    checkpoint: str
    """The folder of a training run, or the name of a model."""
    json: Path
    """Write the rows to this file."""
    against: list[str] = field(default_factory=list)
    """Another model, a dense one for instance; may be repeated."""
    weights: int = 1000
    """Nonzero weights of the blocks that are drawn."""
    windows: int = 128
    """Windows of text to fit labels on, and as many held-out ones."""
    data: list[Path] = field(default_factory=list)
    """A file or folder of text, by default the standard library; may be repeated."""
    seed: int = 0
    """Random seed of the weights and of the control."""
    threads: int | None = None
    """Number of CPU threads; by default those of PyTorch."""


def draw_weights(model: Transformer, count: int, seed: int) -> list[tuple[Node, Node]]:
    """Source and target of so many different nonzero weights of the blocks, or of all."""
    nodes, edges = Nodes.of(model.config), Edges.of(model)
    ends = [
        ((matrix.reads, source), nodes.locate(target))
        for matrix in edges.matrices
        for source, target in zip(matrix.inputs.tolist(), matrix.target.tolist(), strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    return [ends[at] for at in torch.randperm(len(ends), generator=generator)[:count].tolist()]


def shuffled(labels: dict[Node, Label], seed: int) -> dict[Node, Label]:
    """The rules of other nodes of the same hook point; what counts as active stays."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for place in {place for place, _ in labels}:
        nodes = [node for node in labels if node[0] == place]
        order = torch.randperm(len(nodes), generator=generator).tolist()
        for node, other in zip(nodes, order, strict=True):
            found[node] = replace(labels[node], rule=labels[nodes[other]].rule)
    return found


def matters(source: Tensor, target: Tensor, label: Label) -> Tensor:
    """Where a weight does: activations of its ends to bool, all of one shape.

    The weight itself scales all contributions alike.
    """
    size = source.abs()
    least = size.flatten().topk(max(1, round(TOP * size.numel()))).values[-1]
    return (size >= least) & (size > 0) & label.active(target)


def is_explained(said: Tensor, true: Tensor) -> bool:
    """Whether predictions of when a weight matters are good enough."""
    hits = int((said & true).sum())
    enough = hits >= LEAST * int(said.sum()) and hits >= LEAST * int(true.sum())
    return int(true.sum()) >= FEWEST and enough


def measure(name: str, options: Options) -> dict[str, Any]:
    """The row of a model."""
    model, tokenizer = load_run(name)
    model.requires_grad_(False)
    corpus = prepare(options.data or None, vocab_size=model.config.vocab_size)
    held_out = replace(corpus, train=corpus.validation)
    context, count = model.config.context, options.windows
    fit, test = (sample(part, tokenizer, context, count) for part in (corpus, held_out))
    weights = draw_weights(model, options.weights, options.seed)
    nodes = list(dict.fromkeys(node for ends in weights for node in ends))
    labels = dict(zip(nodes, label_nodes(model, fit, tokenizer, nodes), strict=True))
    values = dict(zip(nodes, record_nodes(model, test, nodes), strict=True))
    true = [matters(values[i], values[j], labels[j]) for i, j in weights]
    row: dict[str, Any] = {
        "model": Path(name).name,
        "linear": model.config.linear,
        "weights": len(Edges.of(model).weight),
        "drawn": len(weights),
        "tokens": test.numel(),
        "matter": share([int(where.sum()) >= FEWEST for where in true]),
    }
    for kind, rules in (("explained", labels), ("shuffled", shuffled(labels, options.seed))):
        said = {node: label.predict(test) for node, label in rules.items()}
        row[kind] = share(
            [is_explained(said[i] & said[j], t) for (i, j), t in zip(weights, true, strict=True)]
        )
    return row


def share(found: Sequence[bool]) -> dict[str, float]:
    """Of those that are true, with Wilson's interval of 95%."""
    n, p = len(found), sum(found) / len(found)
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + (_Z / (2 * n)) ** 2) / (1 + _Z**2 / n)
    return dataclasses.asdict(Interval(p, max(0.0, middle - half), min(1.0, middle + half)))


def text(rows: Sequence[report.Row], style: report.Style = "terminal") -> str:
    """A line for each model."""
    lines = [
        {
            "model": row["model"],
            "kind": row["linear"],
            "weights": f"{row['weights']:,}",
            "drawn": row["drawn"],
            "matter somewhere": str(Interval(**row["matter"])),
            "explained": str(Interval(**row["explained"])),
            "by shuffled labels": str(Interval(**row["shuffled"])),
        }
        for row in rows
    ]
    return report.table(lines, style)


def main(arguments: Sequence[str] | None = None) -> int:
    options, command = run.parse(Options, "experiments.explained", __doc__, arguments)
    for name in ("weights", "windows"):
        if getattr(options, name) < 1:
            report.refuse(
                "python -m benchmarks.experiments.explained", f"--{name} must be at least 1"
            )
    keep_freed_memory()
    machine = devices.Device().describe(command)
    print(report.machine_line(machine), flush=True)

    def measure_all() -> None:
        rows = [measure(name, options) for name in (options.checkpoint, *options.against)]
        report.write_json(options.json, machine, rows, complete=True)
        print("", text(rows), sep="\n")

    return program.status(measure_all)


if __name__ == "__main__":
    sys.exit(main())
