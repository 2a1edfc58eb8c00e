"""A proxy before a real S3 server that fails as it is told: real TCP, real faults, on loopback."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import aiohttp
from aiohttp import web

Kind = Literal["500", "503", "403", "reset", "lost answer", "truncated", "short", "late"]
STATUS = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of these methods (None: with all of them).

    The first `after` of them go well.

    500, 503, 403: an S3 error instead of an answer; nothing reaches the server. reset: the connection is reset
    before the request reaches it. lost answer: it is reset after the server has done its work. truncated: the body
    ends in the middle. short: the body has half its bytes, and its header says that this is all. late: the answer
    comes after `late_s`.
    """

    kind: Kind
    times: int | None = None
    methods: tuple[str, ...] = ("GET", "PUT", "HEAD", "DELETE")
    late_s: float = 30.0
    after: int = 0


class FaultyProxy:
    """Forwards to `upstream` (a URL) but for the faults it has been given; runs in a thread of its own."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._faults: list[Fault] = []
        self._seen: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self.endpoint = ""

    def fail(self, *faults: Fault) -> None:
        """Replace what goes wrong from now on, and forget the requests so far; no argument: nothing goes wrong."""
        self._faults = list(faults)
        self._seen = []

    @property
    def seen(self) -> list[str]:
        """The methods of the requests since the last `fail`."""
        return list(self._seen)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            app = web.Application(client_max_size=2**30)
            app.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.endpoint = "http://{}:{}".format(*runner.addresses[0])
            self._started.set()
            await self._stop.wait()
            await runner.cleanup()
            # Late answers still sleep, and a reset leaves its handler waiting.
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self._seen.append(request.method)
        body = await request.read()
        fault = self._next_fault(request.method)
        kind = fault.kind if fault else ""
        if kind in STATUS:
            text = f"<Error><Code>{STATUS[kind]}</Code><Message>told to fail</Message></Error>"
            return web.Response(status=int(kind), text=text, content_type="application/xml")
        if kind == "reset":
            return _reset(request)
        # The host stays as the client wrote it: it is part of what was signed.
        url = aiohttp.client.URL(self._upstream + request.raw_path, encoded=True)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        async with self._session.request(
            request.method, url, headers=headers, data=body, skip_auto_headers={"Content-Type", "User-Agent"}
        ) as answer:
            data = await answer.read()
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            length = answer.headers.get("Content-Length", str(len(data)))
        if kind == "lost answer":
            return _reset(request)
        if fault is not None and kind == "late":
            await asyncio.sleep(fault.late_s)
        if kind == "short":
            data, length = data[: len(data) // 2], str(len(data) // 2)
        response = web.StreamResponse(status=answer.status, headers={**headers, "Content-Length": length})
        await response.prepare(request)
        if request.method != "HEAD":
            await response.write(data[: len(data) // 2] if kind == "truncated" else data)
        if kind == "truncated":
            assert request.transport is not None
            request.transport.close()
        else:
            await response.write_eof()
        return response

    def _next_fault(self, method: str) -> Fault | None:
        for fault in self._faults:
            if method in fault.methods and fault.times != 0:
                if fault.after:
                    fault.after -= 1
                    continue
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


def _reset(request: web.Request) -> web.Response:
    assert request.transport is not None
    connection = request.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
    request.transport.abort()
    return web.Response()
