"""ComfyUI's model files, its nodes, and the checks of POST /prompt (execution.py:validate_prompt)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

Workflow: TypeAlias = dict[str, dict[str, Any]]


class Part(StrEnum):
    """What a piece of weights is for."""

    DIFFUSION = "diffusion"
    TEXT_ENCODER = "text_encoder"
    VAE = "vae"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFile:
    """One file in a models folder. A checkpoint carries its text encoder and VAE inside its size.

    `memory_factor` is the model's factor in ComfyUI's own estimate of working memory
    (comfy/supported_models.py: SD 1.5 1.0, SDXL 0.8, Flux 3.1).
    """

    folder: str
    name: str
    size_bytes: int
    text_encoder_bytes: int = 0
    vae_bytes: int = 0
    memory_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeClass:
    """A node: which inputs must be there, which of them name files of which folder, and is it an output?"""

    required: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    output: bool = False


_SAMPLER = ("model", "seed", "steps", "positive", "negative", "latent_image")

NODE_CLASSES: Mapping[str, NodeClass] = {
    "CheckpointLoaderSimple": NodeClass(files=(("ckpt_name", "checkpoints"),)),
    "UNETLoader": NodeClass(files=(("unet_name", "diffusion_models"),)),
    "CLIPLoader": NodeClass(files=(("clip_name", "text_encoders"),)),
    "DualCLIPLoader": NodeClass(files=(("clip_name1", "text_encoders"), ("clip_name2", "text_encoders"))),
    "VAELoader": NodeClass(files=(("vae_name", "vae"),)),
    "LoraLoader": NodeClass(required=("model", "clip"), files=(("lora_name", "loras"),)),
    "LoraLoaderModelOnly": NodeClass(required=("model",), files=(("lora_name", "loras"),)),
    "CLIPTextEncode": NodeClass(required=("clip", "text")),
    "EmptyLatentImage": NodeClass(required=("width", "height", "batch_size")),
    "EmptySD3LatentImage": NodeClass(required=("width", "height", "batch_size")),
    "KSampler": NodeClass(required=_SAMPLER),
    "KSamplerAdvanced": NodeClass(required=(*_SAMPLER[:1], *_SAMPLER[2:], "noise_seed")),
    "VAEDecode": NodeClass(required=("samples", "vae")),
    "EmptyImage": NodeClass(required=("width", "height", "batch_size", "color")),
    "ImageScale": NodeClass(required=("image", "width", "height")),
    "SaveImage": NodeClass(required=("images",), output=True),
    "PreviewImage": NodeClass(required=("images",), output=True),
}


@dataclass(frozen=True, slots=True)
class Invalid:
    """The body of a 400."""

    error: dict[str, Any]
    node_errors: dict[str, Any]

    def reply(self) -> dict[str, Any]:
        return {"error": self.error, "node_errors": self.node_errors}


def error(kind: str, message: str, details: str = "", **extra_info: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


def is_link(value: object) -> bool:
    """A link to slot N of another node is written ["node id", N]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def links(node: Mapping[str, Any]) -> list[str]:
    """Ids of the nodes this node takes its inputs from."""
    return [value[0] for value in node["inputs"].values() if is_link(value)]


def upstream(prompt: Workflow, node_id: str) -> list[str]:
    """The node and all it needs, each after its own inputs."""
    order: list[str] = []

    def visit(current: str) -> None:
        if current in order or current not in prompt:
            return
        for needed in links(prompt[current]):
            visit(needed)
        order.append(current)

    visit(node_id)
    return order


def validate(prompt: Workflow, files: Sequence[ModelFile], *, names_missing_nodes: bool) -> list[str] | Invalid:
    """The output nodes that can run, or why none can.

    `names_missing_nodes`: since 2026 an unknown class is a `missing_node_type`, before an `invalid_prompt`.
    """
    outputs = []
    if _malformed(prompt):
        return Invalid(error("invalid_prompt", "Cannot execute because a node is malformed"), {})
    for node_id, node in prompt.items():
        kind = node.get("class_type", "")
        known = NODE_CLASSES.get(kind)
        if known is None:
            name = "missing_node_type" if names_missing_nodes else "invalid_prompt"
            message = f"Node '{kind}' not found. The custom node may not be installed."
            extra = {"node_id": node_id, "class_type": kind, "node_title": kind} if names_missing_nodes else {}
            return Invalid(error(name, message, f"Node ID '#{node_id}'", **extra), {})
        if known.output:
            outputs.append(node_id)
    if not outputs:
        return Invalid(error("prompt_no_outputs", "Prompt has no outputs"), {})

    node_errors: dict[str, Any] = {}
    good = []
    for output in outputs:
        wrong = {node_id: _errors(prompt[node_id], files) for node_id in upstream(prompt, output)}
        wrong = {node_id: found for node_id, found in wrong.items() if found}
        if not wrong:
            good.append(output)
        for node_id, found in wrong.items():
            kind = prompt[node_id]["class_type"]
            entry = {"errors": found, "dependent_outputs": list[str](), "class_type": kind}
            node_errors.setdefault(node_id, entry)["dependent_outputs"].append(output)
    if good:
        return good
    own = [found for output in outputs for found in node_errors.get(output, {}).get("errors", ())]
    details = "\n".join(f"{found['message']}: {found['details']}" for found in own)
    failed = error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details)
    return Invalid(failed, node_errors)


def object_info(files: Sequence[ModelFile], only: str | None = None) -> dict[str, Any]:
    """GET /object_info: every node with its inputs, model files as a combo; GET /object_info/{node} only that one."""
    return {
        kind: {
            "input": {
                "required": {name: ["*", {}] for name in node.required}
                | {name: [[file.name for file in files if file.folder == folder], {}] for name, folder in node.files}
            },
            "output": [],
            "name": kind,
            "display_name": kind,
            "description": "",
            "category": "simulated",
            "output_node": node.output,
        }
        for kind, node in NODE_CLASSES.items()
        if only in {None, kind}
    }


def _malformed(prompt: Workflow) -> bool:
    """Something is not a node, or a link leads nowhere."""
    if not isinstance(prompt, dict):
        return True
    nodes = prompt.values()
    if not all(isinstance(node, dict) and isinstance(node.get("inputs"), dict) for node in nodes):
        return True
    return any(source not in prompt for node in nodes for source in links(node))


def _errors(node: Mapping[str, Any], files: Sequence[ModelFile]) -> list[dict[str, Any]]:
    inputs = node["inputs"]
    known = NODE_CLASSES[node["class_type"]]
    found = [
        error("required_input_missing", "Required input is missing", name, input_name=name)
        for name in (*known.required, *(name for name, _ in known.files))
        if name not in inputs
    ]
    for name, folder in known.files:
        options = [file.name for file in files if file.folder == folder]
        value = inputs.get(name)
        if name in inputs and value not in options:
            details = f"{name}: '{value}' not in {options}"
            extra = {"input_name": name, "input_config": [options, {}], "received_value": value}
            found.append(error("value_not_in_list", "Value not in list", details, **extra))
    return found
