"""The twenty binary tasks of Gao et al. 2025 (arXiv 2511.13653), Table 1; see catalogue.py.

    task = tasks.get("for_while")
    pairs = task.pairs(tokenizer, 256, split="test")
    batch = tasks.collate(pairs, pad=tokenizer.get_vocab_size() - 1)
    logits = model(batch.tokens, at=batch.last)

The generators of the paper were not released. The prompts are made to look like the code of
Python's standard library.
"""

from __future__ import annotations

from sparse_transformer.errors import UserError, suggest
from sparse_transformer.tasks.catalogue import TASKS
from sparse_transformer.tasks.task import Batch, Draft, Pair, Prompt, Split, Task, collate

__all__ = ["TASKS", "Batch", "Draft", "Pair", "Prompt", "Split", "Task", "collate", "get"]


def get(name: str) -> Task:
    """The task of that name; a UserError with the nearest names if there is none."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}: {suggest(name, TASKS)}")
    return TASKS[name]
