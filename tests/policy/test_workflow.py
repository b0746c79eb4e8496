"""What a workflow loads: its files and their folders, only of nodes that run, whatever the JSON is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram_manager.policy.workflow import LoaderFile, WorkflowFacts, workflow_facts, workflow_subject

CONTRACTS = Path(__file__).parents[1] / "contracts" / "comfyui"

Workflow = dict[str, Any]


def node(kind: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def file(name: str, folder: str | None = None, share: float = 1.0) -> LoaderFile:
    return LoaderFile(folder=folder, name=name, share=share)


def files_of(workflow: object) -> frozenset[LoaderFile]:
    return workflow_facts(workflow).files


def picture(checkpoint: str = "sdxl.safetensors", *, width: object = 1024, height: object = 1024) -> Workflow:
    """The usual one: load, sample, decode, save."""
    return {
        "4": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "5": node("EmptyLatentImage", width=width, height=height, batch_size=1),
        "6": node("CLIPTextEncode", text="a cat", clip=["4", 1]),
        "3": node("KSampler", model=["4", 0], positive=["6", 0], negative=["6", 0], latent_image=["5", 0], seed=1),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="x"),
    }


SDXL = file("sdxl.safetensors", "checkpoints")


def test_the_files_of_a_workflow_are_found_with_their_folders():
    workflow = picture() | {
        "10": node("LoraLoader", lora_name="sub/add.safetensors", model=["4", 0], clip=["4", 1]),
        "11": node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5.safetensors", type="flux"),
        "12": node("PreviewAny", a=["10", 0], b=["11", 0]),
    }
    assert files_of(workflow) == {
        SDXL,
        file("sub/add.safetensors", "loras"),
        file("clip_l.safetensors", "text_encoders"),
        file("t5.safetensors", "text_encoders"),
    }


@pytest.mark.parametrize("name", ["loader_inputs_by_folder.v0.3.64.json", "loader_inputs_by_folder.v0.33.0.json"])
def test_every_loader_input_that_the_servers_told_of_has_its_folder(name: str):
    told = [entry for entry in json.loads((CONTRACTS / name).read_text()) if "folders" in entry]
    assert len(told) >= 33
    for entry in told:
        workflow = {"1": node(entry["node"], **{entry["input"]: "a.safetensors"})}
        assert files_of(workflow) == {file("a.safetensors", *entry["folders"])}, entry


@pytest.mark.parametrize(
    "extension", [".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft", ".onnx", ".GGUF", ".SafeTensors"]
)
def test_whatever_node_names_a_file_of_weights_loads_it(extension: str):
    workflow = {"1": node("UnetLoaderGGUF", unet_name=f"flux{extension}", other="x.png", number=4)}
    assert files_of(workflow) == {file(f"flux{extension}")}


def test_names_that_are_no_file_are_none():
    workflow = {
        "1": node("VAELoader", vae_name="pixel_space"),
        "2": node("CLIPTextEncode", text="x" * 600 + ".safetensors"),
        "3": node("LoraStack", lora="None"),
    }
    assert files_of(workflow) == frozenset()


def test_a_node_with_a_row_for_each_file_loads_those_that_are_on():
    workflow = {
        "1": node(
            "Power Lora Loader",
            lora_1={"on": True, "lora": "a.safetensors", "strength": 1},
            lora_2={"on": False, "lora": "b.safetensors", "strength": 1},
            lora_3={"lora": "c.safetensors"},
        )
    }
    assert files_of(workflow) == {file("a.safetensors"), file("c.safetensors")}


@pytest.mark.parametrize(
    ("name", "dtype", "share"),
    [
        ("flux1-dev.safetensors", "fp8_e4m3fn", 0.5),
        ("flux1-dev.safetensors", "fp8_e4m3fn_fast", 0.5),
        ("flux1-dev.safetensors", "default", 1.0),
        ("flux1-dev-FP8.safetensors", "fp8_e4m3fn", 1.0),
        ("flux1-dev.safetensors", ["7", 0], 1.0),
    ],
)
def test_weights_cast_to_8_bits_take_half_unless_they_were_so_before(name: str, dtype: object, share: float):
    workflow = {"1": node("UNETLoader", unet_name=name, weight_dtype=dtype)}
    assert files_of(workflow) == {file(name, "diffusion_models", share)}


def test_a_loader_that_nobody_uses_loads_nothing():
    workflow = picture() | {
        "20": node("CheckpointLoaderSimple", ckpt_name="left-over.safetensors"),
        "21": node("LoraLoader", lora_name="left-over.safetensors", model=["20", 0], clip=["20", 1]),
    }
    assert files_of(workflow) == {SDXL}


def test_nodes_that_only_use_each_other_do_not_run():
    workflow = picture() | {"20": node("A", file="a.bin", b=["21", 0]), "21": node("B", a=["20", 0])}
    assert files_of(workflow) == {SDXL}


def test_where_every_node_is_on_a_circle_all_count():
    workflow = {"1": node("A", file="a.bin", b=["2", 0]), "2": node("B", file="b.bin", a=["1", 0])}
    assert files_of(workflow) == {file("a.bin"), file("b.bin")}


def test_a_circle_that_feeds_an_output_is_walked_once():
    workflow = {
        "1": node("A", file="a.bin", b=["2", 0]),
        "2": node("B", file="b.bin", a=["1", 0]),
        "3": node("Save", a=["1", 0]),
    }
    assert files_of(workflow) == {file("a.bin"), file("b.bin")}


def test_a_node_that_uses_itself_ends_the_walk():
    assert files_of({"1": node("A", file="a.bin", me=["1", 0])}) == {file("a.bin")}


def test_where_there_are_only_loaders_all_count():
    assert files_of({"1": node("CheckpointLoaderSimple", ckpt_name="a.ckpt")}) == {file("a.ckpt", "checkpoints")}


def test_links_may_lead_nowhere_and_may_be_numbers():
    workflow = {"1": node("Save", a=["nowhere", 0], b=[2, 0]), "2": node("VAELoader", vae_name="a.pt")}
    assert files_of(workflow) == {file("a.pt", "vae")}


def test_a_body_that_holds_a_prompt_is_that_prompt():
    assert files_of({"prompt": picture(), "client_id": "x"}) == {SDXL}


def test_a_node_called_prompt_is_a_node():
    assert files_of({"prompt": node("Load", file="a.bin")}) == {file("a.bin")}


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        7,
        "x.bin",
        [],
        [node("A", file="a.bin")],
        {},
        {"1": None},
        {"1": {"class_type": "A"}},
        {"1": {"class_type": "A", "inputs": ["a.bin"]}},
        {"prompt": {"prompt": 7}},
    ],
)
def test_what_is_no_workflow_names_nothing(nonsense: object):
    assert workflow_facts(nonsense) == WorkflowFacts()


def test_a_class_that_is_no_text_is_an_unknown_one():
    assert files_of({"1": {"class_type": 7, "inputs": {"ckpt_name": "a.ckpt"}}}) == {file("a.ckpt")}
    assert files_of({"1": {"inputs": {"ckpt_name": "a.ckpt"}}}) == {file("a.ckpt")}


def test_a_chain_of_a_hundred_thousand_nodes_is_walked_to_its_end():
    workflow = {str(number): node("Pass", source=[str(number + 1), 0]) for number in range(100_000)}
    workflow["100000"] = node("Load", file="a.bin")
    assert files_of(workflow) == {file("a.bin")}


def test_a_value_nested_as_deeply_as_json_allows_is_passed_over():
    deep: Any = "a.bin"
    for _ in range(100_000):
        deep = [deep]
    assert files_of({"1": node("A", deep=deep, file="b.bin")}) == {file("b.bin")}
    while isinstance(deep, list):  # taken apart by hand: freeing it all at once would go as deep
        deep = deep.pop()


def test_a_workflow_names_256_files_at_most():
    workflow = {str(number): node("Load", file=f"{number:04d}.bin") for number in range(300)}
    assert files_of(workflow) == {file(f"{number:04d}.bin") for number in range(256)}


@pytest.mark.parametrize(
    ("inputs", "cells"),
    [
        ({"width": 1024, "height": 1024, "batch_size": 1}, 128 * 128),
        ({"width": 1024, "height": 1024, "batch_size": 4}, 4 * 128 * 128),
        ({"width": 832, "height": 480, "length": 81, "batch_size": 1}, 104 * 60 * 21),
        ({"width": 832, "height": 480, "length": 1}, 104 * 60),
        ({"width": 1024, "height": 1024, "batch_size": ["7", 0]}, 128 * 128),
        ({"width": ["7", 0], "height": 1024, "batch_size": 1}, 0),
        ({"width": -1, "height": 1024, "batch_size": 1}, 0),
        ({"width": 10**30, "height": 8, "batch_size": 1}, 2048),
        ({"width": 8, "height": 8, "batch_size": 10**30}, 4096),
        ({"width": 1024, "height": 1024}, 0),
        ({"width": "1024", "height": 1024.5, "batch_size": 1}, 0),
    ],
)
def test_a_latent_has_an_eighth_of_each_side_and_a_quarter_of_the_frames(inputs: dict[str, object], cells: int):
    assert workflow_facts({"1": node("EmptyLatent", **inputs)}).latent_cells == cells


def test_of_several_latents_the_largest_counts():
    workflow = picture() | {"20": node("EmptyLatentImage", width=512, height=512, batch_size=1), "21": node("X")}
    assert workflow_facts(workflow).latent_cells == 128 * 128


def subject(workflow: Workflow) -> str | None:
    return workflow_subject(workflow_facts(workflow))


def test_a_workflow_is_known_again_whatever_its_prompt_seed_and_numbering():
    other = {f"n{number}": entry for number, entry in picture().items()}
    other = json.loads(
        json.dumps(other).replace('["', '["n').replace("a cat", "a dog").replace('"seed": 1', '"seed": 2')
    )
    assert subject(other) == subject(picture())
    assert str(subject(picture())).startswith("workflow:")


def test_what_needs_another_amount_of_memory_is_another_workflow():
    subjects = {
        subject(picture()),
        subject(picture("flux.safetensors")),
        subject(picture(width=2048)),
        subject(picture(width=512, height=512)),
        subject(picture(width=["7", 0])),
        workflow_subject(WorkflowFacts(files=frozenset({file("sdxl.safetensors")}), latent_cells=128 * 128)),
        workflow_subject(WorkflowFacts(files=frozenset({file("sdxl.safetensors", "checkpoints", 0.5)}))),
    }
    assert len(subjects) == 7


@pytest.mark.parametrize(("width", "height"), [(1152, 896), (896, 1152), (1216, 832), (1344, 768)])
def test_shapes_of_about_the_same_size_are_one_workflow(width: int, height: int):
    assert subject(picture(width=width, height=height)) == subject(picture())


def test_a_workflow_that_names_no_file_is_not_remembered():
    assert subject({"1": node("EmptyLatentImage", width=512, height=512, batch_size=1)}) is None


def test_a_subject_is_the_same_in_every_process():
    # sha256 of [[["checkpoints", "sdxl.safetensors", 1.0]], 28]: 128 x 128 cells are 2 ** (28 / 2)
    assert subject(picture()) == "workflow:e4e44656be19bdf5"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a.bin", "1", "2", "fp8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
LINK = st.tuples(st.sampled_from(["1", "2", "3", 1]), st.integers(0, 2)).map(list)
NAMES = st.sampled_from(["ckpt_name", "weight_dtype", "width", "height", "batch_size", "length", "x"])
NODE = st.fixed_dictionaries(
    {"inputs": st.dictionaries(NAMES, LINK | JSON) | JSON},
    optional={"class_type": st.sampled_from(["CheckpointLoaderSimple", "KSampler"]) | JSON},
)
WORKFLOW = JSON | st.dictionaries(st.sampled_from(["1", "2", "3", "prompt"]), NODE | JSON)


@given(WORKFLOW | st.fixed_dictionaries({"prompt": WORKFLOW}))
def test_whatever_json_comes_it_is_read(workflow: object):
    facts = workflow_facts(workflow)
    assert all(entry.name.lower().endswith(".bin") or "." in entry.name for entry in facts.files)
    assert 0 <= facts.latent_cells <= 2048 * 2048 * 4096 * 1024
    assert (workflow_subject(facts) is None) == (not facts.files)


def decoded(workflow: Workflow) -> int:
    return workflow_facts(workflow).decoded_cells


def test_the_cells_of_one_picture_are_decoded_in_a_piece():
    assert decoded(picture()) == 128 * 128
    several = picture() | {"5": node("EmptyLatentImage", width=1024, height=512, batch_size=8)}
    assert (decoded(several), workflow_facts(several).latent_cells) == (128 * 64, 8 * 128 * 64)


def test_without_a_vae_that_decodes_in_a_piece_nothing_is_decoded():
    tiled = picture() | {"8": node("VAEDecodeTiled", samples=["3", 0], vae=["4", 2])}
    assert decoded(tiled) == 0
    unused = tiled | {"20": node("VAEDecode", samples=["20", 0])}
    assert decoded(unused) == 0


def test_frames_of_a_video_are_no_picture():
    video = picture() | {"5": node("EmptyHunyuanLatentVideo", width=1024, height=1024, length=25, batch_size=1)}
    assert (decoded(video), workflow_facts(video).latent_cells) == (0, 128 * 128 * 7)
    assert decoded(picture() | {"5": node("SomeResize", width=1024, height=1024)}) == 0


def test_of_several_pictures_the_largest_is_decoded():
    both = picture() | {
        "15": node("EmptyLatentImage", width=2048, height=2048, batch_size=1),
        "16": node("PreviewAny", source=["15", 0]),
    }
    assert decoded(both) == 256 * 256


def test_what_is_decoded_does_not_make_another_workflow():
    facts = workflow_facts(picture())
    assert workflow_subject(replace(facts, decoded_cells=0)) == workflow_subject(facts)
