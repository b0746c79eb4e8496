"""The page in a real browser, over a pretended box."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.page.box import GIB, MORNING, RESERVED, SILENCE, TOTAL, Box, serving, stamp

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install -e .[dev])")
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 800}
HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens the page over a box; afterwards nothing may have gone elsewhere, and nothing may have gone wrong."""
    wrong: list[str] = []
    asked: list[str] = []
    with ExitStack() as stack:

        def open_page(box: Box, hash_: str = "", url: str | None = None, **context: Any) -> Any:
            url = url or stack.enter_context(serving(box))
            settings = {"viewport": DESKTOP, "timezone_id": "Europe/Berlin", "locale": "en-GB"} | context
            within = browser.new_context(**settings)
            stack.callback(within.close)
            page = within.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("dialog", lambda dialog: wrong.append(dialog.message))
            page.on("console", lambda said: "Security Policy" in said.text and wrong.append(said.text))
            page.on("request", lambda request: asked.append(urlsplit(request.url).netloc))
            page.goto(f"{url}/{hash_}")
            # The last that is told after the first look, and then the picture in which the charts are drawn.
            expect(page.locator("#version")).to_have_text("version 0.4.0")
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            return page

        yield open_page
    assert wrong == []
    assert len(set(asked)) == 1


def box_of(page: Any) -> dict[str, float]:
    return dict(page.locator(".plot canvas").first.bounding_box())


def hover(page: Any, part: float) -> Any:
    """The pointer at a part of the chart's width; the tip."""
    place = box_of(page)
    expect(page.locator(".plot .over").first).to_be_hidden()
    tip = page.locator(".tip").first
    expect(tip).to_be_hidden()
    deadline = time.monotonic() + 10
    while not tip.is_visible():
        assert time.monotonic() < deadline
        page.mouse.move(place["x"] + place["width"] * part - 1, place["y"] + 100)
        page.mouse.move(place["x"] + place["width"] * part, place["y"] + 100)
    return tip


def test_what_is_new_appears_without_a_reload(opened: Open) -> None:
    box = Box()
    page = opened(box)
    page.evaluate("window.mine = true")
    expect(page.locator(".figures")).to_contain_text("11.9 GiB of 24.0 GiB taken (51 %)")

    box.now += 4 * 60
    box.new.append(box.event(7, box.now, "cpu_fallback", "ollama:qwen3:14b"))

    expect(page.locator(".figures")).not_to_contain_text("11.9 GiB of 24.0 GiB taken")
    expect(page.locator("#events li").first).to_contain_text("qwen3:14b: CPU fallback")
    expect(page.locator("#window")).to_have_text("The last 1 h, up to now.")
    assert page.evaluate("window.mine")


def test_an_address_with_a_window_shows_that_window(opened: Open) -> None:
    begin, end = MORNING - 3 * 3600, MORNING - 2 * 3600
    page = opened(Box(), f"#from={stamp(begin)}&to={stamp(end)}")

    expect(page.locator("#window")).to_have_text("2 Mar 05:30:00 to 2 Mar 06:30:00 (1 h).")
    expect(page.locator("#link")).to_have_text("the past")
    expect(page.locator("#from")).to_have_value("2026-03-02T05:30")
    expect(page.locator("#events li time").first).to_contain_text(re.compile("2 Mar 0[56]:"))
    assert "format=csv" in page.locator("#csv").get_attribute("href")
    assert re.match("2 Mar 0(5:5|6:0)", hover(page, 0.5).locator(".when").inner_text())


def test_buttons_move_the_window_and_the_browsers_back_button_takes_it_back(opened: Open) -> None:
    page = opened(Box())

    page.get_by_role("button", name="6 h").click()
    expect(page.get_by_role("button", name="6 h")).to_have_attribute("aria-pressed", "true")
    assert page.url.endswith("#last=21600")
    page.get_by_role("button", name="Earlier").click()
    expect(page.locator("#link")).to_have_text("the past")
    assert re.search(r"#from=2026-03-01T22:30:0\dZ&to=2026-03-02T04:30:0\dZ$", page.url)
    page.get_by_role("button", name="Zoom in").click()
    expect(page.locator("#window")).to_contain_text("(3 h)")
    page.go_back()
    expect(page.locator("#window")).to_contain_text("(6 h)")
    page.get_by_role("button", name="Now").click()
    expect(page.locator("#window")).to_have_text("The last 6 h, up to now.")


def test_typed_times_are_the_window(opened: Open) -> None:
    page = opened(Box())

    page.locator("#from").fill("2026-03-02T03:00:00")
    page.locator("#to").fill("2026-03-02T04:00:00")

    expect(page.locator("#window")).to_have_text("2 Mar 03:00:00 to 2 Mar 04:00:00 (1 h).")


def test_the_tip_says_who_had_how_much(opened: Open) -> None:
    tip = hover(opened(Box()), 0.8)

    expect(tip).to_contain_text("llama3.1:8b5.6 GiB")
    expect(tip).to_contain_text("taken")
    expect(tip).to_contain_text("free")


def test_the_tip_at_a_mark_says_what_happened_and_why(opened: Open) -> None:
    at = MORNING - 15 * 60
    page = opened(Box(), f"#from={stamp(at - 120)}&to={stamp(at + 120)}")
    page.locator(".plot").focus()

    page.keyboard.press("PageUp")

    expect(page.locator(".tip")).to_contain_text("ComfyUI: freed 5.0 GiB in 2.1 s, used 88 % → 66 %")
    expect(page.locator("#spoken")).to_contain_text("above the threshold of 85 %")


def test_a_gap_is_told_as_one(opened: Open) -> None:
    middle = sum(SILENCE) / 2
    page = opened(Box(), f"#from={stamp(middle - 600)}&to={stamp(middle + 600)}")

    expect(hover(page, 0.5)).to_contain_text("Not known")


def test_dragging_over_a_chart_zooms_in(opened: Open) -> None:
    page = opened(Box())
    hover(page, 0.3)
    place = box_of(page)

    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] * 0.6, place["y"] + 100, steps=4)
    expect(page.locator(".dragged")).to_be_visible()
    page.mouse.up()

    expect(page.locator("#link")).to_have_text("the past")
    expect(page.locator("#window")).to_contain_text(re.compile(r"\(2\d min\)"))


def test_the_arrow_keys_walk_through_time_and_say_the_numbers(opened: Open) -> None:
    page = opened(Box())
    page.get_by_role("application", name="Memory of GPU 0 over time").focus()
    spoken = page.locator("#spoken")

    page.keyboard.press("ArrowLeft")
    expect(spoken).to_contain_text("2 Mar 08:30:00: 11.9 GiB taken, 11.6 GiB free, leased 2.0 GiB.")
    page.keyboard.press("Shift+ArrowLeft")
    expect(spoken).to_contain_text("2 Mar 08:29:")
    page.keyboard.press("Home")
    expect(spoken).to_contain_text("2 Mar 07:30:")
    page.keyboard.press("Escape")
    expect(page.locator(".tip")).to_be_hidden()
    page.keyboard.press("+")
    expect(page.locator("#window")).to_have_text("The last 30 min, up to now.")


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_phone_scrolls_in_one_direction_only(opened: Open, gpus: int) -> None:
    page = opened(
        Box(gpus, model="hf.co/somebody/A-Very-Long-Name-Of-A-Model-That-Goes-On-GGUF:Q4_K_M"), viewport=PHONE
    )
    expect(page.locator("#decisions li")).to_have_count(3)

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_theme_is_the_systems_until_another_is_chosen_and_that_is_remembered(opened: Open) -> None:
    page = opened(Box(), color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)

    page.get_by_role("button", name="Theme: system").click()
    light = page.evaluate(ground)
    page.reload()
    expect(page.get_by_role("button", name="Theme: light")).to_be_visible()

    assert dark == "rgb(14, 17, 22)"
    assert light == "rgb(244, 245, 247)"
    assert page.evaluate(ground) == light


@pytest.mark.parametrize(
    ("scheme", "viewport"), [("light", DESKTOP), ("dark", DESKTOP), ("light", PHONE)], ids=["light", "dark", "phone"]
)
def test_axe_finds_nothing_serious(opened: Open, scheme: str, viewport: dict[str, int]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    leak = {
        "tenant": "comfyui in use",
        "baseline_bytes": 2**30,
        "floor_bytes": 2**31,
        "growth_bytes": 2**30,
        "generations": 40,
        "leak": True,
        "points": [{"at": MORNING - 60, "bytes": 2**31, "ran": ["SDXL"]}],
    }
    box = Box(2)
    box.more = {"floors": [leak], "unreclaimable_bytes": {"GPU-0000-feed": 2**30}}
    page = opened(box, color_scheme=scheme, viewport=viewport)
    expect(page.locator("#decisions li")).to_have_count(3)
    page.locator("#events summary").first.click()
    page.locator("#table summary").click()
    page.locator("#fit").fill("9 GiB")

    found = axe.Axe().run(page).response["violations"]

    assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in {"serious", "critical"}] == []


def test_a_hostile_name_is_text(opened: Open) -> None:
    box = Box(model=HOSTILE)
    box.now += 12 * 60
    page = opened(box, "#last=21600")

    expect(page.locator("#ollama b").nth(1)).to_have_text(HOSTILE)
    expect(page.locator(".who")).to_contain_text(HOSTILE)
    expect(page.locator("#events")).to_contain_text(HOSTILE)
    assert page.locator("main img").count() == 0


def test_a_daemon_that_is_gone_is_said_and_its_return_is_seen(opened: Open) -> None:
    box = Box()
    with serving(box) as url:
        page = opened(box, url=url)
        expect(page.locator("#link")).to_have_text("live")
    expect(page.locator("#alarm")).to_contain_text("The daemon does not answer. What you see is of 08:30:0")
    box.now += 600

    with serving(box, port=urlsplit(url).port or 0):
        expect(page.locator("#alarm")).to_be_hidden()
        expect(page.locator("#link")).to_have_text("live")
        expect(page.locator("#spoken")).to_contain_text("answers again")
        box.new.append(box.event(8, box.now, "leak", "worker:tts"))
        expect(page.locator("#events li").first).to_contain_text("tts: leak")


def test_nobody_is_asked_while_nobody_looks(opened: Open) -> None:
    box = Box()
    page = opened(box)
    expect(page.locator("#link")).to_have_text("live")
    look_away = """hidden => {
        Object.defineProperty(document, "hidden", {get: () => hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""

    page.evaluate(look_away, True)
    expect(page.locator("#link")).to_have_text("paused")
    deadline = time.monotonic() + 10
    while box.readers:
        assert time.monotonic() < deadline
    page.evaluate(look_away, False)

    expect(page.locator("#link")).to_have_text("live")


def test_eight_gpus_are_small_and_one_can_be_chosen(opened: Open) -> None:
    page = opened(Box(8), "#last=7200")
    expect(page.locator(".panel")).to_have_count(8)

    page.get_by_label("GPU", exact=True).select_option(label="GPU 5 NVIDIA GeForce RTX 4090")

    expect(page.locator(".panel")).to_have_count(1)
    expect(page.locator(".panel h3")).to_contain_text("GPU 5")
    assert "gpu=GPU-0005-feed" in page.url


def test_a_gpu_that_cannot_be_seen_any_more_keeps_its_past(opened: Open) -> None:
    box = Box()
    box.more = {"gpus": [], "gpus_why": "NVML: the driver does not answer"}
    page = opened(box)

    expect(page.locator("#troubles")).to_contain_text("No GPU: NVML: the driver does not answer")
    expect(page.locator(".who")).to_have_text("It cannot be seen now.")
    expect(hover(page, 0.8)).to_contain_text("llama3.1:8b5.6 GiB")


def test_a_free_shows_the_numbers_of_the_decision_that_asked_for_it(opened: Open) -> None:
    page = opened(Box())

    page.get_by_role("combobox", name="show").select_option("freed")
    row, older = page.locator("#events > li").first, page.locator("#events > li").nth(1)
    row.locator("summary").click()
    older.locator("summary").click()

    expect(page.locator("#events li[data-type=leak]")).to_have_count(0)
    expect(row.locator(".why")).to_contain_text("decision-0412: used 88.1 % above 85 % for 30 s: ComfyUI gives way.")
    expect(row.locator(".why")).to_contain_text("free2.8 GiB")
    # It names a decision that was taken after it: the daemon has counted anew since.
    expect(older.locator("details")).to_contain_text("The numbers of this decision are no longer kept.")


def test_will_it_fit_is_answered_from_what_is_seen_and_spoken_once_asked(opened: Open) -> None:
    page = opened(Box())

    for wish, answer in {
        "7.5 GiB": "GPU 0: yes: 0.1 GiB to spare",
        "12GiB": "GPU 0: not now: 4.4 GiB short; yes if Ollama and ComfyUI give way",
        "40 GiB": "GPU 0: no: 32.4 GiB short",
        "llama3.1:8b": "llama3.1:8b is on the GPU already.",
        "much": "much: must be a size with a unit, such as 24GiB",
    }.items():
        page.locator("#fit").fill(wish)
        expect(page.locator("#fit-answer")).to_contain_text(answer)
        expect(page.locator("#spoken")).not_to_contain_text(answer)
    page.keyboard.press("Enter")
    expect(page.locator("#spoken")).to_contain_text("much: must be a size")


def test_without_a_history_the_charts_begin_now_and_that_is_said(opened: Open) -> None:
    box = Box()
    box.recorded = False
    page = opened(box)

    expect(page.locator("#no-history")).to_contain_text("The past is not shown: no history is kept: VRAM_HISTORY_MB=0.")
    expect(page.locator("#events li").first).to_contain_text("ComfyUI: freed")
    page.locator("#table summary").click()
    expect(page.locator("#table tbody tr")).to_have_count(1)
    box.now += 2
    expect(page.locator("#table tbody tr")).to_have_count(2)


def test_what_a_finger_pointed_at_stays_until_it_taps_elsewhere(opened: Open) -> None:
    page = opened(Box(), viewport=PHONE, has_touch=True)
    expect(page.locator(".plot .over")).to_be_hidden()

    page.locator(".plot").tap()
    expect(page.locator(".tip")).to_contain_text("taken")
    page.locator("#fit").tap()

    expect(page.locator(".tip")).to_be_hidden()


@pytest.mark.parametrize(
    ("name", "shown"),
    [("\u202egnp.evil:7b", " gnp.evil:7b"), ("__proto__", "__proto__"), ("x" * 9000, "x" * 992 + "…")],
    ids=["turned", "prototype", "long"],
)
def test_a_name_steers_nothing_around_it_and_fills_no_page(opened: Open, name: str, shown: str) -> None:
    box = Box()
    page = opened(box)
    box.new.append(box.event(3, box.now, "leak", name))

    newest = page.locator("#events li").first.locator("b")
    expect(newest).to_contain_text(shown.strip()[:900])
    assert len(newest.text_content()) <= 1001
    assert "\u202e" not in newest.text_content()


class Crowd(Box):
    """Each look sees a hundred tenants that nobody has seen before."""

    def snapshot(self) -> dict[str, Any]:
        self.now += 2
        return super().snapshot()

    def tenants(self, index: int, at: float) -> list[dict[str, Any]]:
        names = [f"process:run-{at:.0f}-{number}" for number in range(100 if at > MORNING else 0)]
        return super().tenants(index, at) + [
            {"kind": "process", "tenant": name, "bytes": GIB // 100, "certainty": "measured"} for name in names
        ]


def test_of_tenants_by_the_hundred_no_more_are_kept_than_are_told_apart(opened: Open) -> None:
    box = Crowd()
    page = opened(box)
    page.locator("#table summary").click()
    expect(page.locator("#table th", has_text="run-")).not_to_have_count(0)
    looks = box.asked.count("snapshot") + 3
    deadline = time.monotonic() + 20
    while box.asked.count("snapshot") < looks:
        assert time.monotonic() < deadline
        page.evaluate("1")

    page.keyboard.press("Tab")
    assert page.locator("#table th").count() <= 5 + 33
    newest = page.locator("#table tbody tr").first.locator("td").all_inner_texts()
    sizes = [float(text.split()[0]) / (1024 if text.endswith("MiB") else 1) for text in newest[5:] if text != "–"]
    assert sum(sizes) == pytest.approx(float(newest[1].split()[0]), abs=0.6)


def test_a_clock_that_is_put_back_does_not_keep_out_what_comes(opened: Open) -> None:
    box = Box()
    page = opened(box)
    page.locator("#table summary").click()
    expect(page.locator("#table tbody td").first).to_contain_text("2 Mar 08:30:00")

    box.now -= 3600 - 2.5

    expect(page.locator("#table tbody td").first).to_contain_text("2 Mar 07:30:02")
    expect(page.locator("#to")).to_have_value(re.compile("T07:30:0"))


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_window_is_the_daemons_whatever_the_browsers_clock_says(opened: Open, hours: int) -> None:
    page = opened(Box())
    page.add_init_script(f"Date.now = () => {(MORNING + hours * 3600) * 1000} + performance.now();")
    page.reload()

    expect(page.locator("#to")).to_have_value(re.compile("T08:30"))
    expect(page.locator("#events li").first).to_contain_text("2 Mar 08:")
    expect(page.locator("#leases")).to_contain_text(re.compile("expires in [45] min"))


def test_what_happened_while_the_reader_slept_is_no_gap(opened: Open) -> None:
    box = Box()
    page = opened(box)
    box.now += 900

    page.evaluate("(() => { const right = Date.now; Date.now = () => right() + 900000; })()")

    expect(page.locator("#to")).to_have_value(re.compile("T08:45"))
    expect(hover(page, 0.9).locator(".when")).to_contain_text(re.compile("08:(3[5-9]|4[0-4])"))
    expect(page.locator(".tip").first).to_contain_text("taken")


def test_a_gpu_that_was_larger_fits_into_its_chart(opened: Open) -> None:
    class Exchanged(Box):
        def gpu(self, index: int) -> dict[str, Any]:
            return super().gpu(index) | {"total_bytes": 12 * GIB, "taken_bytes": 2 * GIB, "free_bytes": 10 * GIB}

        def column(self, index: int, times: list[float]) -> dict[str, Any]:
            return super().column(index, times) | {"total_bytes": 12 * GIB}

    page = opened(Exchanged())

    top = page.evaluate("Chart.getChart(document.querySelector('.plot canvas')).scales.y.max")
    assert top == TOTAL - RESERVED


def test_the_page_may_stand_under_a_path_of_a_proxy(opened: Open) -> None:
    class Below(Box):
        def app(self) -> Starlette:
            return Starlette(routes=[Mount("/vram", super().app())])

    with serving(Below()) as url:
        page = opened(Box(), url=f"{url}/vram")

        expect(page.locator("#link")).to_have_text("live")
        expect(page.locator("#events li").first).to_contain_text("ComfyUI: freed")
        assert page.evaluate("fetch(document.querySelector('#csv').href).then(reply => reply.status)") == 200
