"""The same API on TCP: everybody may read, and only who has the token may change anything."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.api.conftest import error_of
from tests.fakes import InThread

READS = (
    "/health",
    "/ready",
    "/health/vram",
    "/v1/snapshot",
    "/v1/events",
    "/v1/decisions",
    "/v1/history",
    "/",
    "/page/page.js",
    "/chart.js",
    "/metrics",
    "/openapi.json",
)


@dataclass(frozen=True)
class OnTcp:
    """A daemon with a port, a client of that port, and one of its socket."""

    daemon: InThread
    tcp: httpx.Client
    unix: httpx.Client

    def free(self, authorization: str | bytes | None = None, **more: object) -> httpx.Response:
        headers = {} if authorization is None else {"Authorization": authorization}
        return self.tcp.post("/v1/free", headers=headers, **({"json": {}} | more))  # type: ignore[arg-type]


@contextlib.contextmanager
def on_tcp(factory: pytest.TempPathFactory, token: str = "", host: str = "") -> Iterator[OnTcp]:
    directory = factory.mktemp("vram")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server(("::1" if ":" in host else "127.0.0.1", 0), family=family) as listener:
        port = listener.getsockname()[1]
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {
            "VRAM_SOCKET": str(directory / "vram.sock"),
            "VRAM_STATE_DIR": str(directory),
            "VRAM_HTTP_PORT": str(port),
            "VRAM_HTTP_HOST": host,
            "VRAM_API_TOKEN": token,
            "VRAM_FREE_COOLDOWN": "0",
            "COMFYUI_IDLE_SECONDS": "0",
        }.items():
            environment.setenv(name, value)
        daemon = stack.enter_context(InThread())
        daemon.comfyui.acts_after_seconds = None
        at = f"http://{f'[{host}]' if ':' in host else '127.0.0.1'}:{port}"
        tcp = stack.enter_context(httpx.Client(base_url=at, trust_env=False, timeout=20))
        transport = httpx.HTTPTransport(uds=str(daemon.path))
        unix = stack.enter_context(httpx.Client(base_url="http://vram", transport=transport, timeout=20))
        yield OnTcp(daemon, tcp, unix)


@pytest.fixture(scope="module")
def open_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnTcp]:
    """No token is set."""
    with on_tcp(tmp_path_factory) as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnTcp]:
    """The token is s3cret."""
    with on_tcp(tmp_path_factory, token="s3cret") as running:
        yield running


@pytest.mark.parametrize("path", READS)
def test_everybody_may_read(open_one: OnTcp, locked: OnTcp, path: str):
    assert open_one.tcp.get(path).status_code == 200
    assert locked.tcp.get(path).status_code == 200


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer None", "Bearer s3cret"])
def test_without_a_token_nobody_may_change_anything(open_one: OnTcp, header: str | None):
    reply = open_one.free(header)
    assert reply.status_code == 403
    assert error_of(reply)["type"] == "read_only"
    assert "VRAM_API_TOKEN" in error_of(reply)["message"]
    assert open_one.daemon.comfyui.posts == []


@pytest.mark.parametrize(
    "header",
    [None, "", "s3cret", "Bearer", "Bearer wrong", "Bearer s3cret2", "Bearer s3cre", "Basic s3cret", "Bearer S3CRET"],
)
def test_a_wrong_token_is_401_and_changes_nothing(locked: OnTcp, header: str | None):
    before = len(locked.daemon.comfyui.posts)
    reply = locked.free(header)
    assert reply.status_code == 401
    assert error_of(reply)["type"] == "unauthorized"
    assert "s3cret" not in reply.text
    assert len(locked.daemon.comfyui.posts) == before


def test_the_token_is_asked_before_the_body_is_looked_at(locked: OnTcp):
    assert locked.free(json=None, content=b"{").status_code == 401
    assert locked.free("Bearer s3cret", json=None, content=b"{").status_code == 400


@pytest.mark.parametrize("token", ["s3cret", "with spaces", "ümläut€"])
def test_the_right_token_is_202(tmp_path_factory: pytest.TempPathFactory, token: str):
    with on_tcp(tmp_path_factory, token=token) as running:
        assert running.free(f"Bearer {token}".encode()).status_code == 202
        assert len(running.daemon.comfyui.posts) == 1


def test_the_socket_needs_no_token(tmp_path_factory: pytest.TempPathFactory):
    with on_tcp(tmp_path_factory, token="s3cret") as running:
        assert running.unix.post("/v1/free", json={}).status_code == 202


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 on loopback")
def test_it_listens_on_ipv6_when_it_is_told_so(tmp_path_factory: pytest.TempPathFactory):
    with on_tcp(tmp_path_factory, host="::1") as running:
        assert running.tcp.get("/health").status_code == 200


def test_without_a_port_nothing_listens_on_tcp(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch, free_port: int
):
    environment()
    monkeypatch.delenv("VRAM_HTTP_PORT", raising=False)
    with InThread(), pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{free_port}/health", trust_env=False)
