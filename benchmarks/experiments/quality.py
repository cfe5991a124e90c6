"""Compares what the variants of the transformer learn: validation loss at equal L0 and tokens.

    python -m benchmarks.experiments.quality --json FILE                 three seeds of each
    python -m benchmarks.experiments.quality --suite width --json FILE   see SUITES; may be repeated
    python -m benchmarks.experiments.quality --smoke                     tiny, in seconds

FILE is written after each run and its runs are not repeated: the same command continues.

    sparse        annealed fans, rewired by sampled gradients
    static        the same with a random pattern that never changes: the control
    masked_dense  the published recipe, with our abs_topk and the fast projection: the same losses,
                  up to ties and rounding, in less time
    released      the published recipe exactly as released; the suite `sooner` shows how much less
                  time the others need to reach its last validation loss on an idle machine
    dense         nn.Linear, without AbsTopK: the plain model

All variants of a seed see the same batches and the same validation windows. Seconds are those of
the steps without validation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import devices, report
from benchmarks import run as runner
from benchmarks.report import Row
from benchmarks.transformer import program
from benchmarks.transformer.variants import PROJECTIONS, VARIANTS
from sparse_transformer import ModelConfig
from sparse_transformer.data import Corpus, prepare
from sparse_transformer.train.distributed import Ranks
from sparse_transformer.train.optimizer import OptimizerConfig
from sparse_transformer.train.settings import Settings, TrainConfig
from sparse_transformer.train.topology import TopologyConfig
from sparse_transformer.train.trainer import Diverged, Trainer

PROGRAM = "python -m benchmarks.experiments.quality"
# The model of each variant, one of benchmarks.transformer.variants.
MODELS = {
    "sparse": "sparse",
    "static": "sparse",
    "masked_dense": "masked_dense_kernel",
    "released": "masked_dense",
    "dense": "dense",
}


@dataclass(frozen=True)
class Run:
    """One training run; names are those of `ModelConfig`, `TrainConfig` and `OptimizerConfig`.

    `topology` is what differs from `TopologyConfig()`.
    """

    variant: str = "sparse"
    d_model: int = 256
    n_layer: int = 2
    context: int = 256
    vocab_size: int = 2048
    density: float = 1 / 64
    embedding_density: float = 1 / 16
    min_nonzeros: int = 4
    seed: int = 0
    learning_rate: float = 2e-2
    steps: int = 1500
    batch_tokens: int = 1024
    validate_every: int = 250
    validation_tokens: int = 65536
    topology: dict[str, Any] = field(default_factory=dict)
    writers: str = "fan_out"

    def __str__(self) -> str:
        return f"{self.name}, d_model {self.d_model}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Of the variant, with what differs from its defaults."""
        changed = self.topology | ({"writers": self.writers} if self.writers != "fan_out" else {})
        return " ".join((self.variant, *(f"{name}={value}" for name, value in changed.items())))

    def settings(self, device: Literal["cpu", "cuda"] = "cpu") -> Settings:
        """For the trainer."""

        def given(kind: type[Any]) -> dict[str, Any]:
            names = (one.name for one in dataclasses.fields(kind) if hasattr(self, one.name))
            return {name: getattr(self, name) for name in names}

        model = MODELS[self.variant]
        projection: Any = PROJECTIONS.get(model, "select")
        static = {"start_multiple": 1.0, "drop_share": 0.0} if self.variant == "static" else {}
        return Settings(
            preset="quality",
            train=TrainConfig(**given(TrainConfig), device=device, projection=projection),
            model=ModelConfig(**given(ModelConfig), **VARIANTS[model]),
            topology=TopologyConfig(**given(TopologyConfig), **static | self.topology),
            optimizer=OptimizerConfig(**given(OptimizerConfig)),
        )


def _product(**values: Sequence[Any]) -> list[Run]:
    """A run for each combination of the values."""
    combinations = itertools.product(*values.values())
    return [Run(**dict(zip(values, chosen, strict=True))) for chosen in combinations]


_BOTH = ("sparse", "masked_dense")
_TINY: dict[str, Any] = {
    "d_model": 32, "n_layer": 1, "context": 16, "vocab_size": 300, "density": 1 / 4,
    "embedding_density": 1 / 4, "min_nonzeros": 1, "steps": 8, "batch_tokens": 32,
    "validate_every": 4, "validation_tokens": 64, "learning_rate": 1e-2,
}  # fmt: skip
_TOPOLOGIES: tuple[dict[str, Any], ...] = (
    {"start_multiple": 4.0}, {"start_multiple": 1.0}, {"grow": "random"}, {"period": 50},
    {"drop_share": 0.0}, {"candidates": 0.25}, {"candidates": 0.01},
)  # fmt: skip
SUITES: dict[str, list[Run]] = {
    "main": _product(seed=(0, 1, 2), variant=("sparse", "static", "masked_dense")),
    "width": _product(d_model=(512,), variant=("sparse", "static", "masked_dense")),
    "densities": [
        *_product(density=(1 / 16,), variant=_BOTH),
        # A least fan of 4 of 256 would be 1/64 again.
        *_product(density=(1 / 256,), min_nonzeros=(1,), variant=_BOTH),
    ],
    # Whether the learning rate that all share suits each: half of it, and twice.
    "rates": _product(learning_rate=(1e-2, 4e-2), variant=_BOTH),
    "ablations": [*_product(topology=_TOPOLOGIES), Run(writers="fan_in")],
    "sooner": _product(d_model=(256, 512), validate_every=(50,), variant=("sparse", "released")),
    "smoke": [
        *(Run(variant, **_TINY) for variant in MODELS),
        *(Run(variant, seed=1, **_TINY) for variant in _BOTH),
        Run(topology={"grow": "random"}, **_TINY),
    ],
}


@torch.enable_grad()
def perform(run: Run, corpus: Corpus, device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """Trains; returns the row. A run that diverges has a `failure` and no `val_loss`."""
    trainer = Trainer(run.settings(device), corpus, Ranks(0, 1, torch.device(device)))
    curve: list[dict[str, float]] = []
    times_s: list[float] = []
    failure = None
    try:
        while trainer.step < run.steps:
            start = time.perf_counter()
            trainer.advance()
            times_s.append(time.perf_counter() - start)
            if trainer.step % run.validate_every == 0 or trainer.step == run.steps:
                tokens, loss = trainer.step * run.batch_tokens, round(trainer.validate(), 5)
                curve.append({"tokens": tokens, "seconds": sum(times_s), "val_loss": loss})
    except Diverged as error:
        failure = str(error)
    return {
        "settings": dataclasses.asdict(run),
        "variant": run.variant,
        "name": run.name,
        "seed": run.seed,
        "l0": trainer.l0(),
        "val_loss": None if failure else curve[-1]["val_loss"],
        "curve": curve,
        "step_ms": 1e3 * statistics.median(times_s) if times_s else None,
        "seconds": sum(times_s),
        "threads": torch.get_num_threads(),
        "commit": report.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "failure": failure,
        "correct": failure is None,
    }


def groups(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Finished rows by what may be compared, then by name."""
    made: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        run = Run(**row["settings"])
        shape = (
            f"d_model {run.d_model}, {run.n_layer} layers, blocks 1/{1 / run.density:.0f}, "
            f"embeddings 1/{1 / run.embedding_density:.0f}, learning rate {run.learning_rate:g}, "
            f"{run.steps * run.batch_tokens:,} tokens"
        )
        if row["val_loss"] is not None:
            made.setdefault(shape, {}).setdefault(row["name"], []).append(row)
    return made


def compare(rows: Sequence[Row], baseline: Sequence[Row]) -> list[tuple[float, float]]:
    """For the seeds of both: validation loss over the baseline's, less 1, and the speed.

    The speed is the baseline's seconds over those to its last loss, 0 where that was not reached.
    """
    found = []
    theirs = {row["seed"]: row for row in baseline}
    for row in rows:
        if other := theirs.get(row["seed"]):
            loss = other["val_loss"]
            reached = (point["seconds"] for point in row["curve"] if point["val_loss"] <= loss)
            seconds = next(reached, math.inf)
            found.append((row["val_loss"] / loss - 1, other["seconds"] / seconds))
    return found


def text(content: Mapping[str, Any]) -> str:
    """A table for each group, a line for each variant."""
    headings = (
        "variant", "seeds", "L0", "val_loss", "vs masked dense (least, most)", "step ms", "sooner",
    )  # fmt: skip
    parts = []
    for shape, names in groups(content["rows"]).items():
        lines = []
        for name, rows in names.items():
            over = [loss for loss, _ in compare(rows, names.get("masked_dense", ()))]
            sooner = [speed for _, speed in compare(rows, names.get("released", ()))]
            val_loss = statistics.fmean(row["val_loss"] for row in rows)
            step_ms = statistics.median(row["step_ms"] for row in rows)
            versus = "-"
            if over:
                versus = f"{statistics.fmean(over):+.2%} ({min(over):+.2%}, {max(over):+.2%})"
            l0 = f"{rows[0]['l0']:,}"
            faster = report.ratio(min(sooner, default=None))
            lines.append([name, len(rows), l0, f"{val_loss:.4f}", versus, f"{step_ms:.1f}", faster])
        parts.append(f"{shape}\n{report.table(headings, lines)}")
    failed = [row for row in content["rows"] if row["failure"]]
    return "\n\n".join([*parts, *(f"FAILED {row['name']}: {row['failure']}" for row in failed)])


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Validation loss against tokens and seconds of the plain variants, into a PNG."""
    from matplotlib.figure import Figure

    drawn = groups(row for row in rows if row["name"] in MODELS)
    figure = Figure(figsize=(9, 0.6 + 2.9 * len(drawn)), layout="constrained")
    all_axes = figure.subplots(max(1, len(drawn)), 2, squeeze=False, sharey="row")
    for axes, (shape, names) in zip(all_axes, drawn.items(), strict=False):
        for axis, key in zip(axes, ("tokens", "seconds"), strict=True):
            for row in itertools.chain.from_iterable(names.values()):
                x, y = ([point[name] for point in row["curve"]] for name in (key, "val_loss"))
                label = f"{row['name']}, seed {row['seed']}: {row['val_loss']:.3f}"
                axis.plot(x, y, color=f"C{list(MODELS).index(row['name'])}", lw=0.9, label=label)
            axis.set(xlabel=key, ylabel="validation loss")
            axis.grid(alpha=0.25, lw=0.5)
        axes[0].legend(fontsize=6)
        axes[0].set_title(shape, fontsize=6)
    figure.suptitle(title, fontsize=7)
    figure.savefig(path, dpi=100, format="png")


@dataclass(frozen=True)
class Options(program.Options):
    """Options of the command line."""

    suite: list[str] = field(default_factory=list)
    """A suite (default: main); may be repeated. With --json, runs of the file are kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    options, command = program.parse(Options, "experiments.quality", __doc__, arguments)
    suites = ["smoke"] if options.smoke else options.suite or ["main"]
    if unknown := set(suites) - set(SUITES):
        names = ", ".join(SUITES)
        report.refuse(PROGRAM, f"--suite must be one of {names}; got {min(unknown)}")
    rows: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        try:
            rows = report.read_json(options.json)["rows"]
        except ValueError as error:
            report.refuse(PROGRAM, f"--json: {error}")
        if not all({"settings", "curve", "val_loss"} <= row.keys() for row in rows):
            report.refuse(PROGRAM, f"--json: {options.json} is the result of another benchmark")
        rows = [row | {"correct": row["failure"] is None} for row in rows]
    done = [Run(**row["settings"]) for row in rows]
    missing = [run for name in suites for run in SUITES[name] if run not in done]
    with tempfile.TemporaryDirectory() as cache:
        folder, size = Path(__file__).parent, _TINY["vocab_size"]
        corpus = prepare(folder, vocab_size=size, cache_dir=cache) if options.smoke else prepare()
        outcome = runner.run(
            # What the file has is one case, so that no moment loses it.
            [*([None] if rows else []), *missing],
            lambda run: rows if run is None else [perform(run, corpus, options.device)],
            lambda rows: "\n".join(f"{r['name']}, seed {r['seed']}: {r['val_loss']}" for r in rows),
            devices.connect(options.device),
            command=command,
            smoke=options.smoke,
            json=options.json,
        )
    print("", text({"rows": outcome.rows}), sep="\n", flush=True)
    if options.plot is not None:
        draw(outcome.rows, options.plot, report.machine_line(outcome.machine))
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
