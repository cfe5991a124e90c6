"""set_or_string_fixedvarname: `set_or_string` with the same variable in all pairs, `result`.

result = set()                  result = ''
for name in names:              for name in names:
    result       ->  .add           result        ->   +=
"""

from __future__ import annotations

from dataclasses import replace

from sparse_transformer.tasks.set_or_string import TEMPLATE
from sparse_transformer.tasks.task import Task

TASK = Task(
    name="set_or_string_fixedvarname",
    description="As set_or_string, and the variable is always called result.",
    draw=replace(TEMPLATE, where={**TEMPLATE.where, "target": ("result",)}),
    first_token=True,
)
