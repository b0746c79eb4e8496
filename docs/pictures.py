"""Makes the pictures in this folder, from a busy simulated box: the page, `top` and `report`.

    python docs/pictures.py [--minutes 40]

An Ollama, a ComfyUI, a worker and others share one of two simulated GPUs, in front of them the real daemon with its
gateways, and one further Ollama server. The first minutes go thirty times as fast, so that there is something to see.
Needs the development dependencies, a C compiler (for the fake NVML library) and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.text import Text

from benchmarks.processes import answers, free_ports, process, until
from tests.fake_nvml import build
from vram_manager.client import call
from vram_manager.report import text
from vram_manager.report.terminal import Terminal
from vram_manager.summary import document
from vram_manager.top import picture

HERE = Path(__file__).parent
FAST = (sys.executable, str(HERE.parent / "benchmarks" / "fast.py"))
SPEED = 30.0
GPUS, NODES = 2, 1
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One picture of the page: its window in time, theme and screen, in pixels."""

    name: str
    window: str
    theme: str
    width: int
    height: int


SHOTS = (
    Shot(name="page", window="#last=900", theme="light", width=1440, height=1500),
    Shot(name="page-dark", window="#last=900", theme="dark", width=1440, height=1500),
    Shot(name="page-phone", window="#last=900", theme="light", width=390, height=844),
)


@contextmanager
def busy_box(directory: Path, minutes: float) -> Iterator[str]:
    """The address of a daemon that has been at work for so long."""
    ollama, comfyui, http, chat, image = _ports()
    caught_up = time.time() + 60 * minutes / SPEED + 3
    settings = {
        "FAST_SPEED": str(SPEED),
        "FAST_UNTIL": str(caught_up),
        "PYTHONWARNINGS": "ignore",  # the worker is there a moment before the daemon
        "OLLAMA_URL": f"http://127.0.0.1:{ollama}",
        "COMFYUI_URL": f"http://127.0.0.1:{comfyui}",
        "OLLAMA_GPU": "0",
        "COMFYUI_GPU": "0",
        "OLLAMA_NODES": f"http://127.0.0.1:{ollama + 1}",
        "GATEWAY_OLLAMA_PORT": str(chat),
        "GATEWAY_COMFYUI_PORT": str(image),
        "THROUGH_OLLAMA": f"http://127.0.0.1:{chat}",
        "THROUGH_COMFYUI": f"http://127.0.0.1:{image}",
        "VRAM_HTTP_PORT": str(http),
        "VRAM_CHECK_TIMEOUT_SECONDS": "120",  # as the others, it goes by thirty times as fast
        "VRAM_SOCKET": str(directory / "vram.sock"),
        "VRAM_STATE_DIR": str(directory / "state"),
        "FAKE_NVML_STATE": str(directory / "gpu.state"),
        "LD_LIBRARY_PATH": str(build(directory).parent),
    }
    numbers = (ollama, comfyui, directory / "gpu.state", GPUS, NODES)
    with ExitStack() as stack:
        stack.enter_context(process(*FAST, "simulate", *map(str, numbers), **settings))
        until(lambda: answers(comfyui))
        stack.enter_context(process(*FAST, "run", **settings))
        os.environ["VRAM_SOCKET"] = settings["VRAM_SOCKET"]
        until(lambda: call("GET", "/ready").status == 200)
        print(f"{minutes:g} minutes go by in {caught_up - time.time():.0f} s", flush=True)
        time.sleep(max(0.0, caught_up - time.time()))
        _until_busy()
        yield f"http://127.0.0.1:{http}"


def _ports() -> list[int]:
    """Free ones; the one after the first, which is the node's, as well."""
    while True:
        found = free_ports(5)
        if found[0] + 1 not in found:
            try:
                answers(found[0] + 1)
            except OSError:
                return found


def _until_busy() -> None:
    """There is something to see: a model on the GPU, ComfyUI at work or somebody waiting. Two minutes at most."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        seen = call("GET", "/v1/snapshot").body
        kinds = {share["kind"] for share in seen["gpus"][0]["tenants"]}
        if {"ollama", "worker"} <= kinds and any(kind.startswith("comfyui") for kind in kinds):
            return
        time.sleep(0.5)


def of_the_page(browser: Browser, url: str) -> None:
    for shot in SHOTS:
        page = browser.new_page(
            viewport={"width": shot.width, "height": shot.height},
            color_scheme="dark" if shot.theme == "dark" else "light",
            device_scale_factor=2 if shot.width < 500 else 1,
            locale="en-GB",
        )
        page.goto(f"{url}/{shot.window}")
        page.locator("#decisions li").first.wait_for()
        page.locator("#link[data-state=live]").wait_for()
        page.wait_for_timeout(2500)  # so that what is live has moved at least once
        page.screenshot(path=HERE / f"{shot.name}.png")
        page.close()


def of_the_terminal(browser: Browser) -> None:
    snapshot: dict[str, Any] = call("GET", "/v1/snapshot").body
    events = call("GET", "/v1/events?limit=50").body["events"]
    drawn = picture(
        snapshot,
        health=call("GET", "/health").body,
        events=events,
        history=call("GET", "/v1/history?from=-10m&step=5").body,
        now=time.time(),
        width=120,
        height=38,
    )
    _shoot(browser, drawn, "top")
    told = text(document(snapshot, events[-8:]), Terminal(width=104, colour=True))
    console = Console(record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor", width=104)
    console.print(Text.from_ansi(told), no_wrap=True, overflow="crop")
    _shoot(browser, console.export_svg(title="vram-manager report", unique_id="report"), "report")


def _shoot(browser: Browser, svg: str, name: str) -> None:
    # No font from somebody else's server.
    svg = re.sub(r"@font-face\s*\{.*?\}\s*", "", svg, flags=re.DOTALL)
    page = browser.new_page(device_scale_factor=1.0)
    page.set_content(f"<style>body{{margin:0}}svg{{display:block;width:1200px}}</style>{svg}")
    page.locator("svg").first.screenshot(path=HERE / f"{name}.png")
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0)
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("pictures: no Chromium on the PATH: install your system's package")
    with (
        tempfile.TemporaryDirectory() as name,
        busy_box(Path(name), options.minutes) as url,
        sync_playwright() as tools,
    ):
        browser = tools.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        of_the_terminal(browser)
        of_the_page(browser, url)
        browser.close()


if __name__ == "__main__":
    main()
