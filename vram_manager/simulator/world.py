"""A whole little world: one card, an Ollama and a ComfyUI on it, and something for both to load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from types import TracebackType

from vram_manager.simulator.comfyui import SimulatedComfyUI
from vram_manager.simulator.comfyui_executor import ComfyUISettings
from vram_manager.simulator.comfyui_files import ModelFile, Workflow
from vram_manager.simulator.comfyui_memory import Mode
from vram_manager.simulator.ledger import GIB, MIB, Ledger, LedgerGpuSensor
from vram_manager.simulator.ollama import SimulatedOllama, utcnow
from vram_manager.simulator.ollama_library import OllamaModel
from vram_manager.simulator.ollama_runner import OllamaSettings

SDXL = "sd_xl_base_1.0.safetensors"
FLUX = "flux1-dev-fp8.safetensors"

OLLAMA_MODELS: Sequence[OllamaModel] = (
    # Full need at 4096 tokens: 5.5, 9.7, 3.8 and 0.3 GiB, each plus 0.4 GiB of CUDA context; gemma3's
    # projector (0.8 GiB) is on top of that and in no number of /api/ps.
    OllamaModel(name="llama3.1:8b", file_bytes=4_920_753_328, layers=32, compute_bytes=410 * MIB),
    OllamaModel(
        name="qwen3:14b",
        file_bytes=9_276_198_565,
        layers=40,
        heads=40,
        compute_bytes=410 * MIB,
        family="qwen3",
        parameter_size="14.8B",
        trained_context=40960,
        capabilities=("completion", "tools", "thinking"),
    ),
    OllamaModel(
        name="gemma3:4b",
        file_bytes=3_338_801_804,
        layers=34,
        heads=8,
        kv_heads=4,
        head_dim=256,
        compute_bytes=1024 * MIB,
        projector_bytes=851_251_104,
        swa_undercount_bytes=400 * MIB,
        family="gemma3",
        parameter_size="4.3B",
        capabilities=("completion", "vision"),
    ),
    OllamaModel(
        name="nomic-embed-text:latest",
        file_bytes=274_302_450,
        layers=12,
        heads=12,
        kv_heads=12,
        head_dim=64,
        compute_bytes=24 * MIB,
        family="nomic-bert",
        parameter_size="137M",
        quantization="F16",
        trained_context=2048,
        capabilities=("embedding",),
    ),
)

COMFYUI_FILES: Sequence[ModelFile] = (
    ModelFile(
        folder="checkpoints",
        name=SDXL,
        size_bytes=6_938_078_334,
        text_encoder_bytes=1_638_000_000,
        vae_bytes=167_000_000,
        memory_factor=0.8,
    ),
    ModelFile(
        folder="checkpoints",
        name="v1-5-pruned-emaonly-fp16.safetensors",
        size_bytes=2_132_696_762,
        text_encoder_bytes=246_000_000,
        vae_bytes=167_000_000,
    ),
    ModelFile(folder="diffusion_models", name=FLUX, size_bytes=int(11.9 * GIB), memory_factor=3.1),
    ModelFile(folder="text_encoders", name="t5xxl_fp8_e4m3fn.safetensors", size_bytes=4_893_934_904),
    ModelFile(folder="text_encoders", name="clip_l.safetensors", size_bytes=246_144_152),
    ModelFile(folder="vae", name="ae.safetensors", size_bytes=335_304_388),
)


class World:
    """`async with World() as world:` closes what runs in the background at the end.

    `loopback`: Ollama listens on loopback only, and so refuses foreign Host names.
    """

    def __init__(
        self,
        gpu_gib: float = 24,
        *,
        mode: Mode = "legacy",
        ollama_settings: OllamaSettings = OllamaSettings(),  # noqa: B008 - frozen
        comfyui_settings: ComfyUISettings = ComfyUISettings(),  # noqa: B008 - frozen
        ollama_models: Sequence[OllamaModel] = OLLAMA_MODELS,
        comfyui_files: Sequence[ModelFile] = COMFYUI_FILES,
        show_processes: bool = False,
        loopback: bool = False,
        utcnow: Callable[[], datetime] = utcnow,
    ) -> None:
        name = "Simulated RTX 4090" if gpu_gib >= 24 else f"Simulated GPU with {gpu_gib:g} GiB"
        self.ledger = Ledger(int(gpu_gib * GIB), name=name)
        self.gpus = LedgerGpuSensor(self.ledger, show_processes=show_processes)
        self.ollama = SimulatedOllama(
            self.ledger, ollama_models, settings=ollama_settings, loopback=loopback, utcnow=utcnow
        )
        self.comfyui = SimulatedComfyUI(self.ledger, comfyui_files, mode=mode, settings=comfyui_settings, utcnow=utcnow)
        self.ollama.scheduler.immovable_bytes = self._immovable_bytes

    def _immovable_bytes(self) -> int:
        """Held beside Ollama and not to be had: by strangers, and by ComfyUI with prompts or after any free."""
        others = {name: held for name, held in self.ledger.holders().items() if not name.startswith("ollama:")}
        comfyui_bytes = others.pop(self.comfyui.memory.holder, 0)
        if not self.comfyui.queue.remaining:
            comfyui_bytes = min(comfyui_bytes, self.comfyui.memory.lasting_bytes)
        return comfyui_bytes + sum(others.values())

    async def __aenter__(self) -> World:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.ollama.close()
        await self.comfyui.close()


def txt2img(checkpoint: str = SDXL, steps: int = 20, width: int = 1024, height: int = 1024, seed: int = 1) -> Workflow:
    """The workflow ComfyUI opens with, for any checkpoint; post it as `{"prompt": txt2img()}`."""
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        **_from_text_to_image(["4", 0], ["4", 1], ["4", 2], steps, width, height, seed),
    }


def flux_txt2img(steps: int = 20, width: int = 1024, height: int = 1024, seed: int = 1) -> Workflow:
    """Flux from three loaders: diffusion model, two text encoders, VAE."""
    clips = {"clip_name1": "t5xxl_fp8_e4m3fn.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"}
    return {
        "10": {"class_type": "UNETLoader", "inputs": {"unet_name": FLUX, "weight_dtype": "default"}},
        "11": {"class_type": "DualCLIPLoader", "inputs": clips},
        "12": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        **_from_text_to_image(["10", 0], ["11", 0], ["12", 0], steps, width, height, seed),
    }


def _from_text_to_image(
    model: list[object], clip: list[object], vae: list[object], steps: int, width: int, height: int, seed: int
) -> Workflow:
    sampler = {
        "model": model,
        "positive": ["6", 0],
        "negative": ["7", 0],
        "latent_image": ["5", 0],
        "seed": seed,
        "steps": steps,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    return {
        "3": {"class_type": "KSampler", "inputs": sampler},
        "5": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": width, "height": height, "batch_size": 1},
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": "a lighthouse in fog"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": "text, watermark"}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": vae}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "ComfyUI"}},
    }
