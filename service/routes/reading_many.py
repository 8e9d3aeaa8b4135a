"""From a form's body to the photos in it and the options for all of them."""

from __future__ import annotations

from fastapi import Request

from service.errors import Problem, printable
from service.routes.reading import FormLimits, parse_form, refuse_encoded
from service.schemas import CaptionOptions, read_options

NAMES = ("images", "image")  # of the form's files
_HELP = "Send multipart/form-data with a file `images` for each photo: curl -F images=@a.jpg -F images=@b.jpg"


async def read_batch(
    request: Request, max_images: int, max_bytes: int, seconds: float
) -> tuple[list[bytes], CaptionOptions]:
    """The photos as they came, one at least, and the options of the query and the form together.

    `seconds` bounds the body's arrival. Raises `Problem` for everything that is wrong but the photos themselves: an
    empty file is one of them.
    """
    refuse_encoded(request)
    declared = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if declared != "multipart/form-data":
        raise Problem("unsupported_media_type", f"Content-Type {printable(declared)} is not taken. {_HELP}")
    too_many = Problem("too_many_images", f"At most {max_images} photos are taken in one request.")
    images, fields = await parse_form(request, FormLimits(NAMES, max_images, too_many, max_bytes, seconds, _HELP))
    if not images:
        raise Problem("missing_image", f"There must be a file in the field `images`. {_HELP}")
    return images, read_options([*request.query_params.multi_items(), *fields])
