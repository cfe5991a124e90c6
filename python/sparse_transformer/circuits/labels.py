"""Automatic labels: for each node the simplest rule about the tokens that says where it is active.

A rule is one of: the current token is in a set, the previous token is in a set, or the text so far
is in a state, such as an open bracket, an open string or a line that begins with `for`. It is
fitted on every second row of a corpus, by F1, and scored on the others. The score is the balanced
accuracy, the mean of the shares of active and of inactive positions that the rule gets right;
guessing has 0.5. A node is active where its activation is at least halfway from its median to its
extreme, on either side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer.circuits import words
from sparse_transformer.circuits.activations import record_nodes
from sparse_transformer.model import Transformer

# A label is shown if its score is at least this, and at least so many of its positions are active.
LEAST_SCORE, LEAST_PRECISION = 0.75, 0.5
# A set of tokens has at most so many, of which a text shows a few.
_MOST_TOKENS, _SHOWN = 12, 3
# With fewer active positions nothing is fitted or scored; the extreme is what as many exceed.
_LEAST_ACTIVE = 8
# A simpler rule is taken unless another is better by this.
_MARGIN = 0.02
_KEYWORDS = (
    "assert", "class", "def", "elif", "else", "except", "for", "from", "if", "import", "raise",
    "return", "while", "with",
)  # fmt: skip
_STATES = (
    *(f"inside `{sign}`" for sign in ("(", "[", "{", "[[", '"', "'", '"""', "'''")),
    "in a comment",
    *(f"in a `{word}` line" for word in _KEYWORDS),
)
_CLASSES: dict[str, Callable[[str], object]] = {
    "a line end": lambda text: "\n" in text,
    "spaces": str.isspace,
    "a number": lambda text: text.strip().isdecimal(),
    "a name": lambda text: text.strip().isidentifier(),
    "a capital": lambda text: text.strip()[:1].isupper(),
    "a sign": lambda text: re.fullmatch(r"\s*[^\w\s]+", text),
    "an opening bracket": re.compile(r".*[(\[{]['\"]?").fullmatch,
    "a closing bracket": re.compile(r"\s*['\"]?[)\]}]").match,
}


class Texts:
    """The tokens of a vocabulary as texts, and what state a text is in after each token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.texts = [tokenizer.decode([token]) for token in range(vocab_size)]
        self._latest: tuple[Tensor | None, dict[str, Tensor]] = (None, {})

    @cached_property
    def classes(self) -> dict[str, Tensor]:
        """bool `(V,)` by name: kinds of tokens."""
        return {
            name: torch.tensor([bool(is_one(text)) for text in self.texts])
            for name, is_one in _CLASSES.items()
        }

    def states(self, tokens: Tensor) -> dict[str, Tensor]:
        """bool `(rows, T)` by name: the states of the text up to and with each token.

        Those of the latest tensor are kept.
        """
        if tokens is not self._latest[0]:
            rows = [_scan([self.texts[token] for token in row]) for row in tokens.tolist()]
            inside = {name: [[name in at for at in row] for row in rows] for name in _STATES}
            found = {
                name: torch.tensor(one, dtype=torch.bool).view(tokens.shape)
                for name, one in inside.items()
            }
            self._latest = tokens, found
        return self._latest[1]


def _scan(texts: Sequence[str]) -> list[list[str]]:
    """The states after each token of a row of Python that may begin anywhere."""
    found, brackets, quote, word, ended, at = [], "", "", "", False, 0
    for text in texts:
        while at < len(text):
            char = text[at]
            if quote and quote != "#":
                if char == "\\":
                    at += 1
                elif text.startswith(quote, at):
                    at, quote = at + len(quote) - 1, ""
            elif char in "\"'#" and not quote:
                quote = char * 3 if char != "#" and text.startswith(char * 3, at) else char
                at += len(quote) - 1
            elif char in "([{" and not quote:
                brackets += char
            elif char in ")]}" and not quote:
                brackets = brackets[:-1]
            if char == "\n":
                quote = quote if len(quote) == 3 else ""
                if not brackets and not quote:
                    word, ended = "", False
            elif not ended and (char.isalpha() or char == "_"):
                word += char
            elif word:
                ended = True
            at += 1
        # A backslash at the end escapes what follows.
        at -= len(text)
        states = [f"inside `{brackets[-1:]}`", f"inside `{quote}`", f"in a `{word}` line"]
        states += ["inside `[[`"] * brackets.endswith("[[") + ["in a comment"] * (quote == "#")
        found.append(states)
    return found


def quoted(texts: Iterable[str]) -> str:
    """Texts of tokens as they stand in a label."""
    return ", ".join(f"`{words.visible(text)}`" for text in texts)


@dataclass(frozen=True)
class Rule:
    """A guess where a node is active.

    Attributes:
        name: of a state, or of a kind of tokens; "" for a set of single tokens.
        members: bool `(V,)`: the tokens; None for a state of `Texts.states`.
        back: 0 for the current token, 1 for the previous one.
    """

    name: str = ""
    members: Tensor | None = None
    back: int = 0

    def predict(self, tokens: Tensor, states: dict[str, Tensor]) -> Tensor:
        """bool like `tokens (rows, T)`."""
        if self.members is None:
            return states[self.name]
        found = self.members[tokens]
        return torch.cat([found[:, :1] & False, found[:, :-1]], 1) if self.back else found


@dataclass(frozen=True)
class Label:
    """What a node detects, as far as a rule about the tokens can say.

    Attributes:
        text: the rule in words; "" where it is not good enough to be shown.
        score: balanced accuracy on held-out text; None where the node is active too rarely.
        precision: share of the positions where the rule says active which are.
        center, reach: the node is active where its activation is `reach` away from `center`.
        rule: None where nothing could be fitted.
        texts: of the vocabulary.
    """

    text: str
    score: float | None
    precision: float | None
    center: float
    reach: float
    rule: Rule | None
    texts: Texts

    def predict(self, tokens: Tensor) -> Tensor:
        """Where the label says that the node is active: int64 `(rows, T)` to bool of that shape."""
        if self.rule is None:
            return torch.zeros_like(tokens, dtype=torch.bool)
        states = {} if self.rule.members is not None else self.texts.states(tokens)
        return self.rule.predict(tokens, states)

    def active(self, values: Tensor) -> Tensor:
        """Where activations, of any shape, count as active."""
        return _active(values, self.center, self.reach)


def label_nodes(
    model: Transformer,
    corpus: Tensor,
    tokenizer: Tokenizer,
    nodes: Sequence[tuple[str, int]],
    first: Collection[int] = (),
) -> list[Label]:
    """A label for each node.

    Args:
        corpus: int64 `(rows, T)`; labels are fitted on even rows and scored on odd ones.
        nodes: hook point and channel of each. All activations are in memory at once.
        first: tokens that the text of a label names before others, if they are in its set.
    """
    texts = Texts(tokenizer, model.config.vocab_size)
    return label_activations(record_nodes(model, corpus, nodes), corpus, texts, first)


def label_activations(
    activations: Iterable[Tensor], corpus: Tensor, texts: Texts, first: Collection[int] = ()
) -> list[Label]:
    """As `label_nodes`, of activations that were recorded: float like `corpus (rows, T)` each."""
    states = texts.states(corpus)
    halves = tuple(
        _Half(corpus[at::2], {name: found[at::2] for name, found in states.items()}, texts)
        for at in (0, 1)
    )
    return [_label(values, halves, first) for values in activations]


@dataclass(frozen=True)
class _Half:
    """Every second row of a corpus, with its states."""

    tokens: Tensor
    states: dict[str, Tensor]
    texts: Texts

    @cached_property
    def named(self) -> tuple[list[Rule], Tensor]:
        """The rules that are the same for all nodes, R, and where they say so: `(R, rows T)`."""
        kinds = self.texts.classes.items()
        rules = [Rule(name, kind, back) for back in (0, 1) for name, kind in kinds]
        rules += [Rule(name) for name in self.states]
        said = [rule.predict(self.tokens, self.states).flatten() for rule in rules]
        return rules, torch.stack(said).float()


def _label(values: Tensor, halves: tuple[_Half, ...], first: Collection[int]) -> Label:
    fit, test = halves
    texts = fit.texts
    parts = values[0::2], values[1::2]
    center = float(parts[0].median())
    far = (parts[0] - center).abs().flatten()
    reach = float(far.topk(min(_LEAST_ACTIVE, len(far))).values[-1]) / 2
    active, true = (_active(part, center, reach) for part in parts)
    if min(int(active.sum()), int(true.sum())) < _LEAST_ACTIVE:
        return Label("", None, None, center, reach, None, texts)
    best, rule = 0.0, None
    for tried, found in _rules(active, fit):
        if found > best + _MARGIN:
            best, rule = found, tried
    if rule is None:
        return Label("", None, None, center, reach, None, texts)
    said = rule.predict(test.tokens, test.states)
    score = float((said[true].float().mean() + (~said[~true]).float().mean()) / 2)
    precision = float(true[said].float().mean()) if bool(said.any()) else 0.0
    good = score >= LEAST_SCORE and precision >= LEAST_PRECISION
    strength = (parts[0] - center) * active
    text = _words(rule, strength, fit.tokens, texts, first) if good else ""
    return Label(text, score, precision, center, reach, rule, texts)


def _active(values: Tensor, center: float, reach: float) -> Tensor:
    return (values - center).abs() >= reach if reach > 0 else torch.zeros_like(values).bool()


def _rules(active: Tensor, half: _Half) -> Iterator[tuple[Rule, float]]:
    """All that are tried, the simplest first, with their F1."""
    size, kinds = len(half.texts.texts), len(_CLASSES)
    rules, said = half.named
    # Counts are exact in float32.
    both, total = said @ active.flatten().float(), said.sum(1) + active.sum()
    named = list(zip(rules, (2 * both.double() / total.clamp_min(1)).tolist(), strict=True))
    for back in (0, 1):
        tokens, there = (half.tokens[:, : half.tokens.shape[1] - back], active[:, back:])
        count = tokens.flatten().bincount(minlength=size)
        hits = tokens[there].bincount(minlength=size)
        # Of all sets of tokens the best takes those that are active more often than half its F1.
        order = (hits / count.clamp_min(1)).argsort(descending=True)
        f1 = 2 * hits[order].cumsum(0) / (count[order].cumsum(0) + there.sum())
        enough = hits / count.clamp_min(1) > f1.max() / 2
        chosen = (hits * enough).topk(min(_MOST_TOKENS, size)).indices
        chosen = chosen[(hits * enough)[chosen] > 0]
        members = torch.zeros(size, dtype=torch.bool)
        members[chosen] = True
        found = 2 * int(hits[chosen].sum()) / (int(count[chosen].sum()) + int(active.sum()))
        yield Rule(members=members, back=back), found
        yield from named[back * kinds : (back + 1) * kinds]
    yield from named[2 * kinds :]


def _words(rule: Rule, values: Tensor, tokens: Tensor, texts: Texts, first: Collection[int]) -> str:
    """Such as "`(`, `[`, 3 more", with the sign of each token's activation if it is not the same.

    Of a set the strongest are named, or those of `first` that are in it.
    """
    if rule.name:
        return f"after {rule.name}" if rule.back else rule.name
    assert rule.members is not None
    # Of the token that decides.
    values = torch.cat([values[:, 1:], values[:, :1] * 0], 1) if rule.back else values
    sums = torch.zeros(len(texts.texts)).index_add_(0, tokens.flatten(), values.flatten())
    ranked = (sums.abs() * rule.members).argsort(descending=True)[: int(rule.members.sum())]
    named = [token for token in ranked.tolist() if token in first] or ranked.tolist()
    shown = named[:_SHOWN]
    both = len({bool(sums[token] < 0) for token in shown}) == 2
    signs = {token: (" −" if sums[token] < 0 else " +") * both for token in shown}
    said = ", ".join(quoted([texts.texts[token]]) + signs[token] for token in shown)
    more = f", {len(ranked) - len(shown)} more" if len(ranked) > len(shown) else ""
    return "after " * rule.back + said + more
