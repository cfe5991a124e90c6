"""`python -m sparse_transformer.steer`: a model's answers with some of its nodes changed.

The changes themselves, and how nodes and positions are written, are in interventions.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from sparse_transformer import hooks, program, tasks
from sparse_transformer.errors import UserError
from sparse_transformer.generation import prompt_tokens
from sparse_transformer.interventions import (
    Ablate,
    Add,
    Intervention,
    Nodes,
    Patch,
    Scale,
    Set,
    answer,
    intervene,
    next_logits,
)
from sparse_transformer.model import Transformer
from sparse_transformer.run import load_run
from sparse_transformer.tokenizer import encode

# How many of the channels that --show names, and of the likeliest tokens, are shown.
_SHOWN_CHANNELS, _SHOWN_TOKENS = 8, 5
# Prompts of a task go through the model this many pairs at a time.
_PAIRS = 16

_Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class SteerConfig:
    """Changes nodes of a trained model and shows what it answers before and after.

    A node is HOOK:CHANNEL, HOOK:FIRST-LAST or HOOK, such as 0.mlp.post_act:137. Token
    positions may follow: @3, @2-5, @-1 (the last). Options with nodes may be repeated; on the same
    node they act in the order ablate, patch, set, scale, add.
    """

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of a run, of a checkpoint in it or of an exported model; or the name of a model."""
    prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Prompt; "-" reads it from standard input."""
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Use test prompts of this task, with their right and wrong answers, instead of a prompt."""
    pairs: int = 64
    """Number of prompt pairs."""
    seed: int = 0
    """Random seed."""
    answers: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="TOKEN TOKEN")] = None
    """Two tokens to compare after a prompt; by default the likeliest tokens are listed."""
    ablate: Annotated[_Texts, tyro.conf.arg(metavar="NODE[@POS]")] = ()
    """Make nodes zero, or their means if --means is given."""
    patch: Annotated[_Texts, tyro.conf.arg(metavar="NODE[@POS]=TEXT")] = ()
    """Give nodes their activation in the prompt TEXT; with --task, in the pair's other prompt."""
    set: Annotated[_Texts, tyro.conf.arg(metavar="NODE[@POS]=VALUE")] = ()
    """Set nodes to a value."""
    scale: Annotated[_Texts, tyro.conf.arg(metavar="NODE[@POS]=VALUE")] = ()
    """Multiply nodes by a value."""
    add: Annotated[_Texts, tyro.conf.arg(metavar="NODE[@POS]=VALUE")] = ()
    """Add a value to nodes."""
    means: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The mean activations of each hook point, a safetensors file as circuits keep in the cache."""
    show: Annotated[
        tuple[tuple[str, ...], ...],
        tyro.conf.UseAppendAction,
        tyro.conf.arg(metavar="NODE [NODE ...]"),
    ] = ()
    """Show nodes' activations at each token; of many nodes those that change most."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the result to this JSON file."""
    step: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """The checkpoint of this step, by default the newest."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, ..."""


def run(config: SteerConfig, out: TextIO) -> None:
    """Does what `config` says and writes a report to `out`."""
    if (config.prompt is None) == (config.task is None):
        raise UserError("one thing can be asked at a time: give either --prompt or --task")
    if config.task is not None and config.answers is not None:
        raise UserError("--answers cannot be used with --task, which has its own answers")
    program.need_writable("--json", config.json)
    model, tokenizer = load_run(config.checkpoint, config.step, config.device)
    steering = _Steering(config, model, tokenizer)
    if config.task is not None:
        report = steering.task(config.task)
        text = _task_text(report)
    else:
        report = steering.prompt(program.read_text(str(config.prompt)))
        text = _prompt_text(report)
    if config.json is not None:
        program.write_json(config.json, report)
    out.write(text)
    out.flush()


class _Steering:
    """A model, its tokenizer and what the command line asks of them."""

    def __init__(self, config: SteerConfig, model: Transformer, tokenizer: Tokenizer) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.device = model.norm.weight.device
        self.end = model.config.vocab_size - 1
        self.means = _read_means(config.means)
        self.show = [Nodes.parse(model, text) for texts in config.show for text in texts]
        self.changed = any((config.ablate, config.patch, config.set, config.scale, config.add))

    def prompt(self, prompt: str) -> dict[str, Any]:
        """What follows a prompt, before and after: probabilities, and the difference of logits."""
        tokens = self._encode(prompt)
        interventions = self._interventions(None)
        before = _finite(next_logits(self.model, tokens)[0])
        after = _finite(next_logits(self.model, tokens, interventions)[0])
        report: dict[str, Any] = {"prompt": prompt, "changed": self.changed}
        if self.config.answers is None:
            likely = [logits.topk(_SHOWN_TOKENS).indices.tolist() for logits in (before, after)]
            ids = list(dict.fromkeys(likely[0] + likely[1]))
            report["flipped"] = likely[0][0] != likely[1][0]
        else:
            ids = [self._answer(text) for text in self.config.answers]
            margins = [float(logits[ids[0]] - logits[ids[1]]) for logits in (before, after)]
            report["logit_difference"] = {"before": margins[0], "after": margins[1]}
            report["flipped"] = (margins[0] > 0) != (margins[1] > 0)
        shares = before.softmax(0), after.softmax(0)
        report["next"] = [
            {"token": self._text(id), "before": float(shares[0][id]), "after": float(shares[1][id])}
            for id in ids
        ]
        last = torch.tensor([tokens.shape[1] - 1], device=self.device)
        return report | {"activations": self._activations(tokens, last, interventions)}

    def task(self, name: str) -> dict[str, Any]:
        """What test prompts of a task are answered with, before and after."""
        program.need_whole("--pairs", self.config.pairs, 1)
        pairs = tasks.get(name).pairs(
            self.tokenizer,
            self.config.pairs,
            split="test",
            seed=self.config.seed,
            context=self.model.config.context,
        )
        margins: list[Tensor] = []
        positive: list[Tensor] = []
        activations: list[dict[str, Any]] = []
        for first in range(0, len(pairs), _PAIRS):
            batch = tasks.collate(pairs[first : first + _PAIRS], self.end).to(self.device)
            tokens, last = batch.tokens, batch.last
            interventions = self._interventions(batch)
            logits = torch.stack(
                [
                    _finite(answer(self.model, tokens, batch.answers, changes, last=last))
                    for changes in ([], interventions)
                ]
            )  # (2, prompts, 2): before and after, right and wrong
            margins.append(logits[..., 0] - logits[..., 1])
            positive.append(batch.positive)
            if first == 0:
                activations = self._activations(tokens, last, interventions)[:2]
        before, after = torch.cat(margins, 1).cpu()
        kinds = torch.cat(positive).cpu()
        groups = {"all": torch.ones_like(kinds), "positive": kinds, "negative": ~kinds}
        return {
            "task": name,
            "pairs": len(pairs),
            "changed": self.changed,
            "effects": {kind: _effect(before[rows], after[rows]) for kind, rows in groups.items()},
            "activations": activations,
        }

    def _interventions(self, batch: tasks.Batch | None) -> list[Intervention]:
        """Those that are asked for; `batch` has the pairs from which a patch may take."""
        config = self.config
        found: list[Intervention] = []
        for text in config.ablate:
            node, at = _split(text)
            found.append(Ablate(node, self._mean(node), at))
        for text in config.patch:
            where, given, other = text.partition("=")
            node, at = _split(where)
            if given:
                found.append(Patch(node, self._encode(other), at=at))
            elif batch is not None:
                # The two prompts of a pair follow each other.
                swapped = torch.arange(len(batch.last)) ^ 1
                found.append(Patch(node, batch.tokens[swapped], batch.last[swapped], at))
            else:
                raise UserError(f"--patch {text} has no other prompt: write --patch {text}=TEXT")
        for option, kind, texts in (
            ("--set", Set, config.set),
            ("--scale", Scale, config.scale),
            ("--add", Add, config.add),
        ):
            for text in texts:
                where, _, number = text.partition("=")
                node, at = _split(where)
                found.append(kind(node, _number(option, text, number), at))
        return found

    def _mean(self, node: str) -> float | Tensor:
        if self.means is None:
            return 0.0
        nodes = Nodes.parse(self.model, node)
        mean = self.means.get(nodes.place)
        if mean is None or mean.shape != (nodes.width,):
            raise UserError(
                f"{self.config.means} has no means of {nodes.place} in this model: choose those "
                f"that python -m sparse_transformer.circuits made for it"
            )
        return mean[nodes.channels]

    @torch.no_grad()
    def _activations(
        self, tokens: Tensor, last: Tensor, interventions: Sequence[Intervention]
    ) -> list[dict[str, Any]]:
        """Of the nodes to show, at each token of each prompt."""
        recordings = []
        for changes in ([], interventions):
            places = dict.fromkeys(nodes.place for nodes in self.show)
            with (
                intervene(self.model, changes, last=last),
                hooks.recording(self.model, places) as seen,
            ):
                self.model(tokens, at=last)
            recordings.append(seen)
        found = []
        for row, end in enumerate(last.tolist()):
            shown: dict[str, Any] = {}
            for nodes in self.show:
                both = [seen[nodes.place][row, : end + 1, nodes.channels] for seen in recordings]
                change = both[1] - both[0] if self.changed else both[0]  # (tokens, channels)
                strength = change.abs().amax(0)
                most = strength.topk(min(_SHOWN_CHANNELS, len(strength))).indices
                for channel in most.sort().values.tolist():
                    before, after = (values[:, channel].tolist() for values in both)
                    node = f"{nodes.place}:{nodes.first + channel}"
                    shown[node] = {"before": before, "after": after}
            texts = [self._text(id) for id in tokens[row, : end + 1].tolist()]
            found.append({"tokens": texts, "nodes": shown})
        return found

    def _encode(self, text: str) -> Tensor:
        """int64 `(1, T)`; an empty text is the beginning of a file."""
        return torch.tensor([program.cropped(*prompt_tokens(self.model, text))], device=self.device)

    def _answer(self, text: str) -> int:
        ids = encode(self.tokenizer, text)
        if len(ids) != 1:
            parts = f"it is {' '.join(map(self._text, ids))}" if ids else "it is empty"
            raise UserError(f"the answer {text!r} is not one token, {parts}: choose another")
        return int(ids[0])

    def _text(self, token: int) -> str:
        """A token in quotes; the tokenizer's name of it where its bytes are no whole character."""
        text = self.tokenizer.decode([token], skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in text:
            return str(self.tokenizer.id_to_token(token))
        return repr(text)


def _split(text: str) -> tuple[str, str | None]:
    """Node and positions of `NODE[@POS]`."""
    node, given, at = text.partition("@")
    return node, at if given else None


def _number(option: str, text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{option} {text} has no number: write {option} NODE=VALUE or {option} NODE@POS=VALUE"
        )
    return value


def _finite(logits: Tensor) -> Tensor:
    """In float32.

    Raises:
        UserError: not all of them are finite.
    """
    if not bool(logits.isfinite().all()):
        raise UserError("the logits are not finite with these changes: choose smaller ones")
    return logits.float()


def _read_means(path: Path | None) -> dict[str, Tensor] | None:
    if path is None:
        return None
    try:
        return load_file(path)
    # A name that cannot be encoded is a ValueError.
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the means {path} cannot be read ({error}): choose another file"
        ) from error


def _effect(before: Tensor, after: Tensor) -> dict[str, float]:
    """Of the right answer's logit minus the wrong one's, `(B,)`; losses are in nats."""
    effect = {"flipped": float(((before > 0) != (after > 0)).float().mean())}
    for when, margins in (("before", before), ("after", after)):
        effect[f"accuracy_{when}"] = float((margins > 0).float().mean())
        effect[f"loss_{when}"] = float(torch.nn.functional.softplus(-margins).mean())
        effect[f"logit_difference_{when}"] = float(margins.mean())
    return effect


def _prompt_text(report: dict[str, Any]) -> str:
    changed, answers = report["changed"], "logit_difference" in report
    rows = [["next token", "before", "after"]]
    rows += [
        [entry["token"], f"{entry['before']:.2%}", f"{entry['after']:.2%}"]
        for entry in report["next"]
    ]
    text = program.table([row if changed else row[:2] for row in rows], left=1)
    if answers:
        first, second = (entry["token"] for entry in report["next"])
        cell = _cell(report["logit_difference"], "", "{:.3f}")
        text += f"logit difference of {first} over {second}: {cell}\n"
    if changed and answers:
        text += "the answer flipped\n" if report["flipped"] else "the answer did not flip\n"
    elif changed:
        text += f"the likeliest token {'changed' if report['flipped'] else 'is the same'}\n"
    (activations,) = report["activations"]
    return text + _activations_text("activations", activations)


def _task_text(report: dict[str, Any]) -> str:
    rows = [["prompts", "accuracy", "loss", "logit difference", "flipped"]]
    for kind, effect in report["effects"].items():
        cells = [
            _cell(effect, "accuracy_", "{:.1%}"),
            _cell(effect, "loss_", "{:.4f}"),
            _cell(effect, "logit_difference_", "{:.3f}"),
        ]
        rows.append([kind, *cells, f"{effect['flipped']:.1%}"])
    text = f"{report['task']}, {report['pairs']} pairs of the test split\n"
    text += program.table([row if report["changed"] else row[:-1] for row in rows], left=1)
    for kind, activations in zip(("positive", "negative"), report["activations"], strict=True):
        text += _activations_text(f"activations in the first {kind} prompt", activations)
    return text


def _activations_text(title: str, activations: dict[str, Any]) -> str:
    """What each node has at each token; nothing if no node is shown."""
    nodes = activations["nodes"]
    if not nodes:
        return ""
    rows = [["at", "token", *nodes]]
    for position, token in enumerate(activations["tokens"]):
        here = [{when: of[when][position] for when in of} for of in nodes.values()]
        rows.append([str(position), token, *(_cell(values, "", "{:.3f}") for values in here)])
    return f"\n{title}\n{program.table(rows, left=2)}"


def _cell(values: dict[str, float], name: str, number: str) -> str:
    """Before and after, or once what is the same."""
    before, after = (number.format(values[f"{name}{when}"]) for when in ("before", "after"))
    return before if before == after else f"{before} -> {after}"


main = program.entry(SteerConfig, "steer", lambda config: run(config, sys.stdout))
