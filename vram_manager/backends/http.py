"""HTTP with the JSON servers of the local stack: deadlines, sizes, and every error in our own words."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Final, NoReturn, TypeVar

# httpx brings a command line of its own, which imports rich and pygments where they are installed: 3 MiB that a daemon
# need not hold. It takes their absence for granted as well.
_no_command_line = ModuleType("httpx._main")
_no_command_line.main = lambda: None  # type: ignore[attr-defined]
sys.modules.setdefault("httpx._main", _no_command_line)

import httpx  # noqa: E402
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt  # noqa: E402

from vram_manager.errors import Rejected, SensorError, TimedOut  # noqa: E402

T = TypeVar("T")

# 4 MiB: the largest reply we ask for is ComfyUI's /queue, which holds some 100 kB of workflow per prompt.
REPLY_LIMIT_BYTES: Final = 4 * 1024 * 1024
_ERROR_LIMIT_BYTES: Final = 4096  # what an error says in its first 4 kB is enough for a log line

# 60 s: longer than any pause between polls, shorter than the 75 s after which aiohttp (ComfyUI) hangs up.
_KEEPALIVE_SECONDS: Final = 60.0

# ComfyUI answers 403 to a foreign Origin or to Sec-Fetch-Site: cross-site, Ollama to a foreign Origin.
_NEVER_SENT: Final = frozenset({"origin", "sec-fetch-site"})

# A kept connection may be closed by the server at the moment we use it. A GET may then be asked again; a POST
# only if it surely never left, because a second `/free` could drop what a prompt has loaded in between.
_GET_AGAIN: Final = (httpx.ConnectError, httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
_POST_AGAIN: Final = (httpx.ConnectError,)


class HttpStatus(Rejected):
    """The server answered with a status other than 2xx."""

    def __init__(self, status: int, said: str = "", remedy: str | None = None) -> None:
        super().__init__(f"HTTP {status}" + (f": {said}" if said else ""), remedy)
        self.status = status


@contextmanager
def errors_of(call: str, *, server: str, deadline: float) -> Iterator[None]:
    """Whatever goes wrong with the outside leaves as a SensorError whose `why` begins with the call."""
    try:
        yield
    except SensorError as error:
        error.why = f"{call}: {error.why}"
        error.args = (error.why,)
        raise
    except (TimeoutError, httpx.TimeoutException) as error:
        raise TimedOut(f"{call}: no answer within {deadline:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        remedy = f"check that {server} runs and listens where this process can reach it"
        raise SensorError(f"{call}: {_in_words(error)}", remedy) from error


class JsonClient:
    """Asks one server. Follows no redirect and no proxy variable: the stack is local, and so it stays."""

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        name: str,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name = name
        self.headers = {key: text for key, text in (headers or {}).items() if key.lower() not in _NEVER_SENT}
        secure = httpx.URL(base_url).scheme == "https"
        self.tls = httpx.create_ssl_context() if secure else None
        self._http = httpx.AsyncClient(
            base_url=base_url,
            # identity: a compressed reply could grow past the limit in one step.
            headers={"User-Agent": "vram-manager", "Accept-Encoding": "identity"} | self.headers,
            # Loading the CA certificates costs megabytes; an empty context trusts nobody and costs nothing.
            verify=self.tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            trust_env=False,
            timeout=None,  # one deadline over the whole call instead, see _ask
            limits=httpx.Limits(keepalive_expiry=_KEEPALIVE_SECONDS),
            transport=transport,
        )

    def address(self, path: str) -> httpx.URL:
        """Where `path` is on this server, below the prefix of its base URL."""
        base = self._http.base_url
        return base.copy_with(path=base.path + path.lstrip("/"))

    async def get(self, path: str, parse: Callable[[object], T], *, deadline: float) -> T:
        """What `parse` makes of the JSON reply."""
        with errors_of(f"GET {path}", server=self.name, deadline=deadline):
            reply, content = await self._ask("GET", path, None, deadline)
            return parse(_json(content, reply.headers.get("content-type", "")))

    async def post(self, path: str, body: Mapping[str, object], *, deadline: float) -> None:
        """The server has said 2xx; what else it said is ignored."""
        with errors_of(f"POST {path}", server=self.name, deadline=deadline):
            await self._ask("POST", path, body, deadline)

    async def query(self, path: str, body: Mapping[str, object], parse: Callable[[object], T], *, deadline: float) -> T:
        """What `parse` makes of the JSON reply to a POST that only asks."""
        with errors_of(f"POST {path}", server=self.name, deadline=deadline):
            reply, content = await self._ask("POST", path, body, deadline)
            return parse(_json(content, reply.headers.get("content-type", "")))

    async def aclose(self) -> None:
        """No connection is left open."""
        await self._http.aclose()

    async def _ask(
        self, method: str, path: str, body: Mapping[str, object] | None, deadline: float
    ) -> tuple[httpx.Response, bytes]:
        """One call, retry included, within the deadline: a reply of 2xx and its whole body."""
        request = self._http.build_request(method, path, json=body)
        retry = retry_if_exception_type(_GET_AGAIN if method == "GET" else _POST_AGAIN)
        once_more = AsyncRetrying(retry=retry, stop=stop_after_attempt(2), reraise=True)
        async with asyncio.timeout(deadline):
            # Only the head of the reply is inside the retry: a body that breaks off is not asked for again.
            reply: httpx.Response = await once_more(self._http.send, request, stream=True)
            try:
                if not reply.is_success:
                    raise await self._refusal(reply)
                content = await _read(reply, REPLY_LIMIT_BYTES)
            finally:
                await reply.aclose()
        if len(content) > REPLY_LIMIT_BYTES:
            told = reply.headers.get("content-length", "unknown")
            raise Rejected(f"reply of more than {REPLY_LIMIT_BYTES} bytes (content-length {told})")
        return reply, content

    async def _refusal(self, reply: httpx.Response) -> HttpStatus:
        """The status and, where the body has one, the server's own sentence."""
        said = ""
        with suppress(httpx.HTTPError):
            said = _own_sentence(await _read(reply, _ERROR_LIMIT_BYTES))
        remedy = None
        if reply.status_code in (401, 403):
            remedy = f"{self.name} or a proxy before it checks callers: configure the header it wants"
        if reply.is_redirect:
            remedy = f"set the address of {self.name} to where it redirects: redirects are not followed"
        return HttpStatus(reply.status_code, said, remedy)


async def _read(reply: httpx.Response, limit: int) -> bytes:
    """At most limit + 1 bytes of the body: the one too many tells that there is more."""
    content = bytearray()
    async for part in reply.aiter_bytes():
        content += part
        if len(content) > limit:
            break
    return bytes(content[: limit + 1])


def _json(content: bytes, content_type: str) -> object:
    try:
        return json.loads(content, parse_constant=_not_json)
    except (ValueError, RecursionError) as error:
        kind = content_type.partition(";")[0].strip() or "no content type"
        raise Rejected(f"not JSON ({kind if content.strip() else 'empty'})") from error


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")  # Python reads NaN and Infinity; a strict reader does not


def _own_sentence(content: bytes) -> str:
    """The message of `{"error": "..."}` or `{"error": {"message": "..."}}`, else nothing."""
    with suppress(Rejected):
        match _json(content, ""):
            case {"error": str(said)} | {"error": {"message": str(said)}}:
                return ascii(said)[1:-1][:200]
    return ""


def _in_words(error: BaseException) -> str:
    """The root of the error in two or three words where it is a usual one, else its own text."""
    root: BaseException | None = error
    passed: list[BaseException] = []
    # Whoever raises an error that they were handling makes a circle of what came of what.
    while root is not None and root not in passed:
        passed.append(root)
        match root:
            case ConnectionRefusedError():
                return "connection refused"
            case socket.gaierror():
                return "host name not found"
            case ConnectionResetError() | BrokenPipeError():
                return "connection reset"
            case ssl.SSLCertVerificationError():
                return "certificate not trusted"
            case BaseExceptionGroup():
                root = root.exceptions[0]
            case OSError(errno=int(), strerror=str(said)):
                return said.lower()
            case _:
                root = root.__cause__ or root.__context__
    return str(error) or type(error).__name__
