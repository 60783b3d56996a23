"""An evaluation's page in headless Chromium."""

from pathlib import Path

from browsers import NEEDED, launched
from evaluating import Shifted, evaluated, own_data, write_lines

pytestmark = NEEDED


def test_the_page_sorts_and_asks_for_nothing(tmp_path: Path) -> None:
    """A row's instruction tries to load a script and a picture."""
    data = own_data(tmp_path / "data", 3)
    lines = (data / "edits.jsonl").read_text().splitlines()
    evil = {"image": "0.png", "instruction": "<script src=//e.org></script><img src=//e.org/x>"}
    write_lines(data, [*lines, evil])
    evaluated(data, tmp_path / "run", Shifted(), Shifted(20))
    with launched() as browser:
        page, asked, wrong = browser.new_page(), list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto((tmp_path / "run/report.html").as_uri())
        page.set_viewport_size({"width": 1200, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 1200  # tables scroll alone
        cases = page.locator("p span[title]")
        assert len(cases.get_attribute("title") or "") == 64 and len(cases.inner_text()) == 9
        column, last = "#edits tbody td:nth-child(5)", "#edits tbody tr:last-child"

        def values() -> list[float]:
            texts = page.locator(column).all_inner_texts()
            return [float(text.split()[0]) for text in texts if text != "–"]

        assert values() == sorted(values()) and len(values()) == 3
        page.get_by_role("button", name="PSNR outside").click()
        assert values() == sorted(values(), reverse=True)
        assert "<script" in page.locator(last).inner_text()  # it has no mask, and so no PSNR
        page.get_by_role("button", name="MSE outside").click()
        assert page.locator("th[aria-sort]").inner_text().startswith("MSE outside")
        loaded = page.locator("img").evaluate_all("all => all.every(one => one.naturalWidth > 0)")
        assert loaded and page.locator("img").count() == 3 * 3 + 2
    assert [url for url in asked if not url.startswith("data:")] == [asked[0]] and not wrong
