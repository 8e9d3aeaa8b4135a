"""What an experiment gives: a table as Markdown and JSON, a plot as PNG and SVG, and what rows it lacked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """`rows` x `columns`; None is an empty cell, for what was not run or not reached."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def to_markdown(self) -> str:
        lines = [
            list(self.columns),
            ["---"] * len(self.columns),
            *([_shown(cell) for cell in row] for row in self.rows),
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Result:
    """One table or figure of one comparison."""

    title: str
    table: Table
    data: dict[str, Any] = field(default_factory=dict)  # what a plot is drawn from
    draw: Callable[[Figure], None] | None = None
    notes: Sequence[str] = ()
    missing: Sequence[str] = ()  # systems without a row

    def to_markdown(self, picture: str = "") -> str:
        """The title is left to the page."""
        parts = [f"![{self.title}]({picture})"] if picture and self.draw and self.table.rows else []
        parts += [self.table.to_markdown()] if self.table.rows else []
        parts += self.notes
        if self.missing:
            parts.append(f"No row yet: {'; '.join(self.missing)}.")
        return "\n\n".join(parts)

    def write(self, folder: Path, name: str) -> list[Path]:
        """`name.md`, `name.json`, and where there is something to draw `name.png` and `name.svg`."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "title": self.title, "columns": self.table.columns, "rows": self.table.rows, "data": self.data,
            "notes": self.notes, "missing": self.missing,
        }  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        (folder / f"{name}.md").write_text(f"# {self.title}\n\n{self.to_markdown(f'{name}.svg')}\n")
        paths = [folder / f"{name}.json", folder / f"{name}.md"]
        if self.draw and self.table.rows:
            paths += _draw(self.draw, folder / name)
        return paths


def interval(estimate: float, low: float, high: float, signed: bool = False) -> str:
    """`54.3 [52.1, 56.4]`; a difference with its sign."""
    sign = "+" if signed else ""
    return f"{estimate:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def _draw(draw: Callable[[Figure], None], path: Path) -> list[Path]:
    """The same bytes for the same content: no dates, no ids drawn at random."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    png, svg = path.with_name(path.name + ".png"), path.with_name(path.name + ".svg")
    figure.savefig(png, dpi=120, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "deecap"}):
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]
