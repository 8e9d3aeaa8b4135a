"""Words that come one by one: the page over a stand-in that streams what the test says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.browsing import DESKTOP, Opener, choose, has_focus, open_page, words_of
from tests.browser.stand_in import CUT, END, StandIn, caption, word
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


def test_a_connection_that_closes_in_the_midst_is_said_in_words(
    browser: Browser, address: str, stand_in: StandIn
) -> None:
    faults: list[str] = []
    with open_page(browser, address, DESKTOP, "light", faults) as page:
        expect(page.locator("#state")).to_contain_text("Ready")
        choose(page, pictures.jpeg())
        stand_in.say(word(0, "a", 1), CUT)
        expect(page.get_by_role("alert")).to_contain_text("The answer broke off")
    assert [fault for fault in faults if "ERR_INCOMPLETE_CHUNKED_ENCODING" not in fault] == []  # the browser's own line


def test_another_photo_takes_the_place_of_the_one_being_captioned(page: Page, stand_in: StandIn) -> None:
    stand_in.say(word(0, "old", 1))
    expect(page.locator("#words .word")).to_have_text(["old1"])
    choose(page, pictures.jpeg(), "other.jpg")
    stand_in.say(caption(("new", 2)), to=1)
    expect(page.locator("#words .word")).to_have_text(["new2"])
    stand_in.say(word(1, "late", 1), to=0)
    page.wait_for_timeout(300)  # as long as the late word would take to be shown
    assert words_of(page) == [("new", "2")]
    assert stand_in.left == {0}
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_mistake_of_the_page_is_not_told_as_the_networks(page: Page, stand_in: StandIn) -> None:
    stand_in.say(("word", None))  # what no service sends
    expect(page.get_by_role("alert")).to_contain_text("Something went wrong in this page")


def test_an_answer_in_json_that_breaks_off_is_no_caption(page: Page) -> None:
    page.route("**/v1/caption", lambda route: route.fulfill(content_type="application/json", body='{"caption": "a d'))
    choose(page, pictures.jpeg(), "other.jpg")
    expect(page.get_by_role("alert")).to_contain_text("The answer broke off")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_the_focus_stays_where_it_is(page: Page, stand_in: StandIn) -> None:
    stand_in.say(word(0, "a", 1), word(1, "dog", 6))
    shown = page.locator("#words .word")
    expect(shown).to_have_count(2)
    shown.nth(1).focus()
    stand_in.say(caption(("a", 1), ("dog", 6)))
    expect(page.locator("#facts div").first).to_be_visible()
    expect(shown.nth(1)).to_be_focused()
    expect(page.locator("#detail")).to_contain_text("“dog” left at layer 6")
    page.get_by_role("button", name="Compare").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#speeds li.compared")).to_have_count(3)
    assert has_focus(page) == "compare"
    page.keyboard.press("Enter")  # it is at work: nothing more is asked
    stand_in.say(("problem", {"title": "No answer in time", "detail": "", "status": 504}), to=1)
    page.get_by_role("button", name="Try again").click()
    assert has_focus(page) == "ask"
    shown.nth(0).focus()
    choose(page, pictures.jpeg(), "other.jpg")
    expect(shown).to_have_count(0)
    assert has_focus(page) == "ask"


def test_half_a_comparison_does_not_stay(page: Page, stand_in: StandIn) -> None:
    cards = page.locator("#speeds li.compared")
    stand_in.say(caption(("a", 1)))
    expect(page.locator("#facts div").first).to_be_visible()
    page.get_by_role("button", name="Compare").click()
    stand_in.say(caption(("a", 1)), to=1)
    expect(cards.first).to_contain_text("SpeedUp")
    stand_in.say(("problem", {"title": "No answer in time", "detail": "", "status": 504}), to=2)
    expect(page.get_by_role("alert")).to_contain_text("No answer in time")
    expect(page.locator("#compared")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    expect(cards).to_have_count(3)
    expect(cards.first).to_be_visible()
    page.locator("#speed").press("ArrowRight")  # another speed: a caption takes the comparison's place
    expect(page.locator("#compared")).to_be_hidden()
    stand_in.say(caption(("b", 2)), to=4)
    expect(page.locator("#words .word")).to_have_text(["b2"])
    expect(page.get_by_role("alert")).to_be_hidden()
    assert stand_in.left == {3}


# A service that goes and comes -------------------------------------------------------------------------------------

LOOKS_AGAIN_MS = 16_000  # a little more than the page waits before it asks a ready service again


@pytest.fixture
def timed(page: Page) -> Page:
    """The page with a clock that tests may put forward."""
    page.clock.install()
    page.reload()
    expect(page.locator("#state")).to_contain_text("Ready")
    return page


def go_away(page: Page, stand_in: StandIn, status: int = 503) -> None:
    stand_in.status = status
    page.clock.fast_forward(LOOKS_AGAIN_MS)
    expect(page.locator("#state")).to_contain_text("Not now")


def come_back(page: Page, stand_in: StandIn) -> None:
    stand_in.status = 200
    page.clock.fast_forward(LOOKS_AGAIN_MS)
    expect(page.locator("#state")).to_contain_text("Ready")


def test_no_old_caption_stands_under_a_new_photo(timed: Page, stand_in: StandIn) -> None:
    choose(timed, pictures.jpeg())
    stand_in.say(caption(("old", 1)), to=1)  # 0 was before the page was loaded again
    expect(timed.locator("#words .word")).to_have_text(["old1"])
    go_away(timed, stand_in)
    timed.locator("#words .word").focus()
    choose(timed, pictures.jpeg(), "other.jpg")
    expect(timed.locator("#ask")).to_have_text("Waits for the service …")
    assert has_focus(timed) == "ask"
    expect(timed.locator("#result")).to_be_hidden()
    stand_in.say(caption(("new", 2)), to=2)
    come_back(timed, stand_in)
    expect(timed.locator("#words .word")).to_have_text(["new2"])


def test_a_caption_under_way_does_not_come_under_a_new_photo(timed: Page, stand_in: StandIn) -> None:
    choose(timed, pictures.jpeg())
    stand_in.say(word(0, "old", 1), to=1)
    expect(timed.locator("#words .word")).to_have_text(["old1"])
    go_away(timed, stand_in)
    choose(timed, pictures.jpeg(), "other.jpg")
    stand_in.say(caption(("old", 1)), to=1)
    timed.wait_for_timeout(300)  # as long as the caption would take to be shown
    expect(timed.locator("#result")).to_be_hidden()


def test_a_new_photo_hangs_up_on_the_caption_under_way(timed: Page, stand_in: StandIn) -> None:
    choose(timed, pictures.jpeg())
    stand_in.say(word(0, "old", 1), to=1)
    expect(timed.locator("#words .word")).to_have_text(["old1"])
    go_away(timed, stand_in)
    choose(timed, pictures.jpeg(), "other.jpg")
    for _ in range(100):  # the service learns of it a moment later
        if 1 in stand_in.left:
            return
        timed.wait_for_timeout(50)
    raise AssertionError("the page listens on")


def test_a_service_that_comes_back_with_other_speeds(timed: Page, stand_in: StandIn) -> None:
    slider, tiers = timed.locator("#speed"), timed.locator("#tiers button")
    timed.get_by_role("button", name="fast").click()
    assert slider.input_value() == "3"
    go_away(timed, stand_in)
    stand_in.highest = 4
    come_back(timed, stand_in)
    expect(tiers).to_have_text(["full 1", "balanced 2", "fast 3", "turbo 4"])
    assert (slider.get_attribute("max"), slider.input_value()) == ("4", "3")
    expect(slider).to_be_focused()  # the button that had the focus was replaced
    go_away(timed, stand_in)
    stand_in.highest = 2
    come_back(timed, stand_in)
    expect(tiers).to_have_text(["full 1", "balanced 2"])
    assert (slider.get_attribute("max"), slider.input_value()) == ("2", "2")
    expect(timed.locator("#tiers [aria-pressed=true]")).to_have_text("balanced 2")


def test_the_state_is_said_once_however_often_it_is_asked(timed: Page, stand_in: StandIn) -> None:
    timed.evaluate(
        """() => {
            window.said = [];
            const state = document.querySelector("#state");
            new MutationObserver(() => window.said.push(state.textContent)).observe(state, { childList: true });
        }"""
    )
    go_away(timed, stand_in)
    before = stand_in.looks
    for _ in range(50):
        timed.clock.fast_forward(1_100)
        timed.wait_for_timeout(20)
        if stand_in.looks >= before + 3:
            break
    assert stand_in.looks >= before + 3
    assert timed.evaluate("window.said") == ["Not now. It says so."]


def test_a_service_that_wants_a_key_is_not_asked_again_and_again(timed: Page, stand_in: StandIn) -> None:
    go_away(timed, stand_in, status=401)
    expect(timed.get_by_label("This service needs an API key")).to_be_visible()
    before = stand_in.looks
    for _ in range(5):
        timed.clock.fast_forward(1_100)
        timed.wait_for_timeout(50)
    assert stand_in.looks == before
    timed.get_by_label("This service needs an API key").fill("some key")
    stand_in.status = 200
    timed.keyboard.press("Enter")
    expect(timed.locator("#state")).to_contain_text("Ready")
    expect(timed.locator("#speed")).to_be_focused()
