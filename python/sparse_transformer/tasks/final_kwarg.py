"""final_kwarg: after a parameter with a default the next one must have a default too.

    def read(self, size, mode=None, encoding    ->  =None
    def read(self, size, mode, encoding         ->  ):

The fact is whether the parameter before the last one has a default. A whole function with or
without defaults stands before. The usual byte-level pre-tokenizer splits `=None`; then its first
token, `=`, is the answer.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

_DEFAULTS = ("=None",) * 6 + ("=False", "=False", "=True", "=0", "=1", "=()")
_BODY = ":\n    <call>\n    return <simple>\n\n"

TASK = Task(
    name="final_kwarg",
    description="Give the last parameter a default if the one before it has one, else close.",
    draw=Template(
        text="<earlier>def <function>(self, <first><long><fact>, <last>",
        facts=tuple((default, "") for default in _DEFAULTS),
        answers=("=None", "):"),
        where={
            "earlier": (
                f"def <function2>(self, <long2>, <long3>){_BODY}",
                f"def <function2>(self, <long2>, <long3><default>){_BODY}",
                f"def <function2>(self, <long2><default>, <long3><default2>){_BODY}",
            ),
            "default": _DEFAULTS,
            "first": ("", "", "<long4>, "),
            "last": ("<long5>",) * 3 + ("<long5>_<part>",) + ("<triple>",) * 5,
        },
        indents=(4,),
    ),
    first_token=True,
)
