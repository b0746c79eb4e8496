"""An HTTP client that goes through a gate, without sockets, so that hours of it pass in virtual time."""

from __future__ import annotations

import httpx

from vram_manager.gateway.proxy import Gate, Head, Reply


class Through(httpx.AsyncBaseTransport):
    """Does with each request what the proxy does: the gate sees it, may hold it, and is told what became of it."""

    def __init__(self, gate: Gate, upstream: httpx.AsyncBaseTransport) -> None:
        self._gate = gate
        self._upstream = upstream

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        head = Head(method=request.method, target=request.url.raw_path.decode(), headers=tuple(request.headers.raw))
        held = self._gate.watch(head)
        if held is None:
            return await self._upstream.handle_async_request(request)
        try:
            held.look(await request.aread())
            verdict = await held.may_pass()
            if isinstance(verdict, Reply):
                return httpx.Response(verdict.status, headers=list(verdict.headers), content=verdict.body)
            response = await self._upstream.handle_async_request(request)
            held.answered(response.status_code)
            # ASGITransport has the whole body by now: the exchange is over when it is returned.
            response.headers.update(
                {name.decode(): value.decode() for name, value in verdict.headers},
            )
            return response
        finally:
            held.over()
