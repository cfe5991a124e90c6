"""Templates of pairs: one text for both prompts, in which only `<fact>` differs.

A template has holes, `<kind>` or `<kind2>`; what may stand in them is in the template's `where` and
in `words.VOCABULARY`. A hole of the same name is the same throughout a prompt, but not in the
neutral lines before it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from random import Random

from sparse_transformer.tasks.task import Draft
from sparse_transformer.tasks.words import DISTINCT, VOCABULARY

_HOLE = re.compile(r"<([a-z]+)\d*>")
_MOST_LINES = 7

Choices = tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """Draws pairs; it is a task's `draw`.

    A prompt is: `cut`, neutral lines mixed with one snippet of each group of
    `before`, and `text`. The snippets are drawn whatever the fact is, so that tokens which come
    with a fact do not tell the answer.

    Attributes:
        text: the statement that asks, up to the answer; a space at its end belongs to the answers.
            `<fact>` is the one of two alternatives, `<other>` is the other.
        facts: pairs of alternatives; in each, the first one makes the positive prompt.
        answers: what follows the positive and the negative prompt. `<line>` is a line break with
            the indentation of the statement, `<deeper>` with four more spaces; the last space of
            the indentation belongs to the next word.
        before: groups of snippets for the lead.
        where: choices for holes of this template.
        cut: pairs of snippets, one of which is drawn. The text begins with the first, the end of a
            statement, as windows of a corpus do; the second is one more for the lead.
        indents: spaces before the statement, one of these.
    """

    text: str
    facts: tuple[tuple[str, str], ...]
    answers: tuple[str, str]
    before: tuple[Choices, ...] = ()
    where: Mapping[str, Choices] = field(default_factory=dict)
    cut: tuple[tuple[str, str], ...] = ()
    indents: tuple[int, ...] = (0,) + (4,) * 4 + (8,) * 4

    def __call__(self, random: Random) -> Draft:
        indent = random.choice(self.indents)
        line = "\n" + " " * max(indent - 1, 0)
        holes = {"<line>": line, "<deeper>": "\n" + " " * (indent + 3)}
        holes |= {hole: hole for hole in ("<fact>", "<other>")}
        fill = _Filler(random, self.where).fill
        parts = (self.text, *self.answers, *random.choice(self.facts))
        text, right, wrong, *facts = (fill(part, holes) for part in parts)
        space = " " * text.endswith(" ")
        text = text.rstrip(" ")
        avoid = set(re.findall(r"\w+", " ".join([text, *facts])))
        shared = {hole: value for hole, value in holes.items() if hole in "".join(parts[1:])}
        cut, whole = random.choice(self.cut) if self.cut else ("", "")
        chosen = (cut, whole, *(random.choice(group) for group in self.before))
        cut, *snippets = (fill(snippet, dict(shared), avoid) for snippet in chosen)
        depth = indent + len(text) - len(text.lstrip(" "))
        lead = _lead(random, depth, snippets, avoid, headed=not cut)
        cut = _indent(cut, depth).lstrip(" ")
        text = _indent(text, indent)
        # The text begins with the end of another line where its first one is indented.
        whole = f"{cut}\n" if cut else "\n" * (lead or text).startswith(" ")
        whole += lead + text
        positive, negative = (
            whole.replace("<fact>", fact).replace("<other>", other)
            for fact, other in (facts, reversed(facts))
        )
        return Draft(positive, negative, space + right, space + wrong)


class _Filler:
    def __init__(self, random: Random, where: Mapping[str, Choices]) -> None:
        self._random, self._where = random, where

    def fill(self, template: str, holes: dict[str, str], avoid: Collection[str] = ()) -> str:
        """`template` with its holes filled: those of `holes`, to which it adds what it draws."""

        def value(match: re.Match[str]) -> str:
            hole, kind = match[0], match[1]
            if hole not in holes:
                holes[hole] = self._draw(kind, holes, avoid)
            return holes[hole]

        return _HOLE.sub(value, template)

    def _draw(self, kind: str, holes: dict[str, str], avoid: Collection[str]) -> str:
        if kind in self._where:
            return self.fill(self._random.choice(self._where[kind]), holes, avoid)
        taken = {*avoid, *holes.values()}
        while True:
            value = self.fill(self._random.choice(VOCABULARY[kind]), {}, taken)
            if kind not in DISTINCT or value not in taken:
                return value


def _lead(
    random: Random, indent: int, snippets: list[str], avoid: Collection[str], *, headed: bool
) -> str:
    """Neutral lines and the snippets, in any order, now and then with the head of a function."""
    fill = _Filler(random, {}).fill
    count = int(_MOST_LINES * random.random() ** 3)
    kind = "<statement>" if indent else "<import>"
    parts = [*snippets, *(fill(kind, {}, avoid) for _ in range(count))]
    random.shuffle(parts)
    lines = "".join(f"{_indent(part, indent)}\n" for part in parts if part)
    if headed and indent and random.random() < 0.4:
        header = fill("<header>" if indent > 4 else "def <function>(<params>):", {}, avoid)
        up = indent - 4 * (1 + header.count("\n"))
        lines = f"{_indent(header, up)}\n{lines}"
    return lines


def _indent(text: str, spaces: int) -> str:
    return "\n".join(" " * spaces * bool(line) + line for line in text.split("\n"))
