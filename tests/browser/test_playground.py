"""The playground in a real browser, over the service with a fake captioner whose words leave at layers 1, 3 and 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from fastapi import FastAPI
from playwright.sync_api import Route, expect

from model.exits import SpeedRow
from service.app import create_app
from service.settings import Settings
from tests.browser.browsing import DESKTOP, PHONE, Opener, choose, drop, words_of
from tests.service import pictures
from tests.service.fakes import BOXES, SPEEDS, FakeCaptioner

ROOT = Path(__file__).parents[2]
JPEG = pictures.jpeg()
WIDTH, HEIGHT = pictures.SIZE


def test_a_photo_becomes_words_in_the_colours_of_their_layers(service: str, visit: Opener) -> None:
    page = visit(service)
    expect(page.locator("#state")).to_contain_text("Ready")
    with page.expect_response("**/v1/caption") as answered:
        choose(page, JPEG)
    assert answered.value.headers["content-type"].startswith("text/event-stream")
    expect(page.locator("#facts div").first).to_be_visible()
    words = words_of(page)
    assert [layer for _, layer in words] == ["1", "3", "2"]
    assert [text for text, _ in words][1:] == [str(WIDTH), str(HEIGHT)]
    colours = page.locator("#words .word").evaluate_all("words => words.map(word => word.style.backgroundColor)")
    assert colours[0] == "rgb(255, 234, 70)"
    assert len(set(colours)) == 3
    expect(page.locator("#layers")).to_have_text("12 of 24 decoder layers used, 12 skipped.")
    width = page.locator("#layers .bar span").evaluate("part => part.getBoundingClientRect().width")
    assert width == pytest.approx(page.locator("#layers .bar").bounding_box()["width"] / 2, abs=2)
    expect(page.locator("#said")).to_contain_text(f"{WIDTH} {HEIGHT}")
    page.locator("#words .word").nth(1).hover()
    expect(page.locator("#detail")).to_have_text(f"“{WIDTH}” left at layer 3 of 6, entropy 1.50 nats.")
    page.locator("#words .word").nth(1).focus()
    page.keyboard.press("Tab")
    expect(page.locator("#detail")).to_contain_text("layer 2 of 6, entropy 1.00 nats")


def test_the_slider_is_the_speed(service: str, visit: Opener, captioner: FakeCaptioner) -> None:
    page = visit(service)
    slider = page.locator("#speed")
    expect(slider).to_be_enabled()
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("1", "4.5")
    expect(page.locator("#tiers button")).to_have_text(["full 1", "balanced 2", "fast 3", "turbo 4"])
    expect(page.locator("#tiers [aria-pressed=true]")).to_have_text("balanced 2")
    choose(page, JPEG)
    expect(page.locator("#curl")).to_contain_text("speed=balanced")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "2.05"
    expect(page.locator("#curl")).to_contain_text("speed=2.05")
    page.get_by_role("button", name="turbo").click()
    expect(page.locator("#curl")).to_contain_text("speed=turbo")
    taus = [tau for tau, _ in captioner.described]
    assert taus[-3:] == [1.0, pytest.approx(1.05), 3.0]


def test_the_named_speeds_are_compared_side_by_side(service: str, visit: Opener, captioner: FakeCaptioner) -> None:
    page = visit(service)
    choose(page, JPEG)
    page.get_by_role("button", name="Compare").click()
    cards = page.locator("#speeds li.compared")
    expect(cards.locator(".ms")).to_have_count(4)
    for card, name in zip(cards.all(), ("full", "balanced", "fast", "turbo"), strict=True):
        expect(card.locator("h3")).to_have_text(f"{name}SpeedUp 2.00")
        expect(card.locator(".ms")).to_contain_text("ms, in all")
    assert [tau for tau, _ in captioner.described][-12:] == [0.0, 1.0, 2.0, 3.0] * 3
    tops = {round(card.bounding_box()["y"]) for card in cards.all()}
    assert len(tops) == 1  # beside each other on a wide screen


def test_the_regions_are_drawn_over_the_photo(service: str, visit: Opener) -> None:
    page = visit(service)
    choose(page, JPEG)
    page.get_by_label("Draw the regions").check()
    expect(page.locator("#boxes-said")).to_have_text("2 regions were looked at.")
    photo, box = page.locator("#photo").bounding_box(), page.locator("#boxes rect.over").nth(1).bounding_box()
    x0, y0, x1, _ = BOXES[1]
    assert box["x"] == pytest.approx(photo["x"] + x0 * photo["width"], abs=2)
    assert box["y"] == pytest.approx(photo["y"] + y0 * photo["height"], abs=2)
    assert box["width"] == pytest.approx((x1 - x0) * photo["width"], abs=3)
    page.get_by_label("Draw the regions").uncheck()
    expect(page.locator("#boxes")).to_be_hidden()


def test_the_photo_is_bright_where_a_word_looked(service: str, visit: Opener) -> None:
    page = visit(service)
    choose(page, JPEG)
    expect(page.locator("#facts div").first).to_be_visible()
    page.locator("#words .word").first.hover()
    expect(page.locator("#look")).to_be_hidden()
    page.get_by_label("Brighten where").check()
    expect(page.locator("#curl")).to_contain_text("attention=true")
    for word, region in ((0, 0), (1, 1), (2, 0)):  # as the fake has it
        page.locator("#words .word").nth(word).hover()
        expect(page.locator("#look")).to_be_visible()
        bright = page.locator("#bright rect").evaluate_all("all => all.map(each => each.getAttribute('opacity'))")
        assert bright == ["1.000" if i == region else "0.000" for i in range(2)]
    page.locator("#caption-title").hover()
    expect(page.locator("#look")).to_be_hidden()
    page.locator("#words .word").first.focus()  # without a pointer
    expect(page.locator("#look")).to_be_visible()
    page.get_by_label("Brighten where").uncheck()
    expect(page.locator("#look")).to_be_hidden()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no photo at all", "The data is not an image of a known format"),
        (JPEG[:200], "The image cannot be decoded"),
        (bytes(300_000), "The body is too large"),
    ],
    ids=["text", "cut", "large"],
)
def test_what_is_wrong_with_a_file_is_said_in_words(service: str, visit: Opener, content: bytes, said: str) -> None:
    page = visit(service)
    choose(page, content)
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text(said)
    expect(problem).to_contain_text("Request ")
    assert "{" not in problem.inner_text()
    assert problem.get_by_role("button").count() == 0  # to send it again would not help
    choose(page, JPEG)
    expect(problem).to_be_hidden()
    expect(page.locator("#words .word")).to_have_count(3)


def test_dropped_pasted_and_sample_photos(service: str, visit: Opener) -> None:
    page = visit(service)
    expect(page.locator("#state")).to_contain_text("Ready")
    drop(page, JPEG, "dropped one.jpg")
    expect(page.locator("#curl")).to_contain_text("'image=@dropped one.jpg'")
    drop(page, JPEG, "pasted.jpg", selector="body", event="paste")
    expect(page.locator("#curl")).to_contain_text("image=@pasted.jpg")
    page.get_by_role("button", name="The face of a cat").click()
    expect(page.locator("#curl")).to_contain_text("image=@cat.jpg")
    expect(page.locator("#words .word").nth(1)).to_contain_text("320")


def test_a_sample_that_comes_late_does_not_take_the_photos_place(service: str, visit: Opener) -> None:
    page = visit(service)
    expect(page.locator("#state")).to_contain_text("Ready")
    held: list[Route] = []
    page.route("**/web/samples/cat.jpg", lambda route: held.append(route))
    with page.expect_request("**/web/samples/cat.jpg"):
        page.get_by_role("button", name="The face of a cat").click()
    choose(page, JPEG, "mine.jpg")
    expect(page.locator("#curl")).to_contain_text("image=@mine.jpg")
    with page.expect_response("**/web/samples/cat.jpg"):
        held[0].continue_()
    page.wait_for_timeout(300)  # as long as it would take to be shown
    expect(page.locator("#drop-hint")).to_have_text("mine.jpg")
    expect(page.locator("#words .word").nth(1)).to_contain_text(str(WIDTH))


def test_a_sample_that_is_not_there_is_no_photo(service: str, visit: Opener) -> None:
    page = visit(service)
    expect(page.locator("#state")).to_contain_text("Ready")
    page.route("**/web/samples/cat.jpg", lambda route: route.fulfill(status=404, body="no photo"))
    page.get_by_role("button", name="The face of a cat").click()
    expect(page.get_by_role("alert")).to_contain_text("The sample cannot be loaded")
    expect(page.locator("#stage")).to_be_hidden()


@pytest.mark.parametrize("highest", [4.0, 4.5, 6.0])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_named_speeds_stand_under_their_ticks(
    serve: Callable[[FastAPI], str], visit: Opener, size: tuple[int, int], highest: float
) -> None:
    captioner = FakeCaptioner()
    captioner.speeds = replace(
        SPEEDS, rows=tuple(SpeedRow(tau, 1.0 + tau, 1.0, 50.0, 20.0) for tau in (0, highest - 1))
    )
    page = visit(serve(create_app(Settings(), load=lambda: captioner)), size)
    expect(page.locator("#tiers button")).to_have_count(4)
    labels = [label.bounding_box() for label in page.locator("#tiers button").all()]
    ticks = [tick.bounding_box() for tick in page.locator("#ticks span").all()]
    for label, tick in list(zip(labels, ticks, strict=True))[1:-1]:
        assert label["x"] + label["width"] / 2 == pytest.approx(tick["x"] + tick["width"] / 2, abs=4)
    for left, right in pairwise(labels):
        assert left["x"] + left["width"] <= right["x"]
    slider = page.locator("#speed").bounding_box()
    assert labels[0]["x"] >= slider["x"] - 1
    assert labels[-1]["x"] + labels[-1]["width"] <= slider["x"] + slider["width"] + 1


def test_the_page_is_there_before_the_model(serve: Callable[[FastAPI], str], visit: Opener) -> None:
    captioner = FakeCaptioner()
    captioner.go.clear()
    page = visit(serve(create_app(Settings(), load=lambda: captioner)))
    expect(page.locator("#state")).to_contain_text("The model is being loaded.")
    choose(page, JPEG)
    expect(page.locator("#ask")).to_have_text("Waits for the service …")
    captioner.go.set()
    expect(page.locator("#state")).to_contain_text("Ready: fake")
    expect(page.locator("#words .word")).to_have_count(3)


def test_a_key_is_asked_for_where_there_must_be_one(serve: Callable[[FastAPI], str], visit: Opener) -> None:
    app = create_app(Settings(api_keys="anna:correct-horse-battery", open_probes=False), load=FakeCaptioner)
    page = visit(serve(app))
    key = page.get_by_label("This service needs an API key")
    expect(key).to_be_visible()
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#state")).to_contain_text("not known")
    key.fill("correct-horse-battery")
    key.press("Enter")
    expect(page.locator("#state")).to_contain_text("Ready")
    expect(key).to_be_hidden()
    expect(page.locator("#speed")).to_be_focused()
    choose(page, JPEG)
    expect(page.locator("#words .word")).to_have_count(3)
    expect(page.locator("#curl")).to_contain_text('-H "Authorization: Bearer $DEECAP_CLIENT_KEY"')
    assert "correct-horse" not in page.content()


def test_the_lines_to_copy_do_the_same(service: str, visit: Opener, tmp_path: Path, captioner: FakeCaptioner) -> None:
    page = visit(service)
    name = 'it\'s "mine", £5; ok.jpg'
    (tmp_path / name).write_bytes(JPEG)
    choose(page, JPEG, name)
    page.get_by_role("button", name="fast").click()
    expect(page.locator("#curl")).to_contain_text("speed=fast")
    caption = " ".join(text for text, _ in words_of(page))
    captioner.described.clear()
    # The package is on the path here, as after `pip install`.
    python = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + page.locator("#python").inner_text()
    for command in (["sh", "-c", page.locator("#curl").inner_text()], [sys.executable, "-c", python]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert caption in done.stdout, done.stderr
    assert captioner.described == [(2.0, 1), (2.0, 1)]
    page.get_by_role("button", name="Copy the line for a shell").click()
    expect(page.locator("#copied")).to_have_text("Copied.")


def test_a_phone_needs_no_sideways_scrolling(service: str, visit: Opener) -> None:
    page = visit(service, PHONE)
    choose(page, JPEG)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#speeds .ms")).to_have_count(4)
    page.get_by_label("Draw the regions").check()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    page.goto(f"{service}/docs")
    page.locator(".operation > summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE[0]


def test_the_apis_page_has_every_address(service: str, visit: Opener) -> None:
    page = visit(f"{service}/docs")
    expect(page.locator(".operation").first).to_be_visible()
    document = page.request.get(f"{service}/openapi.json").json()
    told = {" ".join(summary.split()[:2]) for summary in page.locator(".operation > summary").all_inner_texts()}
    paths = document["paths"].items()
    assert told == {f"{method.upper()} {path}" for path, operations in paths for method in operations}
    page.get_by_text("Caption a photo at a chosen speed").click()
    expect(page.locator(".operation[open]").get_by_role("cell", name="timeout_ms").first).to_be_visible()
