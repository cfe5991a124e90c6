"""Compares what the variants of the transformer learn: validation loss at equal L0 and tokens.

    python -m benchmarks.experiments.quality --json FILE                 three seeds of each
    python -m benchmarks.experiments.quality --suite width --json FILE   see SUITES; may be repeated

FILE is written after each run and its runs are not repeated: the same command continues.

    sparse        annealed fans, rewired by sampled gradients
    static        the same with a random pattern that never changes: the control
    masked_dense  the published recipe, with our abs_topk and the fast projection: the same losses,
                  up to ties and rounding, in less time
    released      the published recipe exactly as released
    dense         nn.Linear, without AbsTopK: the plain model

All variants of a seed see the same batches and validation windows. Seconds are of steps alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks import run as runner
from benchmarks.devices import Device
from benchmarks.report import Row
from benchmarks.transformer.jobs import PROJECTIONS, VARIANTS
from sparse_transformer import ModelConfig
from sparse_transformer.data import Corpus, prepare
from sparse_transformer.train.distributed import Ranks
from sparse_transformer.train.optimizer import OptimizerConfig
from sparse_transformer.train.settings import Settings, TrainConfig
from sparse_transformer.train.topology import TopologyConfig
from sparse_transformer.train.trainer import Diverged, Trainer

# The model of each variant, one of benchmarks.transformer.jobs.
MODELS = {
    "sparse": "sparse", "static": "sparse", "masked_dense": "masked_dense_kernel",
    "released": "masked_dense", "dense": "dense",
}  # fmt: skip


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

    def settings(self, device: str = "cpu") -> Settings:

        def given(kind: type[Any]) -> dict[str, Any]:
            names = (one.name for one in dataclasses.fields(kind) if hasattr(self, one.name))
            return {name: getattr(self, name) for name in names}

        model = MODELS[self.variant]
        on: Any = device
        projection: Any = PROJECTIONS.get(model, "select")
        static = {"start_multiple": 1.0, "drop_share": 0.0} if self.variant == "static" else {}
        return Settings(
            preset="quality",
            train=TrainConfig(
                **given(TrainConfig), device=on, projection=projection, bigram_start="zero"
            ),
            model=ModelConfig(**given(ModelConfig), **VARIANTS[model]),
            topology=TopologyConfig(**given(TopologyConfig), **static | self.topology),
            optimizer=OptimizerConfig(**given(OptimizerConfig)),
        )


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
    "main": [Run(name, seed=seed) for seed in range(3) for name in (*_BOTH, "static")],
    "width": [Run(name, d_model=512) for name in (*_BOTH, "static")],
    "densities": [
        *(Run(name, density=1 / 16) for name in _BOTH),
        # A least fan of 4 of 256 would be 1/64 again.
        *(Run(name, density=1 / 256, min_nonzeros=1) for name in _BOTH),
    ],
    # Whether the learning rate that all share suits each: half of it, and twice.
    "rates": [Run(name, learning_rate=rate) for rate in (1e-2, 4e-2) for name in _BOTH],
    "ablations": [*(Run(topology=changes) for changes in _TOPOLOGIES), Run(writers="fan_in")],
    "sooner": [
        Run(name, d_model=width, validate_every=50)
        for width in (256, 512)
        for name in ("sparse", "released")
    ],
    "smoke": [
        *(Run(variant, **_TINY) for variant in MODELS),
        *(Run(variant, seed=1, **_TINY) for variant in _BOTH),
        Run(topology={"grow": "random"}, **_TINY),
    ],
}


@functools.cache
def _corpus(smoke: bool) -> Corpus:
    if not smoke:
        return prepare()
    with tempfile.TemporaryDirectory() as cache:
        return prepare(Path(__file__).parent, vocab_size=_TINY["vocab_size"], cache_dir=cache)


@torch.enable_grad()
def perform(run: Run, options: Options, device: Device) -> list[dict[str, Any]]:
    """Trains; returns the row. A run that diverges has a `failure` and no `val_loss`."""
    ranks = Ranks(0, 1, torch.device(device.name))
    trainer = Trainer(run.settings(device.name), _corpus(options.smoke), ranks)
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
    row = {
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
    return [row]


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


def closing(rows: Sequence[Row]) -> list[str]:
    return [text(rows)]


def text(rows: Sequence[Row], style: report.Style = "terminal") -> str:
    """A table for each group, a line for each variant, and what failed."""
    parts = []
    for shape, names in groups(rows).items():
        table = []
        for name, found in names.items():
            line = {"variant": name, "seeds": len(found), "L0": f"{found[0]['l0']:,}"}
            line["val_loss"] = f"{statistics.fmean(row['val_loss'] for row in found):.4f}"
            if over := [loss for loss, _ in compare(found, names.get("masked_dense", ()))]:
                mean, least, most = statistics.fmean(over), min(over), max(over)
                line["vs masked dense (least, most)"] = f"{mean:+.2%} ({least:+.2%}, {most:+.2%})"
            line["step ms"] = f"{statistics.median(row['step_ms'] for row in found):.1f}"
            sooner = [speed for _, speed in compare(found, names.get("released", ()))]
            line["sooner"] = report.ratio(min(sooner, default=None))
            table.append(line)
        parts.append(f"{shape}\n{report.table(table, style)}\n")
    parts += [f"FAILED {row['name']}: {row['failure']}" for row in rows if row["failure"]]
    return "\n".join(parts)


def lines(rows: Sequence[Row]) -> str:
    return "\n".join(
        f"{row['name']}, seed {row['seed']}: {row['failure'] or row['val_loss']}" for row in rows
    )


def draw(rows: Sequence[Row], figure: Any) -> None:
    """Validation loss against tokens and seconds of the plain variants."""
    drawn = groups(row for row in rows if row["name"] in MODELS)
    figure.set_size_inches(9, 0.6 + 2.9 * len(drawn))
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


@dataclass(frozen=True)
class Options(runner.Options):
    suite: list[str] = field(default_factory=list)
    """A suite (default: main); may be repeated. With --json, runs of the file are kept."""


def kept(options: Options) -> list[dict[str, Any]]:
    """The rows of the file that the run continues."""
    if options.json is None or not options.json.exists():
        return []
    try:
        rows: list[dict[str, Any]] = report.read_json(options.json)["rows"]
    except ValueError as error:
        report.refuse(main.program, f"--json: {error}")
    if not all({"settings", "curve", "val_loss"} <= row.keys() for row in rows):
        report.refuse(main.program, f"--json: {options.json} is the result of another benchmark")
    return [row | {"correct": row["failure"] is None} for row in rows]


def plan(options: Options, _: Device) -> list[Run]:
    """The runs of the suites that the file does not have."""
    suites = ["smoke"] if options.smoke else options.suite or ["main"]
    if unknown := set(suites) - set(SUITES):
        names = ", ".join(SUITES)
        report.refuse(main.program, f"--suite must be one of {names}; got {min(unknown)}")
    done = [Run(**row["settings"]) for row in kept(options)]
    wanted: list[Run] = []
    for run in (run for name in suites for run in SUITES[name]):
        # Suites share runs, and may be named twice.
        if run not in done + wanted:
            wanted.append(run)
    return wanted


main = runner.Benchmark(
    name="experiments.quality",
    description=__doc__,
    cases=plan,
    measure=perform,
    options=Options,
    kept=kept,
)

if __name__ == "__main__":
    sys.exit(main())
