"""The words beside the picture: facts about the circuit, and what its validation says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparse_transformer.circuits.circuit import Ablated, Circuit, Control, Validation
from sparse_transformer.circuits.viz import words

# How what is ablated is replaced.
_ABLATIONS = {"mean": "at its mean", "zero": "at zero", "resample": "from another prompt"}
_FACTS = {
    "linear": "linear layers",
    "n_layer": "depth",
    "d_model": "width",
    "l0": "L0",
    "edges": "edges of its blocks",
}
COLUMNS = ("loss", "loss with the best scale and shift", "correct answers")


@dataclass(frozen=True)
class Verdict:
    """A sentence, and whether it speaks for the circuit."""

    sentence: str
    holds: bool


@dataclass(frozen=True)
class Summary:
    """All of it as text; what the circuit leaves empty is empty.

    Attributes:
        task, description: of the circuit.
        model, size: a line each.
        verdicts: whether it is sufficient and necessary, and what the control says.
        rows: of the table of losses: name, and a value for each of `COLUMNS`.
        note: what the losses are.
    """

    task: str
    description: str
    model: str
    size: str
    verdicts: tuple[Verdict, ...] = ()
    rows: tuple[tuple[str, tuple[str, ...]], ...] = ()
    note: str = ""


def summarize(circuit: Circuit) -> Summary:
    """Puts a circuit into words."""
    facts = [
        f"{_FACTS.get(key, words.visible(key))} {words.fact(value)}"
        for key, value in circuit.model.items()
    ]
    heading = Summary(
        task=words.line(circuit.task),
        description=words.line(circuit.description),
        model=" · ".join(facts),
        size=f"{_count(circuit.node_count, 'node')}, {_count(circuit.edge_count, 'edge')} "
        f"({circuit.edges_before} before edges were pruned) · "
        f"target loss {words.fact(circuit.target_loss)}",
    )
    found = circuit.validation
    if found is None:
        return heading
    return replace(
        heading,
        verdicts=tuple(_verdicts(found, circuit.target_loss)),
        rows=tuple(_rows(found)),
        note=f"On {found.pairs} held-out pairs of prompts. The loss is binary cross-entropy over "
        "the two answers, in nats; guessing has 0.693.",
    )


def _rows(found: Validation) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "whole model", _values(Ablated(found.model_loss, found.model_accuracy))
    for name, value in found.circuit.items():
        yield f"circuit alone, the rest {_ablation(name)}", _values(value)
    for name, value in found.without.items():
        yield f"without the circuit, which is {_ablation(name)}", _values(value)


def _ablation(name: str) -> str:
    return _ABLATIONS.get(name, words.visible(name))


def _values(found: Ablated) -> tuple[str, ...]:
    best = found.recalibrated_loss
    return words.fact(found.loss), words.fact(best), f"{found.accuracy:.1%}"


def _verdicts(found: Validation, target: float) -> Iterator[Verdict]:
    alone = words.fact(found.circuit["mean"].loss)
    if found.sufficient:
        yield Verdict(f"Sufficient: the circuit alone reaches the target, with loss {alone}.", True)
    else:
        yield Verdict(
            f"Not sufficient: the circuit alone has loss {alone}, above the target of "
            f"{words.fact(target)}.",
            False,
        )
    lost = found.without["mean"]
    loss = f"loss {words.fact(lost.loss)}"
    if lost.recalibrated_loss is not None:
        loss += f", {words.fact(lost.recalibrated_loss)} with the best scale and shift"
    if found.necessary:
        yield Verdict(f"Necessary: without the circuit the model fails ({loss}).", True)
    else:
        yield Verdict(
            f"Not necessary: the model solves the task without the circuit ({loss}).", False
        )
    if found.control is not None:
        yield _control(found.control)


def _control(control: Control) -> Verdict:
    """Random labels must not be explained as well."""
    tried = (
        f"with at most {control.limit} edges (lowest loss {words.fact(control.loss)}, "
        f"{_count(control.nodes, 'node')}, {_count(control.edges, 'edge')})"
    )
    if control.trained is not None:
        tried += f", in {control.trained:.0%} of its training steps"
    if control.passed:
        return Verdict(
            f"Control passed: with random labels the same search misses the target {tried}.", True
        )
    return Verdict(
        f"Control failed, so this circuit explains little: with random labels the same search "
        f"reaches the target {tried}.",
        False,
    )


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
