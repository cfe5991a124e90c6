"""class_init: `__init__` sets an attribute to the argument of the same name.

    class Reader:
        def __init__(self, path, mode):
            self.path =       ->   path
            self.mode =       ->   mode

The fact is the attribute; both names are arguments in both prompts.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    names = words.variables(random, random.choice((2, 2, 3, 3, 4, 5)), pool=words.NAMES)
    text = "\n"
    if random.random() < 0.75:
        text = f"{lines.lead(random, 0, names)}{lines.class_header(random)}\n"
        if random.random() < 0.3:
            text += f'    """{words.phrase(random, 2, 6).capitalize()}."""\n'
    plain = len(names) - random.choice((0, 0, 0, 1, 2))
    arguments = [
        *names[:plain],
        *(f"{name}={random.choice(('None', 'False', '0'))}" for name in names[plain:]),
    ]
    text += f"    def __init__(self, {', '.join(arguments)}):\n"
    if random.random() < 0.3:
        text += f"        {random.choice(('super().__init__()', 'self._lock = Lock()'))}\n"
    # Arguments are stored in their order: those before the first of the two already are.
    one, other = sorted(random.sample(range(len(names)), 2))
    mark = random.choice(("", "", "_"))
    if random.random() < 0.7:
        text += "".join(f"        self.{mark}{name} = {name}\n" for name in names[:one])
    pair = [names[one], names[other]]
    random.shuffle(pair)
    positive, negative = (f"{text}        self.{mark}{name} =" for name in pair)
    return Draft(positive, negative, f" {pair[0]}", f" {pair[1]}")


TASK = Task(
    name="class_init",
    description="Set the attribute to the argument that has its name.",
    draw=_draw,
)
