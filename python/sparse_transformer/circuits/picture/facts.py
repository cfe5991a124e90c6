"""What stands beside the picture: facts about the circuit, and what its proof says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_transformer.circuits.circuit import Circuit
from sparse_transformer.circuits.picture import text

# How what is ablated is replaced.
_ABLATIONS = {"mean": "at its mean", "zero": "at zero", "resample": "resampled"}
_COLUMNS = ("loss", "recalibrated_loss", "accuracy")
_SUBJECTS = {"circuit": "circuit, the rest", "without": "model, the circuit"}


@dataclass(frozen=True)
class Verdict:
    """A sentence, and whether it speaks for the circuit."""

    sentence: str
    holds: bool


@dataclass(frozen=True)
class Facts:
    """All of it as text.

    Attributes:
        task, description: of the circuit; what the circuit leaves empty is empty.
        model, size: a line each.
        verdicts: whether it is sufficient and necessary, and what the control says.
        columns: of the table of losses, its first column excluded.
        rows: of the table: name, and a value for each column.
        others: name and value of all that the proof has beside these.
    """

    task: str
    description: str
    model: str
    size: str
    verdicts: tuple[Verdict, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    others: tuple[tuple[str, str], ...]


def facts(circuit: Circuit) -> Facts:
    """Puts a circuit into words; keys that the proof lacks are left out."""
    proof = circuit.proof
    table = list(_table(proof))
    columns = list(dict.fromkeys([*_COLUMNS, *(key for _, values in table for key in values)]))
    columns = [key for key in columns if any(key in values for _, values in table)]
    rows = [
        (name, tuple(_value(key, values.get(key)) for key in columns)) for name, values in table
    ]
    return Facts(
        task=text.line(circuit.task),
        description=text.line(circuit.description),
        model=" · ".join(_pairs(circuit.model)),
        size=_size(circuit),
        verdicts=tuple(_verdicts(proof, text.fact(circuit.target_loss))),
        columns=tuple(map(_words, columns)),
        rows=tuple(rows),
        others=tuple(_others(proof)),
    )


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield f"{text.visible(key)} {text.fact(value)}"


def _size(circuit: Circuit) -> str:
    nodes, edges = circuit.node_count, circuit.edge_count
    return (
        f"{_count(nodes, 'node')}, {_count(edges, 'edge')} "
        f"({circuit.edges_before} before edges were pruned) · "
        f"target loss {text.fact(circuit.target_loss)}"
    )


def _table(proof: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and values of each row of losses."""
    whole = {
        key: proof[f"model_{key}"]
        for key in ("loss", "accuracy")
        if proof.get(f"model_{key}") is not None
    }
    if whole:
        yield "whole model", whole
    for part, subject in _SUBJECTS.items():
        for ablation, values in _mapping(proof.get(part)).items():
            if isinstance(values, Mapping):
                yield f"{subject} {_ABLATIONS.get(ablation, _words(ablation))}", values


def _verdicts(proof: Mapping[str, Any], target: str) -> Iterator[Verdict]:
    alone = _mapping(_mapping(proof.get("circuit")).get("mean")).get("loss")
    lost = _mapping(_mapping(proof.get("without")).get("mean"))
    gone = _clause(", at loss {}", lost.get("loss"))
    gone += _clause(" ({} recalibrated)", lost.get("recalibrated_loss"))
    if proof.get("sufficient") is True:
        loss = _clause(" with {}", alone)
        yield Verdict(f"Sufficient: the circuit alone meets the target loss{loss}.", True)
    elif proof.get("sufficient") is False:
        loss = f"misses the target loss of {target}" + _clause(" with {}", alone)
        yield Verdict(f"Not sufficient: the circuit alone {loss}.", False)
    if proof.get("necessary") is True:
        yield Verdict(f"Necessary: without the circuit the model fails{gone}.", True)
    elif proof.get("necessary") is False:
        yield Verdict(f"Not necessary: the model does the task without the circuit{gone}.", False)
    control = _mapping(proof.get("control"))
    if isinstance(control.get("passed"), bool):
        yield _control(control)


def _control(control: Mapping[str, Any]) -> Verdict:
    """A task without sense, pruned in the same way, must not be explained as well."""
    reached = control.get("reached")
    end = "was pruned in the same way"
    if isinstance(reached, bool):
        end = "reaches the target as well" if reached else "does not reach the target"
    end = f"for a task without sense the same model {end}"
    end += _clause(" with at most {} edges", control.get("limit"))
    forms = {"loss": "loss {}", "nodes": "{} nodes", "edges": "{} edges"}
    details = [_clause(form, control.get(key)) for key, form in forms.items()]
    if any(details):
        end += f" ({', '.join(filter(None, details))})"
    if control["passed"]:
        return Verdict(f"Control passed: {end}.", True)
    return Verdict(f"Control failed, so this circuit explains little: {end}.", False)


def _others(proof: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What neither the table nor a sentence has."""
    said = {"model_loss", "model_accuracy", "sufficient", "necessary"}
    for key, value in proof.items():
        if value is None or (key in said and not isinstance(value, Mapping)):
            continue
        if key == "control" and isinstance(_mapping(value).get("passed"), bool):
            continue
        if key in _SUBJECTS and isinstance(value, Mapping):
            value = {k: v for k, v in value.items() if not isinstance(v, Mapping)}
        if value != {}:
            yield _words(key), text.fact(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _value(key: str, value: Any) -> str:
    if key == "accuracy" and isinstance(value, (int, float)):
        return f"{value:.1%}"
    return text.fact(value)


def _clause(form: str, value: Any) -> str:
    return "" if value is None else form.format(text.fact(value))


def _words(key: str) -> str:
    return text.visible(key.replace("_", " "))


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
