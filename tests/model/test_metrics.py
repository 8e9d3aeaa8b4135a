"""Caption metrics, their intervals and the SpeedUp figures say what they claim, on cases worked out by hand."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.evaluation import metrics
from model.evaluation.intervals import mean_interval, paired_bootstrap, seeds_interval
from model.evaluation.metrics import caption_scores, per_image_cider, ptb_caption_scores, ptb_tokens
from model.evaluation.speedup import corpus_speedup, executed_speedup, exit_histogram

CANDIDATES = ["a dog runs", "two men on a red bike", "a girl in the snow"]
REFERENCES = [
    ["a dog runs fast", "the brown dog is running on grass"],
    ["two men ride a red bike", "two cyclists", "men on a bike"],
    ["a small girl plays in the snow", "the girl is in snow", "a child", "a girl outside"],
]


def words(sentences: list[str]) -> list[list[str]]:
    return [sentence.split() for sentence in sentences]


def test_bleu_and_rouge_are_those_worked_out_by_hand() -> None:
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    scores = caption_scores(words(["a dog runs"]), [words(["a dog runs fast"])], meteor=False)
    brevity = math.exp(1 - 4 / 3)  # three words where the reference has four; every n-gram of them is right
    for size in (1, 2, 3):
        assert scores[f"bleu_{size}"] == pytest.approx(100 * brevity, abs=1e-4)
    assert scores["bleu_4"] < 3.0, "three words have no 4-gram: only the package's smoothing is left"
    precision, recall, beta = 1.0, 0.75, 1.2
    assert scores["rouge_l"] == pytest.approx(
        100 * (1 + beta**2) * precision * recall / (recall + beta**2 * precision), abs=1e-9
    )


def test_scores_are_labelled_json_in_per_cent_and_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    scores = caption_scores(words(CANDIDATES), [words(image) for image in REFERENCES], meteor=False)
    assert capsys.readouterr().out == ""
    assert json.loads(json.dumps(scores)) == scores
    assert (scores["tokenizer"], scores["images"], scores["meteor"]) == ("given tokens", 3, "not run: not asked for")
    assert scores["bleu_1"] > 50
    assert scores["bleu_1"] > scores["bleu_2"] > scores["bleu_3"] > scores["bleu_4"]


def test_per_image_cider_averages_to_the_packages_figure() -> None:
    pytest.importorskip("pycocoevalcap.cider.cider")
    references = [words(image) for image in REFERENCES]
    each = per_image_cider(words(CANDIDATES), references)
    assert each.shape == (3,)
    assert each.mean() == pytest.approx(
        caption_scores(words(CANDIDATES), references, meteor=False)["cider_d"], abs=1e-6
    )
    swapped = per_image_cider(words(CANDIDATES)[::-1], references)
    assert swapped.mean() < each.mean() / 2, "captions belong to their images"


def test_an_empty_caption_scores_nothing_and_spoils_nothing() -> None:
    """A model may answer EOS at once."""
    pytest.importorskip("pycocoevalcap.bleu.bleu")
    references = [words(image) for image in REFERENCES]
    assert caption_scores([[], *words(CANDIDATES[1:])], references, meteor=False)["rouge_l"] > 30
    nothing = caption_scores([[], [], []], references, meteor=False)
    assert [nothing[key] for key in ("bleu_1", "bleu_4", "rouge_l", "cider_d")] == [0.0] * 4
    assert per_image_cider([[], [], []], references).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("candidates", "references", "reason"),
    [
        ([], [], "cannot be scored"),
        ([["a"]], [], "cannot be scored"),
        ([["a"]], [[]], "at least one reference"),
        (["a dog"], [[["a"]]], "list of words"),
        ([["a dog"]], [[["a"]]], "white space"),
        ([["a", ""]], [[["a"]]], "white space"),
        ([["a"]], [["a dog"]], "list of words"),
    ],
)
def test_captions_that_cannot_be_paired_are_refused(
    candidates: list[list[str]], references: list[list[list[str]]], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        caption_scores(candidates, references)
    with pytest.raises(ValueError, match=reason):
        per_image_cider(candidates, references)


def test_without_the_package_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[train\]'"):
        caption_scores([["a"]], [[["a"]]])


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def meteor_of_one() -> object:
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    return caption_scores([["a", "dog"]], [[["a", "dog"]]])["meteor"]


def test_no_java_is_a_reason_and_not_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert meteor_of_one() == "not run: there is no Java on the path"
    with pytest.raises(metrics.JavaError, match="no Java"):
        ptb_tokens(["a dog"])


@pytest.mark.parametrize("script", ["exec sleep 600", "sleep 600; true"])  # Java itself, or a script that calls it
def test_a_java_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    started: list[subprocess.Popen[str]] = []

    class Recorded(subprocess.Popen[str]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    fake_java(tmp_path, monkeypatch, script)
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(metrics, "METEOR_TIMEOUT_S", 0.5)
    monkeypatch.setattr(metrics, "PTB_TIMEOUT_S", 0.5)
    began = time.monotonic()
    assert meteor_of_one() == "not run: METEOR took longer than 0.5 s"
    with pytest.raises(metrics.JavaError, match="tokenizer took longer"):
        ptb_tokens(["a dog"])
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2, "killed and reaped"
    assert time.monotonic() - began < 300, "not by the end of its sleep"


@pytest.mark.parametrize(
    "script", ["exit 1", "read line; exit 0", "read line; echo nonsense; read line; echo nonsense; echo nonsense"]
)
def test_a_java_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    fake_java(tmp_path, monkeypatch, script)
    assert str(meteor_of_one()).startswith("not run: METEOR failed")


@pytest.mark.parametrize("script", ["exit 1", "cat > /dev/null; echo a dog"])
def test_a_tokenizer_that_fails_or_loses_a_line_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    fake_java(tmp_path, monkeypatch, script)
    with pytest.raises(metrics.JavaError):
        ptb_tokens(["a dog", "two dogs"])


needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="java is not installed")


@needs_java
def test_meteor_is_the_packages() -> None:
    """The same dialogue with the same jar, over 203 images: captions that are references, and ones that are not."""
    package = pytest.importorskip("pycocoevalcap.meteor.meteor")
    draw = random.Random(0)
    known = sorted(
        {word for image in REFERENCES for text in image for word in text.split()} | {"hound", "biking", "run"}
    )

    def sentence() -> str:
        return " ".join(draw.choices(known, k=draw.randint(1, 12)))

    references = [*REFERENCES, *([sentence() for _ in range(draw.randint(1, 5))] for _ in range(200))]
    candidates = [*CANDIDATES, *(draw.choice([draw.choice(image), sentence()]) for image in references[3:])]
    found = {image: [text] for image, text in enumerate(candidates)}
    expected, _ = package.Meteor().compute_score(dict(enumerate(references)), found)
    scores = caption_scores(words(candidates), [words(image) for image in references])
    assert scores["meteor"] == pytest.approx(100 * expected, abs=1e-9)
    assert 20 < scores["meteor"] < 80


@needs_java
def test_ptb_splits_sentences_as_cocos_evaluation_does() -> None:
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    assert ptb_tokens(["A man's dog, running!", "", "...", "Two\nlines  (here) at a café ."]) == [
        ["a", "man", "'s", "dog", "running"],
        [],
        [],
        ["two", "lines", "-lrb-", "here", "-rrb-", "at", "a", "café"],
    ]


@needs_java
def test_ptb_scores_are_labelled_and_keep_captions_with_their_images() -> None:
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    sentences = [text.capitalize() + "." for text in CANDIDATES]
    ptb = ptb_caption_scores(sentences, REFERENCES, meteor=False)
    given = caption_scores(words(CANDIDATES), [words(image) for image in REFERENCES], meteor=False)
    assert ptb == {**given, "tokenizer": "PTB"}


def test_the_interval_of_a_mean_is_the_normal_one_where_that_holds() -> None:
    values = np.random.default_rng(3).normal(50.0, 20.0, 2000)
    found = mean_interval(values, samples=2000)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    narrower = mean_interval(values, samples=2000, confidence=0.5)
    assert found.low < narrower.low < narrower.high < found.high


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        _, low, high = mean_interval(rng.exponential(1.0, 100), samples=200, seed=trial)
        held += low <= 1.0 <= high
    assert 175 <= held <= 198


def test_pairing_cancels_what_makes_an_image_easy_for_both() -> None:
    rng = np.random.default_rng(0)
    ease = rng.normal(50.0, 30.0, 500)
    a, b = ease + 2.0 + rng.normal(0, 1, 500), ease + rng.normal(0, 1, 500)
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(a.mean() - b.mean())
    assert 1.7 < low < difference < high < 2.3
    assert paired_bootstrap(b, a).estimate == pytest.approx(-difference)
    assert paired_bootstrap(ease, ease) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(a, b, seed=0) == (difference, low, high) != paired_bootstrap(a, b, seed=1)


def test_the_interval_over_seeds_is_students() -> None:
    assert seeds_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    random = np.random.default_rng(0)
    for count in (2, 3, 5, 30):  # 30 are beyond the table, and there the interval may only be too wide
        found = [seeds_interval(random.normal(5, 2, count).tolist()) for _ in range(4000)]
        covered = np.mean([low <= 5 <= high for _, low, high in found])
        assert 0.94 < covered < (0.98 if count > 10 else 0.96), count
    with pytest.raises(ValueError, match="at least two seeds"):
        seeds_interval([1.0])
    with pytest.raises(ValueError, match="finite"):
        seeds_interval([1.0, float("nan")])


def test_intervals_of_nothing_are_refused() -> None:
    for bad in ([], [math.nan], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="finite number per image"):
            mean_interval(np.asarray(bad))
    with pytest.raises(ValueError, match="same images"):
        paired_bootstrap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="confidence"):
        mean_interval([1.0], confidence=95.0)


def test_speedup_of_a_set_is_a_ratio_of_sums() -> None:
    captions = [[1, 1, 4], [2], []]
    assert exit_histogram(captions, 4) == [2, 1, 0, 1]
    assert corpus_speedup(captions, 4) == pytest.approx(4 * 4 / (1 + 1 + 4 + 2))
    assert corpus_speedup([[6, 6, 6]], 6) == 1.0
    assert corpus_speedup([[1] * 9], 6) == 6.0
    assert corpus_speedup([], 6) == 1.0


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.lists(st.integers(1, n)), min_size=1))))
def test_what_holds_of_any_speedup(drawn: tuple[int, list[list[int]]]) -> None:
    layers, captions = drawn
    found = corpus_speedup(captions, layers)
    assert 1.0 <= found <= layers
    assert corpus_speedup([[word for caption in captions for word in caption]], layers) == found, (
        "words count, wherever"
    )
    assert corpus_speedup(captions[::-1], layers) == found
    assert sum(exit_histogram(captions, layers)) == sum(map(len, captions))
    if any(captions):
        later = [[min(layers, word + 1) for word in caption] for caption in captions]
        assert corpus_speedup(later, layers) <= found, "who leaves later saves less"
        steps, rows = sum(map(len, captions)), sum(map(sum, captions))
        assert executed_speedup(steps, layers, rows) == pytest.approx(found), "without catch-up it is the paper's"
        assert executed_speedup(steps, layers, rows + 1) < found


def test_executed_speedup_counts_the_catch_up() -> None:
    exits = [1, 1, 3]  # the third word needs the first two at layers 2 and 3: four rows more
    assert executed_speedup(len(exits), 3, sum(exits) + 4) == pytest.approx(3 * 3 / 9)
    assert executed_speedup(len(exits), 3, sum(exits)) == corpus_speedup([exits], 3)
    assert executed_speedup(0, 3, 0) == 1.0


def test_counts_that_cannot_be_are_refused() -> None:
    for layer in (0, 5):
        with pytest.raises(ValueError, match="exit layer"):
            exit_histogram([[layer]], 4)
    for steps, layers, rows in ((3, 3, 2), (-1, 3, 0), (1, 0, 1)):
        with pytest.raises(ValueError, match="rows"):
            executed_speedup(steps, layers, rows)
