"""`docs/results.md`: every table and figure that there are rows for, and what there is no row for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from model.evaluation.result_rows import ResultRow, comparisons
from model.exits import SpeedTable
from model.experiments.ablations import ablations, seeds
from model.experiments.figures import figure2, figure3, figure5, reliability
from model.experiments.others import figure6, policies, speedups
from model.experiments.result import Result
from model.experiments.select import by_kind
from model.experiments.tables import table1, table3, table4, verdicts

FROM_ROWS: dict[str, Callable[[Sequence[ResultRow]], Result]] = {
    "table1": table1,
    "table3": table3,
    "table4": table4,
    "figure2": figure2,
    "figure3": figure3,
    "figure5": figure5,
    "figure6": figure6,
    "reliability": reliability,
    "policies": policies,
    "ablations": ablations,
    "seeds": seeds,
}
OF_ONE = ("policies", "reliability")  # what there is to show of rows that are all of one system
ROWS = Path(__file__).parent / "rows"
FOLDER = "results"  # of tables and plots, beside the page

_HEAD = """# Results

Made by `deecap experiment all` from the result rows in `model/experiments/rows` and the speed table of the shipped
bundle; not to be edited. A row is one trained system on one set of photos, measured by `deecap experiment measure`;
tables hold together only rows of one budget on the same photos. Intervals are 95% bootstrap intervals over photos,
differences paired; where several seeds are told of, each photo has their mean, and a second interval is over the seeds
(Student's t). A difference is said to be shown where each of these intervals excludes 0. The paper's own figures are on
MS COCO and compare with none of these.
"""

_HOW = """## How to make a row

<!-- not run: it takes hours and needs data -->

    deecap train --config flickr8k --until backbone --data DATA --work work    # once: what `systems` start from
    deecap train --config tf-ee --data DATA --work work
    deecap experiment measure --config tf-ee --data DATA --work work
    deecap experiment all

The configurations are in `model/training/configs/systems`. Those in `model/training/configs/ablations`
are `small` with one choice, or the seed, changed; these and the systems named `small-...` begin with no other run.
TF-6L of a six-layer decoder is TF-Complete.

How many seeds of `small` were run was not fixed beforehand: seeds 3 and 4 were added when no difference between DeeCap
and TF-EE was shown over seeds 0 to 2.
"""


def results(name: str, rows: Sequence[ResultRow]) -> dict[str, Result]:
    """One experiment for every comparison that there are rows for: its name -> the result."""
    return {comparison: FROM_ROWS[name](group) for comparison, group in comparisons(rows).items()}


def write_page(folder: Path, rows: Sequence[ResultRow], bundle: str, table: SpeedTable) -> Path:
    """Writes `results.md` into `folder`, and into `results/` all that it shows. Returns the page."""
    parts = [_HEAD]
    beside = folder / FOLDER
    three = speedups(table, bundle)
    three.write(beside, "speedups")
    parts += [f"## {three.title}", three.to_markdown(f"{FOLDER}/speedups.svg")]
    groups = comparisons(rows)
    if not groups:
        lacking = ", ".join(FROM_ROWS)
        parts.append(f"## From result rows\n\nThere is no result row yet, so there is nothing to show for: {lacking}.")
    for number, (comparison, group) in enumerate(groups.items(), start=1):
        parts.append(f"## {comparison}")
        told = verdicts(group)
        compared = len(by_kind(group)) > 1
        if told or compared:
            parts.append("\n".join(f"- {line}" for line in told) or "DeeCap and a baseline are not both there.")
        empty = []
        for name in FROM_ROWS if compared else OF_ONE:
            result = FROM_ROWS[name](group)
            if not result.table.rows:
                empty.append(f"{result.title} (no row of {'; '.join(result.missing) or 'any system'})")
                continue
            slug = f"{name}-{number}"
            result.write(beside, slug)
            parts.append(f"### {result.title}\n\n{result.to_markdown(f'{FOLDER}/{slug}.svg')}")
        if empty:
            parts.append("### Nothing to show\n\n" + "\n".join(f"- {line}" for line in empty))
        parts.append("### Where these come from\n\n" + "\n".join(_origin(row) for row in group))
    parts.append(_HOW)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "results.md"
    page.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    return page


def _origin(row: ResultRow) -> str:
    told = row.origin
    return (
        f"- `{row.system}-{row.key}`: `{told.get('command')}`; {told.get('machine')}; {told.get('search')}; "
        f"weights {told.get('weights')}; seed {row.configuration.get('seed', 'not told')}"
    )
