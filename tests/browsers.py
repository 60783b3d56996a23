"""A headless Chromium for tests of pages: the one that `make test` unpacks, or the system's."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

UNPACKED = Path(__file__).parent.parent / "build" / "chromium"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FOUND = next(filter(None, map(shutil.which, (str(UNPACKED / "chromium"), *NAMES))), None)
NEEDED = pytest.mark.skipif(
    FOUND is None, reason="there is no Chromium: install npm and run make test, or install one"
)


@contextmanager
def launched() -> Iterator[Browser]:
    """Run it while the context lasts. Pages are waited for as long as a busy machine may need."""
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=FOUND,
            args=["--no-sandbox", "--disable-gpu", "--no-zygote", "--disable-dev-shm-usage"],
            timeout=120_000,
            env={**os.environ, "LD_LIBRARY_PATH": str(UNPACKED / "al2023" / "lib")},
        )
        yield browser
        browser.close()
