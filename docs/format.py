"""Draws docs/format.svg, the README's picture of the format: ``python -m docs.format``."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

import sparse_kernels as sk

CELL = 26
SLOT_COLOURS = ("#4477aa", "#ee9944", "#228866")  # told apart by the colour-blind as well
DARK_COLOURS = ("#4477aa", "#228866")
EMPTY, LINE, TEXT = "#f3f3f3", "#c4c4c4", "#222222"


class Drawing:
    """SVG elements, and the few shapes that the picture is made of."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def text(self, x: float, y: float, text: str, **style: str) -> None:
        attributes = "".join(
            f' {name.replace("_", "-")}="{value}"' for name, value in style.items()
        )
        self.elements.append(f'<text x="{x}" y="{y}"{attributes}>{text}</text>')

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
        self.elements.append(f'<rect {place} fill="{fill}" stroke="{LINE}"/>')

    def cell(
        self, x: float, y: float, label: str, fill: str = "none", height: float = CELL
    ) -> None:
        self.box(x, y, CELL, height, fill)
        style = {"fill": "#ffffff"} if fill in DARK_COLOURS else {}
        self.text(x + CELL / 2, y + height / 2 + 4.5, label, text_anchor="middle", **style)

    def title(self, x: float, y: float, name: str, shape: str) -> None:
        bold = f'<tspan font-weight="bold">{name}</tspan>'
        self.text(x, y, f'{bold} <tspan fill="#666666">{shape}</tspan>')

    def svg(self, width: int, height: int) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" fill="{TEXT}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13">'
        )
        paper = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
        return "\n".join([head, paper, *self.elements, "</svg>"]) + "\n"


def draw(layout: sk.FanInLayout) -> str:
    """The matrix, its index list and values, and the transposed list, coloured by slot."""
    drawing = Drawing()
    block_out, _ = layout.block
    rows, slots = layout.indices.shape
    columns = layout.in_features
    tall = block_out * CELL

    left, top = 96, 62
    drawing.title(left, 24, "W", f"(N, K) = ({layout.out_features}, {columns}), block (2, 1)")
    for column in range(columns):
        x = left + column * CELL + CELL / 2
        drawing.text(x, top - 8, str(column), text_anchor="middle", fill="#666666")
    for row in range(rows):
        y = top + row * tall
        outputs = f"outputs {row * block_out}, {row * block_out + 1}"
        drawing.text(left - 8, y + tall / 2 - 4, f"block-row {row}", text_anchor="end")
        drawing.text(left - 8, y + tall / 2 + 12, outputs, text_anchor="end", fill="#666666")
        kept = {column: slot for slot, column in enumerate(layout.indices[row].tolist())}
        for column in range(columns):
            for part in range(block_out):
                fill = SLOT_COLOURS[kept[column]] if column in kept else EMPTY
                drawing.box(left + column * CELL, y + part * CELL, CELL, CELL, fill)

    x = left + columns * CELL + 52
    drawing.title(x, 24, "indices", "int32")
    drawing.text(x, 42, f"(N/2, F) = ({rows}, {slots})", fill="#666666")
    for row in range(rows):
        for slot in range(slots):
            label = str(layout.indices[row, slot].item())
            drawing.cell(x + slot * CELL, top + row * tall, label, SLOT_COLOURS[slot], tall)

    x += slots * CELL + 52
    drawing.title(x, 24, "values", "float")
    drawing.text(x, 42, "(N/2, F, 2, 1)", fill="#666666")
    for row in range(rows):
        for slot in range(slots):
            for part in range(block_out):
                y = top + row * tall + part * CELL
                drawing.box(x + slot * (CELL + 8), y, CELL, CELL, SLOT_COLOURS[slot])

    y = top + rows * tall + 50
    drawing.title(
        left, y - 14, "transposed list", "block-rows that read each input (built once, cached)"
    )
    offsets = layout.transposed.offsets.tolist()
    for column in range(columns):
        x = left + column * CELL
        drawing.text(x + CELL / 2, y + 6, str(column), text_anchor="middle", fill="#666666")
        for place, entry in enumerate(range(offsets[column], offsets[column + 1])):
            source = str(int(layout.transposed.rows[entry]))
            colour = SLOT_COLOURS[int(layout.transposed.slots[entry])]
            drawing.cell(x, y + 14 + place * CELL, source, colour)

    deepest = max(end - start for start, end in itertools.pairwise(offsets))
    x = left + columns * CELL + 52
    for slot, colour in enumerate(SLOT_COLOURS):
        drawing.box(x, y + 14 + slot * 20, 13, 13, colour)
        drawing.text(x + 20, y + 25 + slot * 20, f"slot {slot}")
    return drawing.svg(650, int(y + 14 + deepest * CELL + 16))


def main() -> None:
    indices = torch.tensor([[0, 3, 7], [1, 3, 9], [2, 6, 7], [3, 5, 9]], dtype=torch.int32)
    layout = sk.FanInLayout(indices, in_features=10, block=(2, 1))
    Path(__file__).with_name("format.svg").write_text(draw(layout))


if __name__ == "__main__":
    main()
