"""Compares what the variants of the transformer learn: validation loss at equal L0 and tokens.

    python -m benchmarks.experiments.quality --json FILE                 three seeds of each
    python -m benchmarks.experiments.quality --suite width --json FILE   see SUITES; may be repeated
    python -m benchmarks.experiments.quality --smoke                     tiny, in seconds

The file is written after each run, and a run that it has already is not repeated: the same command
continues an interrupted one.

    sparse        the package's own way: annealed fans, rewired by sampled gradients
    static        the same with a random pattern that never changes: the control
    masked_dense  the published recipe: dense weights, gradients and moments, a global top-k over
                  each matrix after every step. With our abs_topk and the fast projection, which
                  compute the same as the released code in less time: the question is the loss.
    released      masked_dense exactly as released: torch.topk for activations and for the
                  projection. The same losses, up to ties and rounding; the question is the time.
    dense         nn.Linear, without AbsTopK: the plain model

The suite `sooner` shows how much less time than `released` the others need to reach its last
validation loss, in seconds of steps on an idle machine.

All variants of a seed see the same batches and the same validation windows. Seconds are those of
the steps without validation, in the other suites on a machine that may be shared:
benchmarks.training measures what a step costs.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import devices, report
from benchmarks.report import Row
from benchmarks.transformer.variants import PROJECTIONS, VARIANTS
from sparse_transformer import ModelConfig, keep_freed_memory
from sparse_transformer.data import Corpus, prepare
from sparse_transformer.optimizer import OptimizerConfig
from sparse_transformer.parallel import Ranks
from sparse_transformer.presets import Settings, TrainConfig
from sparse_transformer.topology import TopologyConfig
from sparse_transformer.train import Diverged, Trainer

PROGRAM = "python -m benchmarks.experiments.quality"
# The model of each variant, one of benchmarks.transformer.variants.
MODELS = {
    "sparse": "sparse",
    "static": "sparse",
    "masked_dense": "masked_dense_kernel",
    "released": "masked_dense",
    "dense": "dense",
}
_OF_MODEL = (
    "d_model", "n_layer", "context", "vocab_size", "density", "embedding_density", "min_nonzeros",
    "writers",
)  # fmt: skip
_OF_TRAINING = ("seed", "steps", "batch_tokens", "validate_every", "validation_tokens")


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

    @property
    def name(self) -> str:
        """Of the variant, with what differs from its defaults."""
        changed = self.topology | ({"writers": self.writers} if self.writers != "fan_out" else {})
        return " ".join((self.variant, *(f"{name}={value}" for name, value in changed.items())))

    def settings(self) -> Settings:
        """For the trainer."""
        model = MODELS[self.variant]
        static = {"start_multiple": 1.0, "drop_share": 0.0} if self.variant == "static" else {}
        return Settings(
            preset="quality",
            train=TrainConfig(
                device="cpu",
                projection="topk" if PROJECTIONS.get(model) == "topk" else "select",
                **{name: getattr(self, name) for name in _OF_TRAINING},
            ),
            model=ModelConfig(
                **{name: getattr(self, name) for name in _OF_MODEL}, **VARIANTS[model]
            ),
            topology=TopologyConfig(**static | self.topology, seed=self.seed),
            optimizer=OptimizerConfig(learning_rate=self.learning_rate),
        )


def _product(**values: Sequence[Any]) -> list[Run]:
    """A run for each combination of the values."""
    return [
        Run(**dict(zip(values, chosen, strict=True)))
        for chosen in itertools.product(*values.values())
    ]


_BOTH = ("sparse", "masked_dense")
_TINY: dict[str, Any] = {
    "d_model": 32, "n_layer": 1, "context": 16, "vocab_size": 300, "density": 1 / 4,
    "embedding_density": 1 / 4, "min_nonzeros": 1, "steps": 8, "batch_tokens": 32,
    "validate_every": 4, "validation_tokens": 64, "learning_rate": 1e-2,
}  # fmt: skip
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
    "ablations": [
        Run(topology={"start_multiple": 4.0}),
        Run(topology={"start_multiple": 1.0}),
        Run(topology={"grow": "random"}),
        Run(topology={"period": 50}),
        Run(topology={"drop_share": 0.0}),
        Run(topology={"candidates": 0.25}),
        Run(topology={"candidates": 0.01}),
        Run(writers="fan_in"),
    ],
    "sooner": _product(d_model=(256, 512), validate_every=(50,), variant=("sparse", "released")),
    "smoke": [
        *(Run(variant, **_TINY) for variant in MODELS),
        *(Run(variant, seed=1, **_TINY) for variant in _BOTH),
        Run(topology={"grow": "random"}, **_TINY),
    ],
}


def perform(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Trains; returns the row. A run that diverges has a `failure` and no `val_loss`."""
    trainer = Trainer(run.settings(), corpus, Ranks(0, 1, torch.device("cpu")))
    curve: list[dict[str, float]] = []
    times_s: list[float] = []
    failure = None
    try:
        while trainer.step < run.steps:
            start = time.perf_counter()
            trainer.advance()
            times_s.append(time.perf_counter() - start)
            if trainer.step % run.validate_every == 0 or trainer.step == run.steps:
                point = {
                    "step": trainer.step,
                    "tokens": trainer.step * run.batch_tokens,
                    "seconds": round(sum(times_s), 3),
                    "l0": trainer.l0(),
                    "val_loss": round(trainer.validate(), 5),
                }
                curve.append(point)
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
        "seconds": round(sum(times_s), 3),
        "threads": torch.get_num_threads(),
        "commit": report.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "failure": failure,
    }


# --- tables and the plot -----------------------------------------------------------------------


def groups(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Finished rows by what they have in common, and may be compared at, then by name."""
    made: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        run = Run(**row["settings"])
        shape = (
            f"d_model {run.d_model}, {run.n_layer} layers, blocks 1/{round(1 / run.density)}, "
            f"embeddings 1/{round(1 / run.embedding_density)}, learning rate "
            f"{run.learning_rate:g}, {run.steps * run.batch_tokens:,} tokens, validated every "
            f"{run.validate_every} steps"
        )
        if row["val_loss"] is not None:
            made.setdefault(shape, {}).setdefault(row["name"], []).append(row)
    return made


def _pairs(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of equal seeds."""
    by_seed = {row["seed"]: row for row in others}
    return [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]


def difference(rows: Sequence[Row], baseline: Sequence[Row]) -> list[float]:
    """Validation loss over the baseline's of the same seed, less 1; for the seeds of both."""
    return [row["val_loss"] / other["val_loss"] - 1 for row, other in _pairs(rows, baseline)]


def sooner(rows: Sequence[Row], released: Sequence[Row]) -> list[float]:
    """Seconds of the released recipe over those to its last loss, for the seeds of both.

    0 where that loss was not reached.
    """
    found = []
    for row, other in _pairs(rows, released):
        reached = (p["seconds"] for p in row["curve"] if p["val_loss"] <= other["val_loss"])
        seconds = next(reached, None)
        found.append(other["seconds"] / seconds if seconds else 0.0)
    return found


def table(rows: Sequence[Row]) -> str:
    """A table for each group, a line for each variant."""
    headings = (
        "variant", "seeds", "L0", "val_loss", "least", "most", "vs masked dense (least, most)",
        "step ms", "sooner",
    )  # fmt: skip
    parts = [
        f"{shape}\n" + report.table(headings, [_cells(name, names) for name in names])
        for shape, names in groups(rows).items()
    ]
    parts += [f"FAILED {row['name']}: {row['failure']}" for row in rows if row["failure"]]
    return "\n\n".join(parts)


def _cells(name: str, names: Mapping[str, Sequence[Row]]) -> list[str]:
    rows = names[name]
    losses = [row["val_loss"] for row in rows]
    over = difference(rows, names.get("masked_dense", ())) if name != "masked_dense" else []
    against = f"{statistics.fmean(over):+.2%}" if over else "-"
    if len(over) > 1:
        against += f" ({min(over):+.2%}, {max(over):+.2%})"
    factors = sooner(rows, names.get("released", ())) if name != "released" else []
    return [
        name,
        str(len(rows)),
        f"{rows[0]['l0']:,}",
        *(f"{value:.4f}" for value in (statistics.fmean(losses), min(losses), max(losses))),
        against,
        f"{statistics.median(row['step_ms'] for row in rows):.1f}",
        f"{min(factors):.1f}x" if factors else "-",
    ]


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Validation loss against tokens and seconds of the plain variants, into a PNG."""
    from matplotlib.figure import Figure

    drawn = groups(row for row in rows if row["name"] in MODELS)
    colors = {name: f"C{number}" for number, name in enumerate(MODELS)}
    count = max(1, len(drawn))
    figure = Figure(figsize=(9, 0.6 + 2.9 * count), layout="constrained")
    axes = figure.subplots(count, 2, squeeze=False, sharey="row")
    for pair, (shape, names) in zip(axes, drawn.items(), strict=False):
        for axis, (key, label) in zip(
            pair, (("tokens", "tokens"), ("seconds", "seconds of steps")), strict=True
        ):
            for row in itertools.chain.from_iterable(names.values()):
                values = [[point[name] for point in row["curve"]] for name in (key, "val_loss")]
                words = f"{row['name']}, seed {row['seed']}: {row['val_loss']:.3f}"
                axis.plot(*values, color=colors[row["name"]], lw=0.9, label=words)
            axis.grid(alpha=0.25, lw=0.5)
            axis.set_xlabel(label)
        pair[0].set_ylabel("validation loss")
        pair[0].legend(fontsize=6)
        pair[0].set_title(shape, fontsize=6)
    figure.suptitle(title, fontsize=7)
    figure.savefig(path, dpi=100, format="png")


def text(content: Mapping[str, Any]) -> str:
    """The tables of a result file."""
    return table(content["rows"])


# --- the command line --------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    suite: list[str] = field(default_factory=list)
    """A suite (default: main); may be repeated."""
    smoke: bool = False
    """Tiny models, in seconds."""
    json: Path | None = None
    """Write the rows to this file; runs that it has are not repeated."""
    plot: Path | None = None
    """Draw the curves into this PNG."""
    threads: int | None = None
    """torch.set_num_threads."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    config = (tyro.conf.UseAppendAction,)
    options = tyro.cli(Options, prog=PROGRAM, description=__doc__, args=words, config=config)
    suites = ["smoke"] if options.smoke else options.suite or ["main"]
    reason, rows = None, []
    if unknown := set(suites) - set(SUITES):
        reason = f"--suite must be one of {', '.join(SUITES)}; got {min(unknown)}"
    elif options.threads is not None and options.threads < 1:
        reason = f"--threads must be at least 1, got {options.threads}"
    elif options.plot is not None and (why := report.why_no_plot(options.plot)):
        reason = f"--plot: {why}"
    elif options.json is not None and (why := report.why_not_writable(options.json)):
        reason = f"--json: {why}"
    elif options.json is not None and options.json.exists():
        try:
            rows = report.read_json(options.json)["rows"]
        except ValueError as error:
            reason = f"--json: {error}"
        if not all({"settings", "curve", "val_loss"} <= row.keys() for row in rows):
            reason = f"--json: {options.json} is the result of another benchmark: choose another"
    if reason is not None:
        report.refuse(PROGRAM, reason)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    done = [Run(**row["settings"]) for row in rows]
    missing = [run for name in suites for run in SUITES[name] if run not in done]
    kept = {"keeps_freed_memory": keep_freed_memory()}
    machine = devices.connect("cpu").describe(["-m", *PROGRAM.split()[2:], *words]) | kept
    print(report.machine_line(machine), flush=True)
    try:
        train(missing, rows, machine, options)
    except KeyboardInterrupt:
        print("interrupted: --json has the finished runs", file=sys.stderr)
        return report.INTERRUPTED
    print("", table(rows), sep="\n", flush=True)
    if options.plot is not None:
        draw(rows, options.plot, report.machine_line(machine))
    return 1 if any(row["failure"] for row in rows) else 0


def train(runs: Sequence[Run], rows: list[Row], machine: Row, options: Options) -> None:
    """Adds a row for each run, and writes the file after each."""
    with tempfile.TemporaryDirectory() as cache, report.progress(total=len(runs)) as bar:
        corpus = prepare()
        if options.smoke:
            corpus = prepare(Path(__file__).parent, vocab_size=300, cache_dir=cache)
        for number, run in enumerate(runs, 1):
            bar.set_description(f"{run.name}, d_model {run.d_model}, seed {run.seed}")
            rows.append(perform(run, corpus))
            if options.json is not None:
                report.write_json(options.json, machine, rows, complete=number == len(runs))
            gc.collect()
            bar.update()


if __name__ == "__main__":
    sys.exit(main())
