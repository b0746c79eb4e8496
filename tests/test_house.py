"""The layers are law: import-linter's contracts hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_imports_point_down_only_and_the_rules_stay_pure() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"}
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_reader_gets_from_main_to_a_free_in_six_files() -> None:
    steps = {
        "__main__.py": "from vram_manager.cli import main",
        "cli.py": "daemon.run(",
        "daemon.py": "Cycle(",
        "cycle.py": "self._actuator.ask(",
        "actuator.py": "self._comfyui.free(",
        "backends/comfyui.py": '"/free"',
    }

    for name, next_step in steps.items():
        assert next_step in (ROOT / "vram_manager" / name).read_text(), name


def test_the_daemon_imports_nothing_that_only_commands_or_plots_need() -> None:
    heavy = {"rich", "pygments", "matplotlib", "numpy"}
    asked = f"import sys, vram_manager.daemon; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
