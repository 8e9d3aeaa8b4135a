"""Whatever is sent, it is told as a problem with the right status, and never as a 500."""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.service import pictures
from tests.service.checks import assert_problem
from tests.service.fakes import FakeCaptioner

# Pillow warns of what it finds broken, in a dozen ways; what counts here is the answer.
pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::UserWarning:PIL")]

JPEG = pictures.jpeg()
URL = "/v1/caption"
CUT_FORM = b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\nabc"


async def post(client: httpx.AsyncClient, content: bytes, kind: str | None = None) -> httpx.Response:
    return await client.post(URL, content=content, headers={} if kind is None else {"Content-Type": kind})


@pytest.mark.parametrize(
    "body", [b"hello", b"<svg/>", b"%PDF-1.7", b"BMW builds cars and not pictures", b"\xff\xd8", b"RIFFxxxxWAVE"]
)
async def test_not_an_image(client: httpx.AsyncClient, captioner: FakeCaptioner, body: bytes) -> None:
    looked = len(captioner.looked)
    assert_problem(await post(client, body), 415, "not_an_image", "JPEG, PNG, WebP, GIF, BMP, TIFF")
    assert_problem(await client.post(URL, files={"image": ("a.jpg", body)}), 415, "not_an_image")
    encoded = base64.b64encode(body).decode()
    assert_problem(await client.post(URL, json={"image": encoded}), 415, "not_an_image")
    assert len(captioner.looked) == looked


@pytest.mark.parametrize("kind", pictures.truncated())
async def test_truncated_images(client: httpx.AsyncClient, captioner: FakeCaptioner, kind: str) -> None:
    looked = len(captioner.looked)
    assert_problem(await post(client, pictures.truncated()[kind]), 422, "undecodable_image")
    assert len(captioner.looked) == looked, "a broken picture reached the model"


@pytest.mark.parametrize("kind", pictures.truncated())
async def test_headers_alone(client: httpx.AsyncClient, kind: str) -> None:
    for length in (10, 14, 18, 30):
        response = await post(client, pictures.truncated()[kind][:length])
        assert response.status_code in (415, 422), (length, response.text)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (pictures.png_header(50_000, 50_000), 422, "too_many_pixels"),
        (pictures.png_header(2**31 - 1, 2**31 - 1), 422, "too_many_pixels"),
        (pictures.png_header(400, 300), 422, "too_many_pixels"),  # just above this app's 100,000
        (pictures.webp_header(16_383, 16_383), 422, "too_many_pixels"),
        (pictures.png_header(100_000, 1), 422, "image_too_small"),
        (pictures.png_header(0, 0), 422, "undecodable_image"),
        (pictures.png_header(1, 1), 422, "image_too_small"),
        (pictures.encode(pictures.photo((8, 7))), 422, "image_too_small"),
        (pictures.png_header(64, 64), 422, "undecodable_image"),  # far too little data
    ],
)
async def test_sizes_that_are_refused_fast(client: httpx.AsyncClient, body: bytes, status: int, code: str) -> None:
    begin = time.monotonic()
    assert_problem(await post(client, body), status, code)
    assert time.monotonic() - begin < 1.0


async def test_the_smallest_and_the_largest_size_that_are_taken(client: httpx.AsyncClient) -> None:
    assert (await post(client, pictures.encode(pictures.photo((8, 8))))).status_code == 200
    assert (await post(client, pictures.encode(pictures.photo((400, 250)), "JPEG"))).status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "status", "code", "says"),
    [
        (b"", None, 400, "empty_body", "image"),
        (b"", "image/jpeg", 400, "empty_body", "image"),
        (b"", "application/json", 400, "empty_body", "image"),
        (b"", "multipart/form-data; boundary=x", 400, "empty_body", "image"),
        (JPEG, "text/plain", 415, "unsupported_media_type", "text/plain"),
        (JPEG, "application/pdf", 415, "unsupported_media_type", "application/pdf"),
        (JPEG, "multipart/mixed; boundary=x", 415, "unsupported_media_type", "multipart/mixed"),
        (b"{", "application/json", 400, "malformed_json", "line 1"),
        (b"\xff\xfe{}", "application/json", 400, "malformed_json", ""),
        (b"[" * 100_000, "application/json", 400, "malformed_json", ""),
        (b'{"tau": ' + b"1" * 5_000 + b"}", "application/json", 400, "malformed_json", ""),
        (b"[]", "application/json", 422, "missing_image", "object"),
        (b"{}", "application/json; charset=utf-8", 422, "missing_image", "base64"),
        (b'{"image": 5}', "application/json", 422, "missing_image", "string"),
        (b'{"image": ""}', "application/json", 422, "missing_image", "string"),
        (b'{"image": "  "}', "application/json", 422, "missing_image", "empty"),
        (b'{"image": "a"}', "application/json", 422, "bad_base64", ""),
        (b'{"image": "####"}', "application/json", 422, "bad_base64", ""),
        ('{"image": "é\\ud800"}'.encode(), "application/json", 422, "bad_base64", ""),
        (b'{"image": "data:image/png,abc"}', "application/json", 422, "bad_base64", ";base64"),
        (b'{"image": "QUJD", "\\ud800": 1}', "application/json", 422, "unknown_option", "\\ud800"),
        (b"hello", "multipart/form-data", 400, "malformed_multipart", "boundary"),
        (b"hello", "multipart/form-data; boundary=x", 400, "malformed_multipart", ""),
        (b"hello", 'multipart/form-data; boundary=x; charset="a\x00b"', 400, "malformed_multipart", ""),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 422, "missing_image", "`image`"),
        (b"--x\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x", 400, "malformed_multipart", ""),
        (CUT_FORM, "multipart/form-data; boundary=x", 422, "missing_image", "`image`"),
    ],
)  # fmt: skip
async def test_bodies_that_are_no_request(
    client: httpx.AsyncClient, body: bytes, kind: str | None, status: int, code: str, says: str
) -> None:
    assert_problem(await post(client, body, kind), status, code, says)


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        ([("photo", ("a.jpg", JPEG))], "unknown_option", "photo"),
        ([("image", ("a.jpg", JPEG)), ("image", ("b.jpg", JPEG))], "repeated_field", "One `image`"),
        ([("image", ("a.jpg", JPEG)), ("mask", ("b.jpg", JPEG))], "unknown_option", "mask"),
        ([("image", ("a.jpg", JPEG)), ("speed", ("b.txt", b"fast"))], "unknown_option", "speed"),
        ([("image", ("a.jpg", b""))], "missing_image", "empty"),
        ([("image", (None, JPEG[:5_000]))], "missing_image", "must be a file"),
    ],
)
async def test_forms_with_the_wrong_files(client: httpx.AsyncClient, files: Any, code: str, says: str) -> None:
    assert_problem(await client.post(URL, files=files), 422, code, says)


async def test_a_form_with_too_many_or_too_large_fields(client: httpx.AsyncClient) -> None:
    many = await client.post(URL, data={f"x{n}": "" for n in range(100)}, files={"image": JPEG})
    assert_problem(many, 400, "malformed_multipart", "Too many fields")
    large = await client.post(URL, data={"speed": "x" * 20_000}, files={"image": JPEG})
    assert_problem(large, 400, "malformed_multipart", "maximum size")


async def test_compressed_bodies_are_refused(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, content=JPEG, headers={"Content-Encoding": "gzip"})
    assert_problem(response, 415, "unsupported_media_type", "gzip")


async def test_a_body_announced_as_too_large(client: httpx.AsyncClient) -> None:
    assert_problem(await post(client, bytes(200_001), "image/png"), 413, "body_too_large", "200,000")
    assert_problem(await client.post(URL, files={"image": bytes(200_001)}), 413, "body_too_large")
    assert (await post(client, bytes(200_000), "image/png")).status_code == 415  # allowed, and no image


@pytest.mark.parametrize("lie", [{}, {"Content-Length": "10"}])
async def test_a_body_counted_as_too_large(client: httpx.AsyncClient, lie: dict[str, str]) -> None:
    """Without a Content-Length, or with a wrong one, the bytes are counted, and no more is read than needed."""
    sent = 0

    async def stream() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1_000):
            sent += 10_000
            yield bytes(10_000)

    assert_problem(await client.post(URL, content=stream(), headers=lie), 413, "body_too_large")
    assert sent <= 230_000


async def test_a_body_that_does_not_arrive(app: FastAPI, client: httpx.AsyncClient) -> None:
    context = app.state.context
    object.__setattr__(context, "settings", context.settings.model_copy(update={"timeout_ms": 50}))

    async def stream() -> AsyncIterator[bytes]:
        yield JPEG[:100]
        await asyncio.sleep(5)

    assert_problem(await client.post(URL, content=stream()), 408, "body_timeout")


async def test_addresses_and_methods_that_are_not_there(client: httpx.AsyncClient) -> None:
    assert_problem(await client.get("/nowhere"), 404, "not_found", "/nowhere")
    assert_problem(await client.get("/v1/caption/"), 404, "not_found")
    assert_problem(await client.get("/problems/none"), 404, "not_found")
    response = await client.get(URL)
    assert_problem(response, 405, "method_not_allowed", "GET")
    assert response.headers["allow"] == "POST"


async def test_a_failure_inside_leaks_nothing(
    client: httpx.AsyncClient, captioner: FakeCaptioner, caplog: pytest.LogCaptureFixture
) -> None:
    captioner.fails = RuntimeError("secret place")
    response = await client.post(URL, content=JPEG, headers={"X-Request-ID": "find-me"})
    assert_problem(response, 500, "internal")
    assert "secret" not in response.text
    assert any(record.exc_info and "secret place" in str(record.exc_info[1]) for record in caplog.records)


async def test_pixels_that_only_the_model_finds_broken(client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
    captioner.broken = OSError("broken")
    assert_problem(await post(client, JPEG), 422, "undecodable_image")


async def test_random_damage_never_gives_a_500(client: httpx.AsyncClient) -> None:
    """A few hundred damaged pictures and forms; `tests/fuzz` does more."""
    damage = random.Random(0)
    boundary = "multipart/form-data; boundary=abc"
    form = b'--abc\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + JPEG + b"\r\n--abc--\r\n"
    pool = [(data, None) for data in pictures.good().values()] + [(form, boundary)] * 8
    for _ in range(300):
        data, kind = damage.choice(pool)
        broken = bytearray(data)
        for _ in range(damage.choice((1, 4, 30))):
            # Mostly the head: that is where the structure is.
            broken[int(len(broken) * damage.random() ** 4)] = damage.randrange(256)
        if damage.random() < 0.3:
            broken = broken[: damage.randrange(len(broken))]
        response = await post(client, bytes(broken), kind)
        assert response.status_code in (200, 400, 415, 422), (response.text, bytes(broken[:80]))


async def test_random_damage_in_a_batch_never_gives_a_500(client: httpx.AsyncClient) -> None:
    """Neither to the form as a whole nor to the photos in it; the good neighbour is captioned whenever it is whole."""
    damage = random.Random(1)
    begin = b'--abc\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    captioned = 0
    for number in range(60):
        photos = [damage.choice(list(pictures.good().values())) for _ in range(3)]
        form = bytearray(b"".join(begin + photo + b"\r\n" for photo in photos) + b"--abc--\r\n")
        for _ in range(damage.choice((1, 4, 30))):
            # Now and then in the structure, else in one of the photos.
            form[damage.randrange(100 if number % 4 == 0 else len(form))] = damage.randrange(256)
        kind = {"Content-Type": "multipart/form-data; boundary=abc"}
        response = await client.post("/v1/captions", content=bytes(form), headers=kind)
        assert response.status_code in (200, 400, 422), (response.text, bytes(form[:80]))
        if response.status_code == 200:
            statuses = [item["status"] for item in response.json()["results"]]
            assert set(statuses) <= {200, 415, 422}, response.text
            captioned += statuses.count(200)
    assert captioned > 60, "hardly any photo was good: the test shows little"
