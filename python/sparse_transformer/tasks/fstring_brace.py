"""fstring_brace: inside the braces of an f-string close the brace, outside close the string.

    print(f"cannot open path={self.path.name       ->  }
    print(f"cannot open path=self.path.name        ->  ")

The fact is an opening brace. Whole `{expressions}` and dicts, and ends of cut ones, stand before.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="fstring_brace",
    description="Close the brace if one is open in the f-string, else the string.",
    draw=Template(
        # Without a space before it, a name is the same token after a brace as without one.
        text='<caller>(f"<message><sign><fact><shown>',
        facts=(("{", ""),),
        answers=("}", '")'),
        before=(
            (
                '<name> = f"{<name2>}"',
                "<name> = {<quoted>: <simple>}",
                '<caller>(f"<noun> {<name>}")',
                "<call>",
            ),
        ),
        cut=(
            ('<shown>}")', '<caller>(f"<noun><sign><shown2>")'),
            ('<shown>")', '<caller>(f"<noun><sign>{<shown2>}")'),
        ),
        where={
            "caller": (
                "print",
                "print",
                "raise <error>",
                "raise <error>",
                "self.fail",
                "log.debug",
                "f.write",
                "<name>.append",
                "warnings.warn",
            ),
            "message": ("<noun>", "<clause>", "<noun> {<name2>} <noun2>"),
            "sign": ("=", "=", "/", ":", "-"),
            "shown": ("<long>",) * 4 + ("<dotted>",) * 6,
        },
    ),
)
