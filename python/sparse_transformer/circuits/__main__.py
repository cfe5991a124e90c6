"""`python -m sparse_transformer.circuits --checkpoint DIR --task single_double_quote --out DIR`.

Finds the circuit of a task, validates it and draws it: `DIR/TASK/circuit.json`, `.html`, `.svg` and
`.png`. `--all` takes every task that the model solves; `--against DIR ...` does the same with other
models, a dense one for instance, and compares the sizes. The same command continues an interrupted
search; tasks that already have a circuit are skipped.

`DIR/comparison.json` has the numbers of all models and tasks. With `--against` or `--all`, and if
all models have a circuit of the same task, there is also `DIR/comparison.png`: size against target
loss, and against L0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer import program, tasks
from sparse_transformer.circuits import compare
from sparse_transformer.circuits.describe import describe
from sparse_transformer.circuits.edges import Edges
from sparse_transformer.circuits.find import find
from sparse_transformer.circuits.means import fingerprint, mean_activations, windows
from sparse_transformer.circuits.picture import write_html, write_image
from sparse_transformer.circuits.problem import Problem
from sparse_transformer.circuits.search import Budget
from sparse_transformer.data import default_cache, prepare
from sparse_transformer.errors import UserError
from sparse_transformer.evaluate import SOLVED_ACCURACY
from sparse_transformer.memory import keep_freed_memory
from sparse_transformer.model import Transformer
from sparse_transformer.run import load_run
from sparse_transformer.train.checkpoint import load

# More edges than this, those of the ends and the residual stream included, are no picture.
_MOST_DRAWN = 1500
# Windows of the training corpus for means and snippets.
_WINDOWS = 256


@dataclass(frozen=True)
class CircuitConfig:
    """Finds, validates and draws the circuit of a task in a trained model."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder of a training run, or of one checkpoint in it."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Output folder, with a subfolder for each task."""
    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Names of one or more tasks."""
    all: bool = False
    """Find circuits for every task that the model solves."""
    against: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR")] = ()
    """Other runs to compare with; their circuits are found too."""
    target: float = 0.15
    """Two-way loss, in nats, that a circuit must reach on its own."""
    edges: bool = True
    """Also prune single edges, which the paper does not do."""
    control: bool = True
    """Repeat the search with random labels as a control."""
    solved: float = SOLVED_ACCURACY
    """Accuracy from which a model counts as solving a task."""
    budget: Budget = field(default_factory=Budget)
    """How long to search."""
    step: int | None = None
    """The checkpoint of this step, by default the newest."""
    data: tuple[Path, ...] = ()
    """Files and folders for means and snippets; by default the training files."""
    cache_dir: Path | None = None
    """Folder for tokenized corpora and means."""
    seed: int = 0
    """Random seed of the prompts and masks."""


class _Run:
    """A model with what its problems share.

    Raises:
        UserError: a checkpoint or corpus that cannot be read.
    """

    def __init__(self, path: Path, config: CircuitConfig) -> None:
        self.model: Transformer
        self.tokenizer: Tokenizer
        self.model, self.tokenizer = load_run(path, config.step, "cpu")
        self.model.eval().requires_grad_(False)
        point = load(path, config.step, prefix="nothing")
        settings = point.meta["settings"]
        sources = config.data or tuple(Path(source) for source in settings["train"]["data"])
        corpus = prepare(
            list(sources) or None,
            vocab_size=self.model.config.vocab_size,
            cache_dir=config.cache_dir,
        )
        self.corpus: Tensor = windows(corpus, self.tokenizer, self.model.config.context, _WINDOWS)
        self.means = mean_activations(
            self.model, self.corpus, cache_dir=config.cache_dir or default_cache()
        )
        self.weights = fingerprint(self.model)
        self.facts: dict[str, Any] = {
            "run": path.name,
            "step": point.step,
            "linear": self.model.config.linear,
            "n_layer": self.model.config.n_layer,
            "d_model": self.model.config.d_model,
            "l0": len(Edges.of(self.model).weight),
            "preset": settings["preset"],
        }

    def circuit(self, name: str, config: CircuitConfig, folder: Path) -> dict[str, Any]:
        """Finds, proves and draws one circuit; returns what summary.json has of it.

        Raises:
            UserError: the task cannot be asked, or is not solved, or the target is out of reach.
        """
        done = folder / "summary.json"
        settings = self._settings(config)
        stored = _stored(done, settings)
        if stored is not None:
            return stored
        problem = Problem(self.model, tasks.get(name), self.tokenizer, self.means, seed=config.seed)
        solved = problem.need_solved(config.solved)
        folder.mkdir(parents=True, exist_ok=True)
        found = find(
            problem,
            config.target,
            config.budget,
            journal=folder / "search.journal",
            edges=config.edges,
            with_control=config.control,
            seed=config.seed,
        )
        drawn = describe(
            problem,
            found.part,
            found.calibration,
            self.tokenizer,
            self.corpus,
            target=config.target,
            model=self.facts,
            proof=found.proof,
        )
        _write(folder / "circuit.json", drawn.to_json())
        pictures = [folder / f"circuit{ending}" for ending in (".html", ".svg", ".png")]
        if len(drawn.edges) <= _MOST_DRAWN:
            write_html(drawn, pictures[0])
            for picture in pictures[1:]:
                write_image(drawn, picture)
        else:
            for picture in pictures:
                picture.unlink(missing_ok=True)
        summary = {
            "settings": settings,
            "model": self.facts,
            "accuracy": solved.accuracy,
            "sizes": found.sizes,
            "proof": found.proof,
            "curve": found.curve,
            "seconds": found.seconds,
            "config": vars(found.config),
        }
        _write(done, json.dumps(summary, indent=1))
        return summary

    def _settings(self, config: CircuitConfig) -> dict[str, Any]:
        """What a result depends on."""
        names = ("target", "edges", "control", "solved", "seed")
        return {
            **{name: getattr(config, name) for name in names},
            "budget": dict(vars(config.budget)),
            "weights": self.weights,
        }


def run(config: CircuitConfig) -> None:
    """Does what `config` says and prints what it found.

    Raises:
        UserError: see `_Run`; for one task also what `_Run.circuit` refuses.
    """
    if bool(config.task) == config.all:
        raise UserError("no task given: use --task NAME or --all")
    if not config.target > 0:
        raise UserError(f"--target must be above 0, got {config.target}: 0.15 is the published one")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{config.out} cannot be written ({error.strerror}): choose another --out"
        ) from error
    names = list(tasks.TASKS) if config.all else [tasks.get(name).name for name in config.task]
    paths = {path.resolve().name: path for path in (config.checkpoint, *config.against)}
    if len(paths) < 1 + len(config.against):
        raise UserError("--checkpoint and --against must be folders of different names: rename one")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for model, path in paths.items():
        prepared = _Run(path, config)
        rows = results[model] = {}
        root = config.out / model if config.against else config.out
        for name in names:
            try:
                rows[name] = prepared.circuit(name, config, root / name)
            except UserError as error:
                if len(names) == 1:
                    raise
                rows[name] = {"error": str(error)}
                print(f"{model}, {name}: {error}", file=sys.stderr)
                continue
            except OSError as error:
                raise UserError(
                    f"{root / name} cannot be written ({error.strerror}): free some space or "
                    f"choose another --out"
                ) from error
            print(_sentence(model, name, rows[name], root / name), flush=True)
    _write(config.out / "comparison.json", json.dumps(results, indent=1))
    if config.all or config.against:
        print("\n" + compare.table(results))
        if compare.common_tasks(results):
            compare.plot(results, config.out / "comparison.png")


def _sentence(model: str, name: str, row: dict[str, Any], folder: Path) -> str:
    proof, sizes = row["proof"], row["sizes"]
    nodes, edges = list(sizes.values())[-1]
    control = proof.get("control")
    lines = [
        f"{model}, {name}: {nodes} nodes, {edges} edges (by nodes alone {sizes['nodes'][1]}, by "
        f"bisection of nodes {sizes['cut'][1]}) in {sum(row['seconds'].values()):.0f} s",
        f"  model alone: accuracy {proof['model_accuracy']:.1%}, loss {proof['model_loss']:.3f} on "
        f"{proof['pairs']} held-out pairs",
        *(
            f"  {ablation}-ablated: circuit alone {proof['circuit'][ablation]['loss']:.3f}, "
            f"without it {proof['without'][ablation]['loss']:.3f} "
            f"(recalibrated {proof['without'][ablation]['recalibrated_loss']:.3f})"
            for ablation in proof["circuit"]
        ),
        f"  sufficient: {_yes(proof['sufficient'])}; necessary: {_yes(proof['necessary'])}",
    ]
    if control is not None:
        verdict = _red("REACHED THE TARGET") if control["reached"] else "did not reach the target"
        lines.append(
            f"  control, random labels: {verdict} with up to {control['limit']} edges "
            f"(least loss {control['loss']:.3f})"
        )
    picture = folder / "circuit.html"
    found = str(picture) if picture.exists() else f"{folder / 'circuit.json'}, too large to draw"
    return "\n".join([*lines, f"  {found}"])


def _yes(value: bool) -> str:
    return "yes" if value else _red("NO")


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text


def _stored(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run of the same settings."""
    try:
        summary = json.loads(path.read_text())
        same = summary["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return summary if same else None


def _write(path: Path, text: str) -> None:
    """In one go, so that an interruption leaves no half of a file."""
    temporary = path.with_name(f".{path.name}.temporary")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 2 after an error, 130 after Ctrl-C."""
    config = tyro.cli(CircuitConfig, prog="sparse_transformer.circuits", args=arguments)
    return program.status(lambda: run(config), "interrupted: the same command continues the search")


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
