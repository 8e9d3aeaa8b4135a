"""Captioned photos as training reads them: a caption file in, padded batches of numbers out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    number: int | None = None  # MS COCO's id of the photo, by which its features and results are filed


def read_captions(path: Path) -> list[Photo]:
    """The photos of a caption file, words in lower case (paper section 4.1), in the file's order.

    Karpathy's `dataset_*.json`: `images[].{filename, split, sentences[].{tokens | raw}, cocoid}`; `restval` counts as
    train, a missing split too. Or MS COCO's own `captions_*.json` and `image_info_*.json`: `images[].{id, file_name}`
    and `annotations[].{image_id, caption}`; a photo's split is the one that its file name tells.

    Raises `ValueError` saying what is wrong with the file.
    """
    try:
        told = json.loads(path.read_text())
        images = told["images"]
        photos = coco_photos(told) if is_coco(told) else [_karpathy_photo(image) for image in images]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a Karpathy-style caption file, nor COCO's own: {error!r}") from error
    if not photos:
        raise ValueError(f"{path} has no images")
    return photos


def _karpathy_photo(image: dict[str, Any]) -> Photo:
    captions = tuple(
        tuple(token.lower() for token in sentence["tokens"])
        if "tokens" in sentence
        else tuple(tokenise(sentence["raw"]))
        for sentence in image["sentences"]
    )
    split = image.get("split", "train")
    return Photo(image["filename"], "train" if split == "restval" else split, captions, image.get("cocoid"))


def is_coco(told: dict[str, Any]) -> bool:
    """Whether a caption file's content is in MS COCO's own form, rather than Karpathy's."""
    return "annotations" in told or any("file_name" in image for image in told["images"][:1])


def coco_photos(told: dict[str, Any]) -> list[Photo]:
    """The photos of MS COCO's own caption file, or of its list of test photos, which has no captions."""
    captions: dict[int, list[tuple[str, ...]]] = {}
    for annotation in told.get("annotations", []):
        captions.setdefault(annotation["image_id"], []).append(tuple(tokenise(annotation["caption"])))
    return [
        Photo(image["file_name"], _split_of(image["file_name"]), tuple(captions.get(image["id"], ())), image["id"])
        for image in told["images"]
    ]


def _split_of(name: str) -> str:
    """`COCO_val2014_000000391895.jpg` -> val; train where the name does not say."""
    return next((split for split in ("val", "test") if split in name.lower()), "train")


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
