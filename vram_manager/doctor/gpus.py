"""The GPUs, and what is known to go wrong with each kind."""

from __future__ import annotations

from vram_manager.config import Settings
from vram_manager.doctor.finding import Finding
from vram_manager.doctor.surroundings import in_container
from vram_manager.domain.reading import Missing
from vram_manager.domain.size import gib
from vram_manager.domain.snapshot import Gpu, Gpus, Trust
from vram_manager.errors import SensorError
from vram_manager.gpus.all import AllGpus
from vram_manager.policy.accounting import named


async def gpus(settings: Settings) -> tuple[Gpus | None, list[Finding]]:
    sensor = AllGpus(deadline_seconds=settings.gpu.vram_check_timeout_seconds, gpu_sleep=settings.gpu.vram_gpu_sleep)
    try:
        gpus = await sensor.read(with_processes=True)
    except SensorError as error:
        return None, [Finding("gpus", "wrong", error.why, error.remedy), *_traps()]
    finally:
        sensor.close()
    driver = gpus.driver_version if isinstance(gpus.driver_version, str) else "version unknown"
    findings = [finding for gpu in gpus.gpus for finding in _gpu(gpu, driver)]
    findings += [Finding("gpus", "note", f"left out: {words}") for words in gpus.left_out]
    findings += about_choices(settings, gpus)
    return gpus, findings + _traps()


def about_choices(settings: Settings, gpus: Gpus) -> list[Finding]:
    """Settings that choose a GPU which is not there: then nothing is known of who is where, and nothing is freed."""
    there = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in gpus.gpus)
    return [
        Finding("gpus", "wrong", f"{name}={wanted} is none of the GPUs seen here", f"{name}= one of {there}, or empty")
        for name, wanted in (
            ("OLLAMA_GPU", settings.ollama.ollama_gpu),
            ("COMFYUI_GPU", settings.comfyui.comfyui_gpu),
        )
        if wanted is not None and named(gpus, wanted) is None
    ]


def _traps() -> list[Finding]:
    from vram_manager.gpus.traps import traps  # noqa: PLC0415 - the daemon never needs it

    found = traps(in_container=in_container())
    return [Finding("gpus", "wrong" if trap.grave else "note", trap.words, trap.remedy) for trap in found]


def _gpu(gpu: Gpu, driver: str) -> list[Finding]:
    part = f"gpu {gpu.index}"
    name = f"{gpu.name} ({gpu.uuid}, {f'driver {driver}' if gpu.vendor == 'nvidia' else gpu.source})"
    if gpu.asleep:
        words = f"{gpu.name} ({gpu.uuid}) is asleep, and is not woken to be read"
        return [Finding(part, "note", words, "VRAM_GPU_SLEEP=false keeps it awake")]
    if isinstance(gpu.memory, Missing):
        return [Finding(part, "wrong", f"{name}: {gpu.memory.why}", gpu.memory.remedy)]
    memory = gpu.memory
    words = f"{name}: {gib(memory.free_bytes)} of {gib(memory.total_bytes)} free, {memory.used_percent:.0f} % used"
    if gpu.trust is not Trust.MEASURED:
        words += f" ({gpu.trust}, from {gpu.source})"
    findings = [Finding(part, "fine", words)]
    if isinstance(gpu.processes, Missing):
        why = f"{gpu.processes.why}: who holds what is worked out from the APIs instead"
        findings.append(Finding(part, "note", why, gpu.processes.remedy))
    return findings
