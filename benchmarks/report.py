"""What every benchmark shares: the machine, result files, tables, progress.

    python -m benchmarks.report FILE.json                    print the tables of a result file
    python -m benchmarks.report FILE.json --markdown         the same as Markdown
    python -m benchmarks.report FILE.json --plot FILE.png    draw it; with --markdown print it too

A row is a dict as in the JSON file. Files of every earlier version print: VIEWS says which module
knows the rows of which benchmark, and rows that nobody knows print as they are.

Packages for tables, progress and command lines are imported where they are used: `benchmarks.gpu`
runs without them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm

Row = Mapping[str, Any]
Style = Literal["terminal", "markdown"]

# The module that prints the rows of a benchmark. It has `text(rows, style) -> str`, all tables, and
# `lines(rows) -> str`, what a run prints of a case, and `closing(rows) -> list[str]`, what at its
# end. It may have `draw(rows, figure)`, which raises ValueError if there is nothing to draw.
VIEWS = {
    "matmul": "benchmarks.tables",
    "activation": "benchmarks.tables",
    "training": "benchmarks.experiments.scaling",  # older files have the parts of both
    "parts": "benchmarks.parts",
    "inference": "benchmarks.transformer.results",
    "scaling": "benchmarks.experiments.scaling",
    "quality": "benchmarks.experiments.quality",
    "circuits": "benchmarks.experiments.circuits",
    "frontier": "benchmarks.experiments.frontier_results",
    "explained": "benchmarks.experiments.explained",
    "algorithms": "benchmarks.experiments.algorithms",
}
INTERRUPTED = 130  # exit status after Ctrl-C


def refuse(program: str, sentence: str) -> NoReturn:
    """Ends the program with one sentence on stderr and exit status 2."""
    print(f"{program}: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    """What a command prints, stripped; None if it fails or is not there."""
    where = Path(__file__).parent
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=where)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """The commit that these files are from, with "-dirty" if files differ; None outside git."""
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    if gpu := machine.get("gpu"):
        where = (
            f"{gpu['name']} ({gpu['memory_gib']} GiB, driver {gpu['driver']}), CUDA {gpu['cuda']}, "
            f"Triton {gpu['triton']}"
        )
    else:
        where = (
            f"{machine['cpu'] or machine['architecture']}, {machine['threads']} of "
            f"{machine['cores']} cores, {machine['isa'] or 'no C++ extension'}"
        )
    return (
        f"{where}, torch {machine['torch']}, Python {machine['python']}, {machine['os']}, "
        f"commit {machine['commit']}"
    )


def busy(machine: Mapping[str, Any]) -> list[str]:
    """A sentence if other programs wanted the cores when the machine was described."""
    load, cores = machine.get("load_average"), machine["cores"]
    if load is None or load <= cores + 0.5 or machine.get("gpu"):
        return []
    return [
        f"The machine is busy (load {load:.1f} on {cores} cores): times are too long, those of "
        "several threads most. Run again when it is idle."
    ]


def why_not_writable(path: Path) -> str | None:
    """None if a file can be written at `path`, else a sentence. Asked before anything runs."""
    if path.is_dir():
        return f"{path} is a directory; name a file"
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist; create it first"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"{path} is not writable; choose another place"
    return None


def why_no_plot(path: Path) -> str | None:
    """None if a plot can be drawn into `path`, else a sentence."""
    if path.suffix.lower() != ".png":
        return f"the plot is a PNG, and {path.name} does not end in .png"
    if importlib.util.find_spec("matplotlib") is None:
        return "it needs matplotlib, which is not installed: pip install matplotlib"
    return why_not_writable(path)


def write_json(
    path: Path, machine: Mapping[str, Any], rows: Sequence[Row], *, complete: bool, **extra: object
) -> None:
    """Writes the result file, with `extra` beside the rows; a reader never sees half of one."""
    content = {"complete": complete, "machine": machine, **extra, "rows": rows}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        ValueError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or not {"machine", "rows"} <= content.keys():
        raise ValueError(f"{path} is not a result file: it needs machine and rows")
    return content


def table(lines: Sequence[Mapping[str, object]], style: Style = "terminal") -> str:
    """A table of the lines, by their headings. What is None or missing is `-`.

    A column that no line fills is left out; one of numbers is aligned to the right.
    """
    from tabulate import tabulate

    columns = {}
    for heading in dict.fromkeys(heading for line in lines for heading in line):
        values = (line.get(heading) for line in lines)
        cells = ["-" if value is None else str(value) for value in values]
        if set(cells) != {"-"}:
            columns[heading] = cells
    is_number = [all(cell[:1] in "0123456789-<" for cell in cells) for cells in columns.values()]
    return tabulate(
        columns,
        headers="keys",
        tablefmt="github" if style == "markdown" else "simple",
        colalign=["right" if right else "left" for right in is_number],
        disable_numparse=True,
    )


def number(value: float | None, digits: int = 4) -> str:
    """So many digits, all of those before the point, or `-` for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def ratio(value: float | None) -> str:
    """`2.34x`, `23.4x`, `234x`, or `-` for None."""
    return "-" if value is None else f"{number(value, 3).rstrip('.')}x"


def compare(times: float, what: str) -> str:
    """`1.3 times faster than what`, with two significant digits."""
    if 0.95 <= times < 1.05:
        return f"as fast as {what}"
    word = "faster" if times >= 1 else "slower"
    return f"{float(f'{max(times, 1 / times):.2g}'):g} times {word} than {what}"


def progress(items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A bar on stderr with the time left, over `items`, or to `update()`; `write` above it."""
    from tqdm import tqdm

    # Where stderr is a file, a line every ten seconds is enough.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, mininterval=interval, dynamic_ncols=True, smoothing=0.1, **options)


def view_of(command: str) -> Any:
    """The module that knows the rows of a benchmark's command or name, or None."""
    names = (word.split(".")[-1] for word in command.split())
    found = next((VIEWS[name] for name in names if name in VIEWS), None)
    return found and importlib.import_module(found)


def main(file: Path, /, markdown: bool = False, plot: Path | None = None) -> None:
    """Prints a result file, or draws it.

    Args:
        file: a file that a benchmark wrote with --json.
        markdown: print Markdown.
        plot: draw into this PNG instead; with --markdown, too.
    """
    program = "python -m benchmarks.report"
    try:
        content = read_json(file)
    except ValueError as error:
        refuse(program, str(error))
    machine, rows = content["machine"], content["rows"]
    try:
        view, where = view_of(machine["command"]), machine_line(machine)
        heading = f"{where}, {machine['date'][:10]}: {machine['command']}\n"
    except (KeyError, TypeError, AttributeError) as error:
        refuse(program, f"{file} does not say where it was measured (its machine lacks {error})")
    if plot is not None:
        if not hasattr(view, "draw"):
            refuse(program, f"results of `{machine['command']}` cannot be drawn")
        if reason := why_no_plot(plot):
            refuse(program, f"--plot: {reason}")
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        try:
            view.draw(rows, figure)
        except ValueError as error:
            refuse(program, str(error))
        figure.suptitle(where, fontsize=8)
        figure.savefig(plot, dpi=130, format="png")
        if not markdown:
            return
    style: Style = "markdown" if markdown else "terminal"
    print(heading)
    if view is None:
        for row in rows:
            row |= {n: f"{v:.5g}" for n, v in row.items() if isinstance(v, float)}
        print(table([{n: v for n, v in r.items() if len(str(v)) < 40} for r in rows], style))
    else:
        print(view.text(rows, style))


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main, prog="python -m benchmarks.report")
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the text has seen enough; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
