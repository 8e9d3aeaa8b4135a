"""Draws regions into the photo that they were found in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from model.bottom_up.preprocess import to_rgb

SMALLEST = 800  # pixels of the longer side: smaller photos are enlarged, so that labels find room
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000", "#808000", "#000075")
UNNAMED = "#888888"


@dataclass(frozen=True)
class Drawn:
    """One region as it is to be drawn."""

    box: Sequence[float]  # x0, y0, x1, y1 relative to the photo, 0 to 1
    name: str = ""  # nothing is written where there is none
    kind: int = 0  # regions of one kind have one colour


def draw_regions(image: Image.Image, regions: Sequence[Drawn]) -> Image.Image:
    """A copy of the photo in RGB, with the boxes; the first region's lies on top."""
    picture = to_rgb(image)
    scale = max(1.0, SMALLEST / max(picture.size))
    if scale > 1:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    else:
        picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) / 400))
    font = ImageFont.load_default(max(12, max(picture.size) / 55))
    for region in reversed(regions):
        x0, y0, x1, y1 = (
            value * side for value, side in zip(region.box, (picture.width - 1, picture.height - 1) * 2, strict=True)
        )
        colour = COLOURS[region.kind % len(COLOURS)] if region.name else UNNAMED
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=line if region.name else 1)
        if region.name:
            left, top, right, bottom = pen.textbbox((0, 0), region.name, font=font)
            width, height = right - left + 2 * line, bottom - top + 2 * line
            x, y = min(x0, picture.width - width), max(0.0, y0 - height)  # above the box where there is room
            pen.rectangle((x, y, x + width, y + height), fill=colour)
            pen.text((x + line - left, y + line - top), region.name, fill="white", font=font)
    return picture
