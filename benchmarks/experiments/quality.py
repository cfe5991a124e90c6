"""Compares what the variants of the transformer learn: validation loss at equal L0 and tokens.

    python -m benchmarks.experiments.quality --suite main --json FILE    three seeds of each
    python -m benchmarks.experiments.quality --suite all --json FILE     all but the suite sooner
    python -m benchmarks.experiments.quality --from FILE --plot FILE.png
    python -m benchmarks.experiments.quality --smoke                     tiny, in seconds

Runs go one after the other, and the file is written after each. A run that the file already has is
not repeated, so that the same command goes on where it stopped; `--most 1` does one run and ends.
`--jobs 2 --threads 1` does two runs at a time, which suits a machine that others use as well.

    sparse        the package's own way: annealed fans, rewired by sampled gradients
    static        the same with a random pattern that never changes: the control
    masked_dense  the published recipe: dense weights, gradients and moments, a global top-k over
                  each matrix after every step. With our abs_topk and the fast projection, which
                  compute the same as the released code, sooner: the question here is the loss.
    released      masked_dense exactly as released: torch.topk for activations and for the
                  projection. The same losses, up to ties and rounding; the question is the time.
    dense         nn.Linear, without AbsTopK: the plain model

    python -m benchmarks.experiments.quality --suite sooner --json FILE

says how much sooner than `released` the others reach its last validation loss, in seconds of steps
on a machine that should have nothing else to do.

All variants of a seed see the same batches and the same validation windows. Seconds are those of
the steps without validation, in the other suites on a machine that may be shared: what a step
costs is measured by benchmarks.training.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import report
from sparse_kernels import cpu
from sparse_transformer import ModelConfig, keep_freed_memory
from sparse_transformer.data import Corpus, prepare
from sparse_transformer.optimizer import OptimizerConfig
from sparse_transformer.parallel import Ranks
from sparse_transformer.presets import Settings, TrainConfig
from sparse_transformer.topology import TopologyConfig
from sparse_transformer.train import Diverged, Trainer

Row = Mapping[str, Any]

MODULE = "benchmarks.experiments.quality"
PROGRAM = f"python -m {MODULE}"
VARIANTS = ("sparse", "static", "masked_dense", "released", "dense")
BASELINE = "masked_dense"
RELEASED = "released"
_LINEARS = {"static": "sparse", RELEASED: "masked_dense"}
_STATIC = {"start_multiple": 1.0, "drop_share": 0.0}


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        variant: one of `VARIANTS`.
        d_model, n_layer, context, vocab_size, density, embedding_density, min_nonzeros, writers: as
            in `ModelConfig`.
        seed: of the model, the batches and the topology.
        learning_rate: the peak.
        steps, batch_tokens: how long, and how many tokens each.
        validate_every, validation_tokens: as in `TrainConfig`.
        topology: what differs from `TopologyConfig()`.
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
    def key(self) -> str:
        """The same for the same settings."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def name(self) -> str:
        """Of the variant, with what differs from its defaults."""
        changed = self.topology | ({"writers": self.writers} if self.writers != "fan_out" else {})
        options = (f"{name}={value}" for name, value in changed.items())
        return " ".join((self.variant, *options))

    def settings(self) -> Settings:
        """For the trainer."""
        options = (_STATIC if self.variant == "static" else {}) | self.topology
        return Settings(
            preset="quality",
            train=TrainConfig(
                steps=self.steps,
                batch_tokens=self.batch_tokens,
                device="cpu",
                seed=self.seed,
                validate_every=self.validate_every,
                validation_tokens=self.validation_tokens,
                projection="topk" if self.variant == RELEASED else "select",
            ),
            model=ModelConfig(
                vocab_size=self.vocab_size,
                n_layer=self.n_layer,
                d_model=self.d_model,
                context=self.context,
                active=None if self.variant == "dense" else 0.25,
                linear=_LINEARS.get(self.variant, self.variant),
                abs_topk="torch" if self.variant == RELEASED else "kernel",
                density=self.density,
                embedding_density=self.embedding_density,
                min_nonzeros=self.min_nonzeros,
                writers=self.writers,
            ),
            topology=TopologyConfig(**options, seed=self.seed),
            optimizer=OptimizerConfig(learning_rate=self.learning_rate),
        )


def _each(run: Run, *variants: str) -> list[Run]:
    return [replace(run, variant=variant) for variant in variants]


def _with(**topology: Any) -> Run:
    return Run(topology=topology)


_SPARSER = Run(density=1 / 256, min_nonzeros=1)  # 4 of 256 would be 1/64 again
_WIDE = Run(d_model=512)
_TINY = Run(
    d_model=32, n_layer=1, context=16, vocab_size=300, density=1 / 4, embedding_density=1 / 4,
    min_nonzeros=1, steps=8, batch_tokens=32, validate_every=4, validation_tokens=64,
    learning_rate=1e-2,
)  # fmt: skip

# In each suite the most important runs come first, in an order that two jobs at a time like.
SUITES: dict[str, list[Run]] = {
    "main": [
        *_each(Run(seed=0), "sparse", "static"),
        *(Run("masked_dense", seed=seed) for seed in (0, 1)),
        Run("masked_dense", seed=2),
        *(Run("sparse", seed=seed) for seed in (1, 2)),
        *(Run("static", seed=seed) for seed in (1, 2)),
    ],
    "densities": [
        *_each(Run(density=1 / 16), "masked_dense", "sparse"),
        *_each(_SPARSER, "sparse", "masked_dense"),
    ],
    "ablations": [
        _with(start_multiple=4.0),
        _with(start_multiple=1.0),
        _with(grow="random"),
        _with(period=50),
        _with(drop_share=0.0),
        _with(candidates=0.25),
        _with(candidates=0.01),
        Run(writers="fan_in"),
    ],
    # Whether the learning rate that all share suits each: half of it, and twice.
    "rates": [
        Run(variant, learning_rate=rate)
        for rate in (1e-2, 4e-2)
        for variant in ("masked_dense", "sparse")
    ],
    "width": _each(_WIDE, "sparse", "static", "masked_dense"),
    "sooner": [
        Run(variant, d_model=d_model, validate_every=50)
        for d_model in (256, 512)
        for variant in ("sparse", RELEASED)
    ],
    "smoke": [
        *_each(_TINY, *VARIANTS),
        *_each(replace(_TINY, seed=1), "sparse", "masked_dense"),
        replace(_TINY, topology={"grow": "random"}),
    ],
}
_ALL = ("main", "width", "densities", "rates", "ablations")


def _work(run: Run, threads: int) -> dict[str, Any]:
    """`perform` in a process of its own."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    return perform(run, prepare(progress=False))


def _performed(runs: Sequence[Run], corpus: Corpus, jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of the runs, each as soon as it is finished."""
    if jobs == 1:
        for run in runs:
            print(_title(run), file=sys.stderr)
            yield perform(run, corpus)
            gc.collect()
        return
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(_work, run, threads) for run in runs]):
            yield future.result()


def perform(run: Run, corpus: Corpus) -> dict[str, Any]:
    """Trains; returns the row. A run that diverges has a `failure` and no `val_loss`."""
    trainer = Trainer(run.settings(), corpus, Ranks(0, 1, torch.device("cpu")))
    curve: list[dict[str, float]] = []
    times_s: list[float] = []
    losses: list[float] = []
    failure = None
    try:
        while trainer.step < run.steps:
            start = time.perf_counter()
            losses.append(trainer.advance()["loss"])
            times_s.append(time.perf_counter() - start)
            if trainer.step % run.validate_every == 0 or trainer.step == run.steps:
                curve.append(
                    {
                        "step": trainer.step,
                        "tokens": trainer.step * run.batch_tokens,
                        "seconds": round(sum(times_s), 3),
                        "l0": trainer.l0(),
                        "train_loss": round(statistics.fmean(losses), 5),
                        "val_loss": round(trainer.validate(), 5),
                    }
                )
                losses.clear()
    except Diverged as error:
        failure = str(error)
    ordered = sorted(times_s)
    return {
        "settings": dataclasses.asdict(run),
        "variant": run.variant,
        "name": run.name,
        "seed": run.seed,
        "l0": trainer.l0(),
        "val_loss": None if failure else curve[-1]["val_loss"],
        "curve": curve,
        "step_ms": 1e3 * statistics.median(ordered) if ordered else None,
        "step_p90_ms": 1e3 * ordered[int(0.9 * len(ordered))] if ordered else None,
        "seconds": round(sum(times_s), 3),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "commit": report.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "failure": failure,
    }


def _title(run: Run) -> str:
    return f"{run.name}, d_model {run.d_model}, {_density(run.density)}, seed {run.seed}"


def _density(density: float) -> str:
    return f"1/{round(1 / density)}"


# --- the table ---------------------------------------------------------------------------------


def _group(row: Row) -> tuple[Any, ...]:
    """Rows that may be compared: all settings alike but for variant, topology and seed."""
    settings = dict(row["settings"])
    for name in ("variant", "topology", "writers", "seed"):
        settings.pop(name, None)
    return tuple(settings.items())


def groups(rows: Iterable[Row]) -> dict[tuple[Any, ...], dict[str, list[Row]]]:
    """Finished rows by what may be compared, then by name."""
    made: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in rows:
        if row["val_loss"] is not None:
            made.setdefault(_group(row), {}).setdefault(row["name"], []).append(row)
    return made


def difference(rows: Sequence[Row], baseline: Sequence[Row]) -> list[float]:
    """Validation loss over the baseline's of the same seed, less 1; for the seeds of both."""
    theirs = {row["seed"]: row["val_loss"] for row in baseline}
    return [row["val_loss"] / theirs[row["seed"]] - 1 for row in rows if row["seed"] in theirs]


def seconds_to(row: Row, loss: float) -> float | None:
    """Seconds of steps until the first validation that was at most `loss`, if there was one."""
    reached = (point["seconds"] for point in row["curve"] if point["val_loss"] <= loss)
    return next(reached, None)


def sooner(rows: Sequence[Row], released: Sequence[Row]) -> list[float]:
    """Seconds of the released recipe over those to its last loss, for the seeds of both.

    0 where that loss was not reached.
    """
    theirs = {row["seed"]: row for row in released}
    found = []
    for row in rows:
        if row["seed"] in theirs:
            other = theirs[row["seed"]]
            seconds = seconds_to(row, other["val_loss"])
            found.append(other["seconds"] / seconds if seconds else 0.0)
    return found


def table(rows: Sequence[Row]) -> str:
    """A table for each group, a line for each variant."""
    headings = (
        "variant", "seeds", "L0", "val_loss", "least", "most", "vs masked dense (least, most)",
        "step ms", "sooner",
    )  # fmt: skip
    parts = []
    for group, names in groups(rows).items():
        shape = dict(group)
        tokens = shape["steps"] * shape["batch_tokens"]
        lines = [_cells(name, members, names) for name, members in names.items()]
        embeddings = _density(shape["embedding_density"])
        parts.append(
            f"{_shape(shape)}, embeddings {embeddings}, {tokens:,} tokens\n"
            + report.table(headings, lines)
        )
    parts += [f"FAILED {row['name']}: {row['failure']}" for row in rows if row["failure"]]
    return "\n\n".join(parts)


def _shape(shape: Row) -> str:
    return (
        f"d_model {shape['d_model']}, {shape['n_layer']} layers, blocks "
        f"{_density(shape['density'])}, learning rate {shape['learning_rate']:g}"
    )


def _cells(name: str, members: Sequence[Row], names: Mapping[str, Sequence[Row]]) -> list[str]:
    losses = [row["val_loss"] for row in members]
    over = difference(members, names.get(BASELINE, ()))
    against = "-"
    if name != BASELINE and over:
        against = f"{statistics.fmean(over):+.2%}"
        if len(over) > 1:
            against += f" ({min(over):+.2%}, {max(over):+.2%})"
    factors = sooner(members, names.get(RELEASED, ())) if name != RELEASED else []
    return [
        name,
        str(len(members)),
        f"{members[0]['l0']:,}",
        f"{statistics.fmean(losses):.4f}",
        f"{min(losses):.4f}",
        f"{max(losses):.4f}",
        against,
        f"{statistics.median(row['step_ms'] for row in members):.1f}",
        f"{min(factors):.1f}x" if factors else "-",
    ]


# --- the plot ----------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Validation loss against tokens and seconds of the plain variants, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = groups(row for row in rows if row["name"] in VARIANTS)
    colors = {name: f"C{number}" for number, name in enumerate(VARIANTS)}
    figure, axes = pyplot.subplots(
        max(1, len(drawn)), 2, figsize=(9, 0.6 + 2.9 * max(1, len(drawn))), squeeze=False,
        layout="constrained", sharey="row",
    )  # fmt: skip
    for pair, (group, names) in zip(axes, drawn.items(), strict=False):
        shape = dict(group)
        for axis, key in zip(pair, ("tokens", "seconds"), strict=True):
            for name, members in names.items():
                mean = statistics.fmean(row["val_loss"] for row in members)
                for number, row in enumerate(members):
                    seeds = "" if len(members) == 1 else f", {len(members)} seeds"
                    axis.plot(
                        [point[key] for point in row["curve"]],
                        [point["val_loss"] for point in row["curve"]],
                        color=colors[name],
                        lw=0.9,
                        label=None if number else f"{name}: {mean:.3f}{seeds}",
                    )
            axis.grid(alpha=0.25, lw=0.5)
            axis.set_xlabel("tokens" if key == "tokens" else "seconds of steps")
        pair[0].set_ylabel("validation loss")
        pair[0].legend(fontsize=8)
        pair[0].set_title(_shape(shape), fontsize=9)
    figure.suptitle(title, fontsize=7)
    figure.savefig(path, dpi=100, format="png")
    pyplot.close(figure)


# --- the command line --------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Attributes are the options."""

    suite: list[str] = field(default_factory=list)
    """a suite, or all (without sooner); may be repeated; default: main"""
    smoke: bool = False
    """tiny, in seconds"""
    json: Path | None = None
    """write the rows to this file; runs that it holds are not repeated"""
    most: int | None = None
    """stop after so many new runs"""
    jobs: int = 1
    """train so many runs at a time, each in a process"""
    plot: Path | None = None
    """draw the curves into this PNG"""
    threads: int | None = None
    """threads of torch and of the kernels"""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """show a result file; trains nothing"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = tyro.cli(
        Options,
        prog=PROGRAM,
        description=__doc__,
        args=words,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction),
    )
    reason = _why_not(options)
    if reason is not None:
        report.refuse(PROGRAM, reason)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        return _train(options, words) if options.source is None else _show(options.source, options)
    except ValueError as error:
        report.refuse(PROGRAM, str(error))
    except KeyboardInterrupt:
        print("interrupted: --json holds the runs that were complete", file=sys.stderr)
        return report.INTERRUPTED


def _why_not(options: Options) -> str | None:
    known = [*(name for name in SUITES if name != "smoke"), "all"]
    for name in options.suite:
        if name not in known:
            return f"--suite must be one of {', '.join(known)}; got {name}"
    for name in ("threads", "most", "jobs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            return f"--{name} must be at least 1, got {value}"
    if options.json is not None and (reason := report.why_not_writable(options.json)):
        return f"--json: {reason}"
    if options.smoke and options.jobs > 1:
        return "--smoke is one process: leave --jobs out"
    if options.plot is not None and (reason := report.why_no_plot(options.plot)):
        return f"--plot: {reason}"
    return None


def _stored(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Machine and rows of a result file.

    Raises:
        ValueError: it is something else.
    """
    content = report.read_json(path)
    if not all({"settings", "curve", "val_loss"} <= row.keys() for row in content["rows"]):
        raise ValueError(f"{path} is the result of another benchmark: choose another file")
    return content["machine"], content["rows"]


def _show(path: Path, options: Options) -> int:
    """The table and the plot of a result file."""
    machine, rows = _stored(path)
    if options.plot is not None:
        draw(rows, options.plot, report.machine_line(machine))
    print(report.machine_line(machine), "", table(rows), sep="\n")
    return 0


def _train(options: Options, words: Sequence[str]) -> int:
    """Trains what is missing, prints and writes."""
    names = ["smoke"] if options.smoke else options.suite or ["main"]
    names = [one for name in names for one in (_ALL if name == "all" else (name,))]
    wanted = {run.key: run for name in names for run in SUITES[name]}
    exists = options.json is not None and options.json.exists()
    rows = _stored(options.json)[1] if options.json is not None and exists else []
    done = {Run(**row["settings"]).key for row in rows}
    missing = [run for key, run in wanted.items() if key not in done]
    chosen = missing[: options.most]
    left = len(missing)
    isa = cpu.isa() if cpu.isas() else None
    machine = report.describe_machine(["-m", MODULE, *words], isa=isa, peaks=None)
    machine |= {"keeps_freed_memory": keep_freed_memory()}
    print(report.machine_line(machine), flush=True)
    with tempfile.TemporaryDirectory() as cache:
        # Made here, so that it exists before any worker asks for it.
        corpus = (
            prepare(Path(__file__).parent, vocab_size=_TINY.vocab_size, cache_dir=cache)
            if options.smoke
            else prepare()
        )
        performed = _performed(chosen, corpus, options.jobs)
        for row in report.progress(performed, total=len(chosen)):
            rows.append(row)
            left -= 1
            if options.json is not None:
                report.write_json(options.json, machine, rows, complete=left == 0)
    print("", table(rows), sep="\n", flush=True)
    if left:
        print(f"\n{left} runs of {', '.join(names)} are still missing")
    if options.plot is not None:
        draw(rows, options.plot, report.machine_line(machine))
    return 1 if any(row["failure"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
