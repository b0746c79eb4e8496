"""Uploads, pictures and the page of the simulated ComfyUI."""

from __future__ import annotations

import hashlib
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from vram_manager.simulator.comfyui_pictures import UPLOAD_LIMIT_BYTES, Picture, png
from vram_manager.simulator.multipart import form_of
from vram_manager.simulator.world import SDXL, txt2img


async def upload(tenants, content, name="cat.png", **fields):
    return await tenants.comfyui.post("/upload/image", data=fields, files={"image": (name, content)})


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_an_upload_is_counted_and_hashed_and_can_be_viewed(settle):
    tenants = settle()
    content = bytes(range(256)) * 4096
    reply = await upload(tenants, content, subfolder="pets")
    assert reply.json() == {"name": "cat.png", "subfolder": "pets", "type": "input"}
    taken = tenants.world.comfyui.pictures.uploads[Picture("input", "pets", "cat.png")]
    assert taken == (len(content), hashlib.sha256(content).hexdigest())
    query = {"filename": "cat.png", "subfolder": "pets", "type": "input"}
    assert (await tenants.comfyui.get("/view", params=query)).status_code == 200


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_a_name_that_is_taken_gets_a_number_unless_it_is_the_same_or_may_be_overwritten(settle):
    tenants = settle()
    replies = [
        await upload(tenants, b"one"),
        await upload(tenants, b"one"),
        await upload(tenants, b"two"),
        await upload(tenants, b"three"),
        await upload(tenants, b"four", overwrite="true"),
    ]
    names = [reply.json()["name"] for reply in replies]
    assert names == ["cat.png", "cat.png", "cat (1).png", "cat (2).png", "cat.png"]


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_an_upload_beyond_the_limit_is_a_413_and_one_without_a_picture_a_400(settle):
    tenants = settle()
    piece = b"\0" * 2**20

    async def pieces():
        for _ in range(UPLOAD_LIMIT_BYTES // len(piece) + 1):
            yield piece

    headers = {"content-type": "multipart/form-data; boundary=b"}
    large = await tenants.comfyui.post("/upload/image", content=pieces(), headers=headers)
    none = await tenants.comfyui.post("/api/upload/image", data={"type": "input"}, files={"other": ("a", b"")})
    assert (large.status_code, none.status_code) == (413, 400)
    assert tenants.world.comfyui.pictures.uploads == {}


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_the_picture_of_a_prompt_can_be_viewed_and_no_other(settle):
    tenants = settle()
    entry = await tenants.ended(await tenants.post(txt2img(steps=1)))
    (image,) = entry["outputs"]["9"]["images"]
    seen = await tenants.comfyui.get("/view", params=image)
    unknown = await tenants.comfyui.get("/view", params=image | {"filename": "other.png"})
    outside = await tenants.comfyui.get("/api/view", params=image | {"filename": "../../etc/passwd"})
    assert seen.headers["content-type"] == "image/png"
    assert seen.content == png(image["filename"], 512)
    assert len(seen.content) > 512 * 512 * 3
    assert (unknown.status_code, outside.status_code) == (404, 400)


def test_a_picture_is_a_png_with_as_many_rows_as_columns():
    content = png("x", 8)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at = content.index(b"IDAT")
    size = int.from_bytes(content[at - 4 : at])
    assert len(zlib.decompress(content[at + 4 : at + 4 + size])) == 8 * (1 + 3 * 8)


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_nodes_tell_their_inputs_and_the_files_they_can_load(settle):
    tenants = settle()
    everything = (await tenants.comfyui.get("/object_info")).json()
    one = (await tenants.comfyui.get("/api/object_info/CheckpointLoaderSimple")).json()
    unknown = (await tenants.comfyui.get("/object_info/NoSuchNode")).json()
    assert SDXL in one["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
    assert everything["CheckpointLoaderSimple"] == one["CheckpointLoaderSimple"]
    assert unknown == {}


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_the_root_is_a_page(settle):
    page = await settle().comfyui.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "ComfyUI" in page.text


@pytest.mark.asyncio
@pytest.mark.looptime
async def test_accepted_prompts_are_recorded_in_their_order(settle):
    tenants = settle()
    ids = [await tenants.post(txt2img(steps=1, seed=seed), front=seed == 3) for seed in range(1, 4)]
    await tenants.comfyui.post("/prompt", json={"prompt": {}})
    assert list(tenants.world.comfyui.accepted) == ids


CONTENT = st.binary(max_size=300) | st.lists(
    st.sampled_from([b"\r\n--b", b"\r\n", b"--b--", b"--", b"\r", b"x"]), max_size=12
).map(b"".join)


@pytest.mark.asyncio
@given(
    contents=st.lists(CONTENT.filter(lambda content: b"\r\n--b" not in b"\r\n" + content), min_size=1, max_size=4),
    cut=st.integers(1, 400),
)
async def test_a_form_is_read_the_same_however_it_is_cut(contents, cut):
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="p%d"; filename="f%d"\r\nContent-Type: a/b\r\n\r\n%s\r\n'
        % (number, number, content)
        for number, content in enumerate(contents)
    )
    body += b"--b--\r\n"
    pieces = [body[start : start + cut] for start in range(0, len(body), cut)]

    async def receive():
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    headers = [(b"content-type", b'multipart/form-data; boundary="b"')]
    form = await form_of(Request({"type": "http", "method": "POST", "headers": headers}, receive))
    assert [(part.filename, part.size_bytes, part.sha256) for part in form.values()] == [
        (f"f{number}", len(content), hashlib.sha256(content).hexdigest()) for number, content in enumerate(contents)
    ]
