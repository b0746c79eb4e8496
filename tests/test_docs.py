"""What is written down is true: settings, routes, metrics and verbs are documented, and nothing else is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vram_manager import config
from vram_manager.api.openapi import DOCUMENT
from vram_manager.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()


def as_text(default: Any) -> str:
    """A default as a person writes it into an environment file."""
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


def test_every_metric_is_in_the_readme_and_no_other() -> None:
    source = (ROOT / "vram_manager" / "metrics.py").read_text()
    gauges = set(re.findall(r'_gauge\(\s*"([a-z_]+)"', source))
    gauges |= {f"gpu_memory_{name}_bytes" for name in ("total", "used", "free")}
    counters = {f"{name}_total" for name in re.findall(r'_(?:counter|sum)\("([a-z_]+)"', source)}
    histograms = set(re.findall(r'_histogram\(\s*"([a-z_]+)"', source))
    section = README.split("Metrics, with the prefix")[1].split("\n\n")[0]

    assert set(re.findall(r"`([a-z_]+)`", section)) - {"vram_manager_"} == gauges | counters | histograms


def test_the_numbered_tree_is_told_alike_in_the_readme_and_in_the_code() -> None:
    source = (ROOT / "vram_manager" / "policy" / "decide.py").read_text()

    for number in range(1, 7):
        assert re.search(rf"^{number}\. ", source, flags=re.MULTILINE)
        assert re.search(rf"^{number}\. ", README, flags=re.MULTILINE)
