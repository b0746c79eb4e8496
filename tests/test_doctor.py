"""What the doctor says of the gateways and of Ollama's version, with real servers behind real ports."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.policy.worlds import gpu, gpus, second
from vram_manager import config
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.clock import Clock
from vram_manager.config import Settings
from vram_manager.daemon import build
from vram_manager.doctor import Finding, examine, in_words
from vram_manager.doctor.gateways import about_gateway_host
from vram_manager.doctor.gpus import about_choices
from vram_manager.doctor.servers import about_version, nodes
from vram_manager.doctor.surroundings import in_container, page, webhook
from vram_manager.domain.reading import Missing
from vram_manager.simulator.serve import serving
from vram_manager.simulator.world import World
from vram_manager.store import Store

Configured = Callable[..., Settings]


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Configured:
    """The settings that these variables give; nobody answers at the URLs unless they are named."""

    def load(**variables: str) -> Settings:
        defaults = {
            "VRAM_SOCKET": str(tmp_path / "vram.sock"),
            "VRAM_STATE_DIR": str(tmp_path),
            "OLLAMA_URL": "",
            "COMFYUI_URL": "",
        }
        for name, value in (defaults | variables).items():
            monkeypatch.setenv(name, value)
        return config.load()

    return load


@pytest.fixture
def two_ports() -> tuple[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return str(one.getsockname()[1]), str(other.getsockname()[1])


@contextlib.asynccontextmanager
async def listening(settings: Settings, world: World) -> AsyncIterator[None]:
    """A daemon over `world` whose socket and gateways are open inside the block."""
    ollama = HttpOllama(JsonClient(settings.ollama.ollama_url, headers={}, name="ollama"))
    comfyui = HttpComfyUI(JsonClient(settings.comfyui.comfyui_url, headers={}, name="comfyui"))
    store = Store.open(settings.service.vram_state_dir)
    clock = Clock.of_running_loop()
    daemon = build(settings, clock, store, gpus=world.gpus, ollama=ollama, comfyui=comfyui)
    try:
        async with daemon.listening():
            yield
    finally:
        await ollama.aclose()
        await comfyui.aclose()
        daemon.close()


async def gateways(settings: Settings) -> list[Finding]:
    findings = await asyncio.to_thread(examine, settings)
    return [finding for finding in findings if finding.part == "gateway"]


@pytest.mark.asyncio
async def test_each_gateway_is_asked_for_what_stands_behind_it(configured: Configured, two_ports: tuple[str, str]):
    async with (
        World(12.0) as world,
        serving(world.ollama.app) as ollama_url,
        serving(world.comfyui.app) as comfyui_url,
    ):
        settings = configured(
            OLLAMA_URL=ollama_url,
            COMFYUI_URL=comfyui_url,
            GATEWAY_OLLAMA_PORT=two_ports[0],
            GATEWAY_COMFYUI_PORT=two_ports[1],
        )
        async with listening(settings, world):
            findings = await gateways(settings)
    version = world.ollama.version
    assert [(finding.verdict, finding.words) for finding in findings] == [
        ("fine", f"Ollama's on 127.0.0.1:{two_ports[0]}: {ollama_url} answers behind it, {version}"),
        ("fine", f"ComfyUI's on 127.0.0.1:{two_ports[1]}: {comfyui_url} answers behind it, 0 running or waiting"),
    ]


@pytest.mark.asyncio
async def test_a_gateway_with_nobody_behind_it_is_wrong_and_says_why(
    configured: Configured, two_ports: tuple[str, str]
):
    settings = configured(OLLAMA_URL=f"http://127.0.0.1:{two_ports[1]}", GATEWAY_OLLAMA_PORT=two_ports[0])
    async with World(12.0) as world, listening(settings, world):
        (finding,) = await gateways(settings)
    assert finding.verdict == "wrong"
    assert "HTTP 502" in finding.words
    assert "Ollama cannot be reached" in finding.words


def of_gateway(settings: Settings) -> list[Finding]:
    return [finding for finding in examine(settings) if finding.part == "gateway"]


def test_without_a_daemon_a_gateway_that_nobody_opened_is_a_note(configured: Configured, two_ports: tuple[str, str]):
    settings = configured(OLLAMA_URL=f"http://127.0.0.1:{two_ports[1]}", GATEWAY_OLLAMA_PORT=two_ports[0])
    (finding,) = of_gateway(settings)
    assert finding == Finding(
        "gateway",
        "note",
        f"Ollama's on 127.0.0.1:{two_ports[0]}: cannot be reached (connection refused)",
        "it opens when the daemon starts",
    )


@pytest.mark.asyncio
async def test_beside_a_daemon_of_another_environment_a_closed_gateway_is_wrong(
    configured: Configured, two_ports: tuple[str, str]
):
    async with (
        World(12.0) as world,
        serving(world.ollama.app) as ollama_url,
        listening(configured(OLLAMA_URL=ollama_url), world),
    ):
        (finding,) = await gateways(configured(OLLAMA_URL=ollama_url, GATEWAY_OLLAMA_PORT=two_ports[0]))
    assert (finding.verdict, "cannot be reached" in finding.words) == ("wrong", True)


def test_a_gateway_on_another_address_with_the_same_port_is_none_in_front_of_itself(
    configured: Configured, two_ports: tuple[str, str]
):
    settings = configured(
        OLLAMA_URL=f"http://127.0.0.2:{two_ports[0]}", GATEWAY_OLLAMA_PORT=two_ports[0], GATEWAY_HOST="127.0.0.3"
    )
    (finding,) = of_gateway(settings)
    assert "cannot be reached" in finding.words


def test_a_gateway_without_its_server_is_a_note(configured: Configured):
    (finding,) = of_gateway(configured(GATEWAY_COMFYUI_PORT="8189"))
    assert finding.verdict == "note"
    assert finding.words == "GATEWAY_COMFYUI_PORT is set, but there is no ComfyUI here: nothing listens"


def test_without_a_gateway_in_front_of_ollama_that_is_worth_knowing(configured: Configured, two_ports: tuple[str, str]):
    (finding,) = of_gateway(configured(OLLAMA_URL=f"http://127.0.0.1:{two_ports[0]}"))
    assert (finding.verdict, finding.remedy) == ("note", "set GATEWAY_OLLAMA_PORT and let clients use that port")
    assert of_gateway(configured(OLLAMA_URL="")) == []


FAR, NEAR = "http://box:11434", "http://localhost:11434"


@pytest.mark.parametrize(
    ("host", "url", "contained", "words"),
    [
        ("127.0.0.1", FAR, False, None),
        ("localhost", NEAR, False, None),
        ("::1", NEAR, False, None),
        ("0.0.0.0", FAR, True, None),
        ("0.0.0.0", FAR, False, "on 0.0.0.0 whoever can reach this machine is let in: no password"),
        ("::", FAR, False, "on :: whoever can reach this machine is let in: no password"),
        (
            "0.0.0.0",
            NEAR,
            False,
            "Ollama can be used from this machine only, but through the gateway on 0.0.0.0 from any other",
        ),
        (
            "192.0.2.7",
            NEAR,
            True,
            "Ollama can be used from this machine only, but through the gateway on 192.0.2.7 from any other",
        ),
    ],
)
def test_who_is_let_in_without_a_password_is_said(
    configured: Configured, host: str, url: str, contained: bool, words: str | None
):
    settings = configured(OLLAMA_URL=url, GATEWAY_OLLAMA_PORT="11435", GATEWAY_HOST=host)
    findings = about_gateway_host(settings, in_container=contained)
    assert [finding.words for finding in findings] == ([] if words is None else [words])
    assert all(finding.verdict == "note" and finding.remedy for finding in findings)


def test_without_a_gateway_nobody_is_let_in(configured: Configured):
    assert about_gateway_host(configured(OLLAMA_URL=FAR, GATEWAY_HOST="0.0.0.0"), in_container=False) == []


def test_a_container_is_known_by_the_marks_that_engines_leave(tmp_path: Path):
    assert not in_container(tmp_path, {})
    assert in_container(tmp_path, {"KUBERNETES_SERVICE_HOST": "192.0.2.1"})
    (tmp_path / ".dockerenv").touch()
    assert in_container(tmp_path, {})


def test_a_container_of_podman_is_one(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".containerenv").touch()
    assert in_container(tmp_path, {})


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.9.6", "tells no context length"),
        ("0.5.13-rc1", "tells no context length"),
        ("0.10.0", None),
        ("0.29.9", None),
        ("0.30.0", "counts a model that is partly on the CPU up to twice"),
        ("0.30.10", "counts a model that is partly on the CPU up to twice"),
        ("0.30.11", None),
        ("0.33.1", None),
        ("0.0.0", None),
        ("", None),
        ("main", None),
        (Missing("GET /api/version: HTTP 404: 404.12.1"), None),
    ],
)
def test_a_version_that_tells_less_or_wrongly_is_a_note(version: str | Missing, words: str | None):
    findings = about_version(version)
    if words is None:
        assert findings == []
    else:
        (finding,) = findings
        assert (finding.part, finding.verdict) == ("ollama", "note")
        assert f"{version} {words}" in finding.words
        assert (finding.remedy or "").startswith("update Ollama to 0.")


def test_every_part_has_room_in_its_column():
    findings = [Finding("gateway", "note", "words", "remedy"), Finding("settings", "fine", "words")]
    lines = in_words(findings, colour=False).splitlines()
    assert [line.index("words") for line in lines if "words" in line] == [17, 17]


def _looking(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return config.load()


def test_no_page_is_a_note_with_the_way_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = page(_looking(monkeypatch), in_container=False)

    assert (found.verdict, found.remedy) == ("note", "set it, such as 8480")


@pytest.mark.parametrize(
    ("host", "in_container", "verdicts"),
    [
        pytest.param("127.0.0.1", False, ["fine"], id="this machine only"),
        pytest.param("0.0.0.0", False, ["fine", "note"], id="whoever can reach it"),
        pytest.param("0.0.0.0", True, ["fine"], id="a container's own network"),
    ],
)
def test_who_may_look_at_the_page(
    monkeypatch: pytest.MonkeyPatch, host: str, in_container: bool, verdicts: list[str]
) -> None:
    settings = _looking(monkeypatch, VRAM_HTTP_PORT="8480", VRAM_HTTP_HOST=host)

    assert [one.verdict for one in page(settings, in_container=in_container)] == verdicts


@pytest.mark.asyncio
async def test_a_webhook_is_reached_without_being_told_anything_and_its_path_stays_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    received = bytearray()

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read())
        writer.close()

    server = await asyncio.start_server(receive, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}/services/T0/hidden"
    async with server:
        open_one = await webhook(_looking(monkeypatch, VRAM_WEBHOOK_URL=url))
        signed = await webhook(_looking(monkeypatch, VRAM_WEBHOOK_SECRET="s"))
    await server.wait_closed()
    gone = await webhook(_looking(monkeypatch))

    assert [one.verdict for one in open_one] == ["fine", "note"]
    assert [one.verdict for one in signed] == ["fine"]
    assert [one.verdict for one in gone] == ["wrong"]
    assert "hidden" not in str([open_one, signed, gone])
    assert received == b""


@pytest.mark.asyncio
async def test_a_node_that_is_down_is_wrong_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        down = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with World(8) as world, serving(world.ollama.app) as up:
        found = await nodes(_looking(monkeypatch, OLLAMA_NODES=f"{down},{up}"))

    assert [one.verdict for one in found] == ["wrong", "fine"]
    assert "OLLAMA_HOST=0.0.0.0" in (found[0].remedy or "")
    assert "no model loaded" in found[1].words


@pytest.mark.asyncio
async def test_a_node_that_refuses_was_reached_and_is_told_of_once_by_its_own_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /ui\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(elsewhere, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        found = await nodes(_looking(monkeypatch, OLLAMA_NODES=f"{url},{url}/"))

    assert [(one.verdict, one.words) for one in found] == [("wrong", f"{url}: GET /api/ps: HTTP 302")]
    assert found[0].remedy == f"set the address of {url} to where it redirects: redirects are not followed"


def test_a_gpu_that_is_chosen_and_not_there_is_wrong_whoever_answers(configured: Configured) -> None:
    seen = gpus(gpu(), second())

    found = about_choices(configured(OLLAMA_GPU="7", COMFYUI_GPU="GPU-b"), seen)

    assert [(one.verdict, one.words) for one in found] == [("wrong", "OLLAMA_GPU=7 is none of the GPUs seen here")]
    assert found[0].remedy == "OLLAMA_GPU= one of 0 (GPU-a), 1 (GPU-b), or empty"
