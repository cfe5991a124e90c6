"""`python -m sparse_transformer.tasks NAME --out DIR`: solved prompts, to teach a model the task.

`--all` in place of NAME writes those of every task, each to a folder of its own in DIR.

Some tasks are too rare in ordinary code for a small model to learn. This writes prompts with their
correct answers as Python files, for `python -m sparse_transformer.train --data DIR`. They are
from the train split: for all seeds, none of them is a test prompt of `evaluate` or of a circuit's
validation.

`--shortcuts` prints how far linear classifiers get on each task instead (see `tasks.shortcuts`).
Without `--out` it lists the tasks, or with NAME shows a pair of its prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from sparse_transformer import data, program
from sparse_transformer.errors import UserError, writing
from sparse_transformer.tasks import TASKS, Task, get, shortcuts

# Whole files go to training or validation.
_PAIRS_PER_FILE = 100


@dataclass(frozen=True)
class CorpusConfig:
    """Lists the tasks, shows one, or writes solved prompts of it as Python files to train on."""

    task: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """Name of the task; without --out a pair of its prompts is shown, without NAME all names."""
    all: bool = False
    """Write prompts of every task, each to a folder of its name in DIR."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Write to this folder; it is created if it does not exist."""
    shortcuts: bool = False
    """Print the accuracies of linear classifiers on every task, or on NAME, and write nothing."""
    pairs: int = 20000
    """Number of pairs; both prompts of each pair are written."""
    seed: int = 0
    """Random seed."""


def run(config: CorpusConfig) -> None:
    """Writes the files."""
    program.need_whole("--pairs", config.pairs, 1)
    if config.shortcuts:
        chosen = TASKS if config.task is None else {config.task: get(config.task)}
        print(program.table(list(shortcuts.rows(chosen, data.prepare().tokenizer))), end="")
        return
    if config.out is None and not config.all:
        print(_example(get(config.task)) if config.task else _list(), end="")
        return
    if config.out is None or (config.task is None) != config.all:
        raise UserError("give NAME --out DIR, --all --out DIR, or --shortcuts")
    if config.task is not None:
        _write(get(config.task), config.out, config)
    for task in TASKS.values() if config.all else ():
        _write(task, config.out / task.name, config)


def _list() -> str:
    """All tasks, and what each asks."""
    return program.table([(task.name, task.description) for task in TASKS.values()], left=2)


def _example(task: Task) -> str:
    """What the task asks, and a pair of its prompts with their answers."""
    draft = next(iter(task.drafts("test")))
    positive, negative = draft.positive + draft.right, draft.negative + draft.wrong
    return (
        f"{task.description} The answer is {draft.right!r} to the first prompt and "
        f"{draft.wrong!r} to the second:\n\n{positive}\n\n{negative}\n"
    )


def _write(task: Task, folder: Path, config: CorpusConfig) -> None:
    drafts = islice(task.drafts("train", config.seed), config.pairs)
    bar = tqdm(drafts, "pairs", config.pairs, unit=" pairs", disable=None, leave=False)
    texts = [f"{draft.positive}{draft.right}\n{draft.negative}{draft.wrong}\n" for draft in bar]
    if len(texts) < config.pairs:
        raise UserError(
            f"the task {task.name} has only {len(texts)} different pairs for training: "
            f"use a smaller --pairs"
        )
    with writing(folder, "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(texts), _PAIRS_PER_FILE):
            path = folder / f"{task.name}_{first // _PAIRS_PER_FILE:05d}.py"
            path.write_text("".join(texts[first : first + _PAIRS_PER_FILE]), encoding="utf-8")
    print(f"{len(texts)} pairs in {folder}")


main = program.entry(CorpusConfig, "tasks", run)
