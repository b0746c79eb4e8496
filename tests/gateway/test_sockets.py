"""What the kernel is told of each connection of the proxy."""

from __future__ import annotations

import socket

import pytest

from tests.gateway.upstream import Line, Upstream, calling, gateway
from vram_manager.gateway.client_side import ClientSide
from vram_manager.gateway.upstream_side import UpstreamSide

pytestmark = pytest.mark.asyncio

ASKED = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_no_token_waits_in_the_kernel_for_the_one_before_it_on_either_side() -> None:
    async def script(line: Line) -> None:
        while await line.request():
            line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with Upstream(script) as upstream, gateway(upstream.url) as proxy, calling(proxy.address[1]) as client:
        client.send(ASKED)
        await client.answer()
        sides = proxy._common.connections
        undelayed = {
            type(side): side._transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for side in sides
        }

    assert undelayed == {ClientSide: 1, UpstreamSide: 1}
