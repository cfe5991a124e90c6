"""Circuit size against validation loss, over widths and L0: the main result of Gao et al. 2025.

    python -m benchmarks.experiments.frontier --out DIR --json FILE [--plot FILE.png]

Trains the models of `KINDS` with two seeds each, dense ones to the end of their own schedule, on
the standard library and on the answers of prompts of `QUESTIONS`; asks every model every task; and
searches circuits, at the same target and with the same number of trials and steps.

Losses are of the validation files, the same windows for all. A circuit counts unless the whole
interval of its held-out loss lies above the target of 0.15, or the model itself is above what is
searched for: then it is "not reached", which is reported, and the task is in no mean with that
model. Means are geometric, with an interval of 95% by bootstrap over tasks and seeds.

The same command continues after an interruption. Processes with other --models may share DIR.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import devices, report, run
from benchmarks.experiments.frontier_results import circuit_text, solved, text, why_not_reached
from sparse_transformer import ModelConfig, Transformer, UserError, keep_freed_memory, program
from sparse_transformer.circuits.activations import fingerprint, mean_activations
from sparse_transformer.circuits.budget import Budget
from sparse_transformer.circuits.graph import Edges
from sparse_transformer.circuits.objective import TaskLoss
from sparse_transformer.circuits.pipeline import find_circuit
from sparse_transformer.data import Corpus, prepare, sample, validation_batches
from sparse_transformer.evaluation import evaluate_task
from sparse_transformer.files import write_atomically
from sparse_transformer.run import load_run
from sparse_transformer.tasks import TASKS
from sparse_transformer.train import checkpoint, metrics
from sparse_transformer.train.loop import train
from sparse_transformer.train.optimizer import OptimizerConfig
from sparse_transformer.train.settings import Settings, TrainConfig
from sparse_transformer.train.topology import TopologyConfig

PROGRAM = "python -m benchmarks.experiments.frontier"
BASE = Settings(
    preset="frontier",
    train=TrainConfig(
        batch_tokens=4096,
        validate_every=500,
        validation_tokens=32768,
        save_every=100,
        keep=1,
        device="cpu",
        tensorboard=False,
        sample_tokens=0,
    ),
    model=ModelConfig(n_layer=2, context=128),
    topology=TopologyConfig(start_multiple=4.0, anneal_share=0.3),
)
# Nonzero weights of a token in the embedding and in the unembedding, at every width and L0.
EMBEDDING_FAN = 32
SEEDS = (0, 1)
# The target of a search. On held-out prompts the loss of a circuit of hundreds of nodes is about
# 1.3 times that on the prompts it was fitted to; frontier_results.TARGET is for held-out ones.
SEARCHED = 0.12
# Prompts of a mask, so that none comes twice in the default number of steps.
_TRAIN_PAIRS = 2400
# Tasks that models of these sizes learn soon.
QUESTIONS = (
    "single_double_quote",
    "final_kwarg",
    "with_as",
    "for_while",
    "lambda_func",
    "if_equals",
)
# Windows of the losses and of the means, pairs of a score.
_LOSS_WINDOWS, _MEAN_WINDOWS, _SCORE_PAIRS = 1024, 256, 256
# Not bound by the clock: the load on the machine must not change a result.
_SECONDS = 1e9


@dataclass(frozen=True)
class Kind:
    """A row of the table, trained once with each of `SEEDS`.

    `fan` is what every q, k and v channel and every neuron reads of the residual stream, and what
    every v channel and every neuron writes to it; None: dense, without AbsTopK. L0 counts these
    weights of the blocks, 24 d_model fan with two layers; embeddings have `EMBEDDING_FAN`.
    `learning_rate` is the best of a sweep with `--rate`: docs/experiments.md.
    """

    name: str
    label: str
    d_model: int
    fan: int | None
    learning_rate: float

    def settings(self, seed: int, options: Options) -> Settings:
        rate = self.learning_rate * options.rate
        config = replace(
            BASE.train,
            seed=seed,
            steps=options.steps,
            data=tuple(options.data),
            task_pairs=16,
            tasks=QUESTIONS,
        )
        wide = replace(BASE.model, d_model=self.d_model)
        if self.fan is None:
            dense = replace(wide, linear="dense", active=None)
            # The published epsilon does not suit small dense models: docs/experiments.md.
            adam = OptimizerConfig(learning_rate=rate, eps=1e-8)
            return replace(BASE, train=config, model=dense, optimizer=adam)
        density, ends = self.fan / self.d_model, min(1.0, EMBEDDING_FAN / self.d_model)
        model = replace(wide, density=density, embedding_density=ends)
        # A fan cannot be more than dense.
        start = min(BASE.topology.start_multiple, 1 / density)
        topology = replace(BASE.topology, start_multiple=start, seed=seed)
        adam = OptimizerConfig(learning_rate=rate)
        return replace(BASE, train=config, model=model, topology=topology, optimizer=adam)


KINDS = (
    Kind("d64", "width 64", 64, 32, 0.02),
    Kind("d128", "width 128", 128, 16, 0.02),
    Kind("d256", "width 256", 256, 8, 0.02),
    Kind("d128-half", "half the L0", 128, 8, 0.02),
    Kind("d128-double", "twice the L0", 128, 32, 0.02),
    Kind("dense64", "dense, width 64", 64, None, 0.003),
    Kind("dense128", "dense, width 128", 128, None, 0.003),
)


@dataclass(frozen=True)
class Options:
    out: Path
    """Folder of the trainings and circuits."""
    json: Path
    """Write the rows to this file."""
    plot: Path | None = None
    """Draw them into this PNG."""
    models: str = ""
    """Only models whose name, such as d128-half-1 for its seed 1, has a match of this regex."""
    tasks: list[str] = field(default_factory=list)
    """Search circuits of this task; may be repeated. By default those that most models solve."""
    most_tasks: int = 6
    """Search circuits of at most this many tasks, if --tasks names none."""
    steps: int = 2000
    """Training steps, of 4096 tokens."""
    rate: float = 1.0
    """Factor on every learning rate; for a sweep, with --most-tasks 0 and few --steps."""
    trials: int = 2
    """Trials of a search; the best of them is pruned."""
    search_steps: int = 100
    """Steps of a trial."""
    test_pairs: int = 64
    """Held-out pairs of a circuit, in each of three draws."""
    data: list[Path] = field(default_factory=list)
    """A file or folder of the corpus, by default the standard library; may be repeated."""
    threads: int | None = None
    """Number of CPU threads; by default those of PyTorch."""


@dataclass(frozen=True)
class Trained:
    """A model, its folder, and its row of the result."""

    folder: Path
    model: Transformer
    row: dict[str, Any]


def trained(kind: Kind, seed: int, options: Options, corpus: Corpus) -> Trained:
    """Trains, or continues, or finds the model; asks it for its loss and every task.

    Raises:
        UserError: the folder has a run with other settings. SystemExit: training was stopped.
    """
    folder = options.out / f"{kind.name}-{seed}"
    wanted = kind.settings(seed, options)
    with contextlib.suppress(FileNotFoundError):
        if json.loads((folder / "config.json").read_text()) != _plain(wanted.to_dict()):
            raise UserError(f"{folder} was trained with other settings: use another --out")
    if checkpoint.steps(folder)[-1:] != [options.steps] and (status := train(wanted, folder)):
        raise SystemExit(status)
    model = load_run(folder)[0].requires_grad_(False)
    asked = {"weights": fingerprint(model), "pairs": _SCORE_PAIRS, "windows": _LOSS_WINDOWS}

    def measure() -> dict[str, Any]:
        scores = {}
        for name in QUESTIONS:
            pairs = TASKS[name].pairs(
                corpus.tokenizer, _SCORE_PAIRS, split="test", context=model.config.context
            )
            score = evaluate_task(model, pairs, pad=corpus.end_of_text)
            scores[name] = dataclasses.asdict(score) | {"solved": score.solved}
        return {"loss": held_out_loss(model, corpus.validation), "scores": scores}

    last = metrics.read(folder / "metrics.jsonl")[-1]
    row = {
        "run": folder.name,
        "kind": dataclasses.asdict(kind),
        "seed": seed,
        "edges": len(Edges.of(model).weight),
        "training": {name: last[name] for name in ("step", "tokens", "l0", "val_loss", "seconds")},
        **_kept(folder / "evaluation.json", asked, measure),
        "circuits": {},
    }
    return Trained(folder, model, row)


@torch.no_grad()
def held_out_loss(model: Transformer, text: np.ndarray) -> float:
    """Mean loss of a token in evenly spaced windows of `text`."""
    cut = functools.partial(validation_batches, text, context=model.config.context)
    losses = [
        (len(tokens), float(model.loss(tokens, targets)))
        for tokens, targets in cut(batch=32, windows=_LOSS_WINDOWS)
    ]
    return sum(rows * loss for rows, loss in losses) / sum(rows for rows, _ in losses)


def search(found: Trained, task: str, corpus: Corpus, options: Options) -> dict[str, Any]:
    """Sizes and validation of a circuit, or why there is none."""
    model, folder = found.model, found.folder / "circuits"
    folder.mkdir(exist_ok=True)
    budget = Budget(
        seconds=_SECONDS,
        trials=options.trials,
        steps=options.search_steps,
        finalists=1,
        test_pairs=options.test_pairs,
    )
    asked = {
        "weights": fingerprint(model),
        "target": SEARCHED,
        "train_pairs": _TRAIN_PAIRS,
        "budget": vars(budget),
    }

    def measure() -> dict[str, Any]:
        tokens = sample(corpus, corpus.tokenizer, model.config.context, _MEAN_WINDOWS)
        means = mean_activations(model, tokens, cache_dir=found.folder)
        loss = TaskLoss(
            model,
            TASKS[task],
            corpus.tokenizer,
            means,
            train_pairs=_TRAIN_PAIRS,
            test_pairs=options.test_pairs,
        )
        journal = folder / f"{task}.journal"
        try:
            circuit = find_circuit(loss, SEARCHED, budget, journal=journal, controls=0)
        except UserError as error:
            return {"error": str(error)}
        proof = circuit.validation.to_dict()
        return {"sizes": circuit.sizes, "proof": proof, "seconds": circuit.seconds}

    return _kept(folder / f"{task}.json", asked, measure)


def _kept(path: Path, asked: object, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` has if that answers what is asked; else measures it, and writes it there."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        content = json.loads(path.read_text())
        if content["asked"] == _plain(asked):
            found: dict[str, Any] = content["found"]
            return found
    content = {"asked": asked, "found": measure()}
    write_atomically(path, json.dumps(content, indent=1))
    return dict(_plain(content["found"]))


def _plain(content: object) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(content))


def measure(options: Options, machine: Mapping[str, Any]) -> None:
    """Trains, asks and searches; the file has at any time what is known by then."""
    corpus = prepare(options.data or None, vocab_size=BASE.model.vocab_size)
    models: list[Trained] = []

    def save(line: str, *, complete: bool = False) -> None:
        rows = [found.row for found in models]
        report.write_json(options.json, machine, rows, complete=complete)
        print(line, flush=True)

    for kind, seed in ((kind, seed) for seed in SEEDS for kind in KINDS):
        if re.search(options.models, f"{kind.name}-{seed}"):
            models.append(trained(kind, seed, options, corpus))
            row = models[-1].row
            save(f"{row['run']}: loss {row['loss']:.4f}, solves {', '.join(solved(row))}")
    counts = Counter(task for found in models for task in solved(found.row))
    for task in options.tasks or [task for task, _ in counts.most_common(options.most_tasks)]:
        for found in models:
            if task in solved(found.row):
                found.row["circuits"][task] = search(found, task, corpus, options)
                shown = circuit_text(found.row, task) or why_not_reached(found.row, task)
                save(f"{found.row['run']}, {task}: {shown}")
    save("", complete=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options, command = run.parse(Options, "experiments.frontier", __doc__, arguments)
    if unknown := set(options.tasks) - set(QUESTIONS):
        names = ", ".join(QUESTIONS)
        report.refuse(PROGRAM, f"--tasks must be one of {names}; got {min(unknown)}")
    if options.plot is not None and (reason := report.why_no_plot(options.plot)):
        report.refuse(PROGRAM, f"--plot: {reason}")
    keep_freed_memory()
    machine = devices.Device().describe(command)
    print(report.machine_line(machine), flush=True)
    status = program.status(lambda: measure(options, machine), "interrupted: repeat the command")
    if status == 0:
        print(text(report.read_json(options.json)["rows"]))
        if options.plot is not None:
            report.main(options.json, plot=options.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
