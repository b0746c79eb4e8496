"""The page at `/`: its files, and the chart library that another package brings. It reads the API as anybody does.

Nothing is read before it is asked for; what was asked for is kept compressed only.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from vram_manager.api.fields import error

FOLDER = Path(__file__).with_name("page")
# The package is never imported: its wheel has Chart.js with its adapter for dates, as one file.
LIBRARY_PACKAGE, LIBRARY_FILE = "chartkick", "django/static/chartkick/Chart.bundle.js"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HEADERS = {
    # Also inline scripts and styles: what a model is called can never run.
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
}
# A file may change with the next version, under the same address: it is kept, and asked after each time (304).
_OURS = "no-cache"
_LIBRARYS = "max-age=86400"


def library(package: str = LIBRARY_PACKAGE) -> Path | None:
    """The file of Chart.js, None where the package that has it is not installed."""
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := Path(folder, LIBRARY_FILE)).is_file():
            return file
    return None


@dataclass(frozen=True, slots=True)
class _Kept:
    """One file, compressed; `etag` is weak, as it stands for both of its forms."""

    packed: bytes
    etag: str


class _Files:
    """What was asked for so far, by its path."""

    def __init__(self) -> None:
        self._kept: dict[Path, _Kept] = {}
        # When many ask for the same at first, it is compressed once.
        self._packing = asyncio.Lock()

    async def answer(self, request: Request, file: Path, cache: str) -> Response:
        """The file, or 304 where the reader has it."""
        async with self._packing:
            if file not in self._kept:
                self._kept[file] = await asyncio.to_thread(_packed, file)
        kept = self._kept[file]
        headers = {**_HEADERS, "ETag": kept.etag, "Cache-Control": cache}
        if {kept.etag, "*"} & {tag.strip() for tag in request.headers.get("if-none-match", "").split(",")}:
            return Response(status_code=304, headers=headers)
        if _takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(kept.packed, headers={**headers, "Content-Encoding": "gzip"}, media_type=_type(file))
        # From the disk, piece by piece: in one piece the library would cost the daemon 2 MiB for good.
        return FileResponse(file, headers=headers, media_type=_type(file))


def _takes_gzip(accepted: str) -> bool:
    """Named, and not with a weight of 0."""
    codings = (one.partition(";") for one in accepted.lower().split(","))
    return any(name.strip() == "gzip" and not re.fullmatch(r"\s*q=0(\.0*)?\s*", weight) for name, _, weight in codings)


def _packed(file: Path) -> _Kept:
    content = file.read_bytes()
    return _Kept(gzip.compress(content, mtime=0), f'W/"{hashlib.sha256(content).hexdigest()[:16]}"')


def _type(file: Path) -> str:
    return _TYPES[file.suffix]


def routes(package: str = LIBRARY_PACKAGE) -> list[Route]:
    """The page, its parts and the chart library of `package`; read-only and free for all, as what it shows is."""
    files = _Files()

    async def index(request: Request) -> Response:
        return await files.answer(request, FOLDER / "index.html", _OURS)

    async def part(request: Request) -> Response:
        # Only what lies in the folder has a name here: no path can lead out of it.
        names = {file.name: file for file in FOLDER.iterdir() if file.suffix in _TYPES and file.name != "index.html"}
        file = names.get(request.path_params["name"])
        if file is None:
            return error(404, "not_found", f"GET {request.url.path}: Not Found")
        return await files.answer(request, file, _OURS)

    async def chart(request: Request) -> Response:
        file = library(package)
        if file is None:
            return error(404, "not_found", f"no chart library: {package} is not installed (pip install {package})")
        return await files.answer(request, file, _LIBRARYS)

    return [
        Route("/", index),
        Route("/chart.js", chart),
        Route("/page/{name}", part),
    ]
