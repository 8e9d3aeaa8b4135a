"""Caption metrics for a set of images: BLEU, ROUGE-L, CIDEr-D and METEOR by pycocoevalcap, in per cent."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from model.evaluation.cider import corpus_cider_d

Tokens = Sequence[str]

GIVEN_TOKENS = "given tokens"
PTB = "PTB"
METEOR_TIMEOUT_S = 600.0  # a thousand images take about 11 s of one core; past this it hangs
PTB_TIMEOUT_S = 120.0


class JavaError(RuntimeError):
    """Java, which the PTB tokenizer and METEOR run on, is missing or failed. The machine's fault, not the caller's."""


def caption_scores(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], meteor: bool = True
) -> dict[str, Any]:
    """Scores of captions on the tokens as given; the usual figures of the literature up to the tokenizer.

    `candidates`: images x tokens; `references`: images x references x tokens. Tokens hold no white space.

    Returns, ready for JSON: `tokenizer` ("given tokens"), `images`, and times 100 `bleu_1` .. `bleu_4` (of the corpus,
    closest reference length), `rouge_l`, `cider_d` (document frequencies of these images), `meteor` (or, where Java
    cannot run it or it was not wanted, the text "not run: reason").

    Raises `ValueError` for captions that cannot be paired, `ModuleNotFoundError` without pycocoevalcap.
    """
    return _scores(candidates, references, GIVEN_TOKENS, meteor)


def ptb_caption_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]], meteor: bool = True
) -> dict[str, Any]:
    """`caption_scores` of sentences as COCO's evaluation splits them; `tokenizer` is "PTB".

    `candidates`: images; `references`: images x references; both plain sentences, split here, lower-cased and rid of
    punctuation. Never compare a figure of this function with one of `caption_scores`.

    Raises what `caption_scores` raises, and `JavaError`.
    """
    sentences = [*candidates, *(one for image in references for one in image)]
    tokens = iter(ptb_tokens(sentences))
    split_candidates = [next(tokens) for _ in candidates]
    split_references = [[next(tokens) for _ in image] for image in references]
    return _scores(split_candidates, split_references, PTB, meteor)


def per_image_cider(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """CIDEr-D x 100 of each image, float64 (images,), for `paired_bootstrap`; its mean is `cider_d` of the same tokens.

    Needs no pycocoevalcap. Arguments and `ValueError` as in `caption_scores`.
    """
    _check(candidates, references)
    return 100.0 * corpus_cider_d(candidates, references)


def ptb_tokens(sentences: Sequence[str]) -> list[list[str]]:
    """Tokens of each sentence by Stanford's PTB tokenizer, lower-cased, punctuation dropped as in COCO's evaluation.

    Brackets stay, as "-lrb-" and "-rrb-": COCO's list of what to drop has them in capitals, after lower-casing.
    Raises `JavaError` where Java is missing, fails or hangs.
    """
    package = _package("tokenizer.ptbtokenizer")
    jar = Path(package.__file__).with_name(package.STANFORD_CORENLP_3_4_1_JAR)
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    # One sentence a line in and out: white space inside a sentence becomes a blank, so that no line is split.
    lines = "".join(" ".join(sentence.split()) + "\n" for sentence in sentences)
    arguments = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", *options]
    with _java("the PTB tokenizer", arguments, PTB_TIMEOUT_S) as process:
        split = process.communicate(lines)[0].split("\n")[:-1]
        if len(split) != len(sentences):
            raise ValueError(f"{len(split)} lines for {len(sentences)} sentences")
    dropped = set(package.PUNCTUATIONS)
    return [[token for token in line.split() if token not in dropped] for line in split]


def _scores(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], tokenizer: str, meteor: bool
) -> dict[str, Any]:
    _check(candidates, references)
    found = {image: [" ".join(tokens)] for image, tokens in enumerate(candidates)}
    truth = {image: [" ".join(tokens) for tokens in one] for image, one in enumerate(references)}
    bleu, _ = _package("bleu.bleu").Bleu(4).compute_score(truth, found, verbose=0)
    rouge, _ = _package("rouge.rouge").Rouge().compute_score(truth, found)
    cider, _ = _package("cider.cider").Cider().compute_score(truth, found)
    return {
        "tokenizer": tokenizer,
        "images": len(candidates),
        **{f"bleu_{size}": 100.0 * float(value) for size, value in enumerate(bleu, start=1)},
        "rouge_l": 100.0 * float(rouge),
        "cider_d": 100.0 * float(cider),
        "meteor": _meteor_or_reason(candidates, references) if meteor else "not run: not asked for",
    }


def _meteor_or_reason(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float | str:
    try:
        return 100.0 * _meteor(candidates, references)
    except JavaError as error:
        return f"not run: {error}"


def _meteor(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """METEOR 1.5 (English, normalised) of the corpus, 0 to 1, spoken to as pycocoevalcap does. Raises `JavaError`.

    Not by its class: that one waits for Java without end, and after an error deadlocks in its own `__del__`.
    """
    package = _package("meteor.meteor")
    jar = Path(package.__file__).with_name(package.METEOR_JAR)
    if not jar.exists():
        raise JavaError(f"{jar.name} is not installed")
    arguments = ["-jar", "-Xmx2G", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    with _java("METEOR", arguments, METEOR_TIMEOUT_S) as process:
        return _meteor_dialogue(process, candidates, references)


def _meteor_dialogue(
    process: subprocess.Popen[str], candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> float:
    """One SCORE line and its counts per image, then one EVAL line with all counts; `ValueError` for no answer."""
    requests, replies = process.stdin, process.stdout
    assert requests is not None
    assert replies is not None

    def ask(line: str, answers: int) -> Iterator[str]:
        requests.write(line + "\n")
        requests.flush()
        for _ in range(answers):
            answer = replies.readline().strip()
            if not answer:
                raise ValueError("Java ended without an answer")
            yield answer

    counts: list[str] = []
    for candidate, image in zip(candidates, references, strict=True):
        texts = [" ".join(tokens).replace("|||", "") for tokens in (*image, candidate)]
        counts += ask(" ||| ".join(["SCORE", *texts]), answers=1)
    *_, corpus = ask(" ||| ".join(["EVAL", *counts]), answers=len(counts) + 1)
    return float(corpus)


def _check(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> None:
    """`ValueError` for what the scorers would answer with an assertion, or worse, with a figure."""
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{len(candidates)} captions cannot be scored against the references of {len(references)} images"
        )
    if not all(references):
        raise ValueError("each image needs at least one reference")
    for caption in (*candidates, *(one for image in references for one in image)):
        if isinstance(caption, str) or any(token.split() != [token] for token in caption):
            raise ValueError(f"a caption is a list of words without white space, not {caption!r}")


@contextmanager
def _java(what: str, arguments: Sequence[str], timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    """A Java process with pipes, killed when the block ends or after `timeout_s`, when reads of it come back empty.

    `JavaError` where there is no Java, and for any `OSError` or `ValueError` that the block raises.
    """
    executable = shutil.which("java")
    if executable is None:
        raise JavaError("there is no Java on the path")
    late = threading.Event()

    def kill() -> None:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)

    def stop() -> None:
        late.set()
        kill()

    try:
        with subprocess.Popen(
            [executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # nobody reads it, and a full pipe would stop Java
            encoding="utf-8",
            start_new_session=True,  # `java` may be a script: its child must die too, or the pipe stays open
        ) as process:
            alarm = threading.Timer(timeout_s, stop)
            alarm.daemon = True
            alarm.start()
            try:
                yield process
            finally:
                alarm.cancel()
                kill()
    except (OSError, ValueError) as error:
        reason = f"took longer than {timeout_s:g} s" if late.is_set() else f"failed ({error})"
        raise JavaError(f"{what} {reason}") from error


def _package(name: str) -> Any:
    """A module of pycocoevalcap, imported when needed: only training and evaluation have it."""
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("caption scores need pycocoevalcap: pip install '.[train]'") from error
