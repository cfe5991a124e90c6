"""var_if: an `if` asks about the variable that was set just before.

    result = self.lines                  match = self.lines
    match = pattern.search(line)         result = pattern.search(line)
    if       ->   match                  if       ->   result

The fact is which of the two was set last; it may be asked about with `not`, and a line may stand in
between.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="var_if",
    description="Ask in an if about the variable that was set just before.",
    draw=Template(
        text="<other> = <value>\n<fact> = <value2>\n<between>if<sign>",
        facts=(("<subject>", "<subject2>"),),
        answers=(" <subject>", " <subject2>"),
        where={
            "value": (
                *("<call>", "<call>", "self.<long>", "<long2>.match(<long3>)", "len(<plural>)"),
                *("re.match(<long2>, <long3>)", "<long2>.get(<quoted>)", "<plural>[<long3>]"),
                "getattr(<long2>, <quoted>, None)",
            ),
            "between": ("", "", "", "<long4> = <simple>\n", "# <phrase>\n"),
            "sign": ("", "", " not"),
        },
    ),
)
