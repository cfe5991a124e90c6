"""with_open: a file is opened to read or to write, as the code around it says.

    def read_config(path):                  def write_config(path):
        with open(path, '       ->  r           with open(path, '       ->  w

The fact is one word before: in the function's name, in a comment or docstring, or in the name of
the variable.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

_VERBS = (
    *(("read", "write"), ("read", "write"), ("read", "write"), ("load", "save")),
    *(("load", "dump"), ("load", "write"), ("parse", "write"), ("read", "save")),
)
_VARIABLES = (
    *(("infile", "outfile"), ("input", "output"), ("reader", "writer"), ("fin", "fout")),
    *(("source", "output"), ("input_file", "output_file"), ("src", "out"), ("in_file", "out_file")),
)


def _draw(random: Random) -> Draft:
    indent = random.choice((0, 4, 4, 8, 8))
    owner = random.choice(("", "", "self.", "args."))
    path = random.choice(("path", "filename", "fname", "name", words.variable(random)))
    if random.random() < 0.2:
        owner, path = "os_helper.", "TESTFN"
    quote = random.choice("''\"")
    call = f"open({owner}{path}, {quote}"
    statement = random.choice((f"with {call}", f"with {call}", f"f = {call}", f"fp = {call}"))
    thing = words.variable(random)
    kind = random.random()
    if kind < 0.5 and indent:
        own = ["self"] if indent == 8 else []
        arguments = ", ".join([*own, *([] if owner else [path])])
        lead = lines.before_function(random, indent - 4)
        rest = f"_{thing}({arguments}):\n{_body(random, indent)}{' ' * indent}{statement}"
        positive, negative = (f"{lead}def {verb}{rest}" for verb in random.choice(_VERBS))
    elif kind < 0.8:
        lead = lines.lead(random, indent)
        line_break = f"\n{' ' * indent}"
        start, end = ('"""', '."""') if indent and random.random() < 0.3 else ("# ", "")
        rest = f" the {thing} {random.choice(('file', 'data', 'file again', 'lines', 'text'))}"
        positive, negative = (
            f"{lead}{start}{verb.capitalize()}{rest}{end}{line_break}{statement}"
            for verb in random.choice(_VERBS)
        )
    else:
        lead = lines.lead(random, indent)
        positive, negative = (f"{lead}{name} = {call}" for name in random.choice(_VARIABLES))
    return Draft(positive, negative, "r", "w")


def _body(random: Random, indent: int) -> str:
    """Now and then a line between the function's head and the statement: not what it does."""
    if random.random() < 0.75:
        return ""
    name, other = words.variables(random, 2)
    return f"{' ' * indent}{name} = {random.choice((other, f'self.{other}', f'len({other})'))}\n"


TASK = Task(
    name="with_open",
    description="Open the file for reading or for writing, as a word before it says.",
    draw=_draw,
)
