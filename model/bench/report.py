"""A measurement as text for a terminal: aligned tables, the milliseconds beside every ratio."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from model.bench.breakdown import PARTS

NOTE_WIDTH = 120  # characters


def to_text(result: dict[str, Any]) -> str:
    """The whole of what `model.bench.bench.bench` found."""
    parts = [_heading(result), _decoder(result), _end_to_end(result), _authors(result["authors"])]
    if "peers" in result:
        parts.append(_peers(result["peers"]))
    if "breakdown" in result:
        parts.append(_breakdown(result["breakdown"]))
    return "\n\n".join(parts)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _heading(result: dict[str, Any]) -> str:
    bundle, machine = result["bundle"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    tested = ", ".join(map(str, bundle["exit_policy"]["tested"])) or "none"
    lines = [
        result["command"],
        f"{bundle['name']} {bundle['revision']}: {bundle['layers']} decoder layers, tested after {tested}, "
        f"words that skipped layers {bundle['exit_policy']['skipped']} there",
        f"{machine['device']}, {result['precision']}; {machine['processor']}, {threads_of(machine)} on "
        f"{machine['cores']} cores, load {_number(machine['load_before'])} before; "
        f"python {machine['python']}, {versions}",
        f"{result['captions']} captions of {result['photos']} photos, greedy; all rows of a table take turns, "
        "and a caption's time is the median of its rounds",
    ]
    return "\n".join(map(_note, lines))


def _decoder(result: dict[str, Any]) -> str:
    rows = result["decoder"]["rows"]
    batches = list(rows[0]["captions_per_second"])
    table = [
        ["", "SpeedUp", "executed", "clock", "ms p50", "p95", "mean", "steps"]
        + [f"per s, {batch}" for batch in batches]
        + ["MB/word", "bound ms", "reached"]
    ]
    for row in rows:
        speed, spread = row["speedup"], row["ms"]
        cells = [row["name"] + ("*" if row["random_weights"] else "")]
        cells += [f"{speed[kind]:.2f}" for kind in ("paper", "executed", "clock")]
        cells += [f"{spread[kind]:.2f}" for kind in ("p50", "p95", "mean")] + [f"{row['steps']:.1f}"]
        cells += [f"{row['captions_per_second'][batch]:.0f}" for batch in batches]
        if "bound_ms" in row:
            cells += [f"{row['bytes_per_word'] / 1e6:.2f}", f"{row['bound_ms']:.2f}", f"{row['bound_reached']:.0%}"]
        else:
            cells += ["", "", ""]
        table.append(cells)
    bandwidth = result["bandwidth"]
    notes = [
        "Decoder alone, from an image's memory to the caption's last word; `per s` with so many captions at once",
        align(table),
        "clock: mean ms of the first row over the row's own. steps: words of a caption, its end included.",
        "bound: reading a caption's weights, keys and values once a step at the memory's bandwidth, measured here: "
        f"{bandwidth['memory_gb_s']:.1f} GB/s. A buffer the size of all weights, {bandwidth['weights_mb']:.1f} MB, "
        f"is read at {bandwidth['weights_gb_s']:.1f} GB/s: caches can beat the bound.",
    ]
    if any(row["random_weights"] for row in rows):
        notes.append(
            "* a decoder of so many layers alone, with random weights, on which its speed does not depend: every "
            f"caption has {result['decoder']['forced_steps']} steps, its figures are scaled to the first row's mean."
        )
    return "\n".join([*notes[:2], *map(_note, notes[2:])])


def _end_to_end(result: dict[str, Any]) -> str:
    before = [
        f"{name} {spread['p50']:.2f} (p95 {spread['p95']:.2f})" for name, spread in result["before_words"].items()
    ]
    looking = [
        f"{spread['p50']:.2f} (p95 {spread['p95']:.2f}) {'one by one' if size == '1' else f'{size} at once'}"
        for size, spread in result["regions"].items()
    ]
    rows = result["end_to_end"]
    table = [["", "ms p50", "p95", "mean", "times faster"]]
    for row in rows:
        cells = [f"{row['ms'][kind]:.2f}" for kind in ("p50", "p95", "mean")]
        table.append([row["name"], *cells, f"{rows[0]['ms']['mean'] / row['ms']['mean']:.2f}"])
    return "\n".join(
        [
            "End to end, from the bytes of a photo's file to text",
            align(table),
            f"Before the words, ms: {', '.join(before)}",
            f"From the file's bytes to regions, ms a photo: {', '.join(looking)}",
        ]
    )


def _authors(authors: dict[str, Any]) -> str:
    table = [["", "ms", "steps", "times faster"]]
    table += [
        [row["name"], f"{row['ms']:.2f}", f"{row['steps']:.1f}", f"{row['times_faster']:.2f}"]
        for row in authors["rows"]
    ]
    return "\n".join(
        [
            "The authors' way of decoding our network, beside ours: regions to words, at full depth but for the tier",
            align(table),
            _note(
                f"Mean of {authors['captions']} captions. Theirs: encoder and the whole prefix again for every word; "
                "tests, where there are any, after every layer."
            ),
        ]
    )


def _peers(peers: Sequence[dict[str, Any]]) -> str:
    ours = list(peers[0]["ours_ms"])
    table = [["", "M weights", "pixels", "float32 ms", "bfloat16 ms"]]
    table[0] += [text for name in ours for text in (f"{name} ms", "float32 / it", "bfloat16 / it")]
    for peer in peers:
        cells = [peer["name"], f"{peer['parameters_millions']:.0f}", str(peer["image"])]
        cells += [f"{peer['ms'][dtype]:.0f}" for dtype in ("float32", "bfloat16")]
        for name in ours:
            ratios = peer["times_ours"][name]
            cells += [f"{peer['ours_ms'][name]:.1f}", f"{ratios['float32']:.1f}", f"{ratios['bfloat16']:.1f}"]
        table.append(cells)
    return "\n".join(
        [
            "Peers, beside ours in turn with them",
            align(table),
            _note(
                f"Peers have random weights of the real sizes and give {peers[0]['words']} tokens, greedy and cached, "
                "from ready pixels: decoding and resizing the photo is left out for them, and in for ours. Speed alone "
                "is compared: they know far more of the world."
            ),
        ]
    )


def _breakdown(breakdown: dict[str, Any]) -> str:
    table = [["", *PARTS, "sum"]]
    for row in breakdown["tiers"]:
        values = [row["ms"][part] for part in PARTS]
        table.append([row["name"], *(f"{value:.2f}" for value in values), f"{sum(values):.2f}"])
    return "\n".join(
        [
            "Where the milliseconds of a caption go, one at a time",
            align(table),
            _note(
                "Early words left at the first tested layer, deep ones went on. layers: what the word takes in a "
                "decoder of as many layers as it used, untested. tests: what it took beyond that, for deep words with "
                "the catch-up they needed, keys and values of the regions among it. begin: what the first step takes "
                "beyond a later one, in a decoder of as many layers. fixed: a step on a network of next to no width."
            ),
        ]
    )


def _note(text: str) -> str:
    return textwrap.fill(text, NOTE_WIDTH)


def threads_of(machine: dict[str, Any]) -> str:
    return f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"
