"""What a run takes from the bundle that it goes on from: words, to which it adds its own, weights, extractor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from model.bundle import VOCABULARY, BundleError
from model.deecap import DeeCap
from model.vocabulary import Vocabulary

PER_WORD = ("word_embedding.weight", "head_bias")  # what has a row for every word


def words_of(folder: Path) -> Vocabulary:
    """A bundle's vocabulary alone. Raises `BundleError`."""
    path = folder / VOCABULARY
    try:
        return Vocabulary(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(f"{path} is not a bundle's: {error!r}") from error


def with_new_words(known: Vocabulary, captions: Iterable[Sequence[str]], least_count: int) -> Vocabulary:
    """The known words at their numbers, then those of the captions that are new and seen `least_count` times."""
    there = set(known.words)
    return Vocabulary([*known.words, *(w for w in Vocabulary.build(captions, least_count).words if w not in there)])


@torch.no_grad()
def take_weights(model: DeeCap, start: DeeCap) -> None:
    """The start's weights into `model`, whose new words keep what they were drawn as, and are as rare as the rarest.

    Raises `ValueError` for a model of other sizes.
    """
    own, theirs = model.state_dict(), dict(start.state_dict())
    for name in PER_WORD:
        new = own[name][len(theirs[name]) :]
        if name == "head_bias":
            new = torch.full_like(new, float(theirs[name].min()))
        theirs[name] = torch.cat([theirs[name].to(new), new])
    different = [name for name, value in theirs.items() if name not in own or own[name].shape != value.shape]
    if different or set(theirs) != set(own):
        raise ValueError("[model] says other sizes than the bundle has that the run goes on from")
    model.load_state_dict(theirs)


def keep_extractor(theirs: Path, ours: Path) -> None:
    """Copies a bundle's extractor into the work folder.

    Raises `ValueError` where another is there already: since the run began, the bundle has become another.
    """
    if not ours.exists():
        shutil.copyfile(theirs, ours)
    elif ours.read_bytes() != theirs.read_bytes():
        raise ValueError(f"{theirs} is not what this run began with: choose another work folder")
