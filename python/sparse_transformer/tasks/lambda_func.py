"""lambda_func: the arguments of a `lambda` end with a colon, those of a function with `):`.

    merge = lambda x, y, z       ->  :
    def merge(x, y, z            ->  ):

The fact is the keyword before them; both kinds stand before it.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="lambda_func",
    description="End the arguments of a lambda with a colon, those of a function with a bracket.",
    draw=Template(
        text="<fact><arguments>",
        facts=(("<into>lambda ", "def <function>("),),
        answers=(":", "):"),
        before=(("<name> = <simple>", "return <simple>", "<call>", "if <condition>:\n    <body>"),),
        cut=(
            ("<arguments>: <simple>", "def <function2>(<arguments2>):\n    <body>"),
            ("<arguments>):\n    <body>", "<into2>lambda <arguments2>: <simple>"),
        ),
        where={
            "into": ("<long4> = ", "<long4> = ", "self.<long4> = ", "return "),
            "arguments": (
                *("<letter>, <letter2>", "self, <name>", "<long>, <long2>"),
                *("<letter>, <letter2>, <letter3>", "self, <letter>, <letter2>"),
                *("<long>, <long2>, <long3>", "self, <long>, <long2>", "<letter>, *args, <long>"),
            ),
        },
    ),
)
