"""The page in headless Chromium: what a person sees and does, at two widths, light and dark."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest
from browsers import NEEDED, launched
from playwright.sync_api import Browser, Page, expect
from server_process import PERSON, Process, running

KEY = "sk-0123456789abcdef"

pytestmark = NEEDED


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"me {KEY}\n")
    with running("--keys", str(keys)) as started:
        yield started


class Visit:
    """A page that is open. asked: the addresses that it has asked; wrong: errors of its script."""

    def __init__(self, page: Page, server: Process) -> None:
        self.page, self.asked, self.wrong = page, list[str](), list[str]()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.address = f"http://127.0.0.1:{server.port}/"
        page.goto(self.address)

    def says(self, text: str) -> None:
        expect(self.page.locator("#status")).to_contain_text(text)

    def choose(self, picture: Path) -> None:
        self.page.set_input_files("#file", picture)

    def edit(self, instruction: str) -> None:
        self.page.fill("#prompt", instruction)
        self.page.press("#prompt", "Enter")

    def pixels(self, selector: str) -> list[int]:
        """Return a picture's pixels as the page has them, RGBA."""
        return self.page.evaluate(
            """async (selector) => {
                const image = document.querySelector(selector);
                await image.decode();
                const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
                const pen = canvas.getContext("2d");
                pen.drawImage(image, 0, 0);
                return [...pen.getImageData(0, 0, canvas.width, canvas.height).data];
            }""",
            selector,
        )

    def has(self, url: str) -> bool:
        """Return whether the page can still show a picture."""
        shown = "(url) => Object.assign(new Image(), { src: url }).decode()"
        return self.page.evaluate(f"url => ({shown})(url).then(() => true, () => false)", url)

    def check(self) -> None:
        """Check what holds at all times."""
        sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert self.page.evaluate(sideways) == 0
        assert not self.wrong
        for url in self.asked:
            assert url.startswith((self.address, "blob:", "data:")), urlsplit(url).netloc


@pytest.fixture(
    params=[(1280, 800, "light"), (390, 844, "dark")], ids=["desk", "phone"], scope="module"
)
def visit(request: pytest.FixtureRequest, browser: Browser, server: Process) -> Iterator[Visit]:
    width, height, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=_scheme(scheme)
    )
    context.set_default_timeout(60_000)
    yield Visit(context.new_page(), server)
    context.close()


def _scheme(name: str) -> Literal["light", "dark"]:
    return "dark" if name == "dark" else "light"


def test_a_person_edits_turn_by_turn(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    visit.says("needs an API key")
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    expect(page.locator("#model")).to_have_text("nano")
    expect(page.locator("#status")).to_have_text("")

    no_picture = tmp_path / "photo.png"
    no_picture.write_text("this is text")
    visit.choose(no_picture)
    visit.says("damaged, or this browser cannot show it")
    expect(page.locator("#views")).to_be_hidden()
    visit.check()

    visit.choose(PERSON)
    visit.edit("add a hat")
    visit.says("Done, seed")
    expect(page.locator("#history li")).to_have_count(2)
    expect(page.locator("#slider")).to_be_visible()
    assert visit.pixels("#before") != visit.pixels("#after")

    page.fill("#seed", "5")
    page.focus("#slider")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("m")
    page.locator("#mask").scroll_into_view_if_needed()
    box = page.locator("#mask").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.1)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.1)
    page.mouse.up()
    visit.edit("make it red")
    visit.says("Done, seed 5.")
    expect(page.locator("#history li")).to_have_count(3)
    before, after = visit.pixels("#before"), visit.pixels("#after")
    half = len(before) // 2
    assert before[half:] == after[half:], "what was not painted has changed"
    visit.check()

    page.locator("#history button").first.click()
    expect(page.locator("#slider")).to_be_hidden()
    visit.check()


def test_an_edit_is_cancelled_and_a_refusal_is_told(visit: Visit) -> None:
    page = visit.page
    page.fill("#key", KEY)
    gone = page.locator("#history img").evaluate_all("all => all.map(one => one.src)")
    visit.choose(PERSON)
    expect(page.locator("#history li")).to_have_count(1)
    assert not any(map(visit.has, gone)), "pictures of before are kept in memory"
    page.route("**/v1/images/edits", lambda route: None)  # it is never answered
    visit.edit("add a hat")
    visit.says("Waiting")
    expect(page.locator("#cancel")).to_be_visible()
    page.keyboard.press("Escape")
    visit.says("Cancelled.")
    page.unroute("**/v1/images/edits")
    page.fill("#seed", "")
    visit.edit("x " * 500)
    visit.says("the instruction has")
    expect(page.locator("#history li")).to_have_count(1)
    visit.check()
