"""Tables and figures hold what the rows say, at the SpeedUps that they name, and say what is missing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from model.evaluation.intervals import mean_interval, paired_bootstrap, seeds_interval
from model.evaluation.result_rows import Point, ResultRow
from model.exits import SpeedRow, SpeedTable
from model.experiments.ablations import ablations, one_choice, seeds
from model.experiments.differences import Difference
from model.experiments.figures import figure2, figure3, figure5, reliability
from model.experiments.others import figure6, policies, speedups
from model.experiments.page import FROM_ROWS, results, write_page
from model.experiments.select import by_kind, by_seed, cider_at, difference, kind, near
from model.experiments.tables import table1, table3, table4, verdicts

SPEEDS = SpeedTable(
    rows=(SpeedRow(0.0, 1.0, 1.0, 56.0, 12.0), SpeedRow(2.0, 3.0, 2.0, 54.0, 8.0)),
    tiers={"full": 0.0, "balanced": 1.0, "fast": 2.0, "turbo": 3.0},
    measured={"command": "deecap calibrate", "split": "made up"},
)


def point(tau: float, speedup: float, cider: list[float], exits: list[int] | None = None) -> Point:
    scores = {"bleu_1": 60.0, "bleu_4": 20.0, "meteor": "not run: no Java", "rouge_l": 40.0}
    depth = [round(4 / speedup, 2)] * len(cider)
    return Point(
        tau, speedup, 1.0 + (speedup - 1) / 2, scores, cider, depth, exits or [0, 0, 0, 9], 0.8, 0.9, ["a dog"]
    )


def made(row: ResultRow, *points: Point) -> ResultRow:
    return dataclasses.replace(row, points=list(points), data={**row.data, "photos": len(points[0].cider)})


def test_systems_have_the_papers_names(rows: list[ResultRow]) -> None:
    assert [kind(row, 4) for row in rows] == [
        "TF-Complete", "TF-2L", "TF-EE", "DeeCap, concatenation", "DeeCap, average", "DeeCap w/o deep information",
    ]  # fmt: skip


def test_of_several_rows_of_a_system_the_reference_policy_counts(rows: list[ResultRow]) -> None:
    early = next(row for row in rows if row.system == "tf-ee")
    other = dataclasses.replace(early, system="a", policy={**early.policy, "tested": [1]})
    assert by_kind([other, early])["TF-EE"] is early
    assert by_kind([other])["TF-EE"] is other


def test_quality_between_measured_points_is_on_a_straight_line(rows: list[ResultRow]) -> None:
    row = made(rows[2], point(0.0, 1.0, [10.0, 20.0]), point(1.0, 3.0, [30.0, 0.0]), point(2.0, 4.0, [0.0, 0.0]))
    found = cider_at(row, 1.5)
    assert found is not None
    np.testing.assert_allclose(found, [15.0, 15.0])
    assert cider_at(row, 4.5) is None
    assert near(row, 3.05) is row.points[1]
    assert near(row, 2.0) is None


def test_systems_are_compared_at_the_same_speedup_photo_by_photo(rows: list[ResultRow]) -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.normal(50, 20, (2, 40)).round(1).tolist()
    early = made(rows[2], point(0.0, 1.0, ours), point(1.0, 4.0, ours))
    two = made(rows[1], point(0.0, 1.0, theirs))  # two layers of four: a SpeedUp of 2
    gap = difference([(early, two)], 2.0, 4)
    assert gap is not None
    assert gap.photos == pytest.approx(paired_bootstrap(ours, theirs))
    assert gap.seeds is None
    assert gap.told().endswith("], one seed")
    assert difference([(early, two)], 3.0, 4) is None


def test_a_baseline_that_wins_is_said_to_win(rows: list[ResultRow]) -> None:
    low, high = [10.0 + n % 3 for n in range(30)], [50.0 + n % 5 for n in range(30)]
    full, fast = point(0.0, 1.0, low), point(1.0, 4.0, low)
    ours = made(rows[3], full, fast)
    better = made(rows[2], point(0.0, 1.0, high), point(1.0, 4.0, high))
    told = compared([ours, better])
    assert len(told) == 3
    assert all("TF-EE wins" in line for line in told)
    assert all("no difference shown" in line for line in compared([ours, made(rows[2], full, fast)]))
    assert all("DeeCap wins" in line for line in compared([made(rows[3], *better.points), made(rows[2], full, fast)]))
    assert verdicts([better]) == []


def compared(rows: list[ResultRow]) -> list[str]:
    return [line for line in verdicts(rows) if line.startswith("At a SpeedUp")]


def test_who_learned_longer_is_said(rows: list[ResultRow]) -> None:
    points = [point(0.0, 1.0, [10.0, 20.0]), point(1.0, 4.0, [10.0, 20.0])]
    ours, theirs = made(rows[3], *points), made(rows[2], *points)
    assert not any("learned" in line for line in compared([ours, theirs]))
    stages = [{**theirs.configuration["stages"][0], "epochs": 9}]
    longer = dataclasses.replace(theirs, configuration={**theirs.configuration, "stages": stages})
    assert all("TF-EE learned for 9 epochs" in line for line in compared([ours, longer]))


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [(9.0, "more than twice"), (3.0, "less than twice"), (4.0, "neither more nor less than twice shown")],
)
def test_what_is_lost_is_compared_with_twice_what_deecap_loses(
    rows: list[ResultRow], theirs: float, verdict: str
) -> None:
    full = [50.0 + n % 7 for n in range(40)]

    def loses(row: ResultRow, most: float) -> ResultRow:
        return made(row, point(0.0, 1.0, full), point(1.0, 4.0, [x - most - (n % 3 - 1) for n, x in enumerate(full)]))

    (line,) = [
        line for line in verdicts([loses(rows[3], 2.0), loses(rows[2], theirs)]) if "Going to a SpeedUp of 4" in line
    ]
    assert f"DeeCap loses 2.0 of its CIDEr-D at full depth and TF-EE {theirs:.1f}" in line
    assert verdict in line


def test_a_difference_is_shown_where_photos_and_seeds_both_show_it() -> None:
    photos = np.random.default_rng(0).normal(0, 1, 400)
    alike, apart = [photos + seed for seed in (2.0, 2.1, 1.9)], [photos + seed for seed in (0.1, 5.0, 1.0)]
    assert Difference.of(alike).verdict("above", "below") == "above"
    assert Difference.of([-one for one in alike]).verdict("above", "below") == "below"
    both = Difference.of(apart)
    assert both.photos.low > 0  # over photos alone it would be shown
    assert both.verdict("above", "below") == "no difference shown"
    one = Difference.of(apart[1:2])
    assert one.verdict("above", "below") == "above on these photos, whatever other seeds would do"


def test_systems_of_several_seeds_are_compared_by_the_seeds_that_both_have(rows: list[ResultRow]) -> None:
    random = np.random.default_rng(0)

    def run(row: ResultRow, seed: int, drop: float) -> ResultRow:
        full = random.normal(50, 20, 40).round(1)
        found = made(row, point(0.0, 1.0, full.tolist()), point(1.0, 4.0, (full - drop).round(1).tolist()))
        return dataclasses.replace(told(found, seed=seed), system=f"{row.system}-{seed}")

    ours = [run(rows[3], seed, 2.0) for seed in (0, 1, 2)]
    theirs = [run(rows[2], seed, drop) for seed, drop in ((0, 4.0), (1, 9.0), (7, 50.0))]
    changed = told(run(rows[3], 1, 30.0), seed=1, lambda_=0.2)  # not a seed of ours
    pairs = by_seed([*theirs, changed, *ours], ours[0], theirs[0])
    assert pairs == [(ours[0], theirs[0]), (ours[1], theirs[1])]
    assert by_seed([ours[2], theirs[2]], ours[2], theirs[2]) == [(ours[2], theirs[2])]

    each = [np.array(one.points[1].cider) - other.points[1].cider for one, other in pairs]
    gap = difference(pairs, 4.0, 4)
    assert gap is not None
    assert gap.photos == pytest.approx(mean_interval((each[0] + each[1]) / 2))
    assert gap.seeds == pytest.approx(seeds_interval([each[0].mean(), each[1].mean()]))
    assert difference([*pairs, (ours[2], made(theirs[0], theirs[0].points[0]))], 4.0, 4) is None

    lines = verdicts([*ours, changed, *theirs])
    (line,) = [line for line in lines if line.startswith("At a SpeedUp of 4")]
    assert "over 2 seeds [" in line
    assert f"] ({each[0].mean():+.1f}, {each[1].mean():+.1f})" in line
    (line,) = [line for line in lines if "Going to a SpeedUp of 4" in line]
    assert "DeeCap loses 2.0" in line
    assert "TF-EE 6.5" in line
    assert "+2.5 [+2.5, +2.5], over 2 seeds [-29.3, +34.3] (+0.0, +5.0); neither more nor less than twice shown" in line


def test_table_1_shows_each_system_at_full_depth_and_at_4(rows: list[ResultRow]) -> None:
    cider = [10.0, 20.0, 60.0]
    complete, two = made(rows[0], point(0.0, 1.0, cider)), made(rows[1], point(0.0, 1.0, cider))
    early = made(rows[2], point(0.0, 1.0, cider), point(1.0, 4.1, [5.0, 15.0, 55.0]))
    found = table1([complete, two, early])
    lines = {line[0]: line for line in found.table.rows}
    assert list(lines) == ["TF-Complete", "TF-2L", "TF-EE, full depth", "TF-EE"]
    assert lines["TF-2L"][-3] == 2.0
    assert lines["TF-EE"][-3] == 4.1
    assert lines["TF-EE"][1:5] == [60.0, 20.0, None, 40.0]  # METEOR was not run: empty, not replaced
    assert str(lines["TF-EE"][7]) == "-5.0 [-5.0, -5.0]"
    assert lines["TF-Complete"][7] is None
    assert found.missing == ["DeeCap, concatenation"]
    slow = made(rows[2], point(0.0, 1.0, cider), point(1.0, 3.0, cider))
    assert any("TF-EE has no measured point" in note for note in table1([slow]).notes)


def test_tables_3_and_4_say_what_they_lack(rows: list[ResultRow]) -> None:
    cider = [10.0, 20.0, 60.0]
    points = [point(0.0, 1.0, cider), point(0.5, 2.0, cider), point(1.0, 4.0, cider)]
    deep, average, shallow = (made(row, *points) for row in rows[3:])
    found = table3([deep, shallow])
    assert [line[0] for line in found.table.rows] == [
        "DeeCap, concatenation (x2)", "DeeCap w/o deep information (x2)",
        "DeeCap, concatenation (x4)", "DeeCap w/o deep information (x4)",
    ]  # fmt: skip
    assert found.table.rows[0][1:4] == [90.0, 80.0, 20.0]
    assert sum("no difference shown" in note for note in found.notes) == 2
    assert table3([deep]).missing == ["DeeCap w/o deep information"]
    assert [line[0] for line in table4([deep, average]).table.rows] == ["DeeCap, average", "DeeCap, concatenation"]
    assert table4([deep, average]).missing == ["DeeCap, attention", "DeeCap, sequential"]


def test_figure_2_bins_captions_by_their_mean_exit_layer(rows: list[ResultRow]) -> None:
    cider = [float(n) for n in range(20)]
    full = dataclasses.replace(point(0.0, 1.0, cider), depth=[4.0] * 20)  # the ends are nobody's choice
    all_first = dataclasses.replace(point(100.0, 4.0, cider), depth=[1.0] * 20)
    first = dataclasses.replace(point(0.1, 1.01, cider), depth=[4.0] * 20)
    second = dataclasses.replace(point(1.0, 2.0, cider), depth=[1.2] * 10 + [2.6] * 9 + [4.0])
    found = figure2(
        [made(rows[0], point(0.0, 1.0, [n + 1 for n in cider])), made(rows[2], full, first, second, all_first)]
    )
    early = found.data["early"]
    assert [one["layers"] for one in early] == [1, 4]  # nine captions in bin 3 are too few
    assert early[0]["cider"] == pytest.approx(np.mean(cider[:10]))
    assert early[0]["complete_same_photos"] == pytest.approx(np.mean(cider[:10]) + 1)
    assert found.missing == ["TF-1L", "TF-2L", "TF-3L"]


def test_figure_3_has_a_cell_for_every_exit(rows: list[ResultRow]) -> None:
    found = figure3(rows)
    by_name = found.data["AUROC"]
    assert by_name["TF-kL"][1] == pytest.approx(100 * (rows[1].exits[0].auroc or 0))
    assert by_name["TF-kL"][2:] == [None, None]
    assert by_name["TF-Complete"][:3] == [None, None, None]
    assert by_name["TF-EE"] == pytest.approx([100 * (one.auroc or 0) for one in rows[2].exits])


def test_figure_5_has_the_curve_and_its_loss(rows: list[ResultRow]) -> None:
    row = made(rows[2], point(0.0, 1.0, [10.0, 20.0]), point(1.0, 4.0, [8.0, 16.0]))
    (curve,) = figure5([row]).data["curves"].values()
    assert [(one["speedup"], one["cider"], one["loss"]) for one in curve] == [(1.0, 15.0, 0.0), (4.0, 12.0, -3.0)]
    assert curve[1]["loss_low"] == -4.0
    assert curve[1]["loss_high"] == -2.0


def test_two_policies_of_one_training_stand_side_by_side(rows: list[ResultRow]) -> None:
    early = made(rows[2], point(0.0, 1.0, [10.0, 20.0]), point(1.0, 4.0, [9.0, 18.0]))
    copied = made(early, point(0.0, 1.0, [10.0, 20.0]), point(1.0, 4.0, [6.0, 16.0]))
    copied = dataclasses.replace(copied, policy={**early.policy, "skipped": "copied"})
    retrained = dataclasses.replace(early, origin={"weights": "other"})
    table = policies([copied, early]).table
    assert [line[2] for line in table.rows] == ["computed", "copied"], "the reference first"
    of_depth, of_reference = (
        table.columns.index(f"less {what}") for what in ("its full depth's", "the reference policy's")
    )
    assert [line[of_depth] for line in table.rows] == ["-1.5 [-2.0, -1.0]", "-4.0 [-4.0, -4.0]"]
    assert [line[of_reference] for line in table.rows] == [None, "-2.5 [-3.0, -2.0]"]
    assert policies([early, retrained]).table.rows == []
    assert policies([early, retrained]).missing


def told(row: ResultRow, seed: int = 0, **stage: object) -> ResultRow:
    stages = [{**row.configuration["stages"][0], **stage}]
    return dataclasses.replace(row, configuration={**row.configuration, "seed": seed, "stages": stages})


def test_a_change_is_named_and_compared_with_what_it_changes(rows: list[ResultRow]) -> None:
    base = made(rows[3], point(0.0, 1.0, [10.0, 20.0]), point(1.0, 4.0, [8.0, 16.0]))
    base = dataclasses.replace(base, system="small")
    better = made(base, point(0.0, 1.0, [13.0, 23.0]), point(1.0, 3.0, [8.0, 18.0]))
    changed = dataclasses.replace(told(better, lambda_=0.2), system=f"{base.system}-lambda-0.2")
    other_seed = dataclasses.replace(told(better, seed=1), system=f"{base.system}-seed-1")
    both = dataclasses.replace(told(better, seed=1, lambda_=0.2), system=f"{base.system}-both")
    (line,) = ablations([changed, both, other_seed, base, rows[2]]).table.rows
    assert line[0] == "stages.exits.lambda 0.2 (0.5)"
    assert line[2] == "+3.0 [+3.0, +3.0]"
    assert line[4] is None  # it does not reach a SpeedUp of 4
    assert ablations([base, other_seed]).missing
    other_policy = dataclasses.replace(changed, policy={**base.policy, "skipped": "copied"})
    other_kind = dataclasses.replace(
        base, model={**base.model, "exits": "plain"}, configuration={**base.configuration, "exits": "plain"}
    )
    assert ablations([base, other_kind]).missing
    assert ablations([base, other_policy]).missing
    assert ablations([changed, *rows[:3]]).table.rows == []


def test_one_choice_may_be_made_in_several_stages() -> None:
    both = {f"stages.{stage}.label_smoothing": (0.1, 0.0) for stage in ("backbone", "exits")}
    assert one_choice(both) == ("stages.label_smoothing", 0.1, 0.0)
    assert one_choice({**both, "stages.exits.label_smoothing": (0.2, 0.0)}) is None
    assert one_choice({**both, "label_smoothing": (0.1, 0.0)}) is None
    assert one_choice({"model.width": (8, 4)}) == ("model.width", 8, 4)
    assert one_choice({}) is None


def test_seeds_are_counted_where_nothing_else_differs(rows: list[ResultRow]) -> None:
    first = made(rows[3], point(0.0, 1.0, [10.0, 20.0]), point(1.0, 4.0, [8.0, 16.0]))
    second = told(made(first, point(0.0, 1.0, [12.0, 22.0]), point(1.0, 4.0, [8.0, 16.0])), seed=1)
    lines = seeds([first, second, told(second, seed=2, distillation=1.0)]).table.rows
    assert [line[1:4] for line in lines] == [["x1", 2, 16.0], ["x2", 2, pytest.approx(44 / 3)], ["x4", 2, 12.0]]
    assert lines[0][4] == pytest.approx(2**0.5)
    two = made(rows[1], point(0.0, 1.0, [10.0, 20.0]))  # two layers of four
    assert [line[:3] for line in seeds([first, two, told(two, seed=1)]).table.rows] == [["TF-2L", "x2", 2]]
    assert seeds([first]).missing


def test_the_three_speedups_come_from_the_bundles_table() -> None:
    found = speedups(SPEEDS, "made-up")
    assert list(found.table.rows[1]) == ["fast", 2.0, 3.0, 2.0, 1.5, 8.0, 54.0]
    assert "command: deecap calibrate" in found.notes[0]


def test_captions_side_by_side_are_of_the_same_photos(rows: list[ResultRow]) -> None:
    found = figure6(rows)
    assert [line[0] for line in found.table.rows] == [f"{number}.jpg" for number in range(8)]
    assert found.table.rows[3][1] == rows[0].points[0].captions[3]


@pytest.mark.parametrize("name", FROM_ROWS)
def test_every_experiment_writes_what_it_shows(rows: list[ResultRow], tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    ((_, result),) = results(name, rows).items()
    paths = result.write(tmp_path, name)
    told = json.loads((tmp_path / f"{name}.json").read_text())
    assert told["title"] == result.title
    assert len(told["rows"]) == len(result.table.rows)
    if result.draw:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()[:600]
        before = [path.read_bytes() for path in paths]
        result.write(tmp_path, name)
        assert [path.read_bytes() for path in paths] == before


def test_the_page_shows_all_or_says_that_there_is_nothing(rows: list[ResultRow], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = write_page(tmp_path / "none", [], "made-up", SPEEDS).read_text()
    assert "There is no result row yet" in page
    assert "The three SpeedUps" in page
    page = write_page(tmp_path / "all", rows, "made-up", SPEEDS).read_text()
    for name, make in FROM_ROWS.items():
        assert make(rows).title in page, name
    shown = [line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert len(shown) == 5
    assert all((tmp_path / "all" / path).exists() for path in shown)
    assert all(row.key in page for row in rows)


def test_reliability_covers_every_exit(rows: list[ResultRow]) -> None:
    assert len(reliability(rows).table.rows) == sum(len(row.exits) for row in rows)
