"""A rater's day in a real browser: keys, ties, dragging, skipping, and everything that goes wrong in between."""

import re
import time

import pytest
from playwright.sync_api import Page, expect

from annotation.models import Lease, Ranking, Skip
from annotation.services.leases import lease_next
from annotation.services.prompts import prompts_add
from tests.annotation import desk
from tests.annotation.hostile import HOSTILE

pytestmark = pytest.mark.browser
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


class Workplace:
    """One project with one rater, in the live site's database."""

    def __init__(self, site, slug: str, number: int = 3, texts: int = 4, items=None, **fields) -> None:
        self.site, self.slug = site, slug
        with site.data():
            self.project = desk.project(slug, **fields)
            if items is None:
                desk.prompts(self.project, number=number, texts=texts)
            else:
                prompts_add(project=self.project, items=items)
            self.rater = desk.member(self.project, f"rater-{slug}")

    def stored(self) -> list[Ranking]:
        with self.site.data():
            return list(Ranking.objects.filter(project=self.project).order_by("pk"))

    def lease(self) -> Lease:
        with self.site.data():
            return Lease.objects.get(project=self.project, rater=self.rater, state="held")

    def run_out(self) -> Lease:
        with self.site.data():
            lease = Lease.objects.get(project=self.project, rater=self.rater, state="held")
            desk.run_out(lease)
            return lease


@pytest.fixture
def workplace(site, request):
    name = request.node.originalname.removeprefix("test_")[:70].replace("_", "-")
    return lambda **options: Workplace(site, name, **options)


def go(page: Page, place: Workplace) -> None:
    page.goto(f"/projects/{place.slug}/rank/")
    expect(page.locator(".card").first).to_be_focused()


def press(page: Page, keys: str) -> None:
    for key in keys.split():
        page.keyboard.press(key)


def ids(page: Page) -> list[str]:
    return page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.id)")


def next_prompt(page: Page, before: list[str]) -> None:
    """Wait until other cards lie on the desk."""
    page.wait_for_function("before => { const c = document.querySelector('.card'); return !c || c.dataset.id !== before }", arg=before[0])


def bands(page: Page) -> list[str]:
    return [re.sub(r"\s+", "", text) for text in page.locator(".band").all_inner_texts()]


def drag(page: Page, what: str, to: str) -> None:
    start, end = page.locator(what).bounding_box(), page.locator(to).bounding_box()
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=6)
    page.mouse.up()


def test_an_untouched_page_cannot_be_submitted(workplace, sit_down):
    place = workplace()
    page = sit_down(place.rater)
    asked = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/api/v1/rankings/") else None)
    go(page, place)
    press(page, "Enter Enter")
    page.click("#submit", force=True)
    expect(page.locator("#toast")).to_have_text("Not placed: A, B, C, D")
    press(page, "1 ArrowRight 2 ArrowRight 3 Enter")
    expect(page.locator("#toast")).to_have_text("Not placed: D")
    assert not asked and not place.stored()
    # The server does not take the page's word for it.
    body = {"lease": str(place.lease().token), "client_id": "5b3a4b1e-0f6f-4d4f-9b55-0d1f4e1a2b3c", "bands": []}
    answer = page.evaluate(
        """async (body) => (await fetch("/api/v1/rankings/", {method: "POST", body: JSON.stringify(body), headers: {
            "Content-Type": "application/json", "X-CSRFToken": document.cookie.match(/csrftoken=([^;]+)/)[1]}})).status""",
        body,
    )
    assert answer == 400 and not place.stored()


def test_a_whole_day(workplace, sit_down, site):
    place = workplace(number=5, guidelines="Be **fair**.")
    with site.data():
        place.rater.set_password("correct horse")
        place.rater.save()
    page = sit_down()
    page.goto("/")
    page.fill("#id_login", place.rater.username)
    page.fill("#id_password", "correct horse")
    page.keyboard.press("Enter")
    page.wait_for_url("**/")
    page.click("a.button.primary:has-text('Rank')")
    expect(page.locator(".card").first).to_be_focused()
    expect(page.locator("#count")).to_have_text("0 of 5 today")

    # With keys only, a tie and an undo among them; the screen's order is stored, and the cards do not move.
    first = ids(page)
    press(page, "2 ArrowRight 1 c 3 D 1 U D 2")
    assert bands(page) == ["1B", "2A=D", "3C", "4"] and ids(page) == first
    press(page, "Enter")
    next_prompt(page, first)
    a, b, c, d = first
    ranking = place.stored()[0]
    assert ranking.bands == [[b], [a, d], [c]] and ranking.displayed == first and ranking.duration_seconds >= 0
    expect(page.locator("#count")).to_have_text("1 of 5 today")

    # Dragging, flags and a note; then a reload in the middle keeps it all.
    second = ids(page)
    drag(page, ".card[data-letter=C] .letter", ".band[data-level='1']")
    drag(page, ".card[data-letter=A] .letter", ".band[data-level='2']")
    drag(page, ".chip:has-text('A')", ".band[data-level='3']")
    page.click(".card[data-letter=B] .flags summary")
    page.click(".card[data-letter=B] [data-flag=wrong]")
    page.click(".comment summary")
    page.fill("#comment", "B invents a number.")
    page.reload()
    expect(page.locator("#toast")).to_have_text("Your draft is here again.")
    assert ids(page) == second and bands(page) == ["1C", "2", "3A", "4"]
    press(page, "b 4 d 4")
    page.click("#submit")
    next_prompt(page, second)
    a, b, c, d = second
    ranking = place.stored()[1]
    assert (ranking.bands, ranking.flags, ranking.comment) == ([[c], [a], [b, d]], {b: ["wrong"]}, "B invents a number.")

    # Skip with a reason, by keys.
    third = ids(page)
    press(page, "S 2 Enter")
    next_prompt(page, third)
    with site.data():
        assert Skip.objects.get(rater=place.rater).reason == "expertise"

    # Enter twice and again: one ranking.
    fourth = ids(page)
    press(page, "1 b 2 c 3 d 4 Enter Enter Enter")
    next_prompt(page, fourth)
    assert len(place.stored()) == 3
    press(page, "1 b 1 c 1 d 1 Enter")
    expect(page.locator("#stop")).to_contain_text("Nothing left for you here")
    assert len(place.stored()) == 4 and page.evaluate("Object.keys(localStorage).filter((key) => key.includes('draft'))") == []


def test_four_cards_take_at_most_nine_keys(workplace, sit_down):
    place = workplace()
    page = sit_down(place.rater)
    go(page, place)
    before = ids(page)
    press(page, "1 ArrowRight 2 ArrowRight 3 ArrowRight 4 Enter")
    next_prompt(page, before)
    assert place.stored()[0].bands == [[uid] for uid in before]


def test_an_expired_lease_keeps_the_draft_and_the_prompt_can_be_taken_again(workplace, sit_down):
    place = workplace()
    page = sit_down(place.rater)
    go(page, place)
    before = ids(page)
    press(page, "1 b 2 c 3 d 4")
    place.run_out()
    press(page, "Enter")
    expect(page.locator("#banner")).to_contain_text("Your time on this prompt ended, so the ranking was not stored.")
    expect(page.locator("#banner")).to_contain_text("draft is kept")
    page.click("text=Take it again")
    expect(page.locator("#banner")).to_be_hidden()
    assert ids(page) == before and bands(page) == ["1A", "2B", "3C", "4D"]
    press(page, "Enter")
    next_prompt(page, before)
    assert [ranking.bands for ranking in place.stored()] == [[[uid] for uid in before]]


def test_a_prompt_that_went_to_somebody_else_is_said_to_be_gone(workplace, sit_down, site):
    place = workplace(overlap=1)
    page = sit_down(place.rater)
    go(page, place)
    before = ids(page)
    press(page, "1 b 2 c 3 d 4")
    place.run_out()
    with site.data():
        assert set(lease_next(project=place.project, rater=desk.member(place.project, "quicker")).displayed) == set(before)
    press(page, "Enter")
    expect(page.locator("#banner")).to_contain_text("went to somebody else")
    page.click("text=Take it again")
    next_prompt(page, before)
    expect(page.locator("#toast")).to_contain_text("Somebody else has that prompt now.")
    assert not place.stored()


def test_a_lost_network_keeps_the_ranking_and_sends_it_once(workplace, sit_down):
    place = workplace()
    page = sit_down(place.rater)
    go(page, place)
    before = ids(page)
    press(page, "1 b 2 c 3 d 4")
    page.context.set_offline(True)
    press(page, "Enter")
    expect(page.locator("#banner")).to_contain_text("The server did not answer. Your ranking is kept in this browser")
    assert not place.stored()
    page.context.set_offline(False)
    next_prompt(page, before)
    assert len(place.stored()) == 1


def test_an_answer_lost_on_the_way_back_stores_one_ranking(workplace, sit_down):
    place = workplace()
    page = sit_down(place.rater)
    go(page, place)
    before = ids(page)

    def lose_the_answer(route):
        route.fetch()
        route.abort()

    page.route("**/api/v1/rankings/", lose_the_answer, times=1)
    press(page, "1 b 2 c 3 d 4 Enter")
    expect(page.locator("#banner")).to_contain_text("sending it again stores it once")
    assert len(place.stored()) == 1
    page.click("#banner >> text=Try again")
    next_prompt(page, before)
    assert len(place.stored()) == 1


def test_a_second_tab_shows_the_same_draft_and_stores_nothing_twice(workplace, sit_down):
    place = workplace()
    page = sit_down(place.rater)
    go(page, place)
    press(page, "1 b 1")
    other = page.context.new_page()
    go(other, place)
    assert ids(other) == ids(page) and bands(other) == ["1A=B", "2", "3", "4"]
    before = ids(page)
    press(other, "c 2 d 3")
    page.bring_to_front()
    expect(page.locator(".band[data-level='3'] .chip")).to_have_text("D")
    press(page, "Enter")
    next_prompt(page, before)
    other.bring_to_front()
    expect(other.locator("#banner")).to_contain_text("You finished this prompt in another tab.")
    press(other, "Enter")
    next_prompt(other, before)
    assert len(place.stored()) == 1


def test_a_rater_signed_out_meanwhile_keeps_the_draft(workplace, sit_down, site):
    place = workplace()
    page = sit_down(place.rater)
    go(page, place)
    press(page, "1 b 2 c 3 d 4")
    page.context.clear_cookies(name="sessionid")
    press(page, "Enter")
    expect(page.locator("#banner")).to_contain_text("You are signed out. Your draft is kept")
    page.context.add_cookies([{"name": "sessionid", "value": site.session_of(place.rater), "url": site.url}])
    page.reload()
    expect(page.locator(".card").first).to_be_focused()
    assert bands(page) == ["1A", "2B", "3C", "4D"]


def test_the_lease_is_extended_while_the_page_is_in_use(workplace, sit_down, site):
    place = workplace(lease_seconds=30)
    page = sit_down(place.rater)
    go(page, place)
    with site.data():
        lease = Lease.objects.get(project=place.project, rater=place.rater)
    page.evaluate("() => { const now = Date.now; Date.now = () => now() + 16000; }")
    deadline = time.time() + 10
    while place.lease().expires_at == lease.expires_at:
        assert time.time() < deadline, "the lease was not extended"
        press(page, "1")
        page.wait_for_timeout(200)


def test_hostile_markup_runs_nothing(workplace, sit_down):
    everything = "\n\n".join(HOSTILE)
    texts = [everything, *HOSTILE[:15]]
    items = [{"messages": [{"role": "user", "content": everything}], "completions": [{"text": text} for text in texts]}]
    place = workplace(items=items, guidelines=everything, criteria=["<img src=x onerror=alert(1)>"])
    page = sit_down(place.rater)
    go(page, place)
    page.click("#show-guidelines")
    page.keyboard.press(".")
    page.wait_for_timeout(500)
    sources = page.evaluate("[...document.scripts].map((script) => script.src)")
    assert all(source.startswith(f"{page.url.split('/projects')[0]}/static/") for source in sources)
    for risk in ("img", "svg", "iframe", "form", "style", "[style]", "[onerror]", "[id]"):
        assert page.locator(f".prose {risk}").count() == 0, risk
    assert not sit_down.faults
    for link in page.locator(".prose a").all():
        assert not (link.get_attribute("href") or "https:").startswith(("javascript", "data", "vbscript", "/"))


def test_sixteen_cards_without_ties_by_keys(workplace, sit_down):
    place = workplace(number=2, texts=16, ties_allowed=False)
    page = sit_down(place.rater)
    go(page, place)
    before = ids(page)
    press(page, "a 1 b 1")
    expect(page.locator("#toast")).to_contain_text("Ties are not allowed")
    for index, letter in enumerate("abcdefghijklmnop"):
        level = 16 - index
        press(page, f"{letter} 0")
        press(page, f"{letter} {f'Shift+Digit{level - 9}' if level > 9 else level}")
    press(page, "Enter")
    next_prompt(page, before)
    assert place.stored()[0].bands == [[uid] for uid in before[::-1]]


def test_criteria_are_ranked_one_by_one(workplace, sit_down):
    place = workplace(texts=2, criteria=["helpful", "honest"])
    page = sit_down(place.rater)
    go(page, place)
    a, b = before = ids(page)
    press(page, "1 b 2 Enter")
    expect(page.locator("#toast")).to_have_text("Not placed: helpful: A, B; honest: A, B")
    press(page, ". a 1 b 1 . a 2 b 1 Enter")
    next_prompt(page, before)
    assert place.stored()[0].bands == [[a], [b]]
    assert place.stored()[0].criteria == {"helpful": [[a, b]], "honest": [[b], [a]]}


def test_a_phone_ranks_by_tapping(workplace, sit_down):
    place = workplace(texts=3)
    page = sit_down(place.rater, **PHONE)
    go(page, place)
    before = ids(page)
    for letter, level in (("B", 1), ("A", 2), ("C", 2)):
        page.tap(f".card[data-letter={letter}] .letter")
        page.tap(f".band[data-level='{level}'] .put")
    assert bands(page) == ["1B", "2AC", "3"]
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    bar = page.locator(".bar").bounding_box()
    assert bar["y"] + bar["height"] == pytest.approx(740, abs=1)
    page.tap("#submit")
    next_prompt(page, before)
    a, b, c = before
    assert place.stored()[0].bands == [[b], [a, c]]


def test_no_page_scrolls_sideways_on_a_phone(workplace, sit_down):
    place = workplace()
    page, outside = sit_down(place.rater, **PHONE), sit_down(**PHONE)
    for window, address in ((page, "/"), (page, f"/projects/{place.slug}/"), (page, "/accounts/logout/"), (outside, "/accounts/login/")):
        window.goto(address)
        assert window.evaluate("document.documentElement.scrollWidth") == 360, address


def test_a_manager_sees_progress_without_reloading(workplace, sit_down, site):
    place = workplace()
    with site.data():
        boss = desk.member(place.project, "boss-of-progress", "manager")
    watching, ranking = sit_down(boss), sit_down(place.rater)
    watching.goto(f"/projects/{place.slug}/")
    expect(watching.locator("#live")).to_contain_text("Live")
    expect(watching.locator("[data-show=done]")).to_have_text("0")
    go(ranking, place)
    before = ids(ranking)
    press(ranking, "1 b 2 c 3 d 4 Enter")
    next_prompt(ranking, before)
    expect(watching.locator("[data-show=done]")).to_have_text("1")
    expect(watching.locator("#raters tr", has_text=place.rater.username).locator("td").nth(2)).to_have_text("1")


def test_the_console_and_the_api_docs_work_under_their_policies(workplace, sit_down, site):
    workplace()
    with site.data():
        root = desk.person("root", is_staff=True, is_superuser=True)
    page = sit_down(root)
    page.goto("/api/v1/docs/")
    expect(page.locator("text=/api/v1/rankings/").first).to_be_visible()
    page.goto("/admin/")
    expect(page.locator("body")).to_contain_text("Rankloop")


def test_the_chosen_theme_lasts(sit_down):
    page = sit_down(color_scheme="light")
    page.goto("/accounts/login/")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.click("[data-theme-switch]")
    page.click("[data-theme-switch]")
    dark = page.evaluate(ground)
    page.reload()
    assert page.evaluate(ground) == dark != light
