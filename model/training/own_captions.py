"""The captions that a model gives photos itself, for it to learn from: its beam's, or what its samples agree on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.decoding.repeats import stutters
from model.decoding.search import ranked_search
from model.deecap import DeeCap
from model.evaluation.cider import CiderD
from model.exits import ExitPolicy
from model.training.sampling import sample_captions
from model.vocabulary import EOS

KEPT = 3  # captions of a photo: as many as the beam is wide
BATCH = 100  # photos whose captions are made, and written, at a time
TEMPERATURE = 0.4  # of samples: at 1 they are too far from what anyone says to agree on it


@torch.no_grad()
def beam_captions(model: DeeCap, memory: Tensor, mask: Tensor | None) -> list[list[list[int]]]:
    """What a beam of `KEPT` at full depth ends with for each image of `memory (B, R, d)`, best first, without EOS."""
    ranked, _ = ranked_search(model, memory, [0.0] * len(memory), ExitPolicy(()), KEPT, mask)
    captions = []
    for ended in ranked:
        # A caption that was cut says nothing about where captions end: only where none ended is it kept.
        whole = [steps for steps in ended if steps[-1].token == EOS] or ended
        captions.append([[step.token for step in steps if step.token != EOS] for steps in whole[:KEPT]])
    return captions


@torch.no_grad()
def agreed_captions(
    model: DeeCap, memory: Tensor, mask: Tensor | None, samples: int, scorer: CiderD, generator: torch.Generator
) -> list[list[list[int]]]:
    """Of `samples` drawn for each image of `memory (B, R, d)`, those that agree best with the rest, without EOS.

    Minimum Bayes risk decoding with CIDEr-D as the utility (Kumar and Byrne, "Minimum Bayes-Risk Decoding for
    Statistical Machine Translation", 2004): better captions than the beam's, at a cost that only training can bear.
    """
    drawn = sample_captions(model, memory, samples, mask, generator, TEMPERATURE)
    by_image = [drawn[start : start + samples] for start in range(0, len(drawn), samples)]
    ranked = [most_agreed(captions, scorer) for captions in by_image]
    if model.config.no_repeats:
        ranked = [[one for one in captions if not stutters(one)] or captions for captions in ranked]
    return [[[token for token in caption if token != EOS] for caption in captions[:KEPT]] for captions in ranked]


def most_agreed(captions: list[list[int]], scorer: CiderD) -> list[list[int]]:
    """The different ones among `captions`, by falling CIDEr-D with all of them as references.

    One that was drawn often is many references to itself. EOS is a word like others: those that were cut agree less.
    """
    prepared = scorer.prepare(captions)
    different = list(dict.fromkeys(tuple(caption) for caption in captions))
    scores = {caption: scorer.score(caption, prepared) for caption in different}
    return [list(caption) for caption in sorted(different, key=scores.__getitem__, reverse=True)]


def made_once(
    path: Path, names: Sequence[str], make: Callable[[int, int], list[list[list[int]]]], batch: int = BATCH
) -> dict[str, list[list[int]]]:
    """The captions of the photos `names`, by name, as numbers: those in the file `path`, or else made and kept there.

    `make(start, end)` gives those of `names[start:end]`. Each batch is written when it is made, so that after a stop
    no other is made again.
    """
    if not path.exists():
        partial = path.with_suffix(".jsonl")
        done = _whole_lines(partial)
        for start in tqdm(range(batch * len(done), len(names), batch), desc="own captions"):
            end = min(start + batch, len(names))
            done.append(dict(zip(names[start:end], make(start, end), strict=True)))
            with partial.open("a") as lines:
                lines.write(json.dumps(done[-1]) + "\n")
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps({name: captions for part in done for name, captions in part.items()}))
        whole.replace(path)
        partial.unlink(missing_ok=True)
    captions: dict[str, list[list[int]]] = json.loads(path.read_text())
    return captions


def _whole_lines(path: Path) -> list[Any]:
    """What the whole lines of a JSONL file say; one that a stop cut short is taken off the file's end."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
