"""What a ComfyUI workflow will load and how large a picture it makes, read from the body of its prompt.

Whatever JSON comes, it is read: what makes no sense is passed over. Nodes that load by themselves, download, or
grow into other nodes cannot be seen here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import ceil, log2
from typing import Any, Final, TypeAlias

Node: TypeAlias = Mapping[str, Any]

# Folder, inputs and classes of ComfyUI's own loaders, as found by asking v0.3.64 and v0.33.0 (/object_info).
_LOADERS: Final = (
    ("checkpoints", "ckpt_name", "CheckpointLoaderSimple CheckpointLoader unCLIPCheckpointLoader"),
    ("checkpoints", "ckpt_name", "ImageOnlyCheckpointLoader LTXVAudioVAELoader LTXAVTextEncoderLoader"),
    ("checkpoints", "ckpt_name", "CreateHookModelAsLora CreateHookModelAsLoraModelOnly"),
    ("diffusion_models", "unet_name", "UNETLoader"),
    ("text_encoders", "clip_name", "CLIPLoader"),
    ("text_encoders", "clip_name1 clip_name2", "DualCLIPLoader TripleCLIPLoader QuadrupleCLIPLoader"),
    ("text_encoders", "clip_name3 clip_name4", "TripleCLIPLoader QuadrupleCLIPLoader"),
    ("text_encoders", "text_encoder", "LTXAVTextEncoderLoader"),
    ("vae", "vae_name", "VAELoader"),
    ("loras", "lora_name", "LoraLoader LoraLoaderModelOnly LoraLoaderBypass LoraLoaderBypassModelOnly"),
    ("loras", "lora_name", "CreateHookLora CreateHookLoraModelOnly"),
    ("loras", "existing_lora", "TrainLoraNode"),
    ("controlnet", "control_net_name", "ControlNetLoader DiffControlNetLoader"),
    ("style_models", "style_model_name", "StyleModelLoader"),
    ("clip_vision", "clip_name", "CLIPVisionLoader"),
    ("gligen", "gligen_name", "GLIGENLoader"),
    ("hypernetworks", "hypernetwork_name", "HypernetworkLoader"),
    ("upscale_models", "model_name", "UpscaleModelLoader"),
    ("latent_upscale_models", "model_name", "LatentUpscaleModelLoader"),
    ("photomaker", "photomaker_model_name", "PhotoMakerLoader"),
    ("model_patches", "name", "ModelPatchLoader"),
    ("audio_encoders", "audio_encoder_name", "AudioEncoderLoader"),
    ("background_removal", "bg_removal_name", "LoadBackgroundRemovalModel"),
    ("frame_interpolation", "model_name", "FrameInterpolationModelLoader"),
    ("optical_flow", "model_name", "OpticalFlowLoader"),
    ("geometry_estimation", "model_name", "LoadMoGeModel LoadDA3Model"),
    ("detection", "model_name", "LoadMediaPipeFaceLandmarker"),
)
_FOLDERS: Final = {
    (kind, name): folder for folder, names, kinds in _LOADERS for kind in kinds.split() for name in names.split()
}
_LOADER_CLASSES: Final = frozenset(kind for kind, _ in _FOLDERS)
_WEIGHTS: Final = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft", ".onnx")

# A file's name is never longer; a text that is, is a prompt that happens to end like one.
_NAME_LIMIT: Final = 512
# The largest workflows load some dozens; more would only cost time.
_FILES_LIMIT: Final = 256
_SIDE_LIMIT: Final = 16384  # nodes.py: MAX_RESOLUTION
_COUNT_LIMIT: Final = 4096  # nodes.py: EmptyLatentImage.batch_size; frames of a video are fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderFile:
    """A file that a node loads. `folder` is ComfyUI's name of the models folder, None where only the node knows.

    `share` is the part of its size that it takes in memory.
    """

    folder: str | None
    name: str
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowFacts:
    """What can be told from a workflow: its loader files, and the cells of its largest latent (0: not told).

    `decoded_cells` are those of one picture that a VAE decodes in a piece: of several one after the other.
    """

    files: frozenset[LoaderFile] = frozenset()
    latent_cells: int = 0
    decoded_cells: int = 0


def workflow_facts(workflow: object) -> WorkflowFacts:
    """What the nodes that will run tell. `workflow` is a prompt in API format, or a body that holds one."""
    nodes = _nodes_that_run(_nodes(workflow))
    files = sorted({file for node in nodes for file in _files(node)}, key=_order)
    decodes = any(_class_of(node) == "VAEDecode" for node in nodes)
    return WorkflowFacts(
        files=frozenset(files[:_FILES_LIMIT]),
        latent_cells=max((_latent_cells(node) for node in nodes), default=0),
        decoded_cells=max((_picture_cells(node) for node in nodes), default=0) if decodes else 0,
    )


def workflow_subject(facts: WorkflowFacts) -> str | None:
    """What the peak of such workflows is remembered under: same files, and latents within some 40 % of each other.

    None when it names no file: too many different ones would share it.
    """
    if not facts.files:
        return None
    # Two steps for each doubling.
    bucket = ceil(log2(facts.latent_cells) * 2) if facts.latent_cells else -1
    said = [[file.folder, file.name, file.share] for file in sorted(facts.files, key=_order)]
    return "workflow:" + sha256(json.dumps([said, bucket]).encode()).hexdigest()[:16]


def _order(file: LoaderFile) -> tuple[str, str, float]:
    return file.folder or "", file.name, file.share


def _nodes(workflow: object) -> dict[str, Node]:
    """The nodes by id. A body that holds a prompt is told from a node that is called "prompt"."""
    match workflow:
        case {"prompt": dict(inner)} if "class_type" not in inner:
            workflow = inner
    if not isinstance(workflow, dict):
        return {}
    return {
        str(number): node
        for number, node in workflow.items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }


def _nodes_that_run(nodes: Mapping[str, Node]) -> list[Node]:
    """The outputs and all they need. An output is a node that nobody uses, unless all it does is to load.

    A prompt without any is on a circle, or loads only: then every node counts.
    """
    sources = {number: set(_sources(node)) for number, node in nodes.items()}
    used = set[str]().union(*sources.values())
    waiting = [
        number for number, node in nodes.items() if number not in used and _class_of(node) not in _LOADER_CLASSES
    ]
    if not waiting:
        return list(nodes.values())
    reached = set(waiting)
    while waiting:
        more = [source for source in sources[waiting.pop()] if source in nodes and source not in reached]
        reached.update(more)
        waiting += more
    return [nodes[number] for number in nodes if number in reached]


def _sources(node: Node) -> Iterator[str]:
    """Ids of the nodes that this one takes its inputs from: a link is written ["node id", slot]."""
    for value in node["inputs"].values():
        match value:
            case [(str() | int()) as source, int()]:
                yield str(source)


def _class_of(node: Node) -> str:
    kind = node.get("class_type")
    return kind if isinstance(kind, str) else ""


def _files(node: Node) -> Iterator[LoaderFile]:
    inputs = node["inputs"]
    for name, value in inputs.items():
        # Some nodes that load many files have one object for each, with a switch.
        rows = value.values() if isinstance(value, dict) and value.get("on") is not False else (value,)
        for text in rows:
            if isinstance(text, str) and len(text) <= _NAME_LIMIT and text.lower().endswith(_WEIGHTS):
                folder = _FOLDERS.get((_class_of(node), name))
                yield LoaderFile(folder=folder, name=text, share=_share(inputs.get("weight_dtype"), text))


def _share(dtype: object, name: str) -> float:
    """Half of a 16-bit file when it is cast to fp8 (UNETLoader). Only its name tells that it is fp8 already."""
    cast = isinstance(dtype, str) and dtype.startswith("fp8") and "fp8" not in name.lower()
    return 0.5 if cast else 1.0


def _latent_cells(node: Node) -> int:
    """Cells of the latent that a node like EmptyLatentImage makes: an eighth of each side, a quarter of the frames.

    Only these say how many; other nodes have a width and a height for other reasons (CLIPTextEncodeSDXL).
    """
    inputs = node["inputs"]
    if "batch_size" not in inputs and "length" not in inputs:
        return 0
    width, height = (_whole(inputs.get(side), _SIDE_LIMIT) for side in ("width", "height"))
    batch, frames = (_whole(inputs.get(count), _COUNT_LIMIT) or 1 for count in ("batch_size", "length"))
    return (width // 8) * (height // 8) * batch * ((frames - 1) // 4 + 1)


def _picture_cells(node: Node) -> int:
    """Cells of one picture of a node that makes latents of pictures; videos are decoded piece by piece."""
    inputs = node["inputs"]
    if "batch_size" not in inputs or "length" in inputs:
        return 0
    width, height = (_whole(inputs.get(side), _SIDE_LIMIT) for side in ("width", "height"))
    return (width // 8) * (height // 8)


def _whole(value: object, most: int) -> int:
    """A count as it was written, 0 for a link or nonsense."""
    return min(max(value, 0), most) if isinstance(value, int) else 0
