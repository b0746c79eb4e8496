"""The simulated servers on real ports, inside the running event loop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vram_manager.errors import SettingsError
from vram_manager.simulator.comfyui_memory import Mode
from vram_manager.simulator.ledger import GIB, Ledger, OutOfMemory
from vram_manager.simulator.ollama import utcnow
from vram_manager.simulator.world import World


class _QuietServer(uvicorn.Server):
    """A uvicorn that leaves signals to the program around it and says when it is up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving(app: ASGIApp, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """`app` answers at the URL this yields, until the block ends. Port 0 takes a free one. Raises SettingsError."""
    if not 0 <= port <= 65_535:
        raise SettingsError(f"{host}:{port}: is no port; the last one is 65535, and further servers have the next ones")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingsError(f"{host}:{port}: cannot be listened on ({error}); choose another port") from error
    # Inherited by what it accepts: neither of the real servers lets a small write wait.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="websockets-sansio",
        ws_ping_interval=None,  # ComfyUI's socket has no heartbeat
        timeout_graceful_shutdown=1,
    )
    server = _QuietServer(config)
    serving_task = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await server.up.wait()
        name = "127.0.0.1" if host == "0.0.0.0" else host
        yield f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving_task
        listener.close()


def control_app(ledger: Ledger) -> Starlette:
    """GET /gpu tells the truth; POST /gpu/hold {"holder", "bytes"} is another process, gone at 0 bytes."""

    def truth() -> Response:
        return JSONResponse(
            {
                "name": ledger.name,
                "uuid": ledger.uuid,
                "total_bytes": ledger.total_bytes,
                "reserved_bytes": ledger.reserved_bytes,
                "free_bytes": ledger.free_bytes,
                "peak_used_bytes": ledger.peak_used_bytes,
                "out_of_memory": ledger.ooms,
                "holders": ledger.holders(),
            }
        )

    async def get_gpu(request: Request) -> Response:
        return truth()

    async def post_hold(request: Request) -> Response:
        try:
            body = json.loads(await request.body())
            ledger.resize(str(body["holder"]), int(body["bytes"]))
        except OutOfMemory as oom:
            return JSONResponse({"error": str(oom)}, 409)
        except (KeyError, TypeError, ValueError) as wrong:
            return JSONResponse({"error": f'expected {{"holder", "bytes"}}: {wrong!r}'}, 400)
        return truth()

    return Starlette(routes=[Route("/gpu", get_gpu), Route("/gpu/hold", post_hold, methods=["POST"])])


@contextmanager
def mirrored(path: Path, *ledgers: Ledger) -> Iterator[None]:
    """Every change of the ledgers also shows in the state file of the fake NVML library, a card for each.

    Raises SettingsError where that cannot be written.
    """
    from vram_manager.simulator.nvml_state import NvmlState  # noqa: PLC0415 - only with a fake NVML

    try:
        opened = NvmlState(path, gpus=len(ledgers))
    except OSError as error:
        raise SettingsError(f"--nvml-state {path}: cannot be written ({error.strerror})") from error
    with opened as state:

        def write(index: int, ledger: Ledger) -> None:
            state.set_memory(
                index,
                total=ledger.total_bytes,
                reserved=ledger.reserved_bytes,
                used=ledger.used_bytes,
                free=ledger.free_bytes,
            )
            state.gpus[index].utilization = ledger.utilization_percent

        writers = [(ledger, partial(write, index, ledger)) for index, ledger in enumerate(ledgers)]
        for index, (ledger, writer) in enumerate(writers):
            state.set_identity(index, name=ledger.name, uuid=ledger.uuid)
            writer()
            ledger.on_change.append(writer)
        try:
            yield
        finally:
            for ledger, writer in writers:
                ledger.on_change.remove(writer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What a simulated box may have beside one card: further ones, further Ollama servers, and people who use it all.

    They go to the servers, or `through_ollama` and `through_comfyui`, which are gateways in front of them; a worker
    asks the daemon on `socket`.
    """

    busy: bool = False
    seed: int = 1
    gpus: int = 1
    nodes: int = 0
    through_ollama: str | None = None
    through_comfyui: str | None = None
    socket: str | None = None


async def serve_world(
    *,
    ollama_port: int = 11434,
    comfyui_port: int = 8188,
    host: str = "127.0.0.1",
    gpu_gib: float = 24,
    mode: Mode = "dynamic",
    control_port: int | None = None,
    nvml_state: Path | None = None,
    extras: Extras = Extras(),
    utcnow: Callable[[], datetime] = utcnow,
) -> None:
    """Both servers, and the control app if it has a port, until cancelled. Nodes have the ports after Ollama's."""
    async with AsyncExitStack() as stack:
        loopback = host in {"127.0.0.1", "::1", "localhost"}
        world = await stack.enter_async_context(World(gpu_gib, mode=mode, loopback=loopback, utcnow=utcnow))
        others = [_further(number, gpu_gib) for number in range(1, extras.gpus)]
        ledgers = (world.ledger, *others)
        if nvml_state is not None:
            stack.enter_context(mirrored(nvml_state, *ledgers))
        ollama_url = await stack.enter_async_context(serving(world.ollama.app, host, ollama_port))
        comfyui_url = await stack.enter_async_context(serving(world.comfyui.app, host, comfyui_port))
        nodes = []
        for number in range(1, extras.nodes + 1):
            size = 8.0 if number % 2 else 16.0
            node = await stack.enter_async_context(World(size, loopback=loopback, utcnow=utcnow))
            port = ollama_port + number if ollama_port else 0
            nodes.append(await stack.enter_async_context(serving(node.ollama.app, host, port)))
        if control_port is not None:
            await stack.enter_async_context(serving(control_app(world.ledger), host, control_port))
        card = f"{gpu_gib:g} GiB, ComfyUI in {mode} mode"
        print(f"Simulated Ollama at {ollama_url} and ComfyUI at {comfyui_url} on one GPU of {card}", flush=True)
        if nodes:
            print(f"OLLAMA_NODES={','.join(nodes)}", flush=True)
        if extras.busy:
            from vram_manager.simulator.busy import Doors, busy  # noqa: PLC0415 - only then

            doors = Doors(
                ollama_url=extras.through_ollama or ollama_url,
                comfyui_url=extras.through_comfyui or comfyui_url,
                socket=extras.socket,
            )
            await busy(doors, ledgers, nodes=nodes, seed=extras.seed)
        await asyncio.Event().wait()


def _further(number: int, gpu_gib: float) -> Ledger:
    """A card beside the one that Ollama and ComfyUI share."""
    uuid = f"GPU-5107a7ed-0000-4000-8000-{number:012d}"
    return Ledger(int(gpu_gib * GIB), name="Simulated RTX 4090", uuid=uuid)
