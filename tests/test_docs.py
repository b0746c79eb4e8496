"""What is written down is true: settings, routes, metrics and verbs are documented, and nothing else is."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.test_metrics import metrics
from vram_manager import config
from vram_manager.api.openapi import DOCUMENT
from vram_manager.cli import cli
from vram_manager.clock import Clock
from vram_manager.domain.event import Event, EventType
from vram_manager.gateway.waiting import WAITED_HEADER
from vram_manager.journal import Entry, line
from vram_manager.webhook import Webhook

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()


def as_text(default: Any) -> str:
    """A default as a person writes it into an environment file."""
    if isinstance(default, tuple):
        return ",".join(default)
    if default is None or default == {}:
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, dict):
        return json.dumps(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def table_rows() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*?) \|$", README, flags=re.MULTILINE)
    return {name: (default.strip("` "), words) for name, default, words in rows}


def test_the_readme_table_names_every_setting_and_no_other() -> None:
    assert list(table_rows()) == list(config.variables())


def test_the_example_file_names_every_setting_and_no_other() -> None:
    assert re.findall(r"^#?([A-Z_]+)=", EXAMPLE, flags=re.MULTILINE) == list(config.variables())


@pytest.mark.parametrize("name", config.variables())
def test_a_setting_has_one_meaning_and_one_default_wherever_it_is_written(name: str) -> None:
    field = config.variables()[name]
    words = " ".join(field.description.split())
    default = as_text(field.default)

    shown_default, shown_words = table_rows()[name]
    assert shown_words == words
    assert shown_default in {default, "by profile" if default == "" and "By profile" in words else default}
    entry = re.search(rf"((?:^# .*\n)+)^#{name}=(.*)$", EXAMPLE, flags=re.MULTILINE)
    assert entry is not None
    assert " ".join(line.removeprefix("# ") for line in entry[1].splitlines()) == words
    assert entry[2] == default


def test_every_profile_value_is_in_the_words_of_its_setting() -> None:
    by_name = {"threshold": "VRAM_THRESHOLD", "unload": "VRAM_UNLOAD_THRESHOLD", "idle": "COMFYUI_IDLE_SECONDS"}
    for key, name in by_name.items():
        values = " / ".join(f"{profile[key]:g}" for profile in config.PROFILES.values())
        assert values in " ".join(config.variables()[name].description.split())


@pytest.mark.parametrize("path", DOCUMENT["paths"])
def test_every_route_is_in_the_readme(path: str) -> None:
    assert path in README


@pytest.mark.parametrize("verb", cli.commands)
def test_every_verb_is_in_the_readme(verb: str) -> None:
    assert re.search(rf"`[^`]*\b{verb}\b", README)


def metrics_of_the_code() -> set[str]:
    """Every metric is announced with its type, also where there is no sample of it."""
    return set(re.findall(r"^# TYPE vram_manager_(\w+)", metrics().render().decode(), flags=re.MULTILINE))


def test_every_metric_is_in_the_readme_and_no_other() -> None:
    section = README.split("Metrics, with the prefix")[1].split("\n\n")[0]

    assert set(re.findall(r"`([a-z_]+)`", section)) - {"vram_manager_"} == metrics_of_the_code()


def test_the_metrics_of_the_gateways_and_of_repair_exist() -> None:
    named = set(re.findall(r"`((?:gateway|repairs)_[a-z_]+)`", README))

    assert named == {"repairs_total", "gateway_requests_total", "gateway_hold_seconds"}
    assert named <= metrics_of_the_code()


def test_the_numbered_tree_is_told_alike_in_the_readme_and_in_the_code() -> None:
    source = (ROOT / "vram_manager" / "policy" / "decide.py").read_text()

    told = README.split("The decision, in the order")[1].split("| stage |")[0]
    numbers = re.findall(r"^(\d)\. ", source, flags=re.MULTILINE)

    assert numbers == list("1234567")
    assert re.findall(r"^(\d)\. ", told, flags=re.MULTILINE) == numbers


LINES = {
    EventType.FREED: "Freed Ollama model llama3.1:8b",
    EventType.CPU_FALLBACK: "CPU fallback",
    EventType.REPAIRED: "Repaired",
    EventType.REPAIR_FAILED: "Not repaired",
    EventType.WARMED_BACK: "Warmed back",
}


@pytest.mark.parametrize(("kind", "beginning"), LINES.items())
def test_the_log_lines_of_repair_begin_as_the_readme_says(kind: EventType, beginning: str) -> None:
    event = Event(type=kind, target="ollama:llama3.1:8b", reason="llama3.1:8b is 45 % on CPU")
    _, words = line(Entry(id="model-0001", seq=1, at=datetime(2026, 7, 1, tzinfo=UTC), event=event))

    assert words.startswith(f"{beginning}: ")
    assert re.search(rf"^\| `{re.escape(beginning)}: ", README, flags=re.MULTILINE)


GATEWAYS = README.split("## Zero fallback: the gateways")[1].split("\n## ")[0]


def test_the_section_on_the_gateways_names_each_of_their_settings() -> None:
    settings = {name for name in config.variables() if name.startswith("GATEWAY_")}

    assert settings == set(re.findall(r"\bGATEWAY_[A-Z_]+\b", GATEWAYS))


def test_the_section_on_the_gateways_names_the_header_as_it_is_sent() -> None:
    assert f"`{WAITED_HEADER.decode()}`" in GATEWAYS


def test_the_ports_of_the_readme_are_those_of_the_compose_file() -> None:
    compose = (ROOT / "docker-compose.yaml").read_text()
    ports = dict(re.findall(r"\b(GATEWAY_(?:OLLAMA|COMFYUI)_PORT)=(\d+)", GATEWAYS))

    assert len(ports) == 2
    assert all(f"127.0.0.1:{port}:{port}" in compose and f"{name}={port}" in compose for name, port in ports.items())
    clients = GATEWAYS.split("| client |")[1].split("\n\n")[0]
    assert set(re.findall(r":(\d{4,5})\b", clients)) == set(ports.values())


PICTURE_NAMES = ("gateways.svg", "page.png", "top.png", "report.png")
PICTURES = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)


DRAWN, TAKEN = ([one for one in PICTURES if one[1].endswith(kind)] for kind in (".svg", ".png"))


def test_there_are_pictures_of_the_gateways_and_of_all_that_people_look_at() -> None:
    assert {path for _, path in PICTURES} == {f"docs/{name}" for name in PICTURE_NAMES}


@pytest.mark.parametrize(("words", "path"), DRAWN, ids=[path for _, path in DRAWN])
def test_a_picture_is_well_formed_says_what_it_shows_and_needs_nothing_from_elsewhere(words: str, path: str) -> None:
    text = (ROOT / path).read_text()
    root = ET.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"

    assert root.tag == f"{name}svg"
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    assert all((root.findtext(f"{name}{part}") or "").strip() for part in ("title", "desc"))
    assert len(words) > 20
    assert not re.search(r"<script|<foreignObject|href=|@import|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(("words", "path"), TAKEN, ids=[path for _, path in TAKEN])
def test_a_picture_that_the_script_takes_is_a_png_and_says_what_it_shows(words: str, path: str) -> None:
    content = (ROOT / path).read_bytes()

    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) < 500_000
    assert len(words) > 40
    assert Path(path).stem in (ROOT / "docs" / "pictures.py").read_text()


def test_every_link_within_the_readme_leads_somewhere() -> None:
    heads = re.findall(r"^#+ (.+)$", README, flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in heads}

    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_receivers_example_takes_what_we_sign_and_nothing_else() -> None:
    source = re.search(r"```python\n(import hashlib\n.*?)```", README, flags=re.DOTALL)
    assert source is not None
    scope: dict[str, Any] = {}
    exec(source[1], scope)
    webhook = Webhook(Clock(lambda: 0.0, lambda: datetime.now(UTC)), "http://receiver", (), "secret")
    event = Event(type=EventType.LEAK, target="worker:tts")
    headers = webhook._headers(Entry(id="leak-0001", seq=1, at=datetime.now(UTC), event=event), b"{}")
    old = headers | {"X-Vram-Manager-Timestamp": "1"}

    assert scope["genuine"](headers, b"{}", b"secret")
    assert not scope["genuine"](headers, b"{ }", b"secret")
    assert not scope["genuine"](headers, b"{}", b"another")
    assert not scope["genuine"](old, b"{}", b"secret")
