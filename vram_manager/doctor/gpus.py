"""The GPUs, and what is known to go wrong with each kind."""

from __future__ import annotations

from vram_manager.config import Settings
from vram_manager.doctor.finding import Finding
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Gpu, Gpus
from vram_manager.errors import SensorError
from vram_manager.gpus.nvml import NvmlSensor


async def gpus(settings: Settings) -> tuple[Gpus | None, list[Finding]]:
    sensor = NvmlSensor(deadline_seconds=settings.gpu.vram_check_timeout_seconds)
    try:
        gpus = await sensor.read(with_processes=True)
    except SensorError as error:
        return None, [Finding("nvml", "wrong", error.why, error.remedy)]
    finally:
        sensor.close()
    driver = gpus.driver_version if isinstance(gpus.driver_version, str) else "version unknown"
    return gpus, [finding for gpu in gpus.gpus for finding in _gpu(gpu, driver)]


def _gpu(gpu: Gpu, driver: str) -> list[Finding]:
    part, name = f"gpu {gpu.index}", f"{gpu.name} ({gpu.uuid}, driver {driver})"
    if isinstance(gpu.memory, Missing):
        return [Finding(part, "wrong", f"{name}: {gpu.memory.why}", gpu.memory.remedy)]
    memory = gpu.memory
    words = f"{name}: {gib(memory.free_bytes)} of {gib(memory.total_bytes)} free, {memory.used_percent:.0f} % used"
    findings = [Finding(part, "fine", words)]
    if isinstance(gpu.processes, Missing):
        why = f"{gpu.processes.why}: who holds what is worked out from the APIs instead"
        findings.append(Finding(part, "note", why, gpu.processes.remedy))
    return findings
