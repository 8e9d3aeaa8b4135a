"""What a run takes from a bundle: its extractor to see with; to go on from it also its words and weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from model.bottom_up.extractor import Extractor, ExtractorError
from model.bottom_up.extractor_kinds import VISUAL_GENOME
from model.bundle import EXTRACTOR, Bundle, load_bundle
from model.config import DeeCapConfig
from model.deecap import DeeCap
from model.vocabulary import Vocabulary

SHIPPED = Path(__file__).parents[1] / "bundles"
KEPT = "bundle-extractor.onnx"  # the bundle's extractor in the work folder, beside one that a run may make itself
PER_WORD = ("word_embedding.weight", "head_bias")  # what has a row for every word
MAY_DIFFER = ("dropout", "no_repeats")  # of the network's numbers: those that no weight depends on


def read_start(told: str) -> Bundle:
    """The bundle in a folder, or one that ships, by its name.

    Raises `FileNotFoundError` where there is none, `ValueError` for one that cannot be trained on.
    """
    folder = next((folder for folder in (Path(told), SHIPPED / told) if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"there is no bundle {told}, neither a folder nor one that ships")
    bundle = load_bundle(folder)
    try:
        extractor = Extractor(folder / EXTRACTOR)
    except ExtractorError as error:
        raise ValueError(str(error)) from error
    if extractor.kind == VISUAL_GENOME:
        raise ValueError(f"{folder} has a detector: `deecap extract` makes region_features with it, to train on those")
    if extractor.feature_width != (width := bundle.model.config.feature_width):
        raise ValueError(f"{folder}: {extractor.feature_width} numbers for a region, where its network reads {width}")
    return bundle


def with_new_words(known: Vocabulary, captions: Iterable[Sequence[str]], least_count: int) -> Vocabulary:
    """The known words at their numbers, then those of the captions that are new and seen `least_count` times."""
    there = set(known.words)
    return Vocabulary([*known.words, *(w for w in Vocabulary.build(captions, least_count).words if w not in there)])


def network_like(start: DeeCapConfig, told: dict[str, Any], words: int) -> DeeCapConfig:
    """The start's network for so many words, with what the configuration's [model] says of `MAY_DIFFER`.

    Raises `ValueError` naming anything else that it says differently.
    """
    there = start.to_json()
    for name, value in told.items():
        if name not in MAY_DIFFER and there.get(name) != value:
            raise ValueError(f"[model] {name} is {value!r}, and that of the bundle {there.get(name)!r}: it stays so")
    return DeeCapConfig.from_json({**there, **told, "vocabulary_size": words})


@torch.no_grad()
def take_weights(model: DeeCap, start: DeeCap) -> None:
    """The start's weights into `model`, whose new words keep what they were drawn as, and are as rare as the rarest."""
    own, theirs = model.state_dict(), start.state_dict()
    for name in PER_WORD:
        new = own[name][len(theirs[name]) :]
        if name == "head_bias":
            new = torch.full_like(new, float(theirs[name].min()))
        theirs[name] = torch.cat([theirs[name].to(new), new])
    model.load_state_dict(theirs)


def keep_extractor(bundle: Bundle, work: Path) -> Path:
    """The bundle's extractor, copied into the work folder where that has none yet.

    Raises `ValueError` where it has another: since the run began, the bundle has become another.
    """
    theirs, ours = bundle.folder / EXTRACTOR, work / KEPT
    if not ours.exists():
        part = ours.with_suffix(".part")
        shutil.copyfile(theirs, part)
        part.replace(ours)
    elif ours.read_bytes() != theirs.read_bytes():
        raise ValueError(f"{theirs} is not what this run began with: choose another work folder")
    return ours
