"""Captioned photos as training reads them: Karpathy-style JSON in, padded batches of numbers out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.vocabulary import BOS, EOS, PAD, Vocabulary, tokenise


@dataclass(frozen=True)
class Photo:
    """One photo and its human captions, tokenised."""

    name: str
    split: str
    captions: tuple[tuple[str, ...], ...]


def read_captions(path: Path) -> list[Photo]:
    """A Karpathy-style `dataset_*.json`: `images[].{filename, split, sentences[].{tokens | raw}}`.

    `restval` counts as train, a missing split too. Raises `ValueError` saying what is wrong with the file.
    """
    try:
        images = json.loads(path.read_text())["images"]
        photos = []
        for image in images:
            captions = tuple(
                tuple(sentence["tokens"] if "tokens" in sentence else tokenise(sentence["raw"]))
                for sentence in image["sentences"]
            )
            split = image.get("split", "train")
            photos.append(Photo(image["filename"], "train" if split == "restval" else split, captions))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a Karpathy-style caption file: {error!r}") from error
    if not photos:
        raise ValueError(f"{path} has no images")
    return photos


def pad_captions(captions: Sequence[Sequence[int]], max_words: int) -> tuple[Tensor, Tensor]:
    """Numbered captions -> inputs `BOS w1 .. wn` and targets `w1 .. wn EOS`, both `(G, longest + 1)`, padded.

    So the target of each position is the word after it. A caption cut at `max_words` has no EOS to learn: it did
    not end there.
    """
    longest = min(max(len(caption) for caption in captions), max_words)
    inputs = np.full((len(captions), longest + 1), PAD, dtype=np.int64)
    targets = np.full((len(captions), longest + 1), PAD, dtype=np.int64)
    for row, caption in enumerate(captions):
        kept = list(caption[:longest])
        inputs[row, : len(kept) + 1] = [BOS, *kept]
        targets[row, : len(kept)] = kept
        if len(caption) <= longest:
            targets[row, len(kept)] = EOS
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def epoch_batches(count: int, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Row numbers of each batch of one epoch, shuffled by seed and epoch alone, the odd rest left out."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def pick_captions(
    captions: Sequence[Sequence[str]], count: int, vocabulary: Vocabulary, mirrored: bool, random: np.random.Generator
) -> list[list[int]]:
    """`count` captions of one photo as numbers: each once before any twice, in random order."""
    order: list[int] = []
    while len(order) < count:
        order.extend(random.permutation(len(captions)).tolist())
    chosen = [captions[index] for index in order[:count]]
    numbered = [vocabulary.encode(caption) for caption in chosen]
    return [vocabulary.mirrored(caption) for caption in numbered] if mirrored else numbered
