"""The twenty binary tasks of Gao et al. 2025 (arXiv 2511.13653), Table 1, a module each.

    task = tasks.get("for_while")
    pairs = task.pairs(tokenizer, 256, split="test")
    batch = tasks.collate(pairs, pad=tokenizer.get_vocab_size() - 1)
    logits = model(batch.tokens, at=batch.last)

The generators of the paper were not released; each module says what it asks. The prompts are made
to look like the code of Python's standard library.
"""

from __future__ import annotations

import difflib

from sparse_transformer.errors import UserError
from sparse_transformer.tasks import (
    bracket_brace,
    bracket_counting,
    class_init,
    else_elif,
    enumerate_range,
    final_kwarg,
    for_while,
    fstring_brace,
    if_equals,
    if_ternary,
    indent_for,
    lambda_func,
    set_or_string,
    set_or_string_fixedvarname,
    single_double_quote,
    var_if,
    var_swap,
    while_return_true,
    with_as,
    with_open,
)
from sparse_transformer.tasks.task import Batch, Draft, Pair, Prompt, Split, Task, collate

__all__ = ["TASKS", "Batch", "Draft", "Pair", "Prompt", "Split", "Task", "collate", "get"]

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        single_double_quote,
        final_kwarg,
        set_or_string,
        set_or_string_fixedvarname,
        class_init,
        with_as,
        bracket_brace,
        with_open,
        bracket_counting,
        for_while,
        else_elif,
        fstring_brace,
        if_ternary,
        var_swap,
        indent_for,
        lambda_func,
        if_equals,
        enumerate_range,
        var_if,
        while_return_true,
    )
}


def get(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the sentence has the nearest names.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TASKS)}"
        raise UserError(f"there is no task {name!r}: {hint}")
    return TASKS[name]
