"""set_or_string: a set is added to with `.add`, a string with `+=`.

    path = ''                       path = ''
    seen = set()                    seen = ''
    for name in names:              for name in names:
        seen         ->  .add           seen          ->   +=

The fact is what the variable was set to; another one is set to either of them before or after it.
The usual byte-level pre-tokenizer splits `.add`; then its first token, `.`, is the answer.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TEMPLATE = Template(
    text="<first>\n<middle>for <long2> in <plural>:\n    <inner><target>",
    facts=(("set()", "''"), ("set()", "''"), ("set()", '""')),
    answers=(".add", " +="),
    where={
        "target": ("<long>",) * 5 + ("self.<long>",),
        "empty": ("set()", "set()", "''", "''", '""'),
        "first": ("<target> = <fact>\n<long3> = <empty>", "<long3> = <empty>\n<target> = <fact>"),
        "middle": ("", "", "<long4> = <simple>\n", "# <phrase>\n"),
        "inner": (
            *("", "", "<long5> = <long2>.<function>(<number>)\n    ", "<call>\n    "),
            *("if <condition>:\n        ", "if not <long2>:\n        continue\n    "),
        ),
    },
)
TASK = Task(
    name="set_or_string",
    description="Go on with .add if the variable was set to set(), with += if to an empty string.",
    draw=TEMPLATE,
    first_token=True,
)
