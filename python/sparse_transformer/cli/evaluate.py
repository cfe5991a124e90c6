"""`python -m sparse_transformer.evaluate`: evaluates a trained model on the binary tasks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro
from tokenizers import Tokenizer
from tqdm import tqdm

from sparse_transformer import program
from sparse_transformer.errors import UserError
from sparse_transformer.evaluation import SOLVED_ACCURACY, evaluate_task
from sparse_transformer.run import load_run
from sparse_transformer.tasks import TASKS, Pair, Split, get
from sparse_transformer.tasks.task import prompts
from sparse_transformer.train.checkpoint import load


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluates a trained model on the binary tasks."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of a run, of a checkpoint in it or of an exported model; or the name of a model."""
    tasks: tuple[str, ...] = ()
    """Task names; by default all twenty."""
    pairs: int = 256
    """Number of prompt pairs for each task."""
    split: Split = "test"
    """The pairs of the other split share no prompt with these; circuits are found on train."""
    seed: int = 0
    """Random seed of the pairs."""
    step: int | None = None
    """The checkpoint of this step, by default the newest."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the scores to this JSON file."""
    device: str = "cpu"
    """Device: cpu, cuda, ..."""


def run(config: EvaluateConfig, out: TextIO) -> None:
    """Evaluates as `config` says and writes the table to `out`.

    A task that this tokenizer or context cannot ask is a row.
    """
    chosen = [get(name) for name in dict.fromkeys(config.tasks)] or list(TASKS.values())
    program.need_whole("--pairs", config.pairs, 2)
    program.need_writable("--json", config.json)
    model, tokenizer = load_run(config.checkpoint, config.step, config.device)
    rows = [["task", "accuracy", "pairs right", "loss, nats", "pairs", "answers", "solved"]]
    results: dict[str, Any] = {}
    solved = asked = 0
    for task in tqdm(chosen, "tasks", unit=" tasks", disable=None, leave=False):
        try:
            pairs = task.pairs(
                tokenizer,
                config.pairs,
                split=config.split,
                seed=config.seed,
                context=model.config.context,
            )
        except UserError as refusal:
            rows.append([task.name, *"-----", str(refusal)])
            results[task.name] = {"refused": str(refusal)}
            continue
        result = evaluate_task(model, pairs, pad=model.config.vocab_size - 1, device=config.device)
        asked += task.shortcut is None
        solved += result.solved and task.shortcut is None
        rows.append(
            [
                task.name,
                str(result.accuracy),
                str(result.pair_accuracy),
                str(result.loss),
                str(result.pairs),
                _answers(pairs, tokenizer),
                "solved" if result.solved else "no",
            ]
        )
        results[task.name] = {**dataclasses.asdict(result), "solved": result.solved}
    out.write(program.table(rows, left=len(rows[0])))
    left_out = ", ".join(task.name for task in chosen if task.shortcut)
    out.write(
        f"{solved} of the {asked} asked are solved: at least {SOLVED_ACCURACY:.0%} of the prompts "
        f"are right{left_out and f' (without {left_out}, which the last tokens decide)'}\n"
    )
    out.flush()
    if config.json is not None:
        _save(config, results)


def _answers(pairs: Sequence[Pair], tokenizer: Tokenizer) -> str:
    """The two answers, or how many different ones there are."""
    answers = dict.fromkeys(prompt.right for prompt in prompts(pairs))
    if len(answers) > 2:
        return f"{len(answers)} kinds"
    return " ".join(repr(tokenizer.decode([answer])) for answer in answers)


def _save(config: EvaluateConfig, results: dict[str, Any]) -> None:
    assert config.json is not None
    content = {
        "checkpoint": str(config.checkpoint),
        "step": load(config.checkpoint, config.step, prefix="nothing").step,
        "split": config.split,
        "seed": config.seed,
        "solved_accuracy": SOLVED_ACCURACY,
        "tasks": results,
    }
    program.write_json(config.json, content)


main = program.entry(EvaluateConfig, "evaluate", lambda config: run(config, sys.stdout))
