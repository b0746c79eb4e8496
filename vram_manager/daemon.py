"""Wiring and lifetime: builds the parts, runs them in one task group, stops in order. No decisions."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC
from typing import Any, Protocol

from loguru import logger

from vram_manager import __version__
from vram_manager.actuator import Actuator
from vram_manager.admissions import Admissions
from vram_manager.api.admissions import AdmissionRoutes
from vram_manager.api.app import Parts, app
from vram_manager.api.server import serving, tcp_socket, unix_socket
from vram_manager.backends import ComfyUI, Ollama
from vram_manager.backends.comfyui import HttpComfyUI
from vram_manager.backends.http import JsonClient
from vram_manager.backends.ollama import HttpOllama
from vram_manager.clock import Clock
from vram_manager.config import LookingSettings, Settings, unknown_names, without_secrets
from vram_manager.cycle import Cycle
from vram_manager.domain.lease import Lease
from vram_manager.domain.size import MIB
from vram_manager.domain.snapshot import Snapshot
from vram_manager.estimates import Estimates
from vram_manager.floors import Floors
from vram_manager.gateway.gateways import Gateways
from vram_manager.gateway.waiting import Desk
from vram_manager.gpus import GpuSensor
from vram_manager.gpus.all import AllGpus
from vram_manager.history import History
from vram_manager.journal import Journal
from vram_manager.metrics import Metrics
from vram_manager.nodes import Nodes
from vram_manager.observer import Observer
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.repair import reserved
from vram_manager.processes import Processes
from vram_manager.runs import Runs
from vram_manager.store import Store, alone_in
from vram_manager.tenants import Tenants
from vram_manager.webhook import Webhook
from vram_manager.workers import Workers

# Exit status of a container that should be started again: it lost the GPU device and only a restart gives it back.
EXIT_RESTART = 75
REVOKED_LOOK_SECONDS = 15.0
# What would break a line or steer a terminal, and what no stream can encode: names come from outside.
_NOT_IN_A_LINE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


@dataclass(frozen=True, slots=True)
class Daemon:
    """The parts of one daemon, wired. `run` works them until cancelled."""

    settings: Settings
    clock: Clock
    observer: Observer
    cycle: Cycle
    journal: Journal
    metrics: Metrics
    admissions: Admissions
    workers: Workers
    estimates: Estimates
    processes: Processes
    runs: Runs
    gateways: Gateways
    tenants: Tenants
    history: History
    floors: Floors
    webhook: Webhook | None
    nodes: Nodes

    async def run(self) -> None:
        """Reads, turns and records until cancelled; the death of any part ends all."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.journal.write_behind(), name="write history")
            tasks.create_task(self.observer.run(), name="observe")
            tasks.create_task(self.cycle.run(), name="cycle")
            tasks.create_task(self.admissions.run(), name="admissions")
            tasks.create_task(self.estimates.write_behind(), name="write estimates")
            tasks.create_task(self.runs.run(), name="comfyui runs")
            tasks.create_task(self.history.write_behind(), name="write samples")
            tasks.create_task(self.floors.write_behind(), name="write floors")
            tasks.create_task(self.nodes.run(), name="nodes")
            if self.webhook is not None:
                tasks.create_task(self.webhook.run(), name="webhook")

    def close(self) -> None:
        """Writes what is not yet written, and closes the history. Blocks."""
        self.admissions.close()
        self.estimates.flush()
        self.floors.flush()
        self.history.close()
        self.journal.close()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """The socket answers inside the block, and TCP where it was asked for."""
        service = self.settings.service
        admissions = AdmissionRoutes(self.clock, self.admissions, self.estimates, self.cycle.rules, self.processes)
        parts = Parts(
            clock=self.clock,
            cycle=self.cycle,
            observer=self.observer,
            journal=self.journal,
            metrics=self.metrics.render,
            admissions=admissions,
            workers=self.workers,
            held=self.gateways.waiting,
            tenants=self.tenants,
            history=self.history,
            floors=self.floors,
            nodes=self.nodes,
        )
        async with contextlib.AsyncExitStack() as stack:
            path = service.vram_socket
            listener = unix_socket(path)
            stack.callback(path.unlink, missing_ok=True)
            await stack.enter_async_context(serving(app(parts, token=None, trusted=True), listener))
            if service.vram_http_port is not None:
                tcp = tcp_socket(service.vram_http_host, service.vram_http_port)
                guarded = app(parts, token=service.vram_api_token, trusted=False)
                await stack.enter_async_context(serving(guarded, tcp))
            await stack.enter_async_context(self.gateways.listening())
            # First of all at the end: a stream that is followed would keep the server waiting.
            stack.callback(self.journal.hang_up)
            stack.callback(self.admissions.hang_up)
            stack.callback(self.gateways.stop)
            yield


def build(
    settings: Settings,
    clock: Clock,
    store: Store,
    *,
    gpus: GpuSensor | None,
    ollama: Ollama | None,
    comfyui: ComfyUI | None,
    nodes: Mapping[str, Ollama] | None = None,
) -> Daemon:
    """Every part of a daemon over the given rim: the real one, or the simulator's."""
    rules = settings.rules()
    journal = Journal(clock, store)
    observer = Observer(
        clock,
        journal.record,
        gpus=gpus,
        ollama=ollama,
        comfyui=comfyui,
        interval_seconds=rules.interval_seconds,
    )
    soft_body = settings.comfyui.comfyui_soft_free_body
    actuator = Actuator(clock, gpus=gpus, ollama=ollama, comfyui=comfyui, soft_body=soft_body)
    cycle = Cycle(clock, observer, actuator, journal, rules)
    processes = Processes()
    estimates = Estimates(clock, store, rules, ollama=ollama, comfyui=comfyui)
    admissions = Admissions(clock, observer, journal, store, rules, processes)
    workers = Workers(
        clock,
        journal,
        rules,
        snapshot=observer.known,
        leased_bytes=admissions.leased_to,
        on_demand=observer.changed.set,
    )
    runs = Runs(clock, comfyui, estimates, rules)
    floors = Floors(clock, journal, rules, store, workers=workers.all)
    desk = Desk(
        clock=clock,
        observer=observer,
        cycle=cycle,
        admissions=admissions,
        estimates=estimates,
        max_wait_seconds=settings.gateway.gateway_max_wait,
        refuses=settings.gateway.gateway_on_timeout == "refuse",
        tell=journal.record,
    )
    gateways = Gateways(desk, settings)
    tenants = Tenants(cycle, admissions, workers)
    history = History(clock, store, interval_seconds=rules.interval_seconds)
    further = Nodes(clock, nodes or {}, journal.record)
    metrics = Metrics(clock, cycle, observer, admissions, workers, tenants, nodes=further, floors=floors)
    journal.listen(metrics.count)
    journal.listen(floors.freed)
    webhook = _webhook(settings.looking, clock)
    if webhook is not None:
        webhook.on_outcome = metrics.told
        journal.listen(webhook.listen)

    def turned(seconds: float) -> None:
        metrics.turned(seconds)
        if cycle.snapshot is not None:
            history.turned(cycle.snapshot, gpus_seen(cycle.snapshot), tenants.now())

    cycle.on_turn = turned
    admissions.on_answer = metrics.answered

    def lease_ended(lease: Lease) -> None:
        metrics.lease_ended(lease)
        if lease.estimate.subject is not None and lease.peak_bytes:
            estimates.learn(lease.estimate.subject, peak_bytes=lease.peak_bytes)

    def see(snapshot: Snapshot) -> Snapshot:
        estimates.notice(snapshot)
        workers.turned(snapshot)
        gateways.seen(snapshot)
        snapshot = gateways.with_prompts(snapshot)
        snapshot = admissions.seen(snapshot)
        starting = (*workers.demands(snapshot.taken_at), *runs.turned(snapshot))
        floors.turned(snapshot)
        return replace(snapshot, asks=(*snapshot.asks, *starting))

    admissions.on_end = lease_ended
    runs.on_need = observer.changed.set
    runs.on_over = floors.worked
    admissions.reserved = lambda: reserved(cycle.watch, rules)
    observer.served = gateways.served
    desk.on_request = metrics.at_gateway
    cycle.see = see
    return Daemon(
        settings=settings,
        clock=clock,
        observer=observer,
        cycle=cycle,
        journal=journal,
        metrics=metrics,
        admissions=admissions,
        workers=workers,
        estimates=estimates,
        processes=processes,
        runs=runs,
        gateways=gateways,
        tenants=tenants,
        history=history,
        floors=floors,
        webhook=webhook,
        nodes=further,
    )


def _webhook(looking: LookingSettings, clock: Clock) -> Webhook | None:
    if not looking.vram_webhook_url:
        return None
    return Webhook(clock, looking.vram_webhook_url, looking.vram_webhook_events, looking.vram_webhook_secret)


def log_to(stream: Any, *, json_lines: bool, debug: bool) -> None:
    """One line per record on `stream`: for people, or one JSON object for machines."""
    logger.remove()
    logger.configure(patcher=_on_one_line)
    level = "DEBUG" if debug else "INFO"
    if json_lines:

        def write(message: Any) -> None:
            stream.write(_as_json_line(message))
            stream.flush()

        logger.add(write, level=level, format="{message}")
    else:
        text = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <7} {message}"
        logger.add(stream, level=level, format=text, colorize=False, backtrace=False, diagnose=False)


def _on_one_line(record: Any) -> None:
    record["message"] = _NOT_IN_A_LINE.sub(" ", record["message"])


def _as_json_line(message: Any) -> str:
    record = message.record
    at = record["time"].astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body: dict[str, object] = {"at": at, "level": record["level"].name, "message": record["message"]}
    if (event := record["extra"].get("event")) is not None:
        body["event"] = event
    if (point := record["extra"].get("snapshot")) is not None:
        body["snapshot"] = point
    if (problem := record["exception"]) is not None:
        body["error"] = repr(problem.value)
        body["traceback"] = "".join(traceback.format_exception(*problem))
    return json.dumps(body) + "\n"


async def serve(settings: Settings) -> int:
    """A daemon on the real rim until SIGTERM or SIGINT; the exit status."""
    clock = Clock.of_running_loop()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    logger.info("vram-manager {} starts", __version__)
    for words in settings.in_words():
        logger.info(words)
    for warning in unknown_names(os.environ):
        logger.warning(warning)
    async with contextlib.AsyncExitStack() as stack:
        directory = settings.service.vram_state_dir
        stack.enter_context(alone_in(directory))
        most_bytes = settings.looking.vram_history_mb * MIB
        store = await asyncio.to_thread(Store.open, directory, most_bytes)
        if store.problem:
            logger.warning(store.problem)
        gpus = AllGpus(deadline_seconds=settings.gpu.vram_check_timeout_seconds, gpu_sleep=settings.gpu.vram_gpu_sleep)
        stack.callback(gpus.close)
        ollama, comfyui = _servers(settings)
        for server in (ollama, comfyui):
            if server is not None:
                stack.push_async_callback(server.aclose)
        nodes = _further(settings)
        daemon = build(settings, clock, store, gpus=gpus, ollama=ollama, comfyui=comfyui, nodes=nodes)
        daemon.observer.wake = gpus.wake
        stack.push_async_callback(daemon.nodes.aclose)
        stack.callback(daemon.close)
        if daemon.webhook is not None:
            stack.push_async_callback(daemon.webhook.aclose)
        await stack.enter_async_context(daemon.listening())
        # What is there by now stays: it need not be walked through again and again while somebody waits for an answer.
        gc.collect()
        gc.freeze()
        logger.info("Listening on {}", settings.service.vram_socket)
        status = await _until_stopped(daemon, gpus, stop)
    logger.info("Stopped")
    return status


def _servers(settings: Settings) -> tuple[HttpOllama | None, HttpComfyUI | None]:
    ollama, comfyui = settings.ollama, settings.comfyui
    return (
        HttpOllama(JsonClient(ollama.ollama_url, headers=ollama.ollama_headers, name="ollama"))
        if ollama.ollama_url
        else None,
        HttpComfyUI(JsonClient(comfyui.comfyui_url, headers=comfyui.comfyui_headers, name="comfyui"))
        if comfyui.comfyui_url
        else None,
    )


def _further(settings: Settings) -> dict[str, Ollama]:
    """The servers of OLLAMA_NODES by URL."""
    urls = settings.looking.ollama_nodes
    return {url: HttpOllama(JsonClient(url, name=without_secrets(url))) for url in urls}


async def _until_stopped(daemon: Daemon, gpus: AllGpus, stop: asyncio.Event) -> int:
    """Works until asked to stop (0), until the GPU device is revoked (EXIT_RESTART), or until a part dies (1)."""
    work = asyncio.create_task(daemon.run(), name="daemon")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    revoked = asyncio.create_task(device_revoked(gpus, os.getpid()), name="revoked")
    done, _ = await asyncio.wait({work, stopped, revoked}, return_when=asyncio.FIRST_COMPLETED)
    if work in done:
        # Only a bug gets here: say it whole, end, and let the container start afresh, cooled down.
        logger.opt(exception=work.exception()).critical("A part of the daemon died")
        daemon.gateways.crashed()
        status = 1
    elif revoked in done:
        logger.warning("The container lost its GPU device: ending, so that a restart brings it back")
        status = EXIT_RESTART
    else:
        pending = daemon.cycle.watch.pending
        logger.info("Stopping{}", f" while a free is settling ({pending.reason})" if pending else "")
        status = 0
    for task in (work, stopped, revoked):
        task.cancel()
    await asyncio.gather(work, stopped, revoked, return_exceptions=True)
    return status


class Revocable(Protocol):
    """A sensor that can tell that its device worked here and was then taken away."""

    @property
    def revoked(self) -> bool: ...


async def device_revoked(sensor: Revocable, pid: int) -> None:
    """Returns when NVML worked here and was then cut off by the device cgroup, and a restart would help.

    Only as a container's first process: there `restart: unless-stopped` starts us again and the toolkit's hooks
    give the device back. It cannot loop, since a container that never saw the GPU does not leave.
    """
    if pid != 1:
        await asyncio.Event().wait()
    looks = 0
    while looks < 2:
        await asyncio.sleep(REVOKED_LOOK_SECONDS)
        looks = looks + 1 if sensor.revoked else 0


def run(settings: Settings) -> int:
    """The `run` verb: logs to stdout, which is what `docker logs ... | grep` reads."""
    service = settings.service
    log_to(sys.stdout, json_lines=service.vram_log_format == "json", debug=service.vram_debug)
    return asyncio.run(serve(settings))
