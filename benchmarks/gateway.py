"""What the gateway costs: the real daemon's, against no proxy at all, and beside what others put in that place.

    python benchmarks/gateway.py [--quick]

One upstream, in a process of its own, speaks what Ollama speaks, as fast as Python can. It is asked directly, through
HAProxy and nginx (each left out, and said, where it is not installed), through a bare asyncio forwarder that looks at
nothing, which is the floor of Python, and through `vram-manager run` with its gate on and the called model loaded. All
take turns in short rounds, so that a busy machine hits them alike.

"added" is a percentile less the same one without a proxy; "x own" is what is added at p50 against what HAProxy adds, "x
whole" the figure against HAProxy's. On fresh connections HAProxy and nginx have an advantage: they keep connections to
the upstream, where the gateway and the forwarder open one for each client. Figures are of this machine and this moment;
the budgets beside them are the project's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import re
import select
import shutil
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import httptools

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import answers, daemon, free_ports, percentile, process, simulated, until
from tests.fake_nvml import compiler
from vram_manager.client import call

MODEL = "llama3.1:8b"
GIB = 2**30
MIB = 2**20
PIECE = bytes(256 << 10)
CONNECTIONS = 16
CROWD = 500
CROWD_PACE_SECONDS = 0.1
PACE_SECONDS = 0.01
PATIENCE_SECONDS = 60.0
HAPROXY, OURS, DIRECT = "haproxy", "gateway", "direct"

# ---- the upstream


def _json(status: bytes, document: object) -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def _stored() -> dict[str, object]:
    details = {"family": "llama", "parameter_size": "8.0B", "quantization_level": "Q4_K_M"}
    return {"name": MODEL, "model": MODEL, "digest": "46e0c10c039e" + "0" * 52, "size": 5 * GIB, "details": details}


_EXPIRES = "2100-01-01T00:00:00Z"
_LOADED = {**_stored(), "size_vram": 5 * GIB, "context_length": 4096, "expires_at": _EXPIRES}
_SHOWN = {"model_info": {"general.architecture": "llama", "llama.block_count": 32, "llama.context_length": 131072}}
_LINE = b'{"model":"%b","created_at":"2026-01-01T00:00:00.000000Z","sent_ns":%d,"message":{"role":"assistant",'
_LINE += b'"content":" token"},"done":%b}\n'
_ANSWERS = {
    b"/api/version": _json(b"200 OK", {"version": "0.32.15"}),
    b"/api/ps": _json(b"200 OK", {"models": [_LOADED]}),
    b"/api/tags": _json(b"200 OK", {"models": [_stored()]}),
    b"/api/show": _json(b"200 OK", _SHOWN),
}
_UNKNOWN = _json(b"404 Not Found", {"error": "not found"})
_ANSWERED = _json(b"200 OK", {"model": MODEL, "message": {"role": "assistant", "content": "Yes."}, "done": True})
_STORED = _json(b"201 Created", {"status": "success"})
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
_LARGE = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection to it. Of a chat it obeys `stream` and of `options` `num_predict`, `pace` (s) and `from` (s).

    Without `from` the tokens begin for all who wait at `/go`; `/waiting` tells how many these are.
    """

    _transport: asyncio.Transport
    _waiting: ClassVar[list[tuple[Upstream, int, float]]] = []

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body: list[bytes] = []
        self._large_bytes = 0
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._large_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
        del self._parser

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, target: bytes) -> None:
        self._path, self._body = target, []

    def on_body(self, piece: bytes) -> None:
        if self._path == b"/api/chat":
            self._body.append(piece)

    def on_message_complete(self) -> None:
        if self._path == b"/api/chat":
            self._chat(json.loads(b"".join(self._body)))
        elif self._path.startswith(b"/large/"):
            self._large_bytes = int(self._path[7:])
            self._transport.write(_LARGE % self._large_bytes)
            self._more()
        elif self._path.startswith(b"/api/blobs/"):
            self._transport.write(_STORED)
        elif self._path == b"/waiting":
            self._transport.write(_json(b"200 OK", {"waiting": len(self._waiting)}))
        elif self._path == b"/go":
            self._go()
        else:
            self._transport.write(_ANSWERS.get(self._path, _UNKNOWN))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._more()

    def _more(self) -> None:
        while self._large_bytes and not self._paused:
            piece = PIECE[: self._large_bytes]
            self._large_bytes -= len(piece)
            self._transport.write(piece)

    def _chat(self, asked: dict[str, object]) -> None:
        if not asked["stream"]:
            self._transport.write(_ANSWERED)
            return
        options = asked["options"]
        assert isinstance(options, dict)
        count, pace, begin = options["num_predict"], options["pace"], options["from"]
        if begin is None:
            self._waiting.append((self, count, pace))
        else:
            self.token(0, count, pace, max(asyncio.get_running_loop().time(), begin))

    def _go(self) -> None:
        begin = asyncio.get_running_loop().time() + 0.1
        for number, (connection, count, pace) in enumerate(self._waiting):
            connection.token(0, count, pace, begin + number * pace / len(self._waiting))
        self._waiting.clear()
        self._transport.write(_STORED)

    def token(self, number: int, count: int, pace: float, begin: float) -> None:
        loop = asyncio.get_running_loop()
        due = begin + number * pace
        if loop.time() < due:
            self._timer = loop.call_at(due, self.token, number, count, pace, begin)
            return
        last = number == count - 1
        line = _LINE % (MODEL.encode(), time.monotonic_ns(), b"true" if last else b"false")
        chunk = b"%x\r\n%b\r\n" % (len(line), line)
        self._transport.write((b"" if number else _STREAM) + chunk + (b"0\r\n\r\n" if last else b""))
        if not last:
            self._timer = loop.call_at(due + pace, self.token, number + 1, count, pace, begin)


async def serve_upstream(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


# A program of its own, so that its memory is that of the least that Python can do.
FLOOR = """
import asyncio, sys
class End(asyncio.Protocol):
    def __init__(self, other=None):
        self.other, self.transport, self.early = other, None, []
    def connection_made(self, transport):
        self.transport = transport
        if self.other is None:
            self.other = End(self)
            connecting = loop.create_connection(lambda: self.other, "127.0.0.1", int(sys.argv[2]))
            self.task = loop.create_task(connecting)
        for data in self.early:
            transport.write(data)
    def data_received(self, data):
        if self.other.transport is None:
            self.other.early.append(data)
        else:
            self.other.transport.write(data)
    def pause_writing(self):
        self.other.transport.pause_reading()
    def resume_writing(self):
        self.other.transport.resume_reading()
    def connection_lost(self, exc):
        if self.other.transport is not None:
            self.other.transport.close()
async def main():
    global loop
    loop = asyncio.get_running_loop()
    server = await loop.create_server(End, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    await server.serve_forever()
asyncio.run(main())
"""

# Not buffering, and keeping connections to the upstream, is what its manual says to do for streams.
NGINX = """
daemon off; master_process off; worker_rlimit_nofile 8192;
pid {directory}/nginx.pid; error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000;
  client_body_temp_path {directory}/n1; proxy_temp_path {directory}/n2; fastcgi_temp_path {directory}/n3;
  uwsgi_temp_path {directory}/n4; scgi_temp_path {directory}/n5;
  upstream ollama {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024; client_max_body_size 0;
    location / {{
      proxy_pass http://ollama; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""

# Without http-no-delay it lets the kernel wait for more of a chunked answer (MSG_MORE): a token is then 0.1-0.2 s late.
HAPROXY_CONF = """
global
  maxconn 4096
defaults
  mode http
  option http-no-delay
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend clients
  bind 127.0.0.1:{port}
  default_backend ollama
backend ollama
  server one 127.0.0.1:{upstream}
"""

# ---- processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to the upstream; `pid` is of whoever stands between."""

    name: str
    port: int
    pid: int | None = None

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    def cpu_seconds(self) -> float:
        """Of all its threads, to the nanosecond; /proc/PID/stat counts in hundredths."""
        if self.pid is None:
            return 0.0
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


@contextlib.contextmanager
def gateway(directory: Path, upstream: int) -> Iterator[Way]:
    """`vram-manager run` with both gateways, beside a simulated ComfyUI, over the fake NVML library."""
    ollama_gateway, comfyui_gateway = free_ports(2)
    if compiler() is None:
        print("no C compiler: the daemon sees no GPU, and its gate lets all pass without looking at the model")
    with simulated(directory) as settings:
        settings |= {
            # A name, as it is by default: that is looked up.
            "OLLAMA_URL": f"http://localhost:{upstream}",
            "GATEWAY_OLLAMA_PORT": str(ollama_gateway),
            "GATEWAY_COMFYUI_PORT": str(comfyui_gateway),
        }
        with daemon(settings) as pid:
            until(lambda: MODEL in str(call("GET", "/v1/snapshot").body))
            yield Way(name=OURS, port=ollama_gateway, pid=pid)


@contextlib.contextmanager
def ways(directory: Path) -> Iterator[list[Way]]:
    """All ways there are on this machine, ours last."""
    upstream, floor, nginx, haproxy = free_ports(4)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process(sys.executable, __file__, "--upstream", str(upstream)))
        until(lambda: answers(upstream))
        found = [Way(name=DIRECT, port=upstream)]
        pid = stack.enter_context(process(sys.executable, "-c", FLOOR, str(floor), str(upstream)))
        found.append(Way(name="bare asyncio", port=floor, pid=pid))
        for name, port, text, arguments in (
            ("nginx", nginx, NGINX, ("-p", str(directory), "-c")),
            (HAPROXY, haproxy, HAPROXY_CONF, ("-q", "-db", "-f")),
        ):
            program = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
            if program is None:
                print(f"{name} is not installed: left out")
                continue
            written = directory / f"{name}.conf"
            written.write_text(text.format(directory=directory, port=port, upstream=upstream))
            pid = stack.enter_context(process(program, *arguments, str(written)))
            found.append(Way(name=name, port=port, pid=pid))
        found.append(stack.enter_context(gateway(directory, upstream)))
        for way in found:
            until(partial(answers, way.port))
        yield found


# ---- clients

GET = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nUser-Agent: benchmark\r\nAccept: */*\r\n\r\n"
GOT = _ANSWERS[b"/api/version"][-12:]
SENT = re.compile(rb'"sent_ns":(\d+),[^\n]*\n')


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def chat(*, tokens: int = 0, pace_seconds: float = 0.0, begin: float | None = 0.0) -> bytes:
    """A call of the loaded model; without `tokens` its answer comes whole and at once."""
    messages = [{"role": "user", "content": "Is the sky blue? " * 8}]
    options = {"num_predict": tokens, "pace": pace_seconds, "from": begin}
    asked = {"model": MODEL, "messages": messages, "stream": tokens > 0, "options": options}
    return post("/api/chat", json.dumps(asked).encode())


CHAT, CHATTED = chat(), _ANSWERED[-12:]


def connect(way: Way) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", way.port), timeout=PATIENCE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        more = connection.recv(65536)
        if not more:
            raise SystemExit(f"an answer broke off: {data[-200:]!r}")
        data += more
    return data


def ask(connection: socket.socket, path: bytes) -> object:
    connection.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
    return json.loads(read_until(connection, b"}").partition(b"\r\n\r\n")[2])


Table = dict[str, list[float]]
Sample = Callable[[Way], list[float]]


def kept(request: bytes, end: bytes, count: int) -> Sample:
    """Seconds from the request to its answer, one after the other on one connection."""

    def measure(way: Way) -> list[float]:
        taken = []
        with connect(way) as connection:
            for number in range(count + 5):
                began = time.perf_counter()
                connection.sendall(request)
                read_until(connection, end)
                if number >= 5:
                    taken.append(time.perf_counter() - began)
        return taken

    return measure


def fresh(request: bytes, end: bytes, count: int) -> Sample:
    """The same, each on a connection of its own, whose making counts."""

    def measure(way: Way) -> list[float]:
        taken = []
        for _ in range(count):
            began = time.perf_counter()
            with connect(way) as connection:
                connection.sendall(request)
                read_until(connection, end)
                taken.append(time.perf_counter() - began)
        return taken

    return measure


def download(size_bytes: int) -> Sample:
    """MB/s of one large answer."""
    request = f"GET /large/{size_bytes} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    buffer = bytearray(1 << 20)

    def measure(way: Way) -> list[float]:
        with connect(way) as connection:
            began = time.perf_counter()
            connection.sendall(request)
            first = connection.recv(65536)
            left = size_bytes - (len(first) - first.index(b"\r\n\r\n") - 4)
            while left:
                got = connection.recv_into(buffer)
                if not got:
                    raise SystemExit("a download broke off")
                left -= got
            return [size_bytes / 1e6 / (time.perf_counter() - began)]

    return measure


def upload(size_bytes: int) -> Sample:
    """MB/s of one large request, until its answer."""
    head = post("/api/blobs/sha256:0", b"").replace(b"Content-Length: 0", b"Content-Length: %d" % size_bytes)
    piece = bytes(1 << 20)

    def measure(way: Way) -> list[float]:
        with connect(way) as connection:
            began = time.perf_counter()
            connection.sendall(head)
            for _ in range(size_bytes // len(piece)):
                connection.sendall(piece)
            read_until(connection, b"success")
            return [size_bytes / 1e6 / (time.perf_counter() - began)]

    return measure


def flood(request: bytes, end: bytes, seconds: float, cpu: Table) -> Sample:
    """Requests a second over kept connections that ask again when answered; `cpu`: seconds for 1000 of them."""

    def measure(way: Way) -> list[float]:
        with contextlib.ExitStack() as stack:
            poll = stack.enter_context(select.epoll())
            lines = [stack.enter_context(connect(way)) for _ in range(CONNECTIONS)]
            by_number = {line.fileno(): line for line in lines}
            for line in lines:
                poll.register(line, select.EPOLLIN)
                line.sendall(request)
            done, before, began = 0, way.cpu_seconds(), time.perf_counter()
            while time.perf_counter() < began + seconds:
                for number, _ in poll.poll(1.0):
                    line = by_number[number]
                    if line.recv(65536).endswith(end):
                        done += 1
                        line.sendall(request)
            took = time.perf_counter() - began
            cpu[way.name].append(1000 * (way.cpu_seconds() - before) / done)
            return [done / took]

    return measure


@dataclass(slots=True)
class Stream:
    """One answer that is being received; its delays go where those of others may go too."""

    connection: socket.socket
    delays: list[float]
    tokens: int = 0
    rest: bytes = b""
    end: bytes = b""
    open: bool = True

    def take(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.end = (self.end + data[-5:])[-5:]
        self.open = bool(data) and not self.whole
        data = self.rest + data
        sent = SENT.findall(data)
        self.tokens += len(sent)
        self.delays += [(now - int(moment)) / 1e9 for moment in sent]
        self.rest = data[data.rfind(b"\n") + 1 :]

    @property
    def whole(self) -> bool:
        return self.end == b"0\r\n\r\n"


def receive(streams: list[Stream], halfway: Callable[[], object] = lambda: None) -> None:
    """Until all are over or nothing comes any more; `halfway` is called once, when each has begun."""
    by_number = {stream.connection.fileno(): stream for stream in streams}
    left, silent = len(streams), len(streams)
    with select.epoll() as poll:
        for number in by_number:
            poll.register(number, select.EPOLLIN)
        while left and (ready := poll.poll(PATIENCE_SECONDS)):
            for number, _ in ready:
                stream, begun = by_number[number], by_number[number].tokens > 0
                stream.take(stream.connection.recv(65536))
                if not begun and stream.tokens:
                    silent -= 1
                    if not silent:
                        halfway()
                if not stream.open:
                    left -= 1
                    poll.unregister(number)


def side_by_side(found: list[Way], seconds: float, delays: Table) -> None:
    """One stream by each way, all at the same time but never in the same moment."""
    begin, count = time.monotonic() + 0.1, round(seconds / PACE_SECONDS)
    with contextlib.ExitStack() as stack:
        streams = []
        for number, way in enumerate(found):
            connection = stack.enter_context(connect(way))
            moment = begin + number * PACE_SECONDS / len(found)
            connection.sendall(chat(tokens=count, pace_seconds=PACE_SECONDS, begin=moment))
            streams.append(Stream(connection, delays[way.name]))
        receive(streams)
    if not all(stream.tokens == count and stream.whole for stream in streams):
        raise SystemExit("a stream broke off")


@dataclass(slots=True)
class Crowd:
    """What many streams at once did to one way."""

    delays: list[float] = field(default_factory=list)
    gathered_seconds: list[float] = field(default_factory=list)
    asked: int = 0
    whole: int = 0
    cpu_seconds: float = 0.0
    rss_mib: float = 0.0
    rss_after_mib: float = 0.0

    def measure(self, way: Way, direct: Way, size: int, seconds: float) -> None:
        count, before, began = round(seconds / CROWD_PACE_SECONDS), way.cpu_seconds(), time.monotonic()
        request = chat(tokens=count, pace_seconds=CROWD_PACE_SECONDS, begin=None)
        with contextlib.ExitStack() as stack:
            upstream = stack.enter_context(connect(direct))
            streams = []
            for _ in range(size):
                connection = stack.enter_context(connect(way))
                connection.sendall(request)
                streams.append(Stream(connection, self.delays))
            while ask(upstream, b"/waiting") != {"waiting": size}:
                time.sleep(0.005)
            self.gathered_seconds.append(time.monotonic() - began)
            ask(upstream, b"/go")
            receive(streams, lambda: self._look(way))
        self.asked += size
        self.whole += sum(stream.whole and stream.tokens == count for stream in streams)
        self.cpu_seconds += way.cpu_seconds() - before
        if way.pid is not None:
            time.sleep(0.3)
            self.rss_after_mib = way.rss_mib()

    def _look(self, way: Way) -> None:
        if way.pid is not None:
            self.rss_mib = way.rss_mib()


# ---- the report


def against(ours: float, other: float) -> str:
    return f"{ours / other:.1f} x" if ours > 0 and other > 0 else "-"


def verdict(met: bool) -> str:
    return "met" if met else "NOT met"


def row(what: str, *columns: str, budget: str = "") -> None:
    print(f"{what:<44}" + "".join(f"{column:>12}" for column in columns) + f"   {budget}".rstrip(), flush=True)


def report_delays(what: str, taken: Table) -> None:
    """One kind of delay, each way a line."""
    print()
    row(what, "p50 ms", "p99 ms", "added p50", "added p99", "x own", "x whole", budget="budget")
    half = {name: percentile(seconds, 0.5) * 1e3 for name, seconds in taken.items()}
    most = {name: percentile(seconds, 0.99) * 1e3 for name, seconds in taken.items()}
    added = {name: half[name] - half[DIRECT] for name in taken}
    for name in taken:
        columns, budget = [f"{half[name]:.3f}", f"{most[name]:.3f}"], ""
        if name != DIRECT:
            columns += [f"{added[name]:+.3f}", f"{most[name] - most[DIRECT]:+.3f}"]
            if HAPROXY in taken:
                columns += [against(added[name], added[HAPROXY]), against(half[name], half[HAPROXY])]
        if name == OURS:
            budget = f"added p50 <= 1 ms: {verdict(added[OURS] <= 1)}"
            if HAPROXY in taken:
                budget += f"; <= 1.5 x HAProxy's own: {verdict(added[OURS] <= 1.5 * added[HAPROXY])}"
        row(f"  {name}", *columns, budget=budget)


def report_rates(what: str, unit: str, taken: Table, cpu: Table | None = None) -> None:
    """Medians of rates, and of `cpu`: seconds for 1000 requests."""
    print()
    row(what, unit, "HAProxy's", *(["CPU s/1000", "x CPU"] if cpu else []), budget="budget")
    rates = {name: percentile(values, 0.5) for name, values in taken.items()}
    spent = {name: percentile(values, 0.5) for name, values in (cpu or {}).items()}
    for name, rate in rates.items():
        columns = [f"{rate:.0f}", against(rates.get(HAPROXY, 0.0), rate)]
        if spent and name != DIRECT:
            columns += [f"{spent[name]:.3f}", against(spent[name], spent.get(HAPROXY, 0.0))]
        judged = name == OURS and HAPROXY in rates
        budget = f"HAProxy's <= 1.5 x ours: {verdict(rates[HAPROXY] <= 1.5 * rate)}" if judged else ""
        row(f"  {name}", *columns, budget=budget)


def report_crowds(what: str, crowds: dict[str, Crowd], at_rest: dict[str, float]) -> None:
    """What it took to carry many streams at once."""
    print()
    row(what, "complete", "all there s", "CPU s/1000", "RSS at rest", f"with {CROWD}", "afterwards", budget="budget")
    for name, crowd in crowds.items():
        columns, budget = [f"{crowd.whole}/{crowd.asked}", f"{percentile(crowd.gathered_seconds, 0.5):.2f}"], ""
        if name != DIRECT:
            columns.append(f"{1000 * crowd.cpu_seconds / len(crowd.delays):.3f}")
            columns += [f"{rss:.1f} MiB" for rss in (at_rest[name], crowd.rss_mib, crowd.rss_after_mib)]
        if name == OURS:
            budget = f"all complete: {verdict(crowd.whole == crowd.asked)}; RSS <= 60 MiB at rest: "
            budget += f"{verdict(at_rest[name] <= 60)}, with {CROWD}: {verdict(crowd.rss_mib <= 60)}"
        row(f"  {name}", *columns, budget=budget)


def turned(found: list[Way], number: int) -> list[Way]:
    """Each round begins with another one."""
    place = number % len(found)
    return found[place:] + found[:place]


def in_turn(found: list[Way], rounds: int, sample: Sample) -> Table:
    """All ways, one after the other, as often as `rounds`."""
    taken: Table = {way.name: [] for way in found}
    for number in range(rounds):
        for way in turned(found, number):
            taken[way.name] += sample(way)
    return taken


def measure(found: list[Way], rounds: int, crowd_rounds: int, crowd_seconds: float) -> None:
    at_rest = {way.name: way.rss_mib() for way in found if way.pid is not None}
    first = b'"sent_ns"'
    for what, sample in (
        ("GET /api/version, kept connection", kept(GET, GOT, 150)),
        ("GET /api/version, fresh connection", fresh(GET, GOT, 75)),
        ("POST /api/chat through the gate, kept", kept(CHAT, CHATTED, 150)),
        ("time to first token, fresh connection", fresh(chat(tokens=1), first, 75)),
    ):
        report_delays(what, in_turn(found, rounds, sample))

    delays: Table = {way.name: [] for way in found}
    for number in range(rounds):
        side_by_side(turned(found, number), 1.0, delays)
    report_delays(f"a token's way, {1 / PACE_SECONDS:.0f} tokens/s", delays)

    report_rates("one large download", "MB/s", in_turn(found, rounds, download(64 * MIB)))
    report_rates("one large upload", "MB/s", in_turn(found, rounds, upload(64 * MIB)))
    for what, request, end in (("GET /api/version", GET, GOT), ("POST /api/chat", CHAT, CHATTED)):
        cpu: Table = defaultdict(list)
        taken = in_turn(found, rounds, flood(request, end, 0.2, cpu))
        report_rates(f"{what}, {CONNECTIONS} kept connections", "requests/s", taken, cpu)

    crowds = {way.name: Crowd() for way in found}
    for number in range(crowd_rounds):
        for way in turned(found, number):
            crowds[way.name].measure(way, found[0], CROWD, crowd_seconds)
    each = f"{CROWD} streams, {1 / CROWD_PACE_SECONDS:.0f} tokens/s each"
    report_delays(f"a token's way, {each}", {name: crowd.delays for name, crowd in crowds.items()})
    report_crowds(f"{each}; CPU for tokens", crowds, at_rest)


def outcomes() -> str:
    """What the gate made of the requests, by its own count: held ones would be no measure of a proxy."""
    metrics = str(call("GET", "/metrics").body)
    found = re.findall(r'gateway_requests_total\{outcome="(\w+)",upstream="ollama"\} ([0-9.]+)', metrics)
    return ", ".join(f"{float(count):.0f} {outcome}" for outcome, count in found)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="some 20 s instead of some 90")
    arguments.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.upstream is not None:
        asyncio.run(serve_upstream(chosen.upstream))
        return
    print(f"load average {Path('/proc/loadavg').read_text().strip()}, {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as name, ways(Path(name)) as found:
        time.sleep(1.0)
        gc.disable()
        if chosen.quick:
            measure(found, rounds=2, crowd_rounds=1, crowd_seconds=1.0)
        else:
            measure(found, rounds=10, crowd_rounds=2, crowd_seconds=2.0)
        print(f"\nthe gate: {outcomes()}")
    print(f"load average {Path('/proc/loadavg').read_text().strip()}")


if __name__ == "__main__":
    main()
