"""ComfyUI's pictures: what prompts made and clients uploaded (server.py:image_upload, view_image)."""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from vram_manager.simulator.multipart import form_of

UPLOAD_LIMIT_BYTES = 100 * 1024 * 1024
"""--max-upload-size."""

SIDE_PIXELS = 512


class Picture(NamedTuple):
    """Where a picture is; `kind` is input, temp or output."""

    kind: str
    subfolder: str
    name: str


class Upload(NamedTuple):
    """What came; the bytes themselves are not kept."""

    size_bytes: int
    sha256: str


class Pictures:
    """`made` by prompts and `uploads` by clients: both can be viewed, as pictures made up from their names."""

    def __init__(self) -> None:
        self.made: set[Picture] = set()
        self.uploads: dict[Picture, Upload] = {}

    async def upload(self, request: Request) -> Response:
        """A name that is taken gets a number, unless the content is the same or may be overwritten."""
        try:
            form = await form_of(request, UPLOAD_LIMIT_BYTES)
        except OverflowError as error:
            return PlainTextResponse(f"Maximum request body size {UPLOAD_LIMIT_BYTES} exceeded, actual {error}", 413)
        image = form.get("image")
        if image is None or not image.filename:
            return Response(status_code=400)
        fields = {name: part.text for name, part in form.items() if part.filename is None}
        place = Picture(fields.get("type") or "input", fields.get("subfolder", ""), image.filename)
        uploaded = Upload(image.size_bytes, image.sha256)
        stem, dot, ending = image.filename.rpartition(".")
        number = 1
        while fields.get("overwrite") not in {"true", "1"} and self.uploads.get(place, uploaded) != uploaded:
            place = place._replace(name=f"{stem} ({number}){dot}{ending}" if dot else f"{ending} ({number})")
            number += 1
        self.uploads[place] = uploaded
        return JSONResponse({"name": place.name, "subfolder": place.subfolder, "type": place.kind})

    async def view(self, request: Request) -> Response:
        asked = request.query_params
        name = asked.get("filename", "")
        if not name or name.startswith("/") or ".." in name:
            return Response(status_code=400)
        place = Picture(asked.get("type", "output"), asked.get("subfolder", ""), name)
        if place not in self.made and place not in self.uploads:
            return Response(status_code=404)
        headers = {"content-disposition": f'filename="{name}"'}
        return Response(png(name, SIDE_PIXELS), media_type="image/png", headers=headers)


def png(name: str, side_pixels: int) -> bytes:
    """A square PNG of one colour, which follows from the name; not compressed, so 3 bytes a pixel."""
    row = b"\0" + hashlib.sha256(name.encode()).digest()[:3] * side_pixels
    head = struct.pack(">IIBBBBB", side_pixels, side_pixels, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(row * side_pixels, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
