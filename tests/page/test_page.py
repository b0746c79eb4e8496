"""The page's routes: what is served, as what, and what may run in it."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from starlette.applications import Starlette

from vram_manager.api import page

pytestmark = pytest.mark.asyncio
OURS = [file for file in page.FOLDER.iterdir() if file.suffix in {".html", ".js", ".css"}]


def client(app: Starlette) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://vram")


@pytest_asyncio.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with client(Starlette(routes=page.routes())) as http:
        yield http


async def test_everything_that_the_page_names_is_there(http: httpx.AsyncClient) -> None:
    index = (await http.get("/")).text
    named = set(re.findall(r'(?:href|src)="((?:page/|chart)[^"]+)"', index))
    for file in OURS:
        named |= {f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', file.read_text())}

    assert {"chart.js", "page/page.js", "page/page.css", "page/favicon.svg", "page/words.js"} <= named
    for name in named:
        reply = await http.get(f"/{name}")
        assert reply.status_code == 200, name
        assert reply.headers["content-type"].split(";")[0] == page._TYPES["." + name.rpartition(".")[2]]


async def test_nothing_but_its_own_files_may_run_in_the_page(http: httpx.AsyncClient) -> None:
    reply = await http.get("/")

    assert reply.headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]* src=)", reply.text)


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
async def test_data_becomes_text_and_no_address_leads_outside(file: page.Path) -> None:
    text = file.read_text()

    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.search(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text)


async def test_a_reader_that_has_a_file_is_told_that_it_is_still_the_same(http: httpx.AsyncClient) -> None:
    first = await http.get("/page/page.js")
    again = await http.get("/page/page.js", headers={"If-None-Match": f'"other", {first.headers["etag"]}'})
    other = await http.get("/page/page.js", headers={"If-None-Match": '"other"'})

    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert other.status_code == 200
    assert first.headers["cache-control"] == "no-cache"


async def test_whoever_has_any_of_it_is_told_so_too(http: httpx.AsyncClient) -> None:
    assert (await http.get("/", headers={"If-None-Match": "*"})).status_code == 304


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [("GZIP;q=0.5, br", True), ("br, gzip; q=1", True), ("gzip;q=0", False), ("gzip;q=0.000, *", False), ("", False)],
)
async def test_who_refuses_gzip_does_not_get_it(http: httpx.AsyncClient, accepted: str, packed: bool) -> None:
    reply = await http.get("/", headers={"Accept-Encoding": accepted})

    assert ("content-encoding" in reply.headers) == packed
    assert reply.text.startswith("<!doctype html>")


@pytest.mark.parametrize("path", ["/", "/chart.js"])
async def test_who_takes_gzip_gets_it_and_others_the_file(http: httpx.AsyncClient, path: str) -> None:
    packed = await http.get(path, headers={"Accept-Encoding": "gzip"})
    plain = await http.get(path, headers={"Accept-Encoding": "identity"})

    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers
    assert packed.content == plain.content
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"]) / 2


@pytest.mark.parametrize("name", ["..%2Fpage.py", "index.html", "nothing.js", "%2Fetc%2Fpasswd"])
async def test_what_is_no_part_of_the_page_has_no_address(http: httpx.AsyncClient, name: str) -> None:
    reply = await http.get(f"/page/{name}")

    assert reply.status_code == 404


async def test_the_chart_library_is_chart_js_4_and_its_package_is_never_imported(http: httpx.AsyncClient) -> None:
    reply = await http.get("/chart.js")

    found = re.search(r'version = "(\d+)\.', reply.text)
    assert found is not None
    assert found[1] == "4"
    assert page.LIBRARY_PACKAGE not in sys.modules


async def test_without_the_library_its_address_says_what_to_install() -> None:
    async with client(Starlette(routes=page.routes("no_such_package_here"))) as http:
        reply = await http.get("/chart.js")

    assert reply.status_code == 404
    assert "pip install no_such_package_here" in reply.json()["error"]["message"]
