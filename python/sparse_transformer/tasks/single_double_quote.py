"""single_double_quote: close a string with the quote that opened it.

    name = get('key')                  name = get('key')
    print("hello world     ->  ")      print('hello world     ->  ')

The fact is the opening token, `("` or `('`. Strings of both kinds stand before it, whole ones and
ends of cut ones, and those that end in another token.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

_STRINGS = (
    "<function>(<q><key><q>)",
    "<name> = <name2>.get(<q><key><q>)",
    "self.<long>(<q><key><q> % <name>)",
    "<name> = <function>(<q><key><q> + <name2>)",
    "<name> = re.compile(r<q><key><q>)",
    "self.<function>(b<q><key><q>)",
    "<name> = b<q><key><q>",
)

TASK = Task(
    name="single_double_quote",
    description="Close a string argument with the kind of quote that opened it.",
    draw=Template(
        text="<start><fact><message>",
        facts=(('("', "('"),),
        answers=('")', "')"),
        before=(_STRINGS,),
        cut=(
            ('<noun>")', "<function>('<key>')"),
            ("<noun>')", '<function>("<key>")'),
        ),
        where={
            "q": ("'", '"'),
            "start": ("print",) * 3
            + ("raise <error>",) * 3
            + ("self.fail", "warnings.warn", "parser.error", "log.debug", "sys.exit", "f.write")
            + ("<name> = get", "<name> = self.get", "<name>.append"),
            "message": ("<noun>", "<noun> <noun2>", "<phrase>", "<phrase>", "<phrase>"),
        },
    ),
)
