"""What is asked wrongly is answered in one shape, and names what was wrong. One daemon stands for all of it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.conftest import error_of
from tests.fakes import InThread


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    directory = tmp_path_factory.mktemp("vram")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VRAM_SOCKET", str(directory / "vram.sock"))
        environment.setenv("VRAM_STATE_DIR", str(directory))
        with InThread() as running:
            yield running
    assert running.comfyui.posts == [], "nothing of all this may have freed anything"


@pytest.fixture(scope="module")
def standing(daemon: InThread) -> Iterator[httpx.Client]:
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(daemon.path)), base_url="http://vram", timeout=20
    ) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"stage": "hard"}, "stage"),
        ({"stage": None}, "stage"),
        ({"stage": ["soft"]}, "stage"),
        ({"force": "yes"}, "force"),
        ({"force": 1}, "force"),
        ({"target": "windows"}, "target"),
        ({"target": {}}, "target"),
        ({"target": "ollama"}, "model"),
        ({"target": "ollama", "model": ""}, "model"),
        ({"target": "ollama", "model": 5}, "model"),
        ({"model": "llama3.1:8b"}, "model"),
        ({"now": True}, "now"),
        ({"\ud800": 1}, "\ud800"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_wrong_field_is_422_and_named(standing: httpx.Client, body: dict[str, Any], field: str):
    reply = standing.post("/v1/free", content=json.dumps(body))
    assert reply.status_code == 422
    assert error_of(reply)["field"] == field


@pytest.mark.parametrize("body", ["[]", "5", "null", '"soft"', "true"])
def test_a_body_that_is_no_object_is_422(standing: httpx.Client, body: str):
    reply = standing.post("/v1/free", content=body)
    assert (reply.status_code, error_of(reply)["type"]) == (422, "invalid")


@pytest.mark.parametrize(
    "body",
    [b"{", b"stage=soft", b"\xff\xfe", b"[" * 100_000, b'{"a": ' * 50_000, b"9" * 10_000, b"\x00"],
    ids=lambda body: ascii(body[:12]),
)
def test_a_body_that_is_no_json_is_400(standing: httpx.Client, body: bytes):
    reply = standing.post("/v1/free", content=body)
    assert (reply.status_code, error_of(reply)["type"]) == (400, "bad_json")


@pytest.mark.parametrize(
    "path", ["/page", "/v1", "/v1/nothing", "/health/gpu", "/%00", "/v1/events%2f..", "/page/%2e%2e/app.py"]
)
def test_an_unknown_path_is_404(standing: httpx.Client, path: str):
    reply = standing.get(path)
    assert (reply.status_code, error_of(reply)["type"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("verb", "path", "allowed"),
    [("POST", "/health", "GET"), ("GET", "/v1/free", "POST"), ("DELETE", "/v1/events", "GET")],
)
def test_a_wrong_method_is_405_and_says_which_are_right(standing: httpx.Client, verb: str, path: str, allowed: str):
    reply = standing.request(verb, path)
    assert (reply.status_code, error_of(reply)["type"]) == (405, "method_not_allowed")
    assert allowed in reply.headers["allow"]


@pytest.mark.parametrize("path", ["/v1/events", "/v1/decisions"])
@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "many", "", "1e3", "٣", "9" * 30])
def test_a_wrong_limit_is_422_and_named(standing: httpx.Client, path: str, limit: str):
    reply = standing.get(path, params={"limit": limit})
    assert (reply.status_code, error_of(reply)["field"]) == (422, "limit")


@pytest.mark.parametrize("after", ["x", "free-", "-5", "free-1-2", "1.5", "Free-0001", "9" * 30])
def test_a_wrong_id_is_422_and_named(standing: httpx.Client, after: str):
    for headers in ({}, {"Accept": "text/event-stream"}):
        reply = standing.get("/v1/events", params={"after": after}, headers=headers)
        assert (reply.status_code, error_of(reply)["field"]) == (422, "after")


MALFORMED = [
    b"\x00\x01\x02\r\n\r\n",
    b"hello\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /health HTTP/9.9\r\n\r\n",
    b"GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
    b"POST /v1/free HTTP/1.1\r\nContent-Length: many\r\n\r\n",
    b"POST /v1/free HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/free HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /v1/free HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nnot a chunk\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
]


@pytest.mark.parametrize("sent", MALFORMED, ids=lambda sent: ascii(sent[:40]))
def test_what_is_no_http_is_hung_up_on_and_hurts_nobody(daemon: InThread, standing: httpx.Client, sent: bytes):
    came = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(daemon.path))
        client.sendall(sent)
        while more := client.recv(65536):
            came += more
    assert came.startswith(b"HTTP/1.1 4")
    assert standing.get("/health").status_code == 200
