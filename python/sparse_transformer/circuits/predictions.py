"""`python -m sparse_transformer.circuits.predictions`: what circuits predict, and whether it holds.

Gao et al. 2025 (arXiv 2511.13653) read two algorithms out of circuits. Brackets are counted by an
attention head that *averages* detectors of open brackets over the context: so longer texts dilute
the depth, and open brackets that do not belong to the list raise it. The kind of a quote is held by
one node at the opening quote, and a head takes it from every quote before: so setting that node
flips the answer, and closed strings in the other quotes pull towards theirs. An algorithm that
counts, or that looks at the open string only, would do none of it. Everything is measured on the
whole model.

A trend is one of mean logit differences, in nats. A model must be able to do the task: at the first
amount its gap, by which the difference is larger where the first answer is right than where the
second is, must be at least `GAP`. A constant lean to one answer is left aside, as it is where
circuits are calibrated. Then the trend holds when at least `ORDERED` of all pairs of amounts are
ordered as predicted, and the change from the first amount to the last is as predicted, more than
two of its standard errors, and at least the share `MATERIAL` of the gap.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import torch
import tyro
from torch import Tensor

from sparse_transformer import program, taps, tasks
from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.errors import UserError
from sparse_transformer.intervention import Intervention, Nodes, Patch, Set, answer
from sparse_transformer.model import Transformer
from sparse_transformer.run import load_run

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = Sequence[int]

# What is asked of a trend, see above.
GAP, ORDERED, MATERIAL = 1.0, 0.8, 0.1
# A model that answers so many prompts of each kind of quote rightly has a node for the kind, if
# setting one to the mean of the other kind turns right answers into wrong ones on so many prompts,
# and to that of its own kind on at most so many.
SOLVED, FLIPPED, FLIPPED_ANYWAY = 0.75, 0.5, 0.1
# The node of the depth must give back at least so much of what a longer list costs.
RESTORED = 0.5

_BRACKETS, _QUOTES = "bracket_counting", "single_double_quote"
_NAMES = ("values", "rows", "data", "items", "table", "result", "x", "args")
# How many of `_MOST` things before a list are distractors.
_DISTRACTORS, _MOST = (0, 1, 2, 4, 8), 8
# How many of the closed strings before an open one have the other quotes.
_STRINGS = (0, 1, 2, 3, 4)
# How many nodes are tried where no circuit says which ones matter, and how many tokens at once.
_TRIED, _MOST_TOKENS = 16, 8192
# So many of these are set together.
_TOGETHER = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Prediction:
    """A prediction and what was found.

    Attributes:
        name: short.
        task: whose circuit makes it.
        prediction: in a sentence.
        held: whether it came true.
        numbers: what was measured; lists go by `amount`.
    """

    name: str
    task: str
    prediction: str
    held: bool
    numbers: Mapping[str, Any]


def bracket_counting(
    model: Transformer,
    tokenizer: Tokenizer,
    circuit: Circuit | None = None,
    *,
    prompts: int = 32,
    seed: int = 0,
) -> list[Prediction]:
    """What follows from averaging: five trends, and with a circuit the node that holds the depth.

    Args:
        model: in evaluation.
        tokenizer: the model's.
        circuit: of this task, or None.
        prompts: how many for each amount, at least 2.
        seed: draws their names and numbers.

    Raises:
        UserError: the model's context is too short for the prompts.
    """
    lists = _Lists.draw(tokenizer, prompts, seed)
    answers = torch.tensor([_id(tokenizer, text) for text in ("]]", "]")])
    found = []
    for asked in _ASKED:
        made = _fitting(model, lists, asked)
        margins = {amount: _margins(model, texts, answers) for amount, texts in made.items()}
        direction = -1 if asked.opening == "[[" else 1
        first = min(made)
        other = lists.prompts("[" if asked.opening == "[[" else "[[", asked, first)
        gap = (_margins(model, other, answers) - margins[first]).mean() * direction
        found.append(_trend(asked.name, _BRACKETS, asked.sentence, margins, direction, float(gap)))
    if circuit is not None:
        made = _fitting(model, lists, _LONGER)
        found.append(_depth_node(model, circuit, made[min(made)], made[max(made)], answers))
    return found


def single_double_quote(
    model: Transformer,
    tokenizer: Tokenizer,
    circuit: Circuit | None = None,
    *,
    prompts: int = 32,
    seed: int = 0,
) -> list[Prediction]:
    """What follows from a node that holds the kind of quote, and a head that reads all quotes.

    Args:
        model: in evaluation.
        tokenizer: the model's.
        circuit: of this task, whose neurons and v channels are looked at; None for all of them.
        prompts: how many pairs of each split of the task, at least 2; the node is chosen on the
            training split and measured on the test split.
        seed: draws them.

    Raises:
        UserError: the task cannot be asked of this model.
    """
    most = _STRINGS[-1]
    before = {
        _id(tokenizer, f"{own})"): {
            n: tokenizer.encode(f"f({other}x{other})\n" * n + f"f({own}x{own})\n" * (most - n)).ids
            for n in _STRINGS
        }
        for own, other in ("\"'", "'\"")
    }
    context = model.config.context
    longest = max(len(ids) for texts in before.values() for ids in texts.values())
    train, test = (
        tasks.get(_QUOTES).pairs(
            tokenizer,
            prompts,
            split=split,
            seed=seed,
            context=context,
            max_tokens=context - longest,
        )
        for split in ("train", "test")
    )
    asked = [prompt for pair in test for prompt in (pair.positive, pair.negative)]
    answers = torch.tensor([[prompt.right, prompt.wrong] for prompt in asked])
    margins = {
        n: _margins(model, [[*before[p.right][n], *p.tokens] for p in asked], answers)
        for n in _STRINGS
    }
    # Half of the prompts have either answer, and margins are right over wrong.
    gap = 2 * float(margins[0].mean())
    sentence = (
        f"the more of {most} closed strings before an open one have the other kind of quote, the "
        f"less is the right quote preferred"
    )
    return [
        _quote_node(model, circuit, train, test),
        _trend("other_quotes_before", _QUOTES, sentence, margins, -1, gap),
    ]


# By task: what its circuit predicts.
CHECKS: dict[str, Callable[..., list[Prediction]]] = {
    _BRACKETS: bracket_counting,
    _QUOTES: single_double_quote,
}


@dataclass(frozen=True)
class _Asked:
    """A trend of brackets.

    Attributes:
        name, sentence: as of the prediction.
        opening: of the list, `[[` or `[`; the trend leads away from what closes it.
        amounts: what to vary.
        length: how many numbers the list has, of the amount.
        before: what stands before it, of the amount.
    """

    name: str
    sentence: str
    opening: str
    amounts: tuple[int, ...]
    length: Callable[[int], int]
    before: Callable[[int], str]


def _comment(distractor: str, count: int) -> str:
    """A line of `_MOST` words, of which the first `count` are distractors."""
    return f"# {' '.join([distractor] * count + ['x'] * (_MOST - count))}\n"


_LONGER = _Asked(
    "longer_list",
    "the more numbers stand in a nested list, the less is ]] preferred to ]",
    "[[",
    (2, 4, 8, 16, 32, 64, 128),
    lambda n: n,
    lambda n: "",
)
_ASKED = (
    _LONGER,
    _Asked(
        "text_before",
        "the more words without brackets stand before a nested list, the less is ]] preferred",
        "[[",
        (0, 8, 16, 32, 64, 128),
        lambda n: 4,
        lambda n: f"#{' x' * n}\n",
    ),
    _Asked(
        "open_brackets_before",
        f"the more of {_MOST} words before a flat list are [ in a comment, the more is ]] "
        f"preferred",
        "[",
        _DISTRACTORS,
        lambda n: 4,
        lambda n: _comment("[", n),
    ),
    _Asked(
        "double_brackets_before",
        f"the more of {_MOST} words before a flat list are [[ in a comment, the more is ]] "
        f"preferred",
        "[",
        _DISTRACTORS,
        lambda n: 4,
        lambda n: _comment("[[", n),
    ),
    _Asked(
        "closed_lists_before",
        f"the more of {_MOST} lines before a flat list have closed lists and not parentheses, the "
        f"more is ]] preferred",
        "[",
        _DISTRACTORS,
        lambda n: 4,
        lambda n: "a = [[1]]\n" * n + "a = ((1))\n" * (_MOST - n),
    ),
)


@dataclass(frozen=True)
class _Lists:
    """Names and numbers of lists; the prompts of all trends are made of the same ones."""

    tokenizer: Tokenizer
    drawn: list[tuple[str, list[str]]]

    @classmethod
    def draw(cls, tokenizer: Tokenizer, count: int, seed: int) -> _Lists:
        source = random.Random(seed)
        longest = max(asked.length(amount) for asked in _ASKED for amount in asked.amounts)
        return cls(
            tokenizer,
            [
                (source.choice(_NAMES), [str(source.randrange(100)) for _ in range(longest)])
                for _ in range(count)
            ],
        )

    def prompts(self, opening: str, asked: _Asked, amount: int) -> list[Tokens]:
        """Open lists, of one amount."""
        before, length = asked.before(amount), asked.length(amount)
        texts = [
            f"{before}{name} = {opening}{', '.join(numbers[:length])}"
            for name, numbers in self.drawn
        ]
        return [self.tokenizer.encode(text).ids for text in texts]


def _id(tokenizer: Tokenizer, text: str) -> int:
    (id,) = tokenizer.encode(text).ids
    return int(id)


def _fitting(model: Transformer, lists: _Lists, asked: _Asked) -> dict[int, list[Tokens]]:
    """The prompts of each amount, up to the first that does not fit the context."""
    context = model.config.context
    made: dict[int, list[Tokens]] = {}
    for amount in asked.amounts:
        prompts = lists.prompts(asked.opening, asked, amount)
        if max(map(len, prompts)) > context:
            break
        made[amount] = prompts
    if len(made) < 3:
        raise UserError(
            f"a context of {context} tokens is too short for the prompts of {_BRACKETS}: "
            f"use a model with a longer one"
        )
    return made


def _trend(
    name: str,
    task: str,
    sentence: str,
    margins: Mapping[int, Tensor],
    direction: int,
    gap: float,
) -> Prediction:
    """Whether means of `margins`, by amount `(prompts,)`, go in the `direction`, 1 or -1.

    The n-th prompts of all amounts belong together. What is predicted is always a mistake: a margin
    in the direction is a wrong answer.
    """
    amounts = sorted(margins)
    table = torch.stack([margins[amount] for amount in amounts]).double()  # (amounts, prompts)
    means = table.mean(1).tolist()
    steps = [direction * (later - earlier) > 0 for earlier, later in combinations(means, 2)]
    ordered = sum(steps) / len(steps)
    change, error = _mean_and_error(table[-1] - table[0])
    numbers = {
        "amount": amounts,
        "logit_difference": means,
        "standard_error": [_mean_and_error(row)[1] for row in table],
        "accuracy": [_accuracy(row * -direction) for row in table],
        "gap": gap,
        "ordered": ordered,
        "change": change,
        "change_error": error,
        "prompts": table.shape[1],
    }
    clear = direction * change > 2 * error and direction * change >= MATERIAL * gap
    held = gap >= GAP and ordered >= ORDERED and clear
    return Prediction(name, task, sentence, held, numbers)


def _accuracy(margins: Tensor) -> float:
    """Share of right answers; margins are right over wrong."""
    return float((margins > 0).double().mean())


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def _padded(model: Transformer, prompts: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """int64 `(B, T)`, and the last position of each, `(B,)`."""
    device = model.norm.weight.device
    tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    return tokens.to(device), last.to(device)


def _margins(model: Transformer, prompts: Sequence[Tokens], answers: Tensor) -> Tensor:
    """The first answer's logit over the second's, `(B,)`; answers `(2,)` or `(B, 2)`."""
    rows = max(1, _MOST_TOKENS // max(map(len, prompts)))
    answers = answers.expand(len(prompts), 2)
    found = []
    for first in range(0, len(prompts), rows):
        some = slice(first, first + rows)
        tokens, last = _padded(model, prompts[some])
        found.append(_margin(model, tokens, answers[some], (), last))
    return torch.cat(found)


def _margin(
    model: Transformer,
    tokens: Tensor,
    answers: Tensor,
    interventions: Sequence[Intervention],
    last: Tensor,
) -> Tensor:
    logits = answer(model, tokens, answers, interventions, last=last).float().cpu()
    return logits[:, 0] - logits[:, 1]


def _depth_node(
    model: Transformer,
    circuit: Circuit,
    short: Sequence[Tokens],
    long: Sequence[Tokens],
    answers: Tensor,
) -> Prediction:
    """Chosen on the first half of the prompts, measured on the second."""
    half = len(short) // 2
    before = _margins(model, long, answers)
    costs = _margins(model, short, answers) - before

    def restored(node: str, some: slice) -> float:
        """What the node of the shorter lists gives back, of what the longer ones cost."""
        tokens, last = _padded(model, long[some])
        patch = Patch(node, *_padded(model, short[some]), at="-1")
        gain = _margin(model, tokens, answers, [patch], last) - before[some]
        cost = float(costs[some].mean())
        return float(gain.mean()) / cost if cost > 0 else 0.0

    shares = {node.id: restored(node.id, slice(half)) for node in circuit.nodes if node.place}
    chosen = max(shares, key=shares.__getitem__, default=None)
    share = restored(chosen, slice(half, None)) if chosen is not None else 0.0
    cost, error = _mean_and_error(costs)
    return Prediction(
        "depth_node",
        _BRACKETS,
        "one node of the circuit, given at the last token what it has after a short list, gives "
        "back most of the preference for ]] that a long list costs",
        share >= RESTORED and cost > 2 * error,
        {
            "node": chosen,
            "restored": share,
            "cost": cost,
            "cost_error": error,
            "tried": len(shares),
            "prompts": len(short) - half,
        },
    )


@dataclass(frozen=True)
class _Quotes:
    """Prompts of pairs, and where the two of a pair differ; B in all.

    Attributes:
        tokens: int64 `(B, T)`.
        last: int64 `(B,)`.
        answers: int64 `(B, 2)`, right and wrong.
        positive: bool `(B,)`.
        differ: bool `(B, T)`.
    """

    tokens: Tensor
    last: Tensor
    answers: Tensor
    positive: Tensor
    differ: Tensor

    @classmethod
    def of(cls, model: Transformer, pairs: Sequence[tasks.Pair]) -> _Quotes:
        batch = tasks.collate(pairs, model.config.vocab_size - 1).to(model.norm.weight.device)
        # The two prompts of a pair follow each other.
        other = batch.tokens.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        answers = torch.stack([batch.right, batch.wrong], 1)
        return cls(batch.tokens, batch.last, answers, batch.positive, batch.tokens != other)

    def margins(self, model: Transformer, changes: Sequence[Intervention] = ()) -> Tensor:
        """Right over wrong, `(B,)`."""
        return _margin(model, self.tokens, self.answers, changes, self.last)

    def changes(
        self,
        model: Transformer,
        nodes: Sequence[str],
        means: Mapping[str, Tensor],
        *,
        own: bool = False,
    ) -> list[Set]:
        """Sets `nodes`, where the prompts of a pair differ, to their mean there.

        The mean is that of the other kind of prompt, or of the prompt's own.
        """
        kinds = self.positive if own else ~self.positive
        found = []
        for node in nodes:
            where = Nodes.parse(model, node)
            mean = means[where.place][kinds.long(), where.first]  # (B,)
            found.append(Set(node, mean.view(-1, 1, 1), at=self.differ))
        return found


def _quote_node(
    model: Transformer,
    circuit: Circuit | None,
    train: Sequence[tasks.Pair],
    test: Sequence[tasks.Pair],
) -> Prediction:
    """Chosen on `train`, which has the means as well; measured on `test`."""
    seen, unseen = _Quotes.of(model, train), _Quotes.of(model, test)
    means = _means(model, seen)
    if circuit is None:
        nodes = _influential(model, seen, means)
    else:
        nodes = [node.id for node in circuit.nodes if node.kind in ("neuron", "v")]

    before = seen.margins(model).mean()
    drops = {}
    for node in nodes:
        after = seen.margins(model, seen.changes(model, [node], means))
        drops[node] = float(before - after.mean())
    order = sorted(drops, key=drops.__getitem__, reverse=True)
    untouched = unseen.margins(model)

    def flipped(nodes: Sequence[str], own: bool = False) -> float:
        """Share of prompts whose right answer becomes a wrong one."""
        after = unseen.margins(model, unseen.changes(model, nodes, means, own=own))
        return float(((untouched > 0) & (after <= 0)).double().mean())

    solved = min(_accuracy(untouched[0::2]), _accuracy(untouched[1::2]))
    other, itself = flipped(order[:1]), flipped(order[:1], own=True)
    # How many of them it takes, if one is not enough.
    together = [count for count in _TOGETHER if count <= len(order)]
    return Prediction(
        "quote_node",
        _QUOTES,
        "one node, set at the opening quote to its mean at the other kind of quote, flips the "
        "answer, and set to its mean at its own kind does not",
        solved >= SOLVED and other >= FLIPPED and itself <= FLIPPED_ANYWAY,
        {
            "node": order[0] if order else None,
            "solved": solved,
            "flipped": other,
            "flipped_by_own_mean": itself,
            "together": [order[:count] for count in together],
            "flipped_together": [flipped(order[:count]) for count in together],
            "tried": len(order),
            "prompts": len(unseen.tokens),
        },
    )


def _candidates(model: Transformer) -> list[str]:
    """Places of neurons and v channels."""
    return [name for name in taps.names(model) if name.endswith((".post_act", ".v"))]


@torch.no_grad()
def _means(model: Transformer, quotes: _Quotes) -> dict[str, Tensor]:
    """By place `(2, width)`: mean where pairs differ, of negative and of positive prompts."""
    with taps.record(model, _candidates(model)) as seen:
        model(quotes.tokens, at=quotes.last)
    return {
        place: torch.stack(
            [
                values[quotes.differ & (quotes.positive == kind).unsqueeze(1)].mean(0)
                for kind in (False, True)
            ]
        )
        for place, values in seen.items()
    }


def _influential(model: Transformer, quotes: _Quotes, means: Mapping[str, Tensor]) -> list[str]:
    """Nodes whose step to the other kind's mean should lower the margin most, to first order."""
    names = _candidates(model)
    # From here on everything that is recorded has a gradient, whatever the parameters have.
    begin = {"0.attn.act_in": lambda x: x.detach().requires_grad_()}
    with torch.enable_grad(), taps.intervene(model, begin), taps.record(model, names) as seen:
        logits = model(quotes.tokens, at=quotes.last).squeeze(1)
        both = logits.gather(1, quotes.answers)
        slopes = torch.autograd.grad((both[:, 0] - both[:, 1]).sum(), [seen[n] for n in names])
    effects: dict[str, float] = {}
    for name, slope in zip(names, slopes, strict=True):
        step = means[name][(~quotes.positive).long()].unsqueeze(1) - seen[name].detach()
        effect = (slope * step * quotes.differ.unsqueeze(-1)).sum((0, 1))  # (width,)
        effects |= {f"{name}:{channel}": value for channel, value in enumerate(effect.tolist())}
    return sorted(effects, key=effects.__getitem__)[:_TRIED]


@dataclass(frozen=True)
class PredictionsConfig:
    """Checks what circuits for bracket counting and quotes predict about a trained model."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder of a training run, or of one checkpoint in it."""
    circuit: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A circuit.json of this model: only its task is checked, and its own nodes are tried."""
    prompts: int = 32
    """How many prompts for each amount, and pairs for the node of the quote."""
    seed: int = 0
    """Draws them."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write everything there, for programs."""
    step: int | None = None
    """The checkpoint of this step, by default the newest."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, ..."""


def run(config: PredictionsConfig, out: TextIO) -> None:
    """Checks as `config` says and writes a report to `out`.

    Raises:
        UserError: a checkpoint or circuit that cannot be read or does not fit, too few prompts.
    """
    if config.prompts < 2:
        raise UserError(f"--prompts must be at least 2, got {config.prompts}: choose more")
    circuit = None if config.circuit is None else _read(config.circuit)
    if circuit is not None and circuit.task not in CHECKS:
        raise UserError(
            f"nothing is predicted for {circuit.task}: give a circuit for {' or '.join(CHECKS)}"
        )
    model, tokenizer = load_run(config.checkpoint, config.step, config.device)
    found: list[Prediction] = []
    for task in CHECKS if circuit is None else (circuit.task,):
        check = CHECKS[task]
        found += check(model, tokenizer, circuit, prompts=config.prompts, seed=config.seed)
    if config.json is not None:
        program.write_json(config.json, [asdict(prediction) for prediction in found])
    out.write("\n".join(map(_text, found)))
    out.flush()


def _read(path: Path) -> Circuit:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the circuit {path} cannot be read ({error}): choose another") from error
    return Circuit.from_json(text)


def _text(found: Prediction) -> str:
    """A few lines: whether it held, what was predicted, what was measured."""
    lines = [
        f"{found.task}, {found.name}: {'held' if found.held else 'did not hold'}",
        f"  {found.prediction}",
    ]
    numbers = found.numbers
    if "amount" in numbers:
        lines.append("  amount  logit difference  accuracy")
        lines += [
            f"  {amount:6d}  {difference:9.3f} ±{error:6.3f}  {accuracy:8.1%}"
            for amount, difference, error, accuracy in zip(
                *(numbers[n] for n in ("amount", "logit_difference", "standard_error", "accuracy")),
                strict=True,
            )
        ]
        lines.append(
            f"  gap {numbers['gap']:.3f}, change {numbers['change']:.3f} ± "
            f"{numbers['change_error']:.3f}, ordered as predicted {numbers['ordered']:.0%}, "
            f"{numbers['prompts']} prompts"
        )
    else:
        shares = [
            f"{name.replace('_', ' ')} {numbers[name]:.1%}"
            for name in ("solved", "flipped", "flipped_by_own_mean", "restored")
            if name in numbers
        ]
        lines.append(
            f"  {numbers['node'] or 'no node'}: {', '.join(shares)}, {numbers['prompts']} prompts, "
            f"{numbers['tried']} nodes tried"
        )
    if "together" in numbers:
        shares = [
            f"{share:.1%} by {len(nodes)}"
            for nodes, share in zip(numbers["together"], numbers["flipped_together"], strict=True)
        ]
        lines.append(f"  flipped by nodes together: {', '.join(shares) or 'there are none'}")
    return "".join(f"{line}\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit status: 2 after an error, 130 after Ctrl-C."""
    config = tyro.cli(
        PredictionsConfig, prog="sparse_transformer.circuits.predictions", args=arguments
    )
    return program.status(lambda: run(config, sys.stdout))


if __name__ == "__main__":
    sys.exit(main())
