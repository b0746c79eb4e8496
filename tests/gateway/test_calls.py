"""What loads a model is told from what does not, as Ollama itself tells it."""

from __future__ import annotations

import gzip
import json
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vram_manager.gateway.calls import Call, keep_alive_seconds, local_name, look_at

Headers = tuple[tuple[bytes, bytes], ...]
JSON: Headers = ((b"Content-Type", b"application/json"),)
FORM: Headers = ((b"content-type", b"multipart/form-data; boundary=cff66a701551926adc370d2ddb0d0c81"),)


def asked(path: str, body: bytes | dict[str, Any], headers: Headers = JSON) -> Call | None:
    looked = look_at("POST", path, headers)
    assert looked is not None
    looked.feed(body if isinstance(body, bytes) else json.dumps(body).encode())
    return looked.call()


# As the clients sent them: ollama 0.6.3, openai 3.54.0, anthropic 2.12.0.
SENT = {
    "ollama chat": (
        "/api/chat",
        (
            b'{"model":"llama3.1:8b","stream":true,"options":{"num_ctx":8192,"temperature":0},"keep_alive":"10m",'
            b'"messages":[{"role":"user","content":"Why is the sky \\"blue\\"?"}],"tools":[]}'
        ),
        Call(model="llama3.1:8b", context=8192, keep_alive_seconds=600),
    ),
    "ollama chat with an image": (
        "/api/chat",
        (
            b'{"model":"llava","stream":false,"messages":[{"role":"user","content":"what?","images":["iVBORw0K"]}],'
            b'"tools":[]}'
        ),
        Call(model="llava"),
    ),
    "ollama generate": (
        "/api/generate",
        (
            b'{"model":"llama3.1:8b","stream":false,"options":{"num_ctx":2048,"num_gpu":999},"keep_alive":-1.0,'
            b'"prompt":"H\xc3\xa9"}'
        ),
        Call(model="llama3.1:8b", context=2048, num_gpu=999, keep_alive_seconds=inf),
    ),
    "ollama generate that unloads": (
        "/api/generate",
        b'{"model":"llama3.1:8b","stream":false,"keep_alive":0.0}',
        Call(model="llama3.1:8b", keep_alive_seconds=0, unloads=True),
    ),
    "ollama generate that only loads": (
        "/api/generate",
        b'{"model":"llama3.1:8b","stream":false}',
        Call(model="llama3.1:8b"),
    ),
    "ollama chat that unloads": (
        "/api/chat",
        b'{"model":"llama3.1:8b","stream":false,"keep_alive":0.0,"messages":[],"tools":[]}',
        Call(model="llama3.1:8b", keep_alive_seconds=0, unloads=True),
    ),
    "ollama embed": (
        "/api/embed",
        b'{"model":"nomic-embed-text","input":["a","b"],"keep_alive":3.5}',
        Call(model="nomic-embed-text", keep_alive_seconds=3.5, embeds=True),
    ),
    "ollama embeddings": (
        "/api/embeddings",
        b'{"model":"nomic-embed-text","prompt":"a"}',
        Call(model="nomic-embed-text", embeds=True),
    ),
    "openai chat": (
        "/v1/chat/completions",
        b'{"model":"llama3.1:8b","stream":true,"messages":[{"role":"user","content":"Hi"}],"temperature":0.2}',
        Call(model="llama3.1:8b"),
    ),
    "openai completions": (
        "/v1/completions",
        b'{"model":"codellama","prompt":"def f(","max_tokens":5}',
        Call(model="codellama"),
    ),
    "openai responses": (
        "/v1/responses",
        b'{"model":"gpt-oss:20b","input":"Hi","instructions":"short"}',
        Call(model="gpt-oss:20b"),
    ),
    "openai embeddings": (
        "/v1/embeddings",
        b'{"model":"nomic-embed-text","input":"Hi","encoding_format":"base64"}',
        Call(model="nomic-embed-text", embeds=True),
    ),
    "openai transcriptions": (
        "/v1/audio/transcriptions",
        (
            b'--cff66a701551926adc370d2ddb0d0c81\r\nContent-Disposition: form-data; name="model"\r\n\r\ngemma3n:e4b\r\n'
            b'--cff66a701551926adc370d2ddb0d0c81\r\nContent-Disposition: form-data; name="language"\r\n\r\nde\r\n'
            b'--cff66a701551926adc370d2ddb0d0c81\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
            b"Content-Type: audio/x-wav\r\n\r\nRIFF\r\n\x00\xff\r\n--cff66a701551926adc370d2ddb0d0c81--\r\n"
        ),
        Call(model="gemma3n:e4b"),
    ),
    "openai images": (
        "/v1/images/generations",
        b'{"model":"x/z-image-turbo","prompt":"a cat","size":"512x512"}',
        Call(model="x/z-image-turbo"),
    ),
    "anthropic messages": (
        "/v1/messages",
        (
            b'{"max_tokens":64,"messages":[{"role":"user","content":[{"type":"text","text":"Hi"}]}],'
            b'"model":"qwen3-coder","stream":true,"system":"s"}'
        ),
        Call(model="qwen3-coder"),
    ),
}


@pytest.mark.parametrize(("path", "body", "call"), SENT.values(), ids=SENT.keys())
def test_what_the_clients_send_is_understood(path: str, body: bytes, call: Call) -> None:
    headers = FORM if body.startswith(b"--") else JSON

    assert asked(path, body, headers) == call
    in_bytes = look_at("POST", path, headers)
    assert in_bytes is not None
    for place in range(len(body)):
        in_bytes.feed(body[place : place + 1])
    assert in_bytes.call() == call


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/"),
        ("POST", "/api/show"),
        ("POST", "/api/pull"),
        ("POST", "/api/create"),
        ("POST", "/api/blobs/sha256-1"),
        ("POST", "/api/experimental/web_search"),
        ("POST", "/v1/messages/count_tokens"),
        ("GET", "/v1/models"),
        ("GET", "/api/ps"),
        ("GET", "/api/chat"),
        ("OPTIONS", "/api/chat"),
        ("post", "/api/chat"),
        ("POST", "/api/chat/"),
        ("POST", "//api/chat"),
        ("POST", "/api//chat"),
        ("POST", "/x/../api/chat"),
        ("POST", "/API/chat"),
        ("POST", "/api/chat%20"),
        ("POST", "/api/chat%2F"),
        ("POST", "/api/c%zzhat"),
        ("POST", "*"),
        ("POST", "http://box"),
        ("POST", "http://box/"),
        ("POST", "http://box/api/chat/"),
    ],
)
def test_what_loads_nothing_is_not_looked_at(method: str, path: str) -> None:
    assert look_at(method, path, FORM) is None


@pytest.mark.parametrize(
    "path", ["/api/chat", "/api%2Fchat", "/api/ch%61t", "http://box/api/chat", "HTTP://box:11434/api/chat"]
)
def test_a_path_is_compared_as_gin_sees_it(path: str) -> None:
    assert asked(path, {"model": "m"}) == Call(model="m")


@pytest.mark.parametrize(
    "content_type", [b"application/json", b"multipart/form-data", b"multipart/mixed; boundary=a", b""]
)
def test_a_transcription_without_a_form_loads_nothing(content_type: bytes) -> None:
    assert look_at("POST", "/v1/audio/transcriptions", ((b"Content-Type", content_type),)) is None


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("llama3", "llama3"),
        (" llama3:8b\n", "llama3:8b"),
        ("hf.co/a/b:Q4_K_M", "hf.co/a/b:Q4_K_M"),
        ("host:5000/a/b", "host:5000/a/b"),
        ("m:local", "m"),
        ("m:8b:LOCAL", "m:8b"),
        ("m: local ", "m"),
        ("m:cloud", None),
        ("m:8b:Cloud", None),
        ("m:8b-cloud", None),
        ("m:8b-CLOUD ", None),
        ("m-cloud", "m-cloud"),
        ("m:8b-cloud-x", "m:8b-cloud-x"),
        ("host:5000/m-cloud", "host:5000/m-cloud"),
        ("m:cloud:local", None),
        ("m:8b-cloud:local", None),
        ("m:local:local", None),
        (":local", None),
        ("", None),
        ("  ", None),
    ],
)
def test_a_name_says_where_the_model_runs(raw: str, name: str | None) -> None:
    assert local_name(raw) == name
    assert asked("/v1/completions", {"model": raw}) == (Call(model=name) if name else None)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"model":5}', b'{"model":null}', b'{"model":"m"', b'["model","m"]', b"\x1f\x8b"]
)
def test_without_a_model_nothing_is_loaded(body: bytes) -> None:
    assert asked("/api/chat", body) is None


@pytest.mark.parametrize(
    ("sent", "seconds"),
    [
        (0, 0),
        (0.0, 0),
        (1e-10, 0),
        (300, 300),
        (3.5, 3.5),
        (-1, inf),
        (-0.5, inf),
        (1e30, None),
        (10**400, None),
        ("0", 0),
        ("-0", 0),
        ("0s", 0),
        ("0.4ns", 0),
        ("5m", 300),
        ("+5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        (".5s", 0.5),
        ("1.s", 1),
        ("100ms", 0.1),
        ("1µs", 1e-6),
        ("1μs", 1e-6),
        ("-1s", inf),
        ("-1h", inf),
        ("-1", None),  # time.ParseDuration: missing unit
        ("5", None),
        ("", None),
        (" 5m", None),
        ("1d", None),
        ("00", None),
        ("1h-3m", None),
        (".s", None),
        ("9999999h", None),
        ("9" * 400 + "h", None),
        (True, None),
        (None, None),
    ],
)
def test_keep_alive_is_read_as_go_does(sent: Any, seconds: float | None) -> None:
    assert keep_alive_seconds(sent) == seconds


@pytest.mark.parametrize(
    ("path", "body", "unloads"),
    [
        ("/api/generate", {"keep_alive": 0}, True),
        ("/api/generate", {"keep_alive": "0s", "prompt": ""}, True),
        ("/api/generate", {"keep_alive": 0, "prompt": None, "images": ["aGk="]}, True),
        ("/api/generate", {"keep_alive": 0, "messages": [{}]}, True),
        ("/api/generate", {"keep_alive": 0, "prompt": "x"}, False),
        ("/api/generate", {"keep_alive": 0, "prompt": "x" * 5000}, False),
        ("/api/generate", {"keep_alive": 1}, False),
        ("/api/generate", {"keep_alive": None}, False),
        ("/api/generate", {}, False),
        ("/api/chat", {"keep_alive": 0, "messages": None}, True),
        ("/api/chat", {"keep_alive": 0, "prompt": "x"}, True),
        ("/api/chat", {"keep_alive": 0, "messages": [{}]}, False),
        ("/api/embed", {"keep_alive": 0}, False),
        ("/api/embeddings", {"keep_alive": 0, "prompt": ""}, False),
        ("/v1/chat/completions", {"keep_alive": 0, "messages": []}, False),
    ],
)
def test_only_a_call_that_asks_nothing_and_keeps_nothing_unloads(
    path: str, body: dict[str, Any], unloads: bool
) -> None:
    call = asked(path, {"model": "m"} | body)

    assert call is not None
    assert call.unloads is unloads


@pytest.mark.parametrize(
    ("options", "context"),
    [
        ({"num_ctx": 4096}, 4096),
        ({"num_ctx": 4096.0}, 4096),
        ({"num_ctx": 4096.9}, 4096),
        ({"num_ctx": -1}, -1),
        ({"num_ctx": "4096"}, None),
        ({"num_ctx": True}, None),
        ({"num_ctx": None}, None),
        ({"num_ctx": [4096]}, None),
        ({"num_ctx": 1e300}, None),
        ({"num_ctx": 10**400}, None),
        ({"NUM_CTX": 4096}, None),
        ({"x": {"num_ctx": 4096}}, None),
        ([{"num_ctx": 4096}], None),
        ("num_ctx", None),
        (None, None),
    ],
)
def test_a_context_is_what_ollama_takes_for_one(options: Any, context: int | None) -> None:
    assert asked("/api/chat", {"model": "m", "options": options}) == Call(model="m", context=context)


def test_keys_are_compared_without_case_and_the_last_one_counts() -> None:
    body = b'{"model":"a","options":{"num_ctx":1},"MODEL":"b","Options":{"num_gpu":2},"Keep_Alive":5}'

    assert asked("/api/chat", body) == Call(model="b", context=1, num_gpu=2, keep_alive_seconds=5)


def test_the_compatible_endpoints_know_no_options() -> None:
    body = {"model": "m", "options": {"num_ctx": 4096}, "keep_alive": -1, "num_ctx": 5}

    assert asked("/v1/chat/completions", body) == Call(model="m")


def test_zstd_is_unpacked_where_ollama_does_it() -> None:
    zstandard = pytest.importorskip("zstandard")
    body = zstandard.compress(b'{"model":"m"}')
    headers = ((b"CONTENT-ENCODING", b"zstd"),)

    assert asked("/v1/responses", body, headers) == Call(model="m")
    assert asked("/v1/responses", body[:-1], headers) is None
    assert asked("/v1/responses", b'{"model":"m"}', headers) is None
    assert asked("/api/chat", body, headers) is None
    assert asked("/v1/responses", body) is None


def test_twenty_mebibytes_are_unpacked_and_no_more() -> None:
    zstandard = pytest.importorskip("zstandard")
    headers = ((b"content-encoding", b"zstd"),)
    body = b'{"model":"m","input":"%b"}'
    most = (20 << 20) - len(body) + 2

    assert asked("/v1/responses", zstandard.compress(body % (b"x" * most)), headers) == Call(model="m")
    assert asked("/v1/responses", zstandard.compress(body % (b"x" * (most + 1))), headers) is None


@pytest.mark.parametrize("path", ["/api/chat", "/v1/messages"])
def test_another_encoding_is_not_unpacked(path: str) -> None:
    headers = ((b"content-encoding", b"gzip"),)

    assert asked(path, gzip.compress(b'{"model":"m"}'), headers) is None
    assert asked(path, b'{"model":"m"}', headers) == Call(model="m")  # Ollama reads it too: it ignores the header


@given(
    st.sampled_from(["/api/generate", "/api/chat", "/v1/responses", "/v1/audio/transcriptions"]) | st.text(),
    st.sampled_from(
        [JSON, FORM, ((b"Content-Encoding", b"zstd"),), ((b"Content-Type", b'multipart/form-data;boundary="\xff\\'),)]
    ),
    st.lists(st.binary(max_size=30)),
)
def test_nothing_that_is_sent_raises(path: str, headers: Headers, body: list[bytes]) -> None:
    looked = look_at("POST", path, headers)
    if looked is not None:
        for piece in body:
            looked.feed(piece)
        assert looked.call() is None or looked.call() == looked.call()
