"""Words that come one by one: the page over a stand-in that streams what the test says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser.browsing import Opener, choose, words_of
from tests.browser.stand_in import END, StandIn, caption, word
from tests.service import pictures


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture
def address(stand_in: StandIn) -> Iterator[str]:
    with stand_in.serving() as address:
        yield address


@pytest.fixture
def page(address: str, visit: Opener) -> Page:
    page = visit(address)
    expect(page.locator("#state")).to_contain_text("Ready")
    choose(page, pictures.jpeg())
    return page


def test_each_word_is_shown_as_it_is_decided(page: Page, stand_in: StandIn) -> None:
    shown = page.locator("#words .word")
    stand_in.say(word(0, "a", 1))
    expect(shown).to_have_count(1)
    expect(page.locator("#layers")).to_have_text("1 of 6 decoder layers used, 5 skipped.")
    assert page.locator("#facts div").count() == 0  # the caption is not done
    stand_in.say(word(1, "dog", 6))
    expect(shown).to_have_count(2)
    stand_in.say(caption(("a", 1), ("dog", 6)))
    expect(page.locator("#layers")).to_have_text("13 of 18 decoder layers used, 5 skipped.")
    assert words_of(page) == [("a", "1"), ("dog", "6")]
    assert stand_in.accepted[0].startswith("text/event-stream")


def test_a_second_attempt_begins_again(page: Page, stand_in: StandIn) -> None:
    stand_in.say(word(0, "a", 1), word(1, "cat", 2))
    expect(page.locator("#words .word")).to_have_count(2)
    stand_in.say(("restart", {"attempt": 2}), word(0, "one", 3, attempt=2))
    expect(page.locator("#words .word")).to_have_count(1)
    assert words_of(page) == [("one", "3")]
    expect(page.locator("#layers")).to_have_text("3 of 6 decoder layers used, 3 skipped.")


def test_a_problem_in_the_stream_is_said_in_words(page: Page, stand_in: StandIn) -> None:
    problem = {"title": "No answer in time", "detail": "It took too long.", "status": 504, "request_id": "r1"}
    stand_in.say(word(0, "a", 1), ("problem", problem))
    expect(page.get_by_role("alert")).to_contain_text("No answer in timeIt took too long. Request r1.")
    stand_in.say(caption(("fine", 2)), to=1)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#words .word")).to_have_text(["fine2"])
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_stream_that_breaks_off_is_no_caption(page: Page, stand_in: StandIn) -> None:
    stand_in.say(word(0, "a", 1), END)
    expect(page.get_by_role("alert")).to_contain_text("The answer broke off")


def test_another_photo_takes_the_place_of_the_one_being_captioned(page: Page, stand_in: StandIn) -> None:
    stand_in.say(word(0, "old", 1))
    expect(page.locator("#words .word")).to_have_text(["old1"])
    choose(page, pictures.jpeg(), "other.jpg")
    stand_in.say(word(1, "late", 1), to=0)  # to a connection that the page has left
    stand_in.say(caption(("new", 2)), to=1)
    expect(page.locator("#words .word")).to_have_text(["new2"])
    expect(page.get_by_role("alert")).to_be_hidden()
