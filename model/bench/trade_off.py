"""`python -m model.bench.trade_off`: what R costs and what it gives, of several bundles and numbers of regions."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.bench.clock import spread, take_turns
from model.bench.ours import Contender, decode_image, encode, tiers_of
from model.bench.photos import read_photos
from model.bottom_up.detections import Detections
from model.caption import Regions
from model.captioner import Captioner
from model.engine.precision import choose_precision
from model.evaluation.data import EvaluationSet, look_at_split
from model.evaluation.evaluate import describe_all
from model.evaluation.metrics import per_image_cider

TIERS = ("full", "turbo")


@dataclass(frozen=True)
class Choice:
    """A bundle that is given at most so many of the regions that its extractor finds; None: all of them."""

    name: str
    captioner: Captioner
    most: int | None

    def of(self, regions: Regions) -> Regions:
        """The surest ones, and all cells."""
        return regions if self.most is None or not isinstance(regions, Detections) else surest(regions, self.most)

    def tier(self, name: str) -> Contender:
        tiers = tiers_of(self.captioner, choose_precision("cpu", self.captioner.precision))
        return next(tier for tier in tiers if tier.name == name)


def surest(found: Detections, most: int) -> Detections:
    """The first `most` regions that name something, and all that name nothing, which are a region head's cells."""
    rows = np.flatnonzero(~found.named | (found.named.cumsum() <= most))
    return Detections(found.boxes[rows], found.features[rows], found.class_probabilities[rows])


def quality(choices: Sequence[Choice], captions: Path, photos: Path, limit: int | None) -> list[dict[str, Any]]:
    """CIDEr-D x 100 of each choice at each tier, greedy, and how many regions it had."""
    seen: dict[Captioner, EvaluationSet] = {}
    rows = []
    for choice in choices:
        if choice.captioner not in seen:
            seen[choice.captioner] = look_at_split(choice.captioner, captions, photos, "val", limit)
        found = seen[choice.captioner]
        given = dataclasses.replace(found, regions=tuple(map(choice.of, found.regions)))
        row: dict[str, Any] = {"name": choice.name, "regions": float(np.mean([len(r.boxes) for r in given.regions]))}
        for tier in TIERS:
            run = describe_all(choice.captioner, given, choice.captioner.speeds.tiers[tier])
            row[f"cider_{tier}"] = float(per_image_cider(run.words, given.references).mean())
        rows.append(row)
    return rows


@torch.inference_mode()
def times(choices: Sequence[Choice], photos: Sequence[bytes], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each choice for each part of a photo (`p50`, `p95`, `mean`); the choices take turns in each."""
    items = len(photos)
    seen = {one.name: [one.of(one.captioner.look(_image(one, data))) for data in photos] for one in choices}
    memories = {one.name: [encode(one.captioner, regions) for regions in seen[one.name]] for one in choices}
    parts: dict[str, dict[str, Any]] = {
        "photo to regions": {one.name: lambda i, c=one: c.captioner.look(_image(c, photos[i])) for one in choices},
        "encoder": {one.name: lambda i, c=one: encode(c.captioner, seen[c.name][i]) for one in choices},
    }
    for name in TIERS:
        tiers = {one.name: one.tier(name) for one in choices}
        parts[f"words, {name}"] = {
            one.name: lambda i, c=one, tier=tiers[one.name]: tier.caption(memories[c.name][i]) for one in choices
        }
        parts[f"end to end, {name}"] = {
            one.name: lambda i, c=one, tier=tiers[one.name]: tier.caption(
                encode(c.captioner, c.of(c.captioner.look(_image(c, photos[i]))))
            )
            for one in choices
        }
    found = {part: take_turns(rows, items, rounds, "cpu", part) for part, rows in parts.items()}
    return {one.name: {part: spread(taken[one.name]) for part, taken in found.items()} for one in choices}


def _image(choice: Choice, data: bytes) -> Any:
    return decode_image(data, choice.captioner.sufficient_side)


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m model.bench.trade_off", description=(__doc__ or "").split("\n")[0])
    words.add_argument("bundles", nargs="+", type=Path)
    words.add_argument("--captions", type=Path, required=True, help="as for deecap evaluate")
    words.add_argument("--photos", type=Path, required=True, help="of the captions")
    words.add_argument("--count", type=int, default=64, help="photos to time; default: %(default)s")
    words.add_argument("--most", nargs="*", type=int, default=[], help="also with no more regions than each of these")
    words.add_argument("--rounds", type=int, default=3, help="times each is timed, of which the median counts")
    words.add_argument("--limit", type=int, help="only so many photos of the split val")
    options = words.parse_args()
    if len({bundle.name for bundle in options.bundles}) < len(options.bundles):
        words.error("bundles are told apart by the names of their folders: each needs its own")
    timed, choices = read_photos(options.photos, options.count), []
    for bundle in options.bundles:
        captioner = Captioner.load(bundle, "cpu")
        named = captioner.look(decode_image(timed[0], 0))
        most = [None, *(options.most if isinstance(named, Detections) else [])]
        choices += [Choice(f"{bundle.name}{f', {k}' if k else ''}", captioner, k) for k in most]
    rows = quality(choices, options.captions, options.photos, options.limit)
    taken = times(choices, timed, options.rounds)
    for row in rows:
        print(json.dumps(row | {"ms": taken[row["name"]]}))


if __name__ == "__main__":
    main()
