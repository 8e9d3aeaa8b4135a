"""The captions that a model gives photos itself, for it to learn from, made once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.decoding.search import ranked_search
from model.deecap import DeeCap
from model.exits import ExitPolicy
from model.vocabulary import EOS

KEPT = 3  # captions of a photo: as many as the beam is wide
BATCH = 100  # photos whose captions are made, and written, at a time


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


def made_once(
    path: Path, names: Sequence[str], make: Callable[[int, int], list[list[list[int]]]], batch: int = BATCH
) -> dict[str, list[list[int]]]:
    """The captions of the photos `names`, by name, as numbers: those in the file `path`, or else made and kept there.

    `make(start, end)` gives those of `names[start:end]`. Each batch is written when it is made, so that after a stop
    no other is made again. Raises `ValueError` where what was made before the stop is of other photos.
    """
    if not path.exists():
        partial = path.with_suffix(".jsonl")
        done = _whole_lines(partial)
        for number, part in enumerate(done):
            if set(part) != set(names[number * batch : (number + 1) * batch]):
                raise ValueError(f"{partial} is of other photos: delete it, or choose another work folder")
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
