"""Every kind of good picture reaches the model whole, upright and in its right colours."""

from __future__ import annotations

import threading
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from model.bottom_up.preprocess import to_pixels, to_rgb
from service import images
from service.errors import Problem
from service.images import ImageLimits, check_header, check_header_aside, decode, sniff
from tests.service import pictures

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")

LIMITS = ImageLimits(max_pixels=100_000, min_side=8)
COLOURLESS = ("grey", "one bit", "16 bit", "float")


@pytest.mark.parametrize("name", pictures.good())
def test_every_good_picture_is_the_photo(name: str) -> None:
    image = decode(pictures.good()[name], LIMITS)
    assert image.size == pictures.SIZE
    rgb = np.asarray(to_rgb(image)).astype(int)
    left, right = rgb[8:24, 4:20].mean((0, 1)), rgb[8:24, 28:44].mean((0, 1))
    if any(word in name for word in COLOURLESS):
        assert np.ptp(left) < 2
        assert left.mean() > right.mean() + 10  # red is the brighter half, also of a 16-bit picture
        assert left.mean() < 250
    else:
        assert left[0] > left[2] + 50, left  # red is left
        assert right[2] > right[0] + 50, right  # blue is right
    if "alpha" in name:
        assert rgb[0].mean() > rgb[-1].mean() + 50  # transparent at the top: white shows through


def test_no_metadata_stays_that_later_code_would_parse() -> None:
    for name in ("jpeg rotated 6", "jpeg broken exif", "png rotated 8", "tiff rotated 6"):
        image = decode(pictures.good()[name], LIMITS)
        assert image.info == {}
        assert 0x0112 not in image.getexif(), name


def test_the_first_frame_of_an_animation() -> None:
    for name in ("gif animated", "png animated", "webp animated"):
        red, _, _ = decode(pictures.good()[name], LIMITS).convert("RGB").getpixel((4, 16))
        assert red > 150, name  # the second frame is all green


def test_a_large_jpeg_is_decoded_as_far_as_it_takes() -> None:
    limits = ImageLimits(max_pixels=4_000_000, min_side=8)
    with Image.open(Path(__file__).parents[2] / "samples" / "coffee.jpg") as photo:  # 600 x 400: fifteen of it, turned
        tile = photo.convert("RGB").rotate(90, expand=True)
    tiled = Image.new("RGB", (2000, 1600))
    for number in range(15):
        tiled.paste(tile, (number % 5 * 400, number // 5 * 600))
    upright = Image.Exif()
    upright[0x0112] = 6  # to be turned by a quarter
    saved = {}
    for kind, options in (("JPEG", {"exif": upright}), ("PNG", {})):
        buffer = BytesIO()
        tiled.save(buffer, kind, **options)
        saved[kind] = buffer.getvalue()
    whole, reduced = decode(saved["JPEG"], limits), decode(saved["JPEG"], limits, sufficient_side=448)
    assert whole.size == (1600, 2000)
    assert reduced.size == (800, 1000)  # a half of it; a third, which would do, is none of JPEG's
    difference = np.abs(to_pixels(whole).astype(int) - to_pixels(reduced).astype(int))
    assert difference.mean() < 0.5  # levels of 256
    assert np.percentile(difference, 99) < 4
    assert decode(saved["JPEG"], limits, sufficient_side=1700).size == (1600, 2000)
    assert decode(saved["PNG"], limits, sufficient_side=448).size == (2000, 1600)


def test_pillow_still_refuses_truncated_files() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("data", "inline"),
    [
        (pictures.jpeg(), True),
        (pictures.good()["jpeg progressive"], True),
        (pictures.good()["jpeg broken exif"], True),
        (pictures.jpeg() + bytes(70_000), False),  # large
        (b"\xff\xd8" + b"\xff\xe2\x00\x08abcdef" * 40 + pictures.jpeg()[2:], False),
        (b"\xff\xd8\xff\xe1\xff\x00" + bytes(0xFF00 - 2) + pictures.jpeg()[2:], False),  # one long table
        (b"\xff\xd8\xff", False),
        (pictures.encode(pictures.photo()), False),
        (b"no picture", False),
    ],
    ids=["plain", "progressive", "exif", "large", "many tables", "long table", "cut", "png", "none"],
)
async def test_only_what_is_soon_done_is_done_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, data: bytes, inline: bool
) -> None:
    """And what is found wrong is the same."""
    threads = []

    def check(data: bytes, limits: ImageLimits) -> None:
        threads.append(threading.current_thread())
        check_header(data, limits)

    monkeypatch.setattr(images, "check_header", check)
    try:
        check_header(data, LIMITS)
        expected = ""
    except Problem as problem:
        expected = problem.code
    found = ""
    try:
        await check_header_aside(data, LIMITS)
    except Problem as problem:
        found = problem.code
    assert found == expected
    assert [thread is threading.main_thread() for thread in threads] == [inline]


def test_formats_that_pillow_knows_and_we_do_not_want() -> None:
    for kind in ("PPM", "ICO", "TGA", "PDF", "EPS"):
        data = pictures.encode(pictures.photo(), kind)
        assert sniff(data) is None, kind
        with pytest.raises(Problem) as caught:
            decode(data, LIMITS)
        assert caught.value.code == "not_an_image"


def test_the_limits_hold_in_decode_too() -> None:
    for size, code in (((400, 251), "too_many_pixels"), ((400, 7), "image_too_small")):
        with pytest.raises(Problem) as caught:
            decode(pictures.encode(pictures.photo(size)), LIMITS)
        assert caught.value.code == code
