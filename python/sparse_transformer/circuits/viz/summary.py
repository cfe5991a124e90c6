"""The words beside the picture: facts about the circuit, and what its validation says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparse_transformer.circuits import words
from sparse_transformer.circuits.circuit import (
    CONTROL_RATIO,
    PARTS,
    Ablated,
    Circuit,
    Validation,
)

# How what is ablated is replaced.
_ABLATIONS = {
    "mean": "at its mean",
    "zero": "at zero",
    "resample": "from another prompt",
    "pair": "from the pair's other prompt",
}
# Rows of other kinds.
_CIRCUIT = {
    "random": "circuit, a random part of the rest at its mean",
    "adversarial": "circuit, the worst part of the rest at its mean",
    "edges": "circuit, all other edges at their mean",
}
_WITHOUT = {"edges": "whole model, the circuit's edges at their mean"}
_FACTS = {
    "linear": "linear layers",
    "n_layer": "depth",
    "d_model": "width",
    "l0": "L0",
    "edges": "edges of its blocks",
}
# Nodes of a kind and a layer that its sentence has, the most important ones.
_TOLD = 2
COLUMNS = ("loss", "95% interval", "correct answers")


@dataclass(frozen=True)
class Verdict:
    """A sentence, and whether it speaks for the circuit; None: it is undecided."""

    sentence: str
    holds: bool | None


@dataclass(frozen=True)
class Summary:
    """All of it as text; what the circuit leaves empty is empty.

    Attributes:
        task, description: of the circuit.
        story: what each layer does, a sentence each.
        model, size: a line each.
        verdicts: whether it is sufficient, necessary and robust, and what the controls say.
        rows: of the table of losses: name, and a value for each of `COLUMNS`.
        note: what the losses are.
    """

    task: str
    description: str
    model: str
    size: str
    story: tuple[str, ...] = ()
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
        story=tuple(_story(circuit)),
    )
    found = circuit.validation
    if found is None:
        return heading
    return replace(
        heading,
        verdicts=tuple(verdicts(found, circuit.target_loss)),
        rows=tuple(rows(found)),
        note=note(found),
    )


def _story(circuit: Circuit) -> Iterator[str]:
    """For each layer what its neurons detect, where its heads look and which answers it writes."""
    answering = {edge.source for edge in circuit.edges if edge.kind == "unembedding"}
    for layer in sorted({node.layer for node in circuit.nodes if node.kind in PARTS}):
        inside = [node for node in circuit.nodes if node.layer == layer]
        inside.sort(key=lambda node: -(node.importance or 0))
        named = [node for node in inside if node.score is not None]
        heads = {node.channel: node.label for node in inside if node.kind == "head"}
        values = {node.head: node.label for node in named[::-1] if node.kind == "v"}
        # Heads by the importance of their values.
        order = [node.head for node in inside if node.kind == "v" and node.head in heads]
        order = list(dict.fromkeys(order))[:_TOLD]
        told = [*(f"{words.channel(n)} {n.label}" for n in named if n.kind == "neuron")][:_TOLD]
        told += [
            f"head {head} {heads[head]}" + (f" ({values[head]})" if head in values else "")
            for head in order
        ]
        told += [
            f"{'the MLP' if '.mlp.' in node.place else 'attention'} {node.label}"
            for node in inside
            if node.id in answering
        ][:_TOLD]
        if told:
            yield f"Layer {layer}: {'; '.join(words.line(part) for part in dict.fromkeys(told))}."


def note(found: Validation) -> str:
    """What the losses are."""
    return (
        f"On {found.pairs} held-out pairs of prompts in {found.draws} draws. The loss is binary "
        "cross-entropy over the two answers, in nats, with the best scale and shift of the logits "
        "for other prompts; guessing has 0.693."
    )


def rows(found: Validation) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name, and a value for each of `COLUMNS`."""
    yield "whole model", _values(found.model)
    for name, value in found.circuit.items():
        yield _CIRCUIT.get(name, f"circuit alone, the rest {_ablation(name)}"), _values(value)
    for name, value in found.without.items():
        label = f"without the circuit, which is {_ablation(name)}"
        yield _WITHOUT.get(name, label), _values(value)
    for control in found.controls:
        edges = _count(control.edges, "edge") if control.reached else "target not reached"
        cut = "" if control.complete else "cut short"
        yield f"control: {words.visible(control.name)}", (words.fact(control.loss), edges, cut)


def _ablation(name: str) -> str:
    return _ABLATIONS.get(name, words.visible(name))


def _values(found: Ablated) -> tuple[str, ...]:
    return words.fact(found.loss), _interval(found), f"{found.accuracy:.1%}"


def _interval(found: Ablated) -> str:
    return f"{words.fact(found.low)} to {words.fact(found.high)}"


def verdicts(found: Validation, target: float) -> Iterator[Verdict]:
    """What the intervals say, and the controls."""
    yield _controls(found)
    yield _verdict(
        found.sufficient,
        "Sufficient",
        f"the circuit alone has a loss of {_interval(found.circuit['mean'])}",
        f"within the target of {words.fact(target)}",
        f"above the target of {words.fact(target)}",
    )
    lost = " and ".join(
        f"{_interval(found.without[name])} without its {part}"
        for name, part in (("mean", "nodes"), ("edges", "edges"))
    )
    yield _verdict(
        found.necessary,
        "Necessary",
        f"the loss of the model is {lost}",
        "so that it fails",
        "so that it still knows the answer",
    )
    worst = max(
        (found.circuit[name] for name in ("pair", "random", "adversarial")),
        key=lambda ablated: ablated.high,
    )
    yield _verdict(
        found.robust,
        "Robust",
        f"the highest loss under counterfactual, random and adversarial ablation is "
        f"{_interval(worst)}",
        f"at most twice the target of {words.fact(target)}",
        f"above twice the target of {words.fact(target)}",
    )


def _verdict(holds: bool | None, name: str, said: str, good: str, bad: str) -> Verdict:
    if holds is None:
        said = f"{said}. More prompts would decide it."
        return Verdict(f"Undecided whether the circuit is {name.lower()}: {said}", None)
    if holds:
        return Verdict(f"{name}: {said}, {good}.", True)
    return Verdict(f"Not {name.lower()}: {said}, {bad}.", False)


def _controls(found: Validation) -> Verdict:
    """The headline: edges for nonsense over edges for the task."""
    count, reached = len(found.controls), sum(control.reached for control in found.controls)
    if count == 0:
        return Verdict("No control was run, so nobody knows what this circuit is worth.", False)
    ratio = found.ratio
    tried = f"{_count(count, 'control')} by the same search, of which {reached} reached the loss"
    if ratio is not None:
        said = f"Nonsense needs {ratio:.1f} times the edges of the task, at least ({tried})"
    else:
        said = f"Nonsense does not reach the loss of the task ({tried})"
    if found.passed is None:
        return Verdict(f"Undecided, as the clock ended a control early: {said}.", None)
    if found.passed:
        return Verdict(f"{said}.", True)
    return Verdict(
        f"{said}: less than {CONTROL_RATIO:.0f}, so this circuit explains little.", False
    )


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
