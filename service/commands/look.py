"""`deecap look`: draws the regions that an extractor finds in a photo, with what it takes them for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.caption import shown
from service.commands.extract import load_extractor
from service.commands.loading import read_settings, require_onnx_runtime, stop
from service.commands.photo_files import UnreadableError, read_photo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.caption import Regions


def look(
    photo: Annotated[Path, typer.Argument(help="The photo.", dir_okay=False, show_default=False)],
    out: Annotated[Path, typer.Option(dir_okay=False, help="Picture to write, such as boxes.png.")],
    at_least: Annotated[
        float, typer.Option(min=0, max=1, help="Name regions only from this probability on; others are thin and grey.")
    ] = 0.3,
    names: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Object vocabulary, a name a line, where the extractor only has numbers."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the extractor: a model's, or what convert-vg wrote. Default: the region head that ships."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. Default: auto.")] = None,
) -> None:
    """Draw the regions of a photo.

    Those that are named are printed too, surest first: probability, name, and x0 y0 x1 y1 in pixels of the upright
    photo.
    """
    from PIL import Image

    from service.images import ImageLimits
    from service.settings import shipped_bundle

    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:  # many can only be read
        stop(f"--out must end like a picture, such as .png: {shown(out)}")
    if out.exists() and photo.exists() and out.samefile(photo):
        stop("--out is the photo itself")
    require_onnx_runtime()
    from model.bottom_up.picture import Drawn, draw_regions

    settings = read_settings(bundle=bundle or shipped_bundle().with_name("regions"), device=device)
    try:
        image = read_photo(photo, ImageLimits(settings.max_pixels, settings.min_side))
    except UnreadableError as error:
        stop(f"{shown(photo)}: {error}", code=1)
    extractor, _ = load_extractor(settings)
    vocabulary = _read_names(names) if names else extractor.classes
    try:
        (regions,) = extractor.look([image])
    except OSError as error:
        stop(f"{shown(photo)}: {error}", code=1)
    found = _name(regions, vocabulary, at_least)
    drawn = [Drawn(regions.boxes[index], f"{name} {score:.2f}", kind) for index, score, name, kind in found]
    named = {index for index, *_ in found}
    drawn += [Drawn(box) for index, box in enumerate(regions.boxes) if index not in named]
    try:
        draw_regions(image, drawn).save(out)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        stop(f"cannot write {shown(out)}: {reason or error}", code=1)
    for index, score, name, _ in found:
        x0, y0, x1, y1 = regions.boxes[index] * (image.size * 2)
        typer.echo(f"{score:.2f}\t{name}\t{x0:.0f} {y0:.0f} {x1:.0f} {y1:.0f}")
    typer.echo(f"{len(regions.boxes)} regions drawn into {shown(out)}, {len(found)} of them named", err=True)


def _name(regions: Regions, vocabulary: Sequence[str], at_least: float) -> list[tuple[int, float, str, int]]:
    """Row, probability, name and class of each region that is sure enough, surest first; none of a grid's cells."""
    import numpy as np

    from model.bottom_up.detections import Detections

    if not isinstance(regions, Detections):
        return []
    named = []
    for index in np.flatnonzero(regions.named & (regions.scores >= at_least)):
        kind = int(regions.classes[index])
        name = vocabulary[kind] if kind < len(vocabulary) else f"object {kind}"
        named.append((int(index), float(regions.scores[index]), name, kind))
    return sorted(named, key=lambda one: -one[1])


def _read_names(path: Path) -> list[str]:
    """One name a line; of synonyms, which the Visual Genome vocabulary separates by commas, the first."""
    try:
        return [line.split(",")[0].strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read {shown(path)}: {error.strerror if isinstance(error, OSError) else 'it is no text'}")
