"""From a form's body to the photos in it and the options for all of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import Problem, printable
from service.routes.reading import Pairs, body_within, chunks, priority_asked, refuse_encoded
from service.schemas import CaptionOptions, read_options

NAMES = ("images", "image")  # of the form's files
_MAX_FIELDS = 32  # as many as there are options, and some to tell people what is wrong with theirs
_MAX_FIELD_BYTES = 10_000
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
    empty = True

    async def body() -> AsyncGenerator[bytes, None]:
        nonlocal empty
        async for chunk in chunks(request, max_bytes, priority_asked(request)):
            empty = False
            yield chunk
        if empty:
            raise Problem("empty_body", _HELP)

    # The form is parsed as it comes, so that its bytes are there once and not as a whole body beside it.
    parser = MultiPartParser(
        request.headers,
        body(),
        max_files=max_images + 1,  # the parser's own words for too many are no help
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    parser.spool_max_size = max_bytes + 1  # stays in memory: the disk may be read-only
    too_many = Problem("too_many_images", f"At most {max_images} photos are taken in one request.")
    try:
        async with body_within(seconds):
            form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise too_many from error
        raise Problem("malformed_multipart", printable(error.message, 200)) from error
    except ValueError as error:  # an odd charset or boundary
        raise Problem("malformed_multipart", "The header Content-Type is broken.") from error
    images: list[bytes] = []
    pairs: Pairs = list(request.query_params.multi_items())
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            if name in NAMES:
                raise Problem("missing_image", f"The field `{name}` must be a file: curl -F {name}=@photo.jpg")
            pairs.append((name, value))
        elif name in NAMES:
            images.append(await value.read())
            await value.close()
        else:
            raise Problem("unknown_option", f"No file is taken in the field {printable(name)}; only in `images`.")
    if len(images) > max_images:
        raise too_many
    if not images:
        raise Problem("missing_image", f"There must be a file in the field `images`. {_HELP}")
    return images, read_options(pairs)
