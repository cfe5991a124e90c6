"""`python -m sparse_transformer.circuits --checkpoint DIR --task single_double_quote --out DIR`.

Finds the circuit of a task, validates it and draws it: `DIR/TASK/circuit.json`, `.html`, `.svg` and
`.png`. `--all` takes every task that the model solves; `--against DIR ...` does the same with other
models, a dense one for instance, and compares the sizes. The same command continues an interrupted
search; tasks that already have a circuit are skipped.

`DIR/comparison.json` has the numbers of all models and tasks. With `--against` or `--all`, and if
all models have a circuit of the same task, there is also `DIR/comparison.png`: circuit size against
target loss and against model size.
"""

from __future__ import annotations

import json
import sys
import textwrap
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer import program, tasks
from sparse_transformer.circuits import compare
from sparse_transformer.circuits.activations import fingerprint, mean_activations
from sparse_transformer.circuits.annotate import annotate
from sparse_transformer.circuits.budget import Budget, Progress
from sparse_transformer.circuits.circuit import Circuit, Validation
from sparse_transformer.circuits.graph import Edges
from sparse_transformer.circuits.objective import PRUNED_UNDER, TaskLoss
from sparse_transformer.circuits.pipeline import FoundCircuit, find_circuit
from sparse_transformer.circuits.viz import summary, write_html, write_image
from sparse_transformer.data import default_cache
from sparse_transformer.errors import UserError, writing
from sparse_transformer.evaluation import SOLVED_ACCURACY
from sparse_transformer.files import replacing
from sparse_transformer.memory import keep_freed_memory
from sparse_transformer.model import Transformer, count_weights
from sparse_transformer.run import corpus_sample, load_run
from sparse_transformer.train.checkpoint import load

# More edges than this, those to tokens, to answers and of the residual stream included, are not
# drawn: nobody could read the picture.
_MOST_DRAWN = 1500
# The share of the time in which nodes are described.
_DESCRIBING = 0.05


@dataclass(frozen=True)
class CircuitConfig:
    """Finds, validates and draws the circuit of a task in a trained model."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of a run, of a checkpoint in it or of an exported model; or the name of a model."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Output folder, with a subfolder for each task."""
    task: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Names of one or more tasks."""
    all: bool = False
    """Find circuits for every task that the model solves."""
    against: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR")] = ()
    """Other runs to compare with; their circuits are found too."""
    target: float = 0.15
    """Loss over the two answers, in nats, that a circuit must reach alone; guessing has 0.69."""
    edges: bool = True
    """Also prune single edges, which the paper does not do."""
    controls: int = 5
    """Number of nonsense tasks, besides swapped labels and permuted weights; 0: no controls."""
    ablation: tuple[Literal["mean", "mixture"], ...] = ("mean",)
    """mean: as published; mixture: four ablations in turn, a larger circuit; both: two circuits."""
    solved: float = SOLVED_ACCURACY
    """Accuracy from which a model counts as solving a task."""
    budget: Budget = field(default_factory=Budget)
    """Limits of the search for each circuit."""
    step: int | None = None
    """The checkpoint of this step, by default the newest."""
    data: tuple[Path, ...] = ()
    """Files for means and snippets; by default the model's sample, or its training files."""
    cache_dir: Path | None = None
    """Folder for tokenized corpora and means."""
    seed: int = 0
    """Random seed of the prompts and masks."""


class _Run:
    """A model with what its tasks share."""

    def __init__(self, path: Path, config: CircuitConfig) -> None:
        self.model: Transformer
        self.tokenizer: Tokenizer
        self.model, self.tokenizer = load_run(path, config.step, "cpu")
        self.model.eval().requires_grad_(False)
        point = load(path, config.step, prefix="nothing")
        self.corpus: Tensor = corpus_sample(
            path, self.model, data=config.data, cache_dir=config.cache_dir
        )
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
            "l0": count_weights(self.model),
            "edges": len(Edges.of(self.model).weight),
            "preset": point.meta["settings"]["preset"],
        }

    def circuit(
        self, name: str, ablation: str, config: CircuitConfig, folder: Path
    ) -> dict[str, Any]:
        """Finds, validates and draws one circuit; returns the content of summary.json."""
        done = folder / "summary.json"
        settings = self._settings(config) | {"ablation": ablation}
        stored = _stored(done, settings)
        if stored is not None:
            return stored
        with closing(Progress(config.budget.seconds, shown=None)) as progress:
            task = TaskLoss(
                self.model,
                tasks.get(name),
                self.tokenizer,
                self.means,
                test_pairs=config.budget.test_pairs,
                seed=config.seed,
                pruned_under=PRUNED_UNDER[ablation],
            )
            solved = task.need_solved(config.solved)
            folder.mkdir(parents=True, exist_ok=True)
            drawn: list[Circuit] = []

            def draw(found: FoundCircuit) -> None:
                """Before the controls, so that there is something to look at."""
                drawn.append(
                    annotate(
                        task,
                        found,
                        self.tokenizer,
                        self.corpus,
                        target=config.target,
                        model=self.facts,
                        progress=Progress(_DESCRIBING * config.budget.seconds),
                    )
                )
                _draw(drawn[0], folder)
                if config.controls:
                    print(f"{folder}: drawn; its controls follow", flush=True)

            found = find_circuit(
                task,
                config.target,
                config.budget,
                journal=folder / "search.journal",
                edges=config.edges,
                controls=config.controls,
                corpus=self.corpus,
                seed=config.seed,
                progress=progress,
                on_validated=draw,
            )
        _draw(replace(drawn[0], validation=found.validation), folder)
        content = {
            "settings": settings,
            "model": self.facts,
            "accuracy": solved.accuracy,
            "sizes": found.sizes,
            "proof": found.validation.to_dict(),
            "curve": found.curve,
            "faithfulness": found.faithfulness and found.faithfulness._asdict(),
            "seconds": found.seconds,
            "config": vars(found.config),
        }
        _write(done, json.dumps(content, indent=1))
        return content

    def _settings(self, config: CircuitConfig) -> dict[str, Any]:
        """Everything that a result depends on."""
        names = ("target", "edges", "controls", "solved", "seed")
        return {
            **{name: getattr(config, name) for name in names},
            "budget": dict(vars(config.budget)),
            "weights": self.weights,
        }


def run(config: CircuitConfig) -> None:
    """Finds the circuits and prints a few lines about each."""
    if find_spec("pygraphviz") is None:
        raise UserError("drawing needs pygraphviz: pip install '.[transformer]'")
    if bool(config.task) == config.all:
        raise UserError("no task given: use --task NAME or --all")
    if not config.target > 0:
        raise UserError(f"--target must be above 0, got {config.target}: 0.15 is the published one")
    if not 0 <= config.solved <= 1:
        raise UserError(f"--solved must be between 0 and 1, got {config.solved}")
    program.need_whole("--controls", config.controls, 0)
    with writing(config.out, "choose another --out"):
        config.out.mkdir(parents=True, exist_ok=True)
    names = list(tasks.TASKS) if config.all else [tasks.get(name).name for name in config.task]
    paths = {path.resolve().name: path for path in (config.checkpoint, *config.against)}
    if len(paths) < 1 + len(config.against):
        raise UserError("--checkpoint and --against must be folders of different names: rename one")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    # The circuit under the mixture has a folder of its own.
    wanted = {
        name if ablation == "mean" else f"{name}-{ablation}": (name, ablation)
        for name in names
        for ablation in config.ablation
    }
    for model, path in paths.items():
        prepared = _Run(path, config)
        rows = results[model] = {}
        root = config.out / model if config.against else config.out
        for label, (name, ablation) in wanted.items():
            try:
                with writing(root / label, "free some space or choose another --out"):
                    rows[label] = prepared.circuit(name, ablation, config, root / label)
            except UserError as error:
                if len(wanted) == 1:
                    raise
                rows[label] = {"error": str(error)}
                print(f"{model}, {label}: {error}", file=sys.stderr)
                continue
            print(_sentence(model, label, rows[label], root / label), flush=True)
    _write(config.out / "comparison.json", json.dumps(results, indent=1))
    if config.all or config.against:
        print("\n" + compare.table(results))
        if compare.common_tasks(results):
            compare.plot(results, config.out / "comparison.png")


def _draw(circuit: Circuit, folder: Path) -> None:
    _write(folder / "circuit.json", circuit.to_json())
    pictures = [folder / f"circuit{ending}" for ending in (".html", ".svg", ".png")]
    if len(circuit.edges) <= _MOST_DRAWN:
        write_html(circuit, pictures[0])
        for picture in pictures[1:]:
            write_image(circuit, picture)
    else:
        for picture in pictures:
            picture.unlink(missing_ok=True)


def _sentence(model: str, name: str, row: dict[str, Any], folder: Path) -> str:
    found, sizes = Validation.from_dict(row["proof"]), row["sizes"]
    nodes, edges = list(sizes.values())[-1]
    lines = [
        f"{model}, {name}: {nodes} nodes, {edges} edges in {sum(row['seconds'].values()):.0f} s "
        f"(before edges were pruned {sizes['nodes'][1]}, by the mask alone {sizes['cut'][1]})",
    ]
    verdicts = summary.verdicts(found, row["settings"]["target"])
    lines += [
        f"  {verdict.sentence if verdict.holds else _red(verdict.sentence)}" for verdict in verdicts
    ]
    lines += [f"  {summary.note(found)}"]
    picture = folder / "circuit.html"
    path = str(picture) if picture.exists() else f"{folder / 'circuit.json'}, too large to draw"
    rows = [(label, *values) for label, values in summary.rows(found)]
    table = program.table([("", *summary.COLUMNS), *rows])
    return "\n".join([*lines, textwrap.indent(table, "  "), f"  {path}"])


def _red(text: str) -> str:
    return f"\033[31m{text}\033[0m" if sys.stdout.isatty() else text


def _stored(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result of an earlier run with the same settings."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        same = content["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if same else None


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


main = program.entry(
    CircuitConfig, "circuits", run, "interrupted: the same command continues the search"
)


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
