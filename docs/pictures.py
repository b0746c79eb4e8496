"""Writes the pictures of the page: page-light.png, page-dark.png and page-phone.png, beside this file.

    python docs/pictures.py http://localhost:8189

Needs playwright and a Chromium of the system; the daemon there should have been at work for a while.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture of the page: its window in time, theme and screen, in pixels."""

    name: str
    window: str
    theme: str
    width: int
    height: int


PICTURES = (
    Picture(name="page-light", window="#last=900", theme="light", width=1440, height=900),
    Picture(name="page-dark", window="#last=3600", theme="dark", width=1440, height=900),
    Picture(name="page-phone", window="#last=900", theme="light", width=360, height=800),
)


def take(url: str, to: Path) -> None:
    """All pictures of the page at `url`, as PNG files in `to`."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("pictures: no Chromium on the PATH: install your system's package")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for picture in PICTURES:
            page = browser.new_page(
                viewport={"width": picture.width, "height": picture.height},
                color_scheme="dark" if picture.theme == "dark" else "light",
                device_scale_factor=2 if picture.width < 500 else 1,
                locale="en-GB",
            )
            page.goto(f"{url.rstrip('/')}/{picture.window}")
            page.locator("#decisions li").first.wait_for()
            page.locator("#link[data-state=live]").wait_for()
            page.screenshot(path=to / f"{picture.name}.png", full_page=picture.width < 500)
            page.close()
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} BASE_URL")
    take(sys.argv[1], HERE)
