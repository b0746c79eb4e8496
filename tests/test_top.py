"""`vram-manager top`: what is drawn, what keys do, and the real verb in a real terminal."""

from __future__ import annotations

import fcntl
import http.server
import json
import os
import pty
import re
import select
import signal
import socketserver
import struct
import subprocess
import sys
import termios
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import InThread
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.share import ShareKind
from vram_manager.top import picture
from vram_manager.top.frame import frame, furthest
from vram_manager.top.gpus import bar, chart
from vram_manager.top.keys import PACES, Panel, Screen, Wish, keys_in, pressed
from vram_manager.top.layout import shares
from vram_manager.top.look import NO_LETTER, Look, clean, duration, letters
from vram_manager.top.seen import MAX_EVENTS, Heard, Seen

GIB = 2**30
NOW = 1_800_000_000.0
AT = "2027-01-15T08:00:00.000Z"
SIZES = [(60, 20), (80, 24), (120, 40), (200, 60)]
PLAIN, MONO, ASCII = Look(), Look(colour=False), Look(unicode=False, colour=False)


def share(tenant: str, gib: float, kind: str | None = None, certainty: str = "measured") -> dict[str, Any]:
    return {
        "kind": kind or tenant.partition(":")[0],
        "tenant": tenant,
        "bytes": round(gib * GIB),
        "certainty": certainty,
    }


def gpu(index: int = 0, *tenants: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A GPU of 24 GiB that has these tenants."""
    taken = sum(one["bytes"] for one in tenants)
    whole = {
        "index": index,
        "uuid": f"GPU-{index}",
        "name": "NVIDIA GeForce RTX 4090",
        "vendor": "nvidia",
        "source": "NVML",
        "trust": "measured",
        "unified": False,
        "asleep": False,
        "total_bytes": 24 * GIB,
        "used_bytes": taken,
        "free_bytes": 24 * GIB - taken,
        "reserved_bytes": 0,
        "taken_bytes": taken,
        "used_percent": 100 * taken / (24 * GIB),
        "why": None,
        "utilization_percent": 97,
        "temperature_celsius": 64,
        "power_watts": 312.4,
        "processes": None,
        "processes_why": "not visible",
        "leased_bytes": 0,
        "limits": {
            "threshold_bytes": 18 * GIB,
            "unload_threshold_bytes": 20 * GIB,
            "soft_limit_bytes": 21 * GIB,
            "hard_limit_bytes": 23 * GIB,
        },
        "tenants": list(tenants),
    }
    return {**whole, **changes}


def unknown(index: int = 0, **changes: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("total_bytes", "used_bytes", "free_bytes", "taken_bytes", "used_percent", "limits"))
    return gpu(index, **nothing, **{"why": "NVML was lost", **changes})


FULL = (
    share("ollama:llama3.1:8b", 6),
    share("comfyui in use", 5, "comfyui_in_use"),
    share("comfyui cached", 2, "comfyui_cached"),
    share("worker:tts", 3),
    share("process:Xorg", 0.5),
    share("others", 0.5, "others", "perhaps"),
)


def model(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "digest": "a" * 64,
        "size_bytes": 6 * GIB,
        "size_vram_bytes": 6 * GIB,
        "cpu_ratio": 0.0,
        "context_length": 4096,
        "expires_at": "2027-01-15T08:04:05+00:00",
        "requests": 1,
        **changes,
    }


def snapshot(*gpus: dict[str, Any], models: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "taken_at": AT,
        "age_seconds": 0.1,
        "gpus": list(gpus),
        "gpus_why": None,
        "gpus_left_out": [],
        "second_hand": False,
        "ollama": {"state": "ok", "version": "0.32.15", "age_seconds": 0.1, "models": models or []},
        "comfyui": {
            "state": "ok",
            "queue_remaining": 0,
            "idle_seconds": 132.4,
            "version": "0.33.0",
            "argv": [],
            "devices": [
                {
                    "name": "cuda:0",
                    "vram_total_bytes": 24 * GIB,
                    "device_free_bytes": GIB,
                    "torch_total_bytes": 7 * GIB,
                    "torch_free_bytes": 2 * GIB,
                }
            ],
        },
        "leases": [],
        "demands": [],
        "unreclaimable_bytes": {},
        "settling": None,
        "now": "nobody needs more",
        "line": [],
        "held": [],
        **changes,
    }


WAITING = {
    "line": [
        {
            "position": 1,
            "owner": "captions",
            "required": "12.0 GiB",
            "required_bytes": 12 * GIB,
            "gpu": None,
            "priority": "batch",
            "waited_seconds": 12.3,
            "eta_seconds": 40.0,
        }
    ],
    "held": [{"upstream": "ollama", "what": "qwen3:14b", "why": "qwen3:14b waits for room", "waited_seconds": 7.0}],
    "leases": [
        {
            "id": "lease-1",
            "owner": "video",
            "gpu": "GPU-0",
            "bytes": 4 * GIB,
            "visible_bytes": 3 * GIB,
            "overclaimed_bytes": GIB,
            "expires_at": None,
        }
    ],
    "nodes": [
        {
            "url": "http://box2:11434",
            "state": "ok",
            "verdict": "split",
            "vram_bytes": 5 * GIB,
            "models": [model("gemma3:4b")],
        },
        {"url": "http://box3:11434", "state": "missing", "why": "connection refused"},
    ],
    "floors": [{"tenant": "worker:tts", "growth_bytes": GIB, "generations": 40, "leak": True}],
}


def event(number: int, kind: str = "freed", **changes: Any) -> dict[str, Any]:
    fields = {
        "id": f"free-{number:04d}",
        "at": AT,
        "type": kind,
        "target": "comfyui",
        "reason": "llama3.1:8b is 38 % on CPU",
        "gpu": "GPU-0",
        "stage": "soft",
        "freed_bytes": 9 * GIB,
        "took_seconds": 1.2,
        "used_percent_before": 91.0,
        "used_percent_after": 52.0,
        "action_id": None,
        "decision_id": "decision-0007",
    }
    return {**fields, **changes}


HEALTH = {
    "status": "ok",
    "version": "0.4.0",
    "sensors": {"nvml": {"state": "ok"}},
    "dry_run": False,
    "monitoring": True,
}


def seen(*gpus: dict[str, Any], events: int = 0, **changes: Any) -> Seen:
    happened = [event(number) for number in range(1, events + 1)]
    return Seen().heard(Heard(health=HEALTH, snapshot=snapshot(*gpus, **changes), events=happened))


def drawn(
    what: Seen, width: int = 80, height: int | None = 24, look: Look = MONO, screen: Screen | None = None
) -> list[str]:
    return [line.plain for line in frame(what, screen or Screen(), look, width=width, height=height, now=NOW)]


# What is drawn.

NOTHING = {"taken_at": None, "gpus": [], "gpus_why": None, "leases": [], "line": [], "held": [], "now": None}
STATES: dict[str, Callable[[], Seen]] = {
    "nothing answered yet": Seen,
    "nothing seen yet": lambda: Seen().heard(Heard(health=HEALTH, snapshot=NOTHING, events=[])),
    "one GPU": lambda: seen(gpu(0, *FULL, leased_bytes=2 * GIB), events=30, models=[model("llama3.1:8b")], **WAITING),
    "eight GPUs": lambda: seen(
        *(gpu(index, *FULL[:index]) for index in range(6)), unknown(6), unknown(7, asleep=True), events=30, **WAITING
    ),
    "sixteen GPUs": lambda: seen(*(gpu(index, *FULL) for index in range(16)), events=3),
    "unknown memory": lambda: seen(unknown(), events=2),
    "asleep": lambda: seen(unknown(asleep=True, why="asleep: not woken to be read")),
    "unified": lambda: seen(gpu(0, *FULL, unified=True, trust="derived", source="meminfo", name="NVIDIA GB10")),
    "forty models": lambda: seen(
        gpu(0, *(share(f"ollama:m{number}:7b", 0.5) for number in range(40))),
        models=[model(f"m{number}:7b", cpu_ratio=None, requests=None) for number in range(40)],
        events=9,
    ),
    "a daemon that is away": lambda: seen(gpu(0, *FULL), events=9).silent(75, "no daemon: nobody listens any more"),
    "parts that cannot be read": lambda: seen(
        gpus_why="NVML was lost",
        gpus_left_out=["card1: no driver that tells"],
        ollama={"state": "missing", "why": "connection refused", "models": None},
        comfyui={"state": "missing", "why": "timed out", "queue_remaining": None, "idle_seconds": None},
    ),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("state", STATES)
def test_a_frame_fills_the_terminal_and_no_line_is_wider(state: str, size: tuple[int, int]):
    width, height = size
    for look in (PLAIN, ASCII):
        for panel in Panel:
            screen = Screen(panel=panel, event="free-0002", gpu=3)
            lines = frame(STATES[state](), screen, look, width=width, height=height, now=NOW)
            assert len(lines) == height
            assert max(line.cell_len for line in lines) <= width


@pytest.mark.parametrize("state", STATES)
def test_without_unicode_every_line_is_ascii(state: str):
    for panel in Panel:
        lines = drawn(STATES[state](), look=ASCII, screen=Screen(panel=panel, event="free-0001"))
        assert "\n".join(lines).isascii()


NAMES = st.text(max_size=300) | st.sampled_from(
    ["\x1b[2J\x1b]0;title\x07", "模型" * 80, "e\u0301\u202e\u200d👩‍👩‍👧", "\n\r\t"]
)


@settings(max_examples=30, deadline=None)
@given(NAMES, st.integers(1, 230), st.integers(1, 70), st.sampled_from([PLAIN, MONO, ASCII]), st.sampled_from(Panel))
def test_no_name_breaks_a_line(name: str, width: int, height: int, look: Look, panel: Panel):
    decision = {"id": "decision-0007", "at": AT, "until": AT, "reason": name, "branch": name, "inputs": {name: [name]}}
    happened = [event(1, reason=name, target=name)]
    told = snapshot(
        gpu(0, share(f"ollama:{name}", 3, "ollama"), share(name, 2, "worker"), name=name),
        unknown(1, name=name, why=name),
        models=[model(name)],
        now=name,
        **{
            **WAITING,
            "line": [{**WAITING["line"][0], "owner": name}],
            "held": [{**WAITING["held"][0], "what": name, "why": name}],
            "leases": [{**WAITING["leases"][0], "owner": name}],
            "nodes": [{"url": f"http://{name[:9].replace('[', '').replace(']', '')}", "state": "missing", "why": name}],
        },
    )
    what = Seen().heard(Heard(health=HEALTH, snapshot=told, events=happened, decisions=[decision]))
    lines = frame(what, Screen(panel=panel, event="free-0001"), look, width=width, height=height, now=NOW)
    assert len(lines) == height
    assert all(line.cell_len <= width and line.plain.isprintable() for line in lines)


def test_eight_gpus_and_all_that_matters_fit_into_24_lines():
    lines = drawn(STATES["eight GPUs"]())
    assert [line[:4].strip() for line in lines[2:10]] == ["▶  0", "1", "2", "3", "4", "5", "6", "7"]
    assert "memory unknown: NVML was lost" in lines[8]
    shown = "\n".join(lines[10:])
    assert all(part in shown for part in ("Tenants of GPU 0", "Ollama", "ComfyUI", "Waiting", "captions", "Events"))


def test_of_more_gpus_than_fit_those_around_the_chosen_one_are_shown():
    lines = drawn(STATES["sixteen GPUs"](), screen=Screen(gpu=13))
    assert any(line.startswith("▶ 13 ") for line in lines)
    assert not any(line.startswith("   0 ") for line in lines)
    assert "12 of 16 GPUs: g shows the next" in "\n".join(lines)


def test_the_head_says_what_is_not_as_it_should_be():
    health = {**HEALTH, "status": "degraded", "dry_run": True, "monitoring": False}
    health["sensors"] = {"nvml": {"state": "ok"}, "comfyui": {"state": "missing"}}
    what = Seen().heard(Heard(health=health, snapshot=snapshot(gpu(), second_hand=True), events=[]))
    first, second = drawn(what, 120, screen=Screen(paused=True))[:2]
    for words in ("degraded: comfyui cannot be read", "DRY RUN", "NOT MONITORING", "second-hand", "PAUSED", "0.4.0"):
        assert words in first
    assert second == "Now: nobody needs more"


def test_a_daemon_that_is_away_leaves_the_last_picture_dim():
    lines = frame(STATES["a daemon that is away"](), Screen(), PLAIN, width=80, height=24, now=NOW)
    assert lines[1].plain == "No answer for 1 min 15 s, trying again: no daemon: nobody listens any more"
    assert "llama3.1:8b" in lines[7].plain
    assert all(any(span.style.dim for span in line.spans if not isinstance(span.style, str)) for line in lines[2:8])


def test_of_an_older_daemon_the_memory_is_shown():
    card = gpu(0, *FULL)
    for name in ("taken_bytes", "leased_bytes", "tenants", "limits", "vendor", "source", "trust", "unified", "asleep"):
        del card[name]
    told = {"taken_at": snapshot()["taken_at"], "gpus": [card], "now": "nobody needs more"}
    lines = drawn(Seen().heard(Heard(health=HEALTH, snapshot=told, events=[])))

    assert f"taken {gpu(0, *FULL)['taken_bytes'] / GIB:.1f} of" in "\n".join(lines)


def test_a_model_says_where_it_is_and_how_long_it_stays():
    models = [
        model("on-gpu"),
        model("half", cpu_ratio=0.38, requests=None),
        model("pinned", expires_at="2318-01-01T00:00:00Z"),
        model("over", expires_at="2027-01-15T07:00:00Z", cpu_ratio=None),
    ]
    lines = [line for line in drawn(seen(gpu(), models=models)) if " GiB " in line and "ctx" in line]
    one, two, three, four = (" ".join(line.split()) for line in lines)
    assert one == "on-gpu 6.0 GiB on GPU ctx 4096 4m05s left 1 req"
    assert two == "half 6.0 GiB 38 % CPU ctx 4096 4m05s left"
    assert "stays" in three
    assert "place ?" in four
    assert "goes now" in four


def test_what_is_shortened_says_how_much_is_missing():
    text = "\n".join(drawn(STATES["forty models"]()))
    missing = re.search(r"^Ollama  0\.32\.15  (\d+) more", text, re.MULTILINE)
    assert missing is not None
    assert int(missing[1]) + text.count("place ?") == 40


def test_the_chosen_event_is_always_on_the_screen():
    what = seen(gpu(0, *FULL), events=50)
    for number in (50, 30, 1):
        chosen = [line for line in drawn(what, screen=Screen(event=f"free-{number:04d}")) if line.startswith("▶")]
        assert len(chosen) == 1
        assert any(
            f"[free-{number:04d}]" in line for line in drawn(what, 160, screen=Screen(event=f"free-{number:04d}"))
        )


def test_behind_an_event_are_its_free_and_the_numbers_of_its_decision():
    decision = {
        "id": "decision-0007",
        "at": AT,
        "until": AT,
        "reason": "llama3.1:8b waits for 6.0 GiB: ask ComfyUI for a soft free",
        "branch": "6 act",
        "inputs": {"gpus": [{"free_bytes": 3 * GIB}], "demands": []},
    }
    asked, freed = event(1, "free_asked", freed_bytes=None), event(2, action_id="free-0001", decision_id=None)
    what = Seen().heard(Heard(health=HEALTH, snapshot=snapshot(gpu()), events=[asked, freed], decisions=[decision]))
    text = "\n".join(drawn(what, 120, screen=Screen(panel=Panel.EVENT, event="free-0002")))
    for words in (
        "free asked",
        "9.0 GiB in 1.2 s",
        "waits for 6.0 GiB",
        "6 act",
        "free_bytes: 3.0 GiB",
        "demands: none",
    ):
        assert words in text


@pytest.mark.parametrize("decision_id", ["decision-0007", None])
def test_an_event_without_its_decision_says_so(decision_id: str | None):
    what = Seen().heard(
        Heard(health=HEALTH, snapshot=snapshot(gpu()), events=[event(1, decision_id=decision_id)])
    )  # fmt: skip
    text = "\n".join(drawn(what, screen=Screen(panel=Panel.EVENT, event="free-0001")))
    assert ("no longer remembered" if decision_id else "no decision is behind it") in text
    assert "too old" in "\n".join(drawn(what, screen=Screen(panel=Panel.EVENT, event="free-0000")))


def test_a_panel_can_be_scrolled_to_its_end_and_not_beyond():
    decisions = [
        {
            "id": f"decision-{number}",
            "at": AT,
            "until": AT,
            "count": 2,
            "reason": f"reason {number}",
            "branch": "3 nobody",
        }
        for number in range(60)
    ]
    what = Seen().heard(Heard(health=HEALTH, snapshot=snapshot(gpu()), events=[], decisions=decisions))
    first = drawn(what, screen=Screen(panel=Panel.WHY))
    assert "reason 0" in first[3]
    assert "lines below" in first[2]
    last = drawn(what, screen=Screen(panel=Panel.WHY, scroll=10_000))
    assert "reason 59" in "\n".join(last[-4:])
    assert "lines below" not in last[2]
    end = furthest(what, Screen(panel=Panel.WHY), MONO, width=80, height=24)
    assert drawn(what, screen=Screen(panel=Panel.WHY, scroll=end)) == last
    assert drawn(what, screen=Screen(panel=Panel.WHY, scroll=end - 1)) != last
    down, _ = pressed(Screen(panel=Panel.WHY, scroll=end), "page down", gpus=1, events=(), furthest=end)
    assert down.scroll == end
    assert furthest(what, Screen(), MONO, width=80, height=24) == 0


def test_nothing_is_lost_where_a_panel_wraps():
    words = [f"word{number}" for number in range(60)]
    decision = {"id": "d", "at": AT, "until": AT, "reason": " ".join(words), "branch": "b"}
    what = Seen().heard(Heard(health=HEALTH, snapshot=snapshot(gpu()), events=[], decisions=[decision]))
    for width in (30, 80):
        text = " ".join(drawn(what, width, 60, screen=Screen(panel=Panel.WHY))[3:-1])
        assert [word for word in text.split() if word.startswith("word")] == words


def test_what_else_a_snapshot_says_is_shown():
    comfyui = {**snapshot()["comfyui"], "queue_remaining": 3, "idle_seconds": 0.0}
    demands = [
        {
            "kind": "pressure",
            "gpu": "GPU-0",
            "need_free_bytes": GIB,
            "reason": "GPU 0 is 91 % used",
            "age_seconds": 12.0,
        },
        {"kind": "waiting", "gpu": "GPU-0", "need_free_bytes": GIB, "reason": "captions waits", "age_seconds": 12.0},
    ]
    what = seen(gpu(0), comfyui=comfyui, demands=demands, unreclaimable_bytes={"GPU-0": 2 * GIB}, line=WAITING["line"])
    text = "\n".join(drawn(what, 120, 40))
    assert "ComfyUI  0.33.0  busy, 3 in the queue" in text
    assert "GPU 0 is 91 % used (needs 1.0 GiB free, for 12 s)" in text
    assert "2.0 GiB stay in use although everybody was asked" in text
    # Who waits in line is in the line already.
    assert "captions waits" not in text


# Bars and charts.


def test_a_bar_is_stacked_by_tenant_with_its_limits_marked():
    letters_of = letters([(one["kind"], one["tenant"]) for one in FULL], {})
    drawn_bar = bar(gpu(0, *FULL, leased_bytes=2 * GIB), letters_of, 48, MONO)
    assert drawn_bar.plain == "AAAAAAAAAAAACCCCCCCCCCccccBBBBBBD?░░┆░········┃·"


@given(
    st.lists(st.floats(0, 8), max_size=12), st.integers(0, 200), st.floats(0, 30), st.sampled_from([PLAIN, MONO, ASCII])
)
def test_a_bar_has_its_width_and_everybody_with_a_cells_worth_is_in_it(
    sizes: list[float], width: int, leased: float, look: Look
):
    shares_of = [share(f"worker:{number}", size) for number, size in enumerate(sizes)]
    letters_of = letters([("worker", one["tenant"]) for one in shares_of], {})
    line = bar(gpu(0, *shares_of, leased_bytes=round(leased * GIB), limits=None), letters_of, width, look)
    assert line.cell_len == width
    reached = 0.0
    for one, size in zip(shares_of, sizes, strict=True):
        reached += size
        if reached <= 24 and size * width / 24 > 1.01:
            assert letters_of[one["tenant"]] in line.plain


def test_what_is_taken_and_in_nobodys_name_is_in_the_bar_too():
    assert bar(gpu(0, taken_bytes=12 * GIB, limits=None), {}, 10, MONO).plain == "+++++·····"


def test_a_chart_shows_a_gap_as_a_gap_and_a_short_peak_at_its_height():
    trail = ((NOW - 90, 12 * GIB), (NOW - 60, None), (NOW - 30, 6 * GIB), (NOW - 29, 24 * GIB), (NOW - 28, 6 * GIB))
    (line,) = chart(trail, 24 * GIB, 10, 1, MONO, NOW, seconds=100)
    assert line.plain == "▄▄▄   █▂▂▂"
    rows = chart(trail, 24 * GIB, 10, 2, MONO, NOW, seconds=100)
    assert [row.plain for row in rows] == ["      █   ", "███   █▄▄▄"]


def test_a_chart_moves_by_whole_columns():
    trail = tuple((NOW + second, second * GIB // 5) for second in range(100))
    pictures = [chart(trail, 24 * GIB, 20, 1, MONO, NOW + 100 + late, seconds=100)[0].plain for late in range(5)]
    assert len(set(pictures)) == 1
    assert chart(trail, 24 * GIB, 20, 1, MONO, NOW + 105, seconds=100)[0].plain[:-1] == pictures[0][1:]


def test_a_chart_of_unknown_memory_is_empty():
    assert chart(((NOW, None),), None, 5, 1, MONO, NOW)[0].plain == "     "


# What is remembered between two looks.


def heard(
    *gpus: dict[str, Any], at: str = AT, events: list[dict[str, Any]] | None = None, after: str | None = None
) -> Heard:
    return Heard(health=HEALTH, snapshot=snapshot(*gpus, taken_at=at), events=events or [], after=after)


def test_the_trail_keeps_the_highest_of_a_second_and_the_last_ten_minutes():
    what = Seen()
    for at, gib in (("08:00:00.100", 5), ("08:00:00.500", 9), ("08:00:00.900", 4), ("08:00:02.000", 4)):
        what = what.heard(heard(gpu(0, share("others", gib)), at=f"2027-01-15T{at}Z"))
    assert [taken for _, taken in what.trails["GPU-0"]] == [9 * GIB, 4 * GIB]
    later = what.heard(heard(gpu(0, share("others", 1)), at="2027-01-15T08:10:01.500Z"))
    assert [taken for _, taken in later.trails["GPU-0"]] == [4 * GIB, GIB]


def test_a_time_without_an_answer_is_a_gap():
    what = seen(gpu(0, share("others", 5))).gap(NOW + 1).gap(NOW + 2)
    assert what.trails["GPU-0"] == ((NOW, 5 * GIB), (NOW + 1, None))


def test_what_the_daemon_remembers_comes_before_what_was_seen():
    history = {"gpus": [{"uuid": "GPU-0", "at": [NOW - 10, NOW - 5, NOW + 5], "taken_bytes": [1, None, 3]}]}
    what = seen(gpu(0, share("others", 5))).with_history(history)
    assert what.trails["GPU-0"] == ((NOW - 10, 1), (NOW - 5, None), (NOW, 5 * GIB))
    assert seen(gpu()).with_history({}).trails == seen(gpu()).trails


def test_events_are_added_and_the_oldest_forgotten():
    what = Seen().heard(heard(gpu(), events=[event(1), event(2)]))
    what = what.heard(heard(gpu(), events=[event(3)], after="free-0002"))
    assert [one["id"] for one in what.events] == ["free-0001", "free-0002", "free-0003"]
    what = what.heard(heard(gpu(), events=[event(number) for number in range(4, 400)], after="free-0003"))
    assert (len(what.events), what.newest_event) == (MAX_EVENTS, "free-0399")


def test_what_two_looks_bring_is_there_once():
    what = Seen().heard(heard(gpu(), events=[event(1), event(2)]))
    for _ in range(2):
        what = what.heard(heard(gpu(), events=[event(3)], after="free-0002"))
    assert [one["id"] for one in what.events] == ["free-0001", "free-0002", "free-0003"]


def test_a_daemon_that_lost_its_memory_begins_anew():
    what = Seen().heard(heard(gpu(), events=[event(number) for number in range(1, 9)]))
    later = [event(1, at="2027-01-15T09:00:00Z"), event(2, at="2027-01-15T09:00:01Z")]
    what = what.heard(heard(gpu(), events=later, after="free-0008"))
    assert [one["id"] for one in what.events] == ["free-0001", "free-0002"]


def test_a_tenant_keeps_its_letter_while_it_is_there():
    first = letters([("ollama", "a"), ("ollama", "b"), ("worker", "w")], {})
    assert first == {"a": "A", "b": "B", "w": "D"}
    second = letters([("ollama", "b"), ("ollama", "new"), ("comfyui_in_use", "comfyui in use")], first)
    assert second == {"b": "B", "new": "A", "comfyui in use": "C"}


def test_letters_differ_until_there_are_none_left():
    given_out = letters([("ollama", str(number)) for number in range(70)], {})
    own = [letter for letter in given_out.values() if letter != NO_LETTER]
    assert len(own) == len(set(own)) == 59
    assert not {"C", "c", "u", "?"} & set(own)


def test_every_kind_of_tenant_is_drawn_apart_from_the_others():
    kinds = [(str(kind), str(kind)) for kind in ShareKind]
    given_out = letters(kinds, {})
    assert len(set(given_out.values())) == len(kinds)


@pytest.mark.parametrize(
    ("seconds", "long", "short"),
    [
        (-3, "0 s", "0s"),
        (59.9, "59 s", "59s"),
        (245, "4 min 05 s", "4m05s"),
        (11_520, "3 h 12 min", "3h12m"),
        (187_200, "2 d 4 h", "2d4h"),
    ],
)
def test_durations_have_two_units(seconds: float, long: str, short: str):
    assert (duration(seconds), duration(seconds, short=True)) == (long, short)


def test_text_from_outside_is_made_harmless():
    assert clean("a\x1b[2Jb\nc\u202ed\u200be\u0301") == "a?[2Jb?c?d?é"


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 4)), max_size=8), st.integers(0, 60))
def test_rows_are_shared_out_and_none_is_wasted(wanted: list[tuple[int, int]], room: int):
    rows = shares(wanted, room)
    assert sum(rows) <= room
    assert all(row <= lines for row, (lines, _) in zip(rows, wanted, strict=True))
    if sum(rows) < room:
        served = [(row, lines) for row, (lines, _) in zip(rows, wanted, strict=True) if row]
        assert all(row == lines for row, lines in served)


# Keys.


def after(
    *keys: str, screen: Screen | None = None, gpus: int = 1, events: tuple[str, ...] = ()
) -> tuple[Screen, Wish | None]:
    state, wish = screen or Screen(), None
    for key in keys:
        state, wish = pressed(state, key, gpus=gpus, events=events, furthest=99)
    return state, wish


def test_keys_come_as_sequences_too():
    assert keys_in(b"q\x1b[A\x1bOB\x1b[5~\r\x1b") == ["q", "up", "down", "page up", "enter", "escape"]
    assert keys_in(b"\x1b[1;5Cx\x1b[") == ["x"]


@given(st.binary(max_size=40))
def test_no_bytes_from_a_terminal_are_too_strange(data: bytes):
    state = Screen()
    for key in keys_in(data):
        state, _ = pressed(state, key, gpus=3, events=("free-1", "free-2"), furthest=9)
    assert 0 <= state.gpu < 3


@pytest.mark.parametrize(("key", "wish"), [("f", Wish.FREE_SOFT), ("u", Wish.FREE_UNLOAD)])
def test_a_free_is_asked_for_only_after_a_yes(key: str, wish: Wish):
    asking, nothing = after(key)
    assert (asking.asking, nothing) == (wish, None)
    assert after("y", screen=asking) == (Screen(), wish)
    for no in ("n", "q", "enter", "escape", key):
        state, asked = after(no, screen=asking)
        assert (state.asking, state.answer, asked) == (None, "nothing was asked", None)


def test_the_question_says_what_would_be_done_in_dry_run():
    dry = Seen().heard(Heard(health={**HEALTH, "dry_run": True}, snapshot=snapshot(gpu()), events=[]))
    foot = drawn(dry, 80, screen=Screen(asking=Wish.FREE_UNLOAD))[-1]
    assert foot == " y/n  Free ComfyUI by the unload stage: models and node cache go? (dry run)"


def test_an_answer_stands_until_the_next_key():
    answered = Screen(answer="Refused: cooldown", bad=True)
    assert drawn(seen(gpu()), screen=answered)[-1] == " Refused: cooldown"
    assert after("g", screen=answered)[0] == Screen()


def test_q_and_ctrl_c_quit():
    assert after("q")[1] is after("\x03")[1] is Wish.QUIT


def test_plus_and_minus_go_along_the_paces_and_not_beyond():
    state, _ = after(*"-" * 20)
    assert state.seconds == PACES[-1]
    state, _ = after(*"+" * 20, screen=state)
    assert state.seconds == PACES[0]
    assert after("+", screen=Screen(seconds=0.7))[0].seconds == 0.5


def test_panels_open_and_close():
    assert after("w")[0].panel is Panel.WHY
    assert after("w", "w")[0].panel is Panel.MAIN
    assert after("w", "?")[0].panel is Panel.HELP
    assert after("?", "escape")[0].panel is Panel.MAIN
    assert after("p")[0].paused
    assert not after("p", "p")[0].paused


def test_arrows_choose_an_event_from_the_newest_on():
    events = ("free-1", "free-2", "free-3")
    chosen = [after(*["down"] * times, events=events)[0].event for times in (1, 2, 3, 4)]
    assert chosen == ["free-3", "free-2", "free-1", "free-1"]
    assert after("down", "down", "up", events=events)[0].event == "free-3"
    assert after("down", "enter", events=events) == (Screen(panel=Panel.EVENT, event="free-3"), Wish.LOOK)
    assert after("down", "enter", "escape", events=events)[0] == Screen(event="free-3")
    assert after("down", "escape", events=events)[0] == Screen()
    assert after("enter", events=events) == (Screen(), None)
    assert after("down") == (Screen(), None)


def test_arrows_scroll_a_panel():
    assert after("w", "down", "page down", "up")[0].scroll == 10
    assert after("w", "up")[0].scroll == 0


def test_g_goes_round_the_gpus():
    assert [after(*["g"] * times, gpus=3)[0].gpu for times in (1, 2, 3)] == [1, 2, 0]
    assert after("left", gpus=3)[0].gpu == 2
    assert after("g", gpus=0)[0].gpu == 0


# The picture for documents.


def test_a_picture_is_whole_and_needs_nothing_from_elsewhere():
    history = {"gpus": [{"uuid": "GPU-0", "at": [NOW - 60], "taken_bytes": [GIB]}]}
    drawn_picture = picture(
        snapshot(gpu(0, *FULL)), health=HEALTH, events=[event(1)], history=history, now=NOW, width=100, height=30
    )
    texts = "".join(ET.fromstring(drawn_picture).itertext())
    assert "RTX 4090" in texts.replace("\xa0", " ")
    assert "@font-face" not in drawn_picture
    assert "url(http" not in drawn_picture


# The verb in a terminal.


class FakeDaemon(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers on a socket what it is told to; a question in `held` gets its answer when the event is set."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Answers)
        self.snapshot: Any = snapshot(gpu(0, *FULL), models=[model("llama3.1:8b")])
        self.events = [event(number) for number in range(1, 6)]
        self.history: Any = None
        self.free: tuple[int, Any] = (202, {"accepted": True, "event_id": "free-0006"})
        self.asked: list[Any] = []
        self.paths: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self.may_answer.set()
        self.shutdown()
        self.server_close()
        self._thread.join(20)


class _Answers(http.server.BaseHTTPRequestHandler):
    server: FakeDaemon

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.may_answer.wait(60)
        path, _, query = self.path.partition("?")
        newer = "after" not in query
        answers = {
            "/health": HEALTH,
            "/v1/snapshot": self.server.snapshot,
            "/v1/events": {"events": self.server.events if newer else []},
            "/v1/decisions": {
                "decisions": [
                    {"id": "decision-0007", "at": AT, "until": AT, "reason": "because", "branch": "6 act", "inputs": {}}
                ]
            },
        }
        if self.server.history is not None:
            answers["/v1/history"] = self.server.history
        self._say(200 if path in answers else 404, answers.get(path, {"error": {"message": "no such thing"}}))

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._say(*self.server.free)

    def _say(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def address_string(self) -> str:
        return "socket"

    def log_message(self, *_: object) -> None:
        pass


# Makes the terminal the child's own, as a shell does: only then does it hear of a new size.
OWN_TERMINAL = "import fcntl,os,sys,termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Tty:
    """`vram-manager top` in a terminal, and what is on its screen."""

    def __init__(
        self, *arguments: str, columns: int = 80, rows: int = 24, stdin: int | None = None, **environment: str
    ):
        self.keyboard, self.terminal = pty.openpty()
        self._resize(columns, rows)
        self.before = termios.tcgetattr(self.terminal)
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.child = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, sys.executable, "-m", "vram_manager", "top", *arguments],
            stdin=self.terminal if stdin is None else stdin,
            stdout=self.terminal,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1", **environment},
        )

    @property
    def text(self) -> str:
        return "\n".join(self.screen.display)

    def until(self, *words: str) -> None:
        """Goes on once all of it is on the screen."""
        self.when(lambda: all(one in self.text for one in words), words)

    def when(self, true: Callable[[], bool], what: object = "") -> None:
        deadline = time.monotonic() + 20
        while not true():
            assert time.monotonic() < deadline, f"never came: {what}\n{self.text}"
            self._read(0.05)

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self._resize(columns, rows)

    def ended(self) -> tuple[int, str]:
        """Its status and what it said on stderr, when it is gone."""
        self.when(lambda: self.child.poll() is not None, "the end")
        self._read(0.05)
        assert self.child.stderr is not None
        return self.child.returncode, self.child.stderr.read().decode()

    def is_as_before(self) -> bool:
        """The terminal's modes, its cursor, its own screen."""
        left = self.raw.rfind(b"\x1b[?1049l") > self.raw.rfind(b"\x1b[?1049h")
        wraps = self.raw.rfind(b"\x1b[?7h") > self.raw.rfind(b"\x1b[?7l")
        return termios.tcgetattr(self.terminal) == self.before and left and wraps and not self.screen.cursor.hidden

    def close(self) -> None:
        self.child.kill()
        self.child.communicate()
        os.close(self.keyboard)
        os.close(self.terminal)

    def _read(self, seconds: float) -> None:
        while select.select([self.keyboard], [], [], seconds)[0]:
            data = os.read(self.keyboard, 65536)
            self.raw += data
            self._stream.feed(data)
            seconds = 0

    def _resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "VRAM_SOCKET": str(tmp_path / "vram.sock"),
        "VRAM_STATE_DIR": str(tmp_path),
        "VRAM_CHECK_INTERVAL": "0.25",
        "VRAM_FREE_COOLDOWN": "0",
        "VRAM_SETTLE_TIMEOUT": "1",
        "COMFYUI_IDLE_SECONDS": "0",
        "VRAM_GRACE_SECONDS": "3600",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def daemon(environment: None, tmp_path: Path) -> Iterator[FakeDaemon]:
    running = FakeDaemon(tmp_path / "vram.sock")
    yield running
    running.stop()


@pytest.fixture
def top(environment: None) -> Iterator[Callable[..., Tty]]:
    """Starts `vram-manager top`."""
    running: list[Tty] = []

    def start(*arguments: str, **options: Any) -> Tty:
        running.append(Tty(*arguments, **options))
        return running[-1]

    yield start
    for one in running:
        one.close()


def plain(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`vram-manager top` with its output in a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "vram_manager", "top", *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_quit_leaves_the_terminal_as_it_was(daemon: FakeDaemon, top):
    tty = top()
    tty.until("RTX 4090", "llama3.1:8b", "Events", "q quit")
    assert not tty.is_as_before()
    tty.press("q")
    assert tty.ended() == (0, "")
    assert tty.is_as_before()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 0), (signal.SIGQUIT, 131)]
)
def test_a_signal_leaves_the_terminal_as_it_was(daemon: FakeDaemon, top, number: signal.Signals, status: int):
    tty = top()
    tty.until("q quit")
    tty.child.send_signal(number)
    assert tty.ended() == (status, "")
    assert tty.is_as_before()


def test_what_nobody_expected_leaves_the_terminal_as_it_was(daemon: FakeDaemon, top):
    tty = top()
    tty.until("q quit")
    daemon.snapshot = {**daemon.snapshot, "gpus": [{"of another": "version"}]}
    status, said = tty.ended()
    assert status == 1
    assert "KeyError" in said
    assert tty.is_as_before()


def test_ctrl_z_gives_the_terminal_back_until_fg(daemon: FakeDaemon, top):
    tty = top()
    tty.until("q quit")
    tty.child.send_signal(signal.SIGTSTP)
    tty.when(lambda: Path(f"/proc/{tty.child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")
    tty.when(tty.is_as_before)
    tty.child.send_signal(signal.SIGCONT)
    tty.when(lambda: not tty.is_as_before())
    tty.until("RTX 4090")
    tty.press("q")
    assert tty.ended() == (0, "")


def test_a_free_is_asked_for_by_f_and_y_and_its_answer_is_shown(daemon: FakeDaemon, top):
    tty = top()
    tty.until("q quit")
    tty.press("f")
    tty.until("Free ComfyUI softly", "y/n")
    tty.press("n")
    tty.until("nothing was asked")
    assert daemon.asked == []
    tty.press("uy")
    tty.until("Asked [free-0006], waiting for the proof")
    daemon.free = (409, {"error": {"type": "not_now", "message": "cooldown: 30 s must pass"}})
    tty.press("fy")
    tty.until("Refused: cooldown: 30 s must pass")
    assert daemon.asked == [{"stage": "unload"}, {"stage": "soft"}]


def test_a_new_size_is_drawn_at_once(daemon: FakeDaemon, top):
    tty = top("--seconds", "60")
    tty.until("q quit")
    tty.resize(130, 40)
    tty.when(lambda: "q quit" in tty.screen.display[39] and "q quit" not in tty.screen.display[23])
    tty.resize(60, 15)
    tty.when(lambda: "q quit" in tty.screen.display[14] and "RTX 4090" in tty.text)


def test_keys_are_answered_while_the_daemon_is_not_answering(daemon: FakeDaemon, top):
    tty = top("--seconds", "0.25")
    tty.until("q quit")
    daemon.may_answer.clear()
    asked = len(daemon.paths)
    tty.when(lambda: len(daemon.paths) > asked)
    tty.press("?")
    tty.until("Help")
    tty.press("\x1b")
    tty.until("Tenants")
    tty.press("q")
    assert tty.ended() == (0, "")


def test_a_daemon_that_goes_away_is_told_and_waited_for(daemon: FakeDaemon, top, tmp_path: Path):
    tty = top("--seconds", "0.25", columns=200)
    tty.until("q quit")
    daemon.stop()
    tty.until("No answer for", "nobody listens", "RTX 4090")
    (tmp_path / "vram.sock").unlink()
    tty.until("does not exist")
    back = FakeDaemon(tmp_path / "vram.sock")
    try:
        tty.until("Now: nobody needs more")
        tty.press("q")
        assert tty.ended() == (0, "")
    finally:
        back.stop()


def test_why_and_an_event_with_its_decision(daemon: FakeDaemon, top):
    tty = top()
    tty.until("q quit")
    assert not any("decisions" in path for path in daemon.paths)
    tty.press("w")
    tty.until("Why", "because")
    tty.press("\x1b")
    tty.until("Tenants")
    tty.press("\x1b[B\r")
    tty.until("Event free-0005", "because", "6 act")


def test_the_chart_begins_with_what_the_daemon_remembers(daemon: FakeDaemon, top):
    now = time.time()
    daemon.snapshot = snapshot(gpu(0, *FULL), taken_at=datetime.fromtimestamp(now, UTC).isoformat())
    at = [now - 600 + 5 * number for number in range(120)]
    daemon.history = {"gpus": [{"uuid": "GPU-0", "at": at, "taken_bytes": [23 * GIB] * 120}]}
    tty = top()
    tty.until("last 10 min " + "█" * 60)
    begin, step = parse_qs(urlsplit(next(path for path in daemon.paths if "history" in path)).query).values()
    assert (datetime.fromisoformat(begin[0]).timestamp(), step) == (pytest.approx(now - 600, abs=30), ["5"])


def test_a_picture_that_is_paused_stands_still_and_still_says_why(daemon: FakeDaemon, top):
    tty = top("--seconds", "0.25")
    tty.until("q quit")
    tty.press("p")
    tty.until("PAUSED")
    daemon.snapshot = snapshot(gpu(0, name="another card"))
    tty.press("?")
    tty.until("Help")
    tty.press("w")
    tty.until("because")
    tty.press("w")
    tty.until("Tenants", "RTX 4090")
    tty.press("p")
    tty.until("another card")


def test_without_a_keyboard_it_is_shown_and_refreshed(daemon: FakeDaemon, top):
    with Path(os.devnull).open("rb") as nothing:
        tty = top("--seconds", "0.25", stdin=nothing.fileno())
    tty.until("RTX 4090", "every 0.25 s; keys need a terminal for input: docker exec -it")
    daemon.snapshot = snapshot(gpu(0, name="another card"))
    tty.until("another card")
    tty.child.send_signal(signal.SIGTERM)
    assert tty.ended() == (143, "")


def test_no_color_is_respected(daemon: FakeDaemon, top):
    tty = top(NO_COLOR="1")
    tty.until("q quit", "AAAA")
    assert not re.search(rb"\x1b\[[0-9;]*[34][0-8][;m]", tty.raw)
    colourful = top()
    colourful.until("q quit")
    assert re.search(rb"\x1b\[[0-9;]*48;5;", colourful.raw)


def test_a_terminal_that_cannot_be_redrawn_gets_one_frame(daemon: FakeDaemon, top):
    tty = top(TERM="dumb")
    assert tty.ended() == (0, "")
    assert b"RTX 4090" in tty.raw
    assert b"\x1b" not in tty.raw


def test_once_is_one_frame_on_the_terminals_own_screen(daemon: FakeDaemon, top):
    tty = top("--once", rows=60)
    assert tty.ended() == (0, "")
    tty.until("RTX 4090", "Events")
    assert b"\x1b[?" not in tty.raw


def test_into_a_pipe_goes_one_frame(daemon: FakeDaemon):
    ended = plain(COLUMNS="90")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "RTX 4090" in ended.stdout
    assert "\x1b" not in ended.stdout
    assert max(len(line) for line in ended.stdout.splitlines()) <= 90


def test_an_output_that_has_only_ascii_gets_only_ascii(daemon: FakeDaemon):
    assert plain(PYTHONIOENCODING="ascii").stdout.isascii()
    assert plain("--ascii").stdout.isascii()
    assert not plain(PYTHONUTF8="1").stdout.isascii()
    # As in `docker exec`, where no locale is set: Python speaks UTF-8 then.
    assert "┃" in plain(LC_ALL="C", PYTHONIOENCODING="").stdout


def test_without_a_daemon_it_ends_with_4_and_one_line(top):
    tty = top()
    status, said = tty.ended()
    assert status == 4
    assert said.startswith("vram-manager: no daemon: ")
    assert said.count("\n") == 1
    assert tty.raw == b""


@pytest.mark.parametrize("seconds", ["0.1", "61", "often"])
def test_a_pace_out_of_bounds_is_2(environment, seconds: str):
    ended = plain("--seconds", seconds)
    assert ended.returncode == 2
    assert "--seconds" in ended.stderr


def test_it_shows_a_real_daemon_and_frees_for_real(environment, top):
    with InThread() as running:
        running.ollama.load("llama3.1:8b", 5)
        running.until(lambda: running.daemon.cycle.snapshot.ollama.value.models)
        tty = top("--seconds", "0.25", columns=100, rows=40)
        tty.until("Fake card 0", "llama3.1:8b", "ComfyUI  0.3.40", "Events")
        tty.press("fy")
        tty.until("Freed 8.0 GiB in")
        assert [body for _, body in running.comfyui.posts] == [{"unload_models": True, "free_memory": False}]
        running.daemon and running.do(
            lambda: running.daemon.journal.record(
                Event(type=EventType.LEAK, target="worker:tts", reason="grew by 1.0 GiB")
            )
        )
        tty.until("leak", "grew by 1.0 GiB")
        tty.press("q")
        assert tty.ended() == (0, "")
