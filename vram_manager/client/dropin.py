"""Three functions for a worker that checks before it starts a job: no client to keep, never an exception.

>>> if not check_vram_sufficient(job.get("estimated_vram", 8192)):
...     fail(job, "Insufficient VRAM")

Settings, read at each call: ENABLE_VRAM_MONITORING, VRAM_CHECK_DRY_RUN (or VRAM_DRY_RUN), VRAM_SAFETY_MARGIN_MB,
VRAM_CHECK_TIMEOUT_SECONDS, VRAM_FAIL_OPEN, VRAM_SOCKET. MB are MiB.
"""

from __future__ import annotations

import math
import os
from typing import Any

from vram_manager.client.answers import GpuTotals, as_object, gpus, read
from vram_manager.client.questions import Question, env_flag, logger
from vram_manager.client.sync import Line, VramClient
from vram_manager.errors import VramManagerError

# One model's worth of context, kernels and temporary tensors on top of its weights.
SAFETY_MARGIN_MB = 2048
TIMEOUT_SECONDS = 5.0


def get_available_vram() -> int | None:
    """MB free, as the GPUs count it; None when it cannot be known.

    >>> get_available_vram()
    15000
    """
    stats = get_vram_stats()
    return None if stats is None else stats["free_mb"]


def get_vram_stats() -> dict[str, Any] | None:
    """`total_mb`, `used_mb`, `free_mb`, `usage_percent` and `gpus`, each of them with the same; None on failure.

    >>> get_vram_stats()["usage_percent"]
    29.3
    """
    try:
        line = Line(fail_open=False, timeout_seconds=_timeout_seconds())
        return line.ask(Question("GET", "/health/vram", None, _stats, lambda _: {}))
    except VramManagerError as error:
        logger.warning("VRAM stats are not available: %s", error)
        return None


def check_vram_sufficient(required_mb: int, safety_margin_mb: int | None = None) -> bool:
    """Is there room for `required_mb` and the margin (VRAM_SAFETY_MARGIN_MB, 2048)? True when nobody can tell.

    >>> check_vram_sufficient(24576)
    True

    Says what it decided and why. In dry run a refusal is said, and the answer is True.
    """
    if not env_flag("ENABLE_VRAM_MONITORING", default=True):
        return True
    margin_mb = (
        int(_number("VRAM_SAFETY_MARGIN_MB", SAFETY_MARGIN_MB)) if safety_margin_mb is None else safety_margin_mb
    )
    needed = f"{required_mb} MB required + {margin_mb} MB margin"
    try:
        with VramClient(fail_open=False, timeout_seconds=_timeout_seconds()) as client:
            admission = client.check(required_mb, margin_mb=margin_mb)
    except (VramManagerError, TypeError) as error:
        admitted = env_flag("VRAM_FAIL_OPEN", default=True)
        logger.warning("VRAM check: %s %s: %s", needed, "admitted unseen" if admitted else "refused unseen", error)
        return admitted
    available = "unknown" if admission.available_bytes is None else f"{admission.available_bytes // 2**20} MB"
    if admission.fail_open:
        logger.warning("VRAM check: %s admitted unseen: %s", needed, admission.reason)
        return True
    if admission.admitted and not admission.dry_run:
        logger.info("VRAM check: %s, %s available: sufficient", needed, available)
        return True
    if env_flag("VRAM_CHECK_DRY_RUN", default=env_flag("VRAM_DRY_RUN", default=False)) or admission.admitted:
        logger.warning("DRY RUN: would reject %s, %s available: %s", needed, available, admission.reason)
        return True
    logger.warning("VRAM check: %s, %s available: rejected: %s", needed, available, admission.reason)
    return False


def _timeout_seconds() -> float:
    return _number("VRAM_CHECK_TIMEOUT_SECONDS", TIMEOUT_SECONDS)


def _stats(body: Any) -> dict[str, Any]:
    """The answer as it came, once it is sure to be one."""
    read(GpuTotals, body)
    gpus(body)
    stats = as_object(body)
    return {name: stats.get(name) for name in ("total_mb", "used_mb", "free_mb", "usage_percent", "gpus")}


def _number(name: str, default: float) -> float:
    written = os.environ.get(name, "").strip()
    try:
        number = float(written) if written else default
    except ValueError:
        number = math.nan
    if not 0 <= number < 10**9:
        logger.warning("%s=%s: must be a number; %g is used", name, written, default)
        return default
    return number
