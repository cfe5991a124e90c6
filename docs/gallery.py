"""Writes the gallery, `docs/gallery/`: `python -m docs.gallery [MODEL=FOLDER ...]`.

There is a page for each circuit `docs/gallery/MODEL/TASK.json`, with its picture, its validation
and its story, one for the bridge `docs/gallery/bridges.json`, and an index of all; `docs/hooks.py`
makes the pages to explore. Stories are written
by hand in `docs/gallery/stories.txt`, one in a line: `MODEL/TASK: TEXT`. `MODEL=FOLDER` first
copies the circuits of that model from a folder that `sparse_transformer.circuits` wrote.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from sparse_transformer.circuits.circuit import Circuit, Validation
from sparse_transformer.circuits.viz import summary, write_image

GALLERY = Path(__file__).parent / "gallery"
_INDEX = ("task", "nodes", "edges", "loss alone", "nonsense over task", "what holds")
_MOST_EDGES = 60
_VERDICTS = ("sufficient", "necessary", "robust")
_HOLDS = {True: "holds", False: "**does not hold**", None: "**open**"}


def copy(model: str, folder: Path) -> None:
    """Takes the circuits of a model, those left out of which nobody could read the picture."""
    for path in sorted(folder.glob("*/circuit.json")):
        if Circuit.from_json(path.read_text(encoding="utf-8")).edge_count <= _MOST_EDGES:
            (GALLERY / model).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, GALLERY / model / f"{path.parent.name}.json")


def circuits() -> dict[str, dict[str, Circuit]]:
    """The circuits of the gallery, by model and task."""
    found: dict[str, dict[str, Circuit]] = {}
    for path in sorted(GALLERY.glob("*/*.json")):
        tasks = found.setdefault(path.parent.name, {})
        tasks[path.stem] = Circuit.from_json(path.read_text(encoding="utf-8"))
    return found


def page(model: str, circuit: Circuit, story: str) -> str:
    """Markdown of a circuit's page."""
    shown, found = summary.summarize(circuit), validation(circuit)
    table = [("", *summary.COLUMNS), *((label, *values) for label, values in summary.rows(found))]
    asked = f"--checkpoint {model} --task {circuit.task} --out out"
    verdicts = "\n".join(
        f"- {_HOLDS[verdict.holds]}: {verdict.sentence}" for verdict in shown.verdicts
    )
    return f"""# {circuit.task}

{circuit.description} In the model `{model}`: {shown.size}.

{story.strip()}

[![The circuit of {circuit.task}]({circuit.task}.svg)]({circuit.task}.svg)

{verdicts}

{tabulate(table, headers="firstrow", tablefmt="github", disable_numparse=True)}

{shown.note}

Click the picture for its full size. The circuit is also there [as data]({circuit.task}.json)
and, on the site, as a [page to explore]({circuit.task}.html). To search
again, where a later version may find another circuit:

    python -m sparse_transformer.circuits {asked}
"""


def bridges(report: Mapping[str, Any], story: str) -> str:
    """Markdown of the bridge's page."""
    rows = []
    for task, result in report["tasks"].items():
        shares = [
            f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
            for share in result["flipped"].values()
        ]
        channels = ", ".join(f"{key} ({value:+.2f})" for key, value in result["channels"].items())
        rows.append(
            (task, f"{result['strength']:g} x [{channels}] before {result['site']}", *shares)
        )
        kinds = list(result["flipped"])
    table = tabulate(rows, ("task", "what is added", *kinds), "github", disable_numparse=True)
    return f"""# Bridges

{story.strip()}

Held-out answers that flip, of the dense model and, in the last column, of the sparse model:

{table}

The same [as data](bridges.json), with the accuracy of the bridge at each site.
"""


def index(found: Mapping[str, Mapping[str, Circuit]]) -> str:
    """Markdown of the first page."""
    parts = [
        "# Gallery",
        "Circuits of `python-small`, which comes with the package, and of `python-base`, in "
        "`models/` of the repository. Each was validated on held-out "
        "prompts and compared with controls, the same search on nonsense tasks. "
        "[Circuits](../circuits.md) has the method. Edits of `python-small` also steer a dense "
        "model: [bridges](bridges.md).",
    ]
    for model, tasks in found.items():
        rows = [_INDEX, *(_row(model, circuit) for circuit in tasks.values())]
        parts += [
            f"## {model}",
            tabulate(rows, headers="firstrow", tablefmt="github", disable_numparse=True),
        ]
    return "\n\n".join(parts) + "\n"


def _row(model: str, circuit: Circuit) -> tuple[str, ...]:
    found = validation(circuit)
    alone = found.circuit["mean"]
    ratio = "not reached" if found.ratio is None else f"{found.ratio:.1f}"
    holds = [name for name in _VERDICTS if getattr(found, name)]
    holds += ["controls"] * bool(found.passed)
    return (
        f"[{circuit.task}]({model}/{circuit.task}.md)",
        str(circuit.node_count),
        str(circuit.edge_count),
        f"{alone.loss:.3f} ({alone.low:.3f} to {alone.high:.3f})",
        ratio,
        ", ".join(holds) or "nothing",
    )


def validation(circuit: Circuit) -> Validation:
    if circuit.validation is None:
        raise SystemExit(f"{circuit.task} has no validation: find it again")
    return circuit.validation


def pages() -> Iterator[tuple[Path, str]]:
    """Every page and its text."""
    lines = (GALLERY / "stories.txt").read_text(encoding="utf-8").splitlines()
    stories = dict(line.split(": ", 1) for line in lines if line)
    found = circuits()
    untold = {f"{model}/{task}" for model, tasks in found.items() for task in tasks} - {*stories}
    if untold:
        raise SystemExit(f"stories.txt has no story of {', '.join(sorted(untold))}: write them")
    yield GALLERY / "index.md", index(found)
    report = json.loads((GALLERY / "bridges.json").read_text(encoding="utf-8"))
    yield GALLERY / "bridges.md", bridges(report, stories["bridges"])
    for model, tasks in found.items():
        for task, circuit in tasks.items():
            yield GALLERY / model / f"{task}.md", page(model, circuit, stories[f"{model}/{task}"])


def main(arguments: list[str]) -> None:
    for argument in arguments:
        model, _, folder = argument.partition("=")
        copy(model, Path(folder))
    for path, text in pages():
        path.write_text(text, encoding="utf-8")
    for model, tasks in circuits().items():
        for task, circuit in tasks.items():
            write_image(circuit, GALLERY / model / f"{task}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
