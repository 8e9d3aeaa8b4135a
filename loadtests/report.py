"""The report: steps.csv, load.png, and index.html with both and what was measured on what."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from loadtests.measure import DISPATCH_LIMIT, Step

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}img{max-width:100%}"""
COLOURS = {"full": "#4c566a", "balanced": "#2e86ab", "fast": "#e08e45", "turbo": "#a23b72"}


def write(folder: Path, steps: Sequence[Step], saturation: Mapping[str, float], about: Mapping[str, str]) -> None:
    """`saturation`: good answers per second at most, by speed. `about`: command, machine and so on, in words."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [one.as_row() for one in steps]
    with (folder / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    picture = plot(steps, saturation)
    (folder / "load.png").write_bytes(picture)
    (folder / "index.html").write_text(page(steps, saturation, about, picture))


def plot(steps: Sequence[Step], saturation: Mapping[str, float]) -> bytes:
    """Goodput, p99 and refusals against offered load, a line for each speed. PNG."""
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for speed in saturation:
        line = sorted((one for one in steps if one.speed == speed), key=lambda one: one.offered)
        offered = [one.offered for one in line]
        style = {"marker": "o", "label": speed, "color": COLOURS.get(speed)}
        axes[0].plot(offered, [one.goodput for one in line], **style)
        axes[1].plot(offered, [one.p99 for one in line], **style)
        axes[2].plot(offered, [100 * (one.refused + one.late) for one in line], **style)
        axes[0].axhline(saturation[speed], color=COLOURS.get(speed), linewidth=0.8, linestyle=":")
    most = max(one.offered for one in steps)
    axes[0].plot([0, most], [0, most], color="#bbb", linewidth=1, zorder=0)
    axes[0].set(title="Good answers per second (dotted: saturation)", ylabel="1/s")
    axes[1].set(title="p99 of good answers", ylabel="s", yscale="log")
    axes[2].set(title="Refused or late", ylabel="%")
    for axis in axes:
        axis.set_xlabel("offered, 1/s")
        axis.grid(alpha=0.3)
        axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    pyplot.close(figure)
    return buffer.getvalue()


def table(steps: Sequence[Step], saturation: Mapping[str, float]) -> list[list[str]]:
    """One row per speed, as in docs/capacity.md.

    Saturation, the times at about half and four fifths of it, and what is left of it at about twice as much.
    """
    shares = {"half": 0.5, "four fifths": 0.8}
    timed = [f"at {words}: offered, 1/s; p50, p95, p99, ms" for words in shares]
    rows = [["speed", "saturation, 1/s", *timed, "at twice: offered, 1/s; good answers, 1/s, share of saturation"]]
    for speed, most in saturation.items():
        row = [speed, f"{most:.1f}"]
        for share in shares.values():
            near = _nearest(steps, speed, share * most)
            times = ", ".join(f"{1000 * value:.0f}" for value in (near.p50, near.p95, near.p99))
            row.append(f"{near.offered:.1f}; {times}")
        twice = _nearest(steps, speed, 2 * most)
        much = twice.offered > 1.7 * most  # the burst that the steps go by may have been a little under saturation
        row.append(f"{twice.offered:.1f}; {twice.goodput:.1f}, {twice.goodput / most:.0%}" if much else "")
        rows.append(row)
    return rows


def _nearest(steps: Sequence[Step], speed: str, offered: float) -> Step:
    return min((one for one in steps if one.speed == speed), key=lambda one: abs(one.offered - offered))


def page(steps: Sequence[Step], saturation: Mapping[str, float], about: Mapping[str, str], picture: bytes) -> str:
    facts = "".join(f"<li>{html.escape(name)}: {html.escape(value)}" for name, value in about.items())
    shown = [list(steps[0].as_row()), *([str(value) for value in one.as_row().values()] for one in steps)]
    doubtful = [one for one in steps if not one.valid]
    warning = (
        f"<p><b>{len(doubtful)} steps are in doubt</b>: the sender was more than {DISPATCH_LIMIT} s late."
        if doubtful
        else ""
    )
    image = base64.b64encode(picture).decode()
    return (
        f"<!doctype html><meta charset=utf-8><title>DeeCap under load</title><style>{STYLE}</style>"
        f"<h1>DeeCap under load</h1><ul>{facts}</ul>{warning}{_table(table(steps, saturation))}"
        f'<p><img alt="Goodput, p99 and refusals against offered load" src="data:image/png;base64,{image}">'
        f"<h2>Every step</h2>{_table(shown)}"
        "<p>Open loop: requests come at their times. Times run from when a request was due to the end of its answer. "
        "Each photo is new to the service. Every answer was checked, not only its status.\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows[1:])
    return f"<table><tr>{head}{body}</table>"
