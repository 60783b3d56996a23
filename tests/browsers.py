"""The system's Chromium, headless, for tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

# CI installs one of Debian's; a person may name another.
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FOUND = os.environ.get("VAREDIT_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
NEEDED = pytest.mark.skipif(
    FOUND is None, reason=f"there is no Chromium: install {NAMES[0]}, or set VAREDIT_CHROMIUM"
)


@contextmanager
def launched() -> Iterator[Browser]:
    """Run it while the context lasts."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=FOUND, args=["--no-sandbox", "--disable-gpu", "--no-zygote"]
        )
        yield browser
        browser.close()
