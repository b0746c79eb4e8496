"""The report: every number that people look for, unknown where it is, on every terminal."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_nvml import compiler
from tests.test_end_to_end import whole_stack
from vram_manager.report import text
from vram_manager.report.gpu import MOST_ROWS, NOT_VISIBLE
from vram_manager.report.terminal import Terminal, cells, clean, columns, table, wrapped
from vram_manager.simulator.serve import serving
from vram_manager.simulator.world import World
from vram_manager.summary import NO_SNAPSHOT, completed, document, summary

GIB = 2**30
SEEN_AT = "2026-07-01T12:00:00.000000Z"
BOX, SLOW = "http://10.9.66.124:11434", "http://10.9.66.154:11434"


def share(tenant: str, gib: float, kind: str = "", certainty: str = "measured") -> dict[str, Any]:
    kind = kind or tenant.partition(":")[0].replace(" ", "_")
    return {"kind": kind, "tenant": tenant, "bytes": int(gib * GIB), "certainty": certainty}


def gpu(index: int = 0, total: float = 24, used: float = 8, **more: Any) -> dict[str, Any]:
    """A card of so many GiB as the API tells of it, without a reserve."""
    tenants = more.pop("tenants", [share("others", used, certainty="perhaps")] if used else [])
    leased = int(more.pop("leased", 0) * GIB)
    free = int((total - used) * GIB)
    told = {
        "index": index,
        "uuid": f"GPU-{index:08d}",
        "name": "NVIDIA GeForce RTX 4090",
        "vendor": "nvidia",
        "source": "NVML",
        "trust": "measured",
        "unified": False,
        "asleep": False,
        "total_bytes": int(total * GIB),
        "used_bytes": int(used * GIB),
        "free_bytes": free,
        "reserved_bytes": 0,
        "taken_bytes": int(used * GIB),
        "used_percent": round(100 * used / total, 1),
        "why": None,
        "utilization_percent": 45,
        "temperature_celsius": 62,
        "power_watts": 210.4,
        "unknown": {},
        "processes": [],
        "processes_why": None,
        "leased_bytes": leased,
        "fits_bytes": max(0, free - leased - 2 * GIB),
        "limits": {
            "threshold_bytes": int(0.75 * total * GIB),
            "unload_threshold_bytes": int(0.85 * total * GIB),
            "soft_limit_bytes": int(0.9 * total * GIB),
            "hard_limit_bytes": int(0.95 * total * GIB),
        },
        "tenants": tenants,
    }
    return told | more


def blind(index: int = 0, **more: Any) -> dict[str, Any]:
    """A card of which nothing is known but that it is there."""
    unknown = dict.fromkeys(("utilization_percent", "temperature_celsius", "power_watts"), "the GPU is lost")
    sizes = ("total_bytes", "used_bytes", "free_bytes", "reserved_bytes", "taken_bytes", "used_percent")
    return gpu(
        index,
        **dict.fromkeys((*sizes, "fits_bytes", "limits", *unknown)),
        why="the GPU is lost: it has fallen off the bus",
        unknown=unknown,
        processes=None,
        processes_why="processes are not visible",
        tenants=[],
        **more,
    )


def model(name: str = "llama3.1:latest", gib: float = 5, on_cpu: float | None = 0, **more: Any) -> dict[str, Any]:
    size = int(gib * GIB)
    return {
        "name": name,
        "digest": "a" * 64,
        "size_bytes": size,
        "size_vram_bytes": int(size * (1 - (on_cpu or 0))),
        "cpu_ratio": on_cpu,
        "context_length": 4096,
        "expires_at": "2026-07-01T12:04:00+00:00",
        "requests": None,
    } | more


def ollama(*models: dict[str, Any]) -> dict[str, Any]:
    return {"state": "ok", "version": "0.32.15", "age_seconds": 0.1, "models": list(models)}


def comfyui(**more: Any) -> dict[str, Any]:
    device = {
        "name": "cuda:0 NVIDIA GeForce RTX 4090",
        "vram_total_bytes": 24 * GIB,
        "device_free_bytes": 10 * GIB,
        "torch_total_bytes": 6 * GIB,
        "torch_free_bytes": 2 * GIB,
    }
    told = {"state": "ok", "version": "0.3.60", "argv": [], "queue_remaining": 0, "idle_seconds": 190.0}
    return told | {"devices": [device]} | more


def node(url: str = BOX, *models: dict[str, Any], verdict: str = "gpu", **more: Any) -> dict[str, Any]:
    vram = sum(one["size_vram_bytes"] for one in models)
    return {
        "url": url,
        "state": "ok",
        "why": None,
        "remedy": None,
        "age_seconds": 3.0,
        "version": "0.32.15",
        "verdict": verdict,
        "vram_bytes": vram,
        "ram_bytes": sum(one["size_bytes"] for one in models) - vram,
        "models": list(models),
    } | more


def away(url: str = SLOW, **more: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("models", "vram_bytes", "ram_bytes", "version", "age_seconds"))
    lost = {"state": "missing", "why": "GET /api/ps: connection refused", "remedy": "check that it runs"}
    return node(url, verdict="unknown") | nothing | lost | more


def event(**more: Any) -> dict[str, Any]:
    nothing = ("gpu", "target", "stage", "freed_bytes", "took_seconds", "used_percent_before", "used_percent_after")
    told = {"id": "event-0001", "at": SEEN_AT, "type": "pressure_began", "reason": "81 % used"}
    return dict.fromkeys(nothing) | told | more


def snapshot(*gpus: dict[str, Any], **more: Any) -> dict[str, Any]:
    seen = {"taken_at": SEEN_AT, "age_seconds": 0.1, "gpus": list(gpus), "gpus_why": None, "margin_bytes": 2 * GIB}
    return {**NO_SNAPSHOT, **seen, "now": "nobody needs more", **more}


def report(*gpus: dict[str, Any], width: int = 100, events: tuple[dict[str, Any], ...] = (), **more: Any) -> str:
    return text(document(snapshot(*gpus, **more), list(events)), Terminal(width=width))


def flat(words: str) -> str:
    """Without the lines that it is broken into."""
    return " ".join(words.split())


def summed(words: str) -> dict[str, str]:
    """The rows of the summary."""
    rows = words.partition("Summary\n")[2].splitlines()
    return {name.strip(): said.strip() for name, said in ((row[3:27], row[27:]) for row in rows) if name.strip()}


# What the report of a box is to have, row by row.

TWO_CARDS = (
    gpu(0, 24, 8, utilization_percent=45, temperature_celsius=62),
    gpu(1, 24, 2, name="NVIDIA GeForce RTX 3090", utilization_percent=12, temperature_celsius=48),
)
LOADED = (model("mxbai-embed-large:latest", 0.7), model("llama3.1:latest", 4.7))


def test_it_begins_with_when_it_was_seen():
    assert re.match(r"GPU memory at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", report(gpu()))


def test_each_gpu_has_its_name_vendor_and_uuid():
    assert re.search(r"^GPU 1: NVIDIA GeForce RTX 3090 +GPU-00000001$", report(*TWO_CARDS), re.MULTILINE)
    assert "GPU 0: Radeon RX 7900 (AMD) " in report(gpu(name="Radeon RX 7900", vendor="amd"))


def test_each_gpu_has_its_total_used_free_and_reserved_memory():
    assert "total 24.0 GiB   used 8.0 GiB   free 16.0 GiB   reserved 0.5 GiB" in report(gpu(reserved_bytes=GIB // 2))


def test_each_gpu_has_its_utilisation_temperature_and_power():
    assert "utilisation 45 %   temperature 62 °C   power 210 W" in report(*TWO_CARDS)
    assert "utilisation 12 %   temperature 48 °C" in report(*TWO_CARDS)


@pytest.mark.parametrize(("celsius", "hot"), [(84, False), (85, True)])
def test_a_gpu_that_is_too_hot_is_called_hot(celsius: int, hot: bool):
    assert (f"{celsius} °C (hot)" in report(gpu(temperature_celsius=celsius))) is hot


def test_each_model_has_its_size_place_expiry_and_context():
    words = report(gpu(), ollama=ollama(*LOADED))
    assert re.search(r"^   llama3.1:latest +4.7 GiB  GPU \(VRAM\)  in 4 min  context 4096$", words, re.MULTILINE)
    assert re.search(r"^   mxbai-embed-large:latest  0.7 GiB  GPU \(VRAM\)", words, re.MULTILINE)


@pytest.mark.parametrize(
    ("on_cpu", "place"),
    [
        (0, "GPU (VRAM)"),
        (1, "CPU (RAM)"),
        (0.38, "62 % GPU / 38 % CPU"),
        (0.999, "1 % GPU / 99 % CPU"),
        (0.011, "99 % GPU / 1 % CPU"),
        (None, "unknown (its sizes contradict)"),
    ],
)
def test_a_model_is_on_the_gpu_the_cpu_or_split(on_cpu: float | None, place: str):
    assert f"  {place}  in 4 min" in report(gpu(), ollama=ollama(model(on_cpu=on_cpu)))


@pytest.mark.parametrize(
    ("expires_at", "words"),
    [
        ("2026-07-01T12:00:40+00:00", "in 40 s"),
        ("2026-07-01T14:04:00+02:00", "in 4 min"),
        ("2026-07-01T17:00:00+00:00", "in 5 h"),
        ("2026-07-09T12:00:00+00:00", "in 8 days"),
        ("2318-10-11T00:00:00+00:00", "never"),
        ("2026-07-01T11:59:00+00:00", "stopping"),
        (None, "expiry unknown"),
    ],
)
def test_a_model_expires_soon_never_or_is_stopping(expires_at: str | None, words: str):
    assert f"GPU (VRAM)  {words}  context" in report(gpu(), ollama=ollama(model(expires_at=expires_at)))


def test_a_model_of_an_old_list_is_not_therefore_stopping():
    late = model(expires_at="2026-07-01T11:59:55+00:00")
    assert "in 5 s" in report(gpu(), nodes=[node(BOX, late, age_seconds=10.0)])
    assert "stopping" in report(gpu(), nodes=[node(BOX, late, age_seconds=1.0)])


def test_a_model_with_requests_is_in_use_whatever_its_expiry_says():
    late = model(expires_at="2026-07-01T11:59:00+00:00", requests=2)
    assert "in use (2 under way)  context 4096" in report(gpu(), ollama=ollama(late))


def test_a_node_on_its_gpu_says_so_with_its_vram_and_its_models():
    words = report(gpu(), nodes=[node(BOX, *LOADED)])
    assert re.search(rf"^   GPU +{BOX}  VRAM 5.4 GiB  \(Ollama 0.32.15\)$", words, re.MULTILINE)
    assert re.search(r"^ +llama3.1:latest +4.7 GiB  GPU \(VRAM\)", words, re.MULTILINE)


def test_a_node_on_its_cpu_says_so_with_its_ram_and_its_models():
    words = report(gpu(), nodes=[node(SLOW, model(gib=2.5, on_cpu=1), verdict="cpu")])
    assert re.search(rf"^   CPU +{SLOW}  RAM 2.5 GiB \(CPU fallback\)", words, re.MULTILINE)
    assert re.search(r"^ +llama3.1:latest +2.5 GiB  CPU \(RAM\)", words, re.MULTILINE)


def test_a_node_on_both_has_its_vram_and_its_ram():
    words = report(gpu(), nodes=[node(BOX, model(gib=4, on_cpu=0.25), verdict="split")])
    assert re.search(rf"^   GPU \+ CPU  {BOX}  VRAM 3.0 GiB, RAM 1.0 GiB \(CPU fallback\)", words, re.MULTILINE)


def test_a_node_with_nothing_loaded_does_not_guess():
    assert f"   idle       {BOX}  nothing loaded: GPU or CPU shows when" in report(gpu(), nodes=[node(verdict="idle")])


def test_a_node_that_cannot_be_read_says_why_and_what_to_do():
    words = flat(report(gpu(), nodes=[away(age_seconds=200.0)]))
    assert f" missing {SLOW} cannot be read: GET /api/ps: connection refused; check that it runs; last read" in words
    assert "; last read 3 min ago" in words


def test_a_node_that_was_not_asked_yet_is_no_missing_one():
    assert "not read yet: not asked yet" in report(
        gpu(), nodes=[away(state="unread", why="not asked yet", remedy=None)]
    )


def test_an_old_reading_of_a_node_has_its_age():
    assert ", seen 50 s ago)" in report(gpu(), nodes=[node(age_seconds=50.0)])


def test_what_was_measured_of_a_node_stands_below_it():
    measured = {"model": "m:1b", "words": "about 4 tokens/s with m:1b (4.7 GiB): on a CPU"}
    words = report(
        gpu(), nodes=[node(measured=measured), node(SLOW, measured={"model": None, "words": "not measured: x"})]
    )
    assert re.search(r"^ {14}measured: about 4 tokens/s with m:1b \(4.7 GiB\): on a CPU$", words, re.MULTILINE)
    assert re.search(r"^ {14}not measured: x$", words, re.MULTILINE)


def test_the_summary_has_vendor_total_utilisation_free_and_what_ollama_has():
    rows = summed(report(*TWO_CARDS, ollama=ollama(*LOADED)))
    assert rows == {
        "GPU vendor": "NVIDIA",
        "Total VRAM": "48.0 GiB on 2 GPUs",
        "VRAM utilisation": "20.8 % (10.0 GiB)",
        "Free VRAM": "38.0 GiB",
        "Ollama GPU-accelerated": "yes, wholly",
        "Ollama VRAM usage": "5.4 GiB",
        "Fits now": "up to 20.0 GiB on GPU 1 (free, less promises and a margin of 2.0 GiB)",
    }


def test_the_summary_names_every_vendor_once():
    assert summed(report(gpu(), gpu(1), gpu(2, vendor="amd")))["GPU vendor"] == "NVIDIA, AMD"


@pytest.mark.parametrize(
    ("models", "accelerated", "usage"),
    [
        ([model(on_cpu=0.5, gib=4)], "partly", "2.0 GiB of 4.0 GiB, 2.0 GiB in RAM"),
        ([model(on_cpu=1, gib=4)], "no: all of it is on the CPU", "0.0 GiB of 4.0 GiB, 4.0 GiB in RAM"),
        ([model(gib=4), model("b:1b", on_cpu=1, gib=1)], "partly", "4.0 GiB of 5.0 GiB, 1.0 GiB in RAM"),
        ([], "nothing is loaded", "0.0 GiB"),
        ([model(on_cpu=None)], "unknown: its list cannot be used", "unknown"),
    ],
    ids=["split", "on the CPU", "one of two", "idle", "contradictory"],
)
def test_whether_ollama_is_accelerated_and_how_much(models, accelerated: str, usage: str):
    rows = summed(report(gpu(), ollama=ollama(*models)))
    assert (rows["Ollama GPU-accelerated"], rows["Ollama VRAM usage"]) == (accelerated, usage)


def test_what_fits_now_is_free_less_promises_less_the_margin():
    rows = summed(report(gpu(used=8, leased=4)))
    assert rows["Free VRAM"] == "16.0 GiB, 4.0 GiB of it promised"
    assert rows["Fits now"].startswith("up to 10.0 GiB on GPU 0 ")


def test_where_nothing_more_fits_it_says_why():
    waiting = {"position": 1, "owner": "tts", "required": "4.0 GiB", "priority": "normal", "waited_seconds": 3.0}
    rows = summed(report(gpu(used=22), line=[{**waiting, "eta_seconds": None}], width=120))
    assert rows["Fits now"] == "nothing more: what is free is promised, or the margin of 2.0 GiB; 1 in line before"


def test_the_document_for_machines_has_the_same_sums():
    whole = document(
        snapshot(*TWO_CARDS, ollama=ollama(*LOADED), nodes=[node()]), [event()], [away(), node(version="9")]
    )
    assert whole["summary"] == {
        "gpus": 2,
        "unknown_gpus": [],
        "vendors": ["nvidia"],
        "total_bytes": 48 * GIB,
        "used_bytes": 10 * GIB,
        "free_bytes": 38 * GIB,
        "leased_bytes": 0,
        "used_percent": 20.8,
        "margin_bytes": 2 * GIB,
        "fits_bytes": 20 * GIB,
        "fits_gpu": 1,
        "ollama_accelerated": "yes",
        "ollama_vram_bytes": sum(one["size_vram_bytes"] for one in LOADED),
        "ollama_ram_bytes": 0,
    }
    # What was asked from here stands in the place of what the daemon knew of the same node.
    assert [(one["url"], one["version"]) for one in whole["nodes"]] == [(BOX, "9"), (SLOW, None)]
    assert whole["events"] == [event()]
    json.dumps(whole, allow_nan=False)


# Who has it.

HELD = [
    share("ollama:llama3.1:8b", 6),
    share("comfyui in use", 4, "comfyui_in_use"),
    share("worker:tts", 3),
    share("comfyui unseen", 2, "comfyui_unseen", "learned"),
    share("others", 1, certainty="perhaps"),
]


def bars(words: str) -> list[str]:
    return re.findall(r"^   \[(.+)\]", words, re.MULTILINE)


def test_the_bar_is_stacked_in_proportion_and_in_the_order_of_the_table():
    words = report(gpu(used=16, tenants=HELD), width=120)
    (bar,) = bars(words)
    parts = [match.group() for match in re.finditer(r"(.)\1*", bar)]
    assert [part[0] for part in parts] == ["█", "▓", "▒", "█", "░", "·"]
    for part, gib in zip(parts, [6, 4, 3, 2, 1, 8], strict=True):
        assert len(part) == pytest.approx(len(bar) * gib / 24, abs=1)


def test_each_tenant_has_its_size_and_percent_and_what_is_not_sure_is_marked():
    words = report(gpu(used=16, tenants=HELD))
    for sign, name, size, percent in (
        ("█", "ollama:llama3.1:8b", "6.0", "25.0"),
        ("▒", "worker:tts", "3.0", "12.5"),
        ("█", r"comfyui unseen \(learned\)", "2.0", "8.3"),
        ("░", r"others \(perhaps\)", "1.0", "4.2"),
    ):
        assert re.search(rf"^   {sign}{sign} {name} +{size} GiB +{percent} %$", words, re.MULTILINE)


def test_what_is_promised_and_not_yet_taken_stands_in_the_bar_and_the_table():
    words = report(gpu(used=8, leased=4))
    assert "─" in bars(words)[0]
    assert re.search(r"^   ── promised, not yet taken +4.0 GiB +16.7 %$", words, re.MULTILINE)


def test_a_tenant_however_small_is_seen_in_the_bar():
    assert "▓" in bars(report(gpu(tenants=[share("ollama:a", 7.99), share("process:Xorg", 0.01)])))[0]


def test_a_name_of_ten_thousand_letters_does_not_fill_the_screen():
    words = report(gpu(tenants=[share("ollama:" + "x" * 10_000, 8)]), now="y" * 10_000, width=100)
    assert len(words.splitlines()) < 60
    assert "x..." in words.replace(" ", "").replace("\n", "")


def test_many_small_tenants_are_summed_up():
    many = [share(f"process:p{place}", 0.25) for place in range(20)]
    words = report(gpu(used=5, tenants=many))
    assert re.search(rf"^      {20 - MOST_ROWS + 1} more +2.2 GiB +9.4 %$", words, re.MULTILINE)


def test_processes_have_their_memory_where_it_is_known():
    ones = [
        {"pid": 12, "used_bytes": GIB, "command": "/usr/bin/Xorg :0"},
        {"pid": 1234567, "used_bytes": 6 * GIB, "command": "ollama runner"},
        {"pid": 77, "used_bytes": None, "command": None},
    ]
    lines = report(gpu(processes=ones)).splitlines()
    begin = lines.index("   processes:")
    assert lines[begin + 1 : begin + 4] == [
        "      pid 1234567   6.0 GiB  ollama runner",
        "      pid      12   1.0 GiB  /usr/bin/Xorg :0",
        f"      pid      77  not told  {NOT_VISIBLE}",
    ]


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("processes are not visible", "processes: not visible (needs pid: host)"),
        ("this driver is too old for it", "processes: unknown: this driver is too old for it"),
    ],
)
def test_processes_that_cannot_be_seen_say_why(why: str, words: str):
    assert f"   {words}\n" in report(gpu(processes=None, processes_why=why))


def test_a_gpu_that_nobody_is_on_says_so():
    assert "   processes: none\n" in report(gpu(used=0))


# ComfyUI, promises, events.


def test_comfyui_has_its_use_its_cache_and_its_queue():
    words = report(gpu(), comfyui=comfyui())
    assert "ComfyUI 0.3.60\n   queue: empty, idle for 3 min\n   torch: 4.0 GiB in use, 2.0 GiB cached  (cuda:0" in words
    assert "   queue: 2 running or waiting\n" in report(gpu(), comfyui=comfyui(queue_remaining=2))


def test_of_a_comfyui_that_is_away_what_is_known_stays_and_the_rest_is_unknown():
    missing = {
        "state": "missing",
        "why": "GET /prompt: refused",
        "queue_remaining": None,
        "idle_seconds": None,
        "devices": None,
    }
    words = report(gpu(), comfyui=missing)
    assert "ComfyUI cannot be read: GET /prompt: refused\n   queue: unknown\n   torch: unknown\n" in words


def test_leases_the_line_and_held_calls_are_there_when_there_are_any():
    lease = {
        "id": "lease-1",
        "owner": "tts",
        "bytes": 2 * GIB,
        "estimate_source": "request",
        "visible_bytes": GIB,
        "peak_bytes": None,
        "overclaimed_bytes": 0,
        "expires_at": None,
    }
    waiting = {"position": 1, "owner": "flux", "required": "12.0 GiB", "priority": "normal", "waited_seconds": 9.0}
    held = {"upstream": "ollama", "what": "llama3.1:8b", "why": "waits for room", "waited_seconds": 3.2}
    words = report(gpu(), leases=[lease], line=[{**waiting, "eta_seconds": 4}], held=[held])
    assert "Leases\n   lease-1  tts: 2.0 GiB (request), 1.0 GiB taken; held by its connection\n" in words
    assert "Waiting in line\n   1. flux: 12.0 GiB, normal, for 9 s, ETA 4 s (estimate)\n" in words
    assert "Held at the gateways\n   Ollama: llama3.1:8b, for 3 s: waits for room\n" in words
    nothing = report(gpu())
    assert not any(title in nothing for title in ("Leases", "Waiting in line", "Held at", "Who needs", "Lately"))


def test_who_needs_memory_and_what_nobody_gives_back_are_said():
    demand = {"kind": "worker", "reason": "tts waits", "need_free_bytes": 4 * GIB}
    words = report(
        gpu(), demands=[demand], unreclaimable_bytes={"GPU-0": GIB}, settling="over 75 %", gpus_left_out=["i"]
    )
    assert "Who needs memory\n   tts waits (needs 4.0 GiB free)\n" in words
    assert "1.0 GiB on GPU-0 stay in use although everybody was asked" in words
    assert "Waiting for proof of a free: over 75 %" in words
    assert "Not counted: i" in words


def test_recent_events_have_their_time_of_day_and_what_came_of_them():
    freed = event(
        type="freed",
        target="comfyui",
        stage="soft",
        freed_bytes=3 * GIB,
        took_seconds=1.24,
        used_percent_before=91.0,
        used_percent_after=52.4,
        reason="llama waits",
    )
    words = report(gpu(), events=(freed,), width=120)
    pattern = (
        r"^   \d\d:00:00  freed  comfyui  soft  3.0 GiB in 1.2 s  used 91 % -> 52 %  \(llama waits\) \[event-0001\]$"
    )
    assert re.search(pattern, words, re.MULTILINE)


# Unknown is unknown.


def test_a_gpu_whose_memory_cannot_be_read_has_no_number_and_says_why():
    words = report(gpu(), blind(1))
    block = words[words.index("GPU 1:") : words.index("Ollama")]
    assert "   memory unknown: the GPU is lost: it has fallen off the bus\n" in block
    assert "utilization unknown (the GPU is lost)" in block.replace("utilisation", "utilization")
    assert "temperature unknown (the GPU is lost)" in block
    assert not re.search(r"\b0(\.0)? (GiB|%|W|°C)", block)
    assert summed(words)["Total VRAM"] == "24.0 GiB on 1 GPU; GPU 1 unknown"


def test_without_any_gpu_the_summary_says_why_and_shows_no_zero():
    words = report(gpus_why="NVML cannot be loaded")
    assert "No GPU can be read: NVML cannot be loaded\n" in words
    rows = summed(words)
    for name in ("GPU vendor", "Total VRAM", "VRAM utilisation", "Free VRAM", "Fits now"):
        assert rows[name] == "unknown: NVML cannot be loaded"
    assert "0.0" not in words


def test_what_only_another_program_told_is_called_second_hand():
    words = report(gpu(trust="second-hand", source="ComfyUI"))
    assert "   (second-hand: these numbers come from ComfyUI)\n" in words
    assert "these numbers come" not in report(gpu())


def test_memory_that_is_the_cpus_too_and_a_card_that_sleeps_are_called_so():
    words = report(gpu(unified=True, trust="derived", source="i915 sysfs"), blind(1, asleep=True))
    assert "(its memory is the CPU's too)" in words
    assert "(worked out: these numbers come from i915 sysfs)" in words
    assert "(asleep: the kernel has suspended it" in words


def test_numbers_that_the_daemon_does_not_tell_are_unknown():
    seen = snapshot(gpu())
    del seen["margin_bytes"], seen["gpus"][0]["fits_bytes"], seen["gpus"][0]["unknown"]
    assert summed(text(document(seen, []), Terminal()))["Fits now"] == "unknown: the daemon does not say"


def older(*gpus: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A snapshot as a daemon of version 0.3.0 says it."""
    new_in_gpu = ("vendor", "source", "trust", "unified", "asleep", "taken_bytes", "unknown", "leased_bytes")
    new_in_gpu += ("fits_bytes", "limits", "tenants")
    whole = snapshot(*({key: gpu[key] for key in gpu.keys() - set(new_in_gpu)} for gpu in gpus), **more)
    return {key: whole[key] for key in whole.keys() - {"gpus_left_out", "margin_bytes", "line", "nodes"}}


def test_what_an_older_daemon_does_not_say_follows_from_what_it_says_or_is_unknown():
    leases = [{"gpu": "GPU-00000000", "outstanding_bytes": GIB}, {"gpu": "GPU-00000001", "outstanding_bytes": 3 * GIB}]
    whole = completed(older(gpu(total=24, used=8, reserved_bytes=GIB, free_bytes=15 * GIB), blind(1), leases=leases))

    assert [one["taken_bytes"] for one in whole["gpus"]] == [8 * GIB, None]
    assert [one["leased_bytes"] for one in whole["gpus"]] == [GIB, 3 * GIB]
    assert [one["source"] for one in completed(older(gpu(), second_hand=True))["gpus"]] == ["ComfyUI"]
    assert completed(snapshot(gpu())) == snapshot(gpu())


def test_the_report_of_an_older_daemon_has_the_sums_that_it_can_have():
    words = text(document(older(gpu(used=8), blind(1)), []), Terminal())

    assert summed(words)["VRAM utilisation"] == "33.3 % (8.0 GiB)"
    assert summed(words)["Fits now"] == "unknown: the daemon does not say"


@pytest.mark.parametrize("ollama", [None, {"state": "missing", "why": "refused", "models": None}])
def test_an_ollama_that_is_not_there_has_no_sums(ollama):
    found = summary(snapshot(gpu(), ollama=ollama))
    assert (found["ollama_vram_bytes"], found["ollama_ram_bytes"]) == (None, None)
    assert found["ollama_accelerated"] == ("none" if ollama is None else "unknown")


def test_without_a_daemon_only_the_nodes_are_shown():
    words = text(document(NO_SNAPSHOT, [], [node(BOX, *LOADED, asked_at=SEEN_AT)], problem="no daemon"), Terminal())
    assert words.startswith("Further Ollama servers\n   GPU ")
    assert "in 4 min" in words
    assert "unknown" not in words


# Any terminal.

NASTY = st.text(max_size=60) | st.sampled_from(
    [
        "",
        "\x1b[2J\x1b]0;x\x07",
        "a\nb\r\tc",
        "\u202edlrow",
        "模型" * 30,
        "x" * 300,
        "👩‍👩‍👧" * 9,
        "e\u0301" * 50,
        "\ud800",
    ]
)
WIDTHS = st.integers(60, 260)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(NASTY)
    tenants = [share(f"process:{draw(NASTY)}", 0.5, certainty=draw(st.sampled_from(["measured", "perhaps"])))]
    ones = [
        {"pid": draw(st.integers(1, 2**22)), "used_bytes": draw(st.sampled_from([None, GIB])), "command": draw(NASTY)}
    ]
    card = gpu(
        name=name, uuid=draw(NASTY), used=8, tenants=tenants * draw(st.integers(1, 20)), processes=ones, leased=1
    )
    models = [
        model(draw(NASTY), on_cpu=draw(st.sampled_from([0, 0.3, 1, None])), requests=draw(st.sampled_from([None, 3])))
    ]
    models.append(model("qwen3:14b", 10.3, 0.46))
    lost = blind(1, name=draw(NASTY))
    lost |= {"why": draw(NASTY), "processes_why": draw(NASTY)}
    return document(
        snapshot(
            *draw(st.sampled_from([(), (card,), (card, lost), (card, card, card)])),
            ollama=draw(st.sampled_from([None, ollama(*models), {"state": "missing", "why": name, "models": None}])),
            comfyui=comfyui(version=draw(NASTY)),
            gpus_why=draw(st.none() | NASTY),
            demands=[{"reason": draw(NASTY), "need_free_bytes": GIB}],
            held=[{"upstream": "ollama", "what": draw(NASTY), "why": draw(NASTY), "waited_seconds": 1.0}],
            nodes=[node(f"http://{name}", *models), away(why=draw(NASTY))],
            now=draw(NASTY),
        ),
        [event(reason=draw(NASTY), target=name)],
    )


@settings(max_examples=60, deadline=None)
@given(documents(), WIDTHS, st.booleans())
def test_no_line_is_wider_than_the_terminal_whatever_the_names(whole, width: int, colour: bool):
    for line in text(whole, Terminal(width=width, colour=colour)).splitlines():
        assert columns(line) <= width


@settings(max_examples=40, deadline=None)
@given(documents(), st.sampled_from(["ascii", "latin-1", "cp437"]))
def test_what_an_encoding_cannot_say_is_replaced_and_the_width_stays(whole, encoding: str):
    words = text(whole, Terminal(width=80, signs=False, encoding=encoding))
    words.encode(encoding)
    assert all(columns(line) <= 80 for line in words.splitlines())


@settings(max_examples=40, deadline=None)
@given(documents())
def test_no_name_can_steer_the_terminal(whole):
    words = text(whole, Terminal())
    assert not re.search(
        r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]", words
    )


@given(st.text())
def test_a_clean_text_stays_as_it_is(name: str):
    assert clean(clean(name)) == clean(name)
    assert clean("llama3.1:8b  模型 é") == "llama3.1:8b 模型 é"


@given(NASTY.map(clean), st.integers(8, 100))
def test_wrapping_loses_nothing(words: str, width: int):
    lines = wrapped(words, width, indent="  ", hanging="    ")
    assert "".join("".join(lines).split()) == "".join(words.split())


ROWS = st.lists(
    st.tuples(NASTY.map(clean), st.text("0123456789", max_size=8), st.text("ab c", max_size=25)), max_size=6
)


@given(ROWS, st.integers(50, 120))
def test_no_line_of_a_table_is_wider_than_it_may_be(rows, width: int):
    assert all(columns(line) <= width for line in table(rows, width, indent=" " * 14, right=(1,)))


def test_a_name_that_just_does_not_fit_stands_on_a_line_of_its_own():
    rows = [("nomic-embed-text:latest", "0.3 GiB", "CPU (RAM)"), ("qwen3:14b", "10.3 GiB", "54 % GPU / 46 % CPU")]
    assert table(rows, 48, indent="  ", right=(1,)) == [
        "  nomic-embed-text:latest",
        "              0.3 GiB  CPU (RAM)",
        "  qwen3:14b  10.3 GiB  54 % GPU / 46 % CPU",
    ]


@given(st.lists(st.integers(0, 24 * GIB), max_size=30), st.integers(1, 200))
def test_the_cells_of_a_bar_are_no_more_than_it_has_and_nobody_is_left_out_who_has_room(sizes: list[int], width: int):
    given_cells = cells(sizes, 24 * GIB, width)
    assert sum(given_cells) <= width
    if sum(size > 0 for size in sizes) <= width and sum(sizes) <= 24 * GIB:
        assert all(bool(number) == (size > 0) for number, size in zip(given_cells, sizes, strict=True))


def test_a_size_that_is_unknown_has_no_cells():
    assert cells([1, 2], 0, 10) == [0, 0]


def test_a_long_name_stands_on_lines_of_its_own_and_the_others_stay_in_line():
    lines = table([("a", "1", ""), ("b" * 50, "22", ""), ("c", "333", "")], 40, indent=" ", right=(1,))
    assert lines == [" a    1", f" {'b' * 39}", f"   {'b' * 11}", "     22", " c  333"]


def test_a_wide_terminal_has_two_blocks_beside_each_other():
    wide = report(*TWO_CARDS, width=200).splitlines()
    assert any("GPU 0: NVIDIA" in line and "GPU 1: NVIDIA" in line for line in wide)
    assert len(wide) < len(report(*TWO_CARDS, width=100).splitlines())


def test_in_between_no_line_is_too_long_to_follow():
    assert max(map(columns, report(*TWO_CARDS, width=140).splitlines())) <= 120


def test_where_there_are_no_blocks_the_bar_is_ascii():
    words = text(document(snapshot(gpu(used=16, tenants=HELD, leased=2)), []), Terminal(signs=False, encoding="ascii"))
    assert re.fullmatch(r"#+=+\++#+\?+-+\.+", bars(words)[0])
    assert "temperature 62 C" in words
    assert words.isascii()


class Screen(io.StringIO):
    """A stream that says what it is."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__()
        self.said, self.terminal = encoding, terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.said

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("encoding", "is_terminal", "environment", "signs", "colour"),
    [
        ("utf-8", True, {}, True, True),
        ("utf-8", True, {"NO_COLOR": "1"}, True, False),
        ("utf-8", True, {"NO_COLOR": ""}, True, True),
        ("utf-8", False, {}, True, False),
        ("ascii", True, {}, False, True),
        ("cp437", True, {}, False, True),
    ],
)
def test_colour_and_blocks_are_only_for_what_can_show_them(encoding, is_terminal, environment, signs, colour):
    found = Terminal.of(Screen(encoding, is_terminal), environment)
    assert (found.signs, found.colour) == (signs, colour)


def test_columns_are_obeyed_down_to_60(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert Terminal.of(Screen("utf-8", False)).width == 200
    monkeypatch.setenv("COLUMNS", "20")
    assert Terminal.of(Screen("utf-8", False)).width == 60


def test_colours_say_how_full_it_is():
    def painted(used: float) -> str:
        return text(document(snapshot(gpu(used=used)), []), Terminal(colour=True))

    assert [code in painted(used) for used, code in ((8, "\x1b[32m  "), (19, "\x1b[33m  "), (23, "\x1b[31m  "))] == [
        True
    ] * 3


def test_the_legend_has_the_colours_of_the_bar():
    shown = text(document(snapshot(gpu(tenants=[share("ollama:a", 4)])), []), Terminal(colour=True))
    (line,) = [one for one in shown.splitlines() if "ollama:a" in one]

    assert "\x1b[32m" in line  # as in the bar: green


def test_colours_change_no_word():
    whole = document(snapshot(*TWO_CARDS, ollama=ollama(*LOADED), nodes=[node(), away()]), [event()])
    assert re.sub(r"\x1b\[[0-9;]*m", "", text(whole, Terminal(colour=True))) == text(whole, Terminal())


# The real thing.


async def ran(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of the real command."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "vram_manager",
        *arguments,
        env={**os.environ, "COLUMNS": "80", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await child.communicate()
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()


@pytest.mark.asyncio
async def test_without_a_daemon_a_node_that_is_named_is_shown_and_the_exit_is_0(tmp_path: Path):
    async with World() as world, serving(world.ollama.app) as url:
        status, out, err = await ran("report", "--node", url, VRAM_SOCKET=str(tmp_path / "none.sock"))
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("vram-manager: no daemon: ")
    assert err.endswith("; only the nodes are shown\n")
    assert flat(out).startswith(f"Further Ollama servers idle {url} nothing loaded")


@pytest.mark.asyncio
async def test_without_a_daemon_and_without_an_answer_the_exit_is_4(tmp_path: Path):
    gone = {"VRAM_SOCKET": str(tmp_path / "none.sock")}
    status, out, _ = await ran("report", "--json", "--node", "http://127.0.0.1:1", **gone)
    assert status == 4
    assert json.loads(out)["nodes"][0]["state"] == "missing"
    assert (await ran("report", "--measure", **gone))[0] == 4


@pytest.mark.asyncio
async def test_a_node_that_is_no_url_is_wrong_usage(tmp_path: Path):
    status, out, err = await ran("report", "--node", "box:11434", VRAM_SOCKET=str(tmp_path / "none.sock"))
    assert (status, out) == (2, "")
    assert "--node: 'box:11434': must be an http:// or https:// URL" in err


@pytest.mark.asyncio
@pytest.mark.skipif(compiler() is None, reason="no C compiler here to build the fake NVML library")
async def test_the_whole_report_of_a_real_daemon_with_a_node(tmp_path: Path):
    async with World() as far, serving(far.ollama.app) as url:
        nodes = f"{url.replace('//', '//me:pw@')},http://127.0.0.1:1"
        async with whole_stack(tmp_path, OLLAMA_NODES=nodes) as (_, http, urls):
            chat = {"model": "gemma3:4b", "keep_alive": -1}
            (await http.post(f"{urls['ollama']}/api/generate", json=chat)).raise_for_status()
            socket = {"VRAM_SOCKET": str(tmp_path / "vram.sock")}
            seen = ""
            while "Ollama GPU-accelerated  yes" not in seen:
                _, seen, _ = await ran("report", **socket)
            _, wide, _ = await ran("report", COLUMNS="200", **socket)
            _, measured, _ = await ran("report", "--measure", "--json", **socket)
            transport = httpx.AsyncHTTPTransport(uds=socket["VRAM_SOCKET"])
            async with httpx.AsyncClient(transport=transport, base_url="http://box") as daemon:
                health = (await daemon.get("/health")).json()
                metrics = (await daemon.get("/metrics")).text
    assert re.search(r"^   gemma3:4b  3.\d GiB  GPU \(VRAM\)  never  context 4096$", seen, re.MULTILINE)
    assert re.search(r"^   .. ollama:gemma3:4b +3.\d GiB +\d\d.\d %$", seen, re.MULTILINE)
    assert f" idle {url} nothing loaded" in flat(seen)
    assert " missing http://127.0.0.1:1 cannot be read: GET /api/ps: " in flat(seen)
    assert re.search(r"^   Fits now +up to \d\.\d GiB on GPU 0 ", seen, re.MULTILINE)
    assert all(columns(line) <= 80 for line in seen.splitlines())
    assert all(columns(line) <= 200 for line in wide.splitlines())
    whole = json.loads(measured)
    assert [one["measured"]["verdict"] if "measured" in one else one["state"] for one in whole["nodes"]] == [
        "gpu",
        "missing",
    ]
    assert whole["summary"]["fits_bytes"] == whole["gpus"][0]["free_bytes"] - 2 * GIB
    # A node that is away makes no daemon degraded.
    assert health["status"] == "ok"
    assert f'vram_manager_node_up{{node="{url}"}} 1.0' in metrics
    assert 'vram_manager_node_up{node="http://127.0.0.1:1"} 0.0' in metrics
    assert f'vram_manager_node_ollama_vram_bytes{{node="{url}"}} 0.0' in metrics
    assert "me:pw" not in seen + measured + metrics
