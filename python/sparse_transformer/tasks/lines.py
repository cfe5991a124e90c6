"""Neutral code to stand before the statement that asks: both prompts of a pair begin with it."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from sparse_transformer.tasks import words

# `{a} {b} {c}` are names, `{f}` a function, `{k}` a class, `{n}` a number, `{q}` a short string,
# `{s}` a simple expression, `{w}` words, `{e}` an exception, `{l}` something to loop over, `{m}` a
# module.
_STATEMENTS = (
    "{a} = {b}",
    "{a} = {s}",
    "{a} = {f}({b})",
    "{a} = {f}({b}, {s})",
    "{a} = {b}.{f}()",
    "{a} = {b}.{f}({s})",
    "{a} = {b}[{n}]",
    "{a} = {b}[{c}]",
    "{a} = len({b})",
    "{a} = {b} + {n}",
    "{a} = {b} or {c}",
    "{a} = {b} - {c}",
    "{a} = [{b}, {c}]",
    "{a} = ({b}, {n})",
    "{a} = {{}}",
    "{a}, {b} = {f}({c})",
    "{a} += {n}",
    "{a}[{b}] = {c}",
    "{a}.{f}({b})",
    "{a}.append({b})",
    "assert {a} is not None",
    "print({a}, {b})",
    "del {a}",
    "{f}({q}, {a})",
    "# {w}",
    "# {w}",
)
_IN_METHODS = (
    *_STATEMENTS,
    "{a} = self.{b}",
    "{a} = self.{f}({b})",
    "self.{a} = {b}",
    "self.{a} = {s}",
    "self._{a} = {s}",
    "self.{f}({s})",
    "self.{f}({a}, {b})",
    "self.{a}.{f}({b})",
    "self.assertEqual({a}, {s})",
    "self.assertEqual({f}({a}), {n})",
    "self.assertTrue({a})",
    "self.assertIsNone({a})",
    "self.assertRaises({e}, {f}, {a})",
)
_IN_MODULES = (
    *_STATEMENTS,
    *("import {m}",) * 20,
    *("from {m} import {f}",) * 10,
    *("",) * 10,
)
_BLOCKS = (
    ("if {a} is None:", "    {a} = {s}"),
    ("if not {a}:", "    return"),
    ("if not {a}:", "    raise {e}({q})"),
    ("if {a} in {b}:", "    {b}.{f}({a})"),
    ("if {a} > {n}:", "    {b} = {c}"),
    ("if isinstance({a}, {k}):", "    {b} = {a}.{c}"),
    ("for {a} in {l}:", "    {b}.{f}({a})"),
    ("for {a} in self.{l}:", "    self.{f}({a})"),
    ("while {a} < {n}:", "    {a} += 1"),
    ("with self.{a}:", "    self.{f}()"),
    ("try:", "    {a} = {b}.{f}()", "except {e}:", "    {a} = None"),
    ("try:", "    {f}({a})", "finally:", "    {b}.close()"),
)


def indentation(random: Random) -> int:
    """How many spaces stand before a statement: 0, 4 or 8."""
    return random.choices((0, 4, 8), (1, 9, 10))[0]


def how_many(random: Random) -> int:
    """How many lines to set before a statement: up to 4 mostly, up to 30 now and then."""
    return random.randrange(5) if random.random() < 0.8 else int(4 * 7.5 ** random.random())


def lead(random: Random, indent: int, avoid: Collection[str] = (), count: int | None = None) -> str:
    """What stands before a statement: about `count` lines, a line break and the indentation.

    The text may begin in the middle of a function, as the windows of a corpus do; where there is
    neither line nor indentation it is empty.

    Args:
        random: draws everything.
        indent: spaces before the statement.
        avoid: names that none of the lines uses as a variable.
        count: how many lines; by default `how_many` draws it.
    """
    count = how_many(random) if count is None else count
    if indent == 0:
        return "".join(f"{line}\n" for line in lines(random, 0, count, avoid))
    headers = []
    if count and random.random() < 0.6:
        if indent >= 8 and count > 1 and random.random() < 0.5:
            headers.append(" " * (indent - 8) + class_header(random))
        headers.append(" " * (indent - 4) + function_header(random, avoid, method=indent >= 8))
    text = "\n".join([*headers, *lines(random, indent, count - len(headers), avoid), " " * indent])
    # Where the first line is indented, the text begins with the end of another.
    return f"\n{text}" if text.startswith(" ") else text


def before_function(random: Random, indent: int, avoid: Collection[str] = ()) -> str:
    """What stands before a `def` at `indent` spaces, 0 or 4: often the end of the one before it."""
    count = how_many(random)
    if indent == 0 and random.random() < 0.5:
        return lead(random, 0, avoid, count)
    if count == 0:
        return f"\n{' ' * indent}" if indent else ""
    body = lead(random, indent + 4, avoid, count) + f"return {words.variable(random, avoid)}\n"
    return f"{body}\n{' ' * indent}" if indent else f"{body}\n\n"


def lines(random: Random, indent: int, count: int, avoid: Collection[str] = ()) -> list[str]:
    """`count` lines of neutral statements with their indentation, or up to 3 more.

    At no indentation they are what modules begin with.
    """
    statements = _IN_METHODS if indent else _IN_MODULES
    found: list[str] = []
    while len(found) < count:
        block: tuple[str, ...] = (random.choice(statements),)
        if indent and count - len(found) > 1 and random.random() < 0.3:
            block = random.choice(_BLOCKS)
        a, b, c = words.variables(random, 3, avoid)
        values = {
            "a": a,
            "b": b,
            "c": c,
            "f": random.choice(words.FUNCTIONS),
            "k": random.choice(words.CLASSES),
            "n": words.number(random),
            "q": words.quoted(random),
            "s": words.simple(random, (a, *avoid)),
            "w": words.phrase(random, 2, 7),
            "e": random.choice(words.ERRORS),
            "l": words.variable(random, (a, b, *avoid), words.PLURALS),
            "m": random.choice(words.MODULES),
        }
        found += [" " * indent + line.format(**values) if line else "" for line in block]
    return found


def class_header(random: Random) -> str:
    """`class Name(Base):`"""
    base = random.choice(("", f"({random.choice(words.BASES)})"))
    return f"class {random.choice(words.CLASSES)}{base}:"


def function_header(random: Random, avoid: Collection[str] = (), *, method: bool) -> str:
    """`def name(arguments):`, the first of them `self` if it is a method."""
    own = ["self"] if method else []
    arguments = own + words.variables(random, random.randrange(4), avoid)
    return f"def {random.choice(words.FUNCTIONS)}({', '.join(arguments)}):"


def line_break(indent: int) -> str:
    """The token that ends a line; the last space of the indentation belongs to the next word."""
    return "\n" + " " * max(indent - 1, 0)
