"""Files from the kernel's cache straight to a socket, for answers over plain HTTP: ASGI's `http.response.zerocopysend`.

    offer(protocol)      after a request's head: the application may send {"type": ZERO_COPY, "file", "offset", "count"}

uvicorn knows no such message. A body's bytes would be copied into Python and out again, a quarter of the server's
time. Over TLS bytes must be encrypted in between, so nothing is offered there.
"""

import asyncio
import contextlib
import os
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from moestro.core.errors import StorageError

ZERO_COPY = "http.response.zerocopysend"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.001, 0.05
"""Between looks at whether what was written before is out; mostly the head, which is out at once."""


def offer(protocol: HttpToolsProtocol) -> None:
    """Let the application answer the request that has just come in with parts of files."""
    protocol.scope["extensions"] = {ZERO_COPY: {}}
    protocol.cycle.send = _Sender(protocol.cycle).send  # type: ignore[method-assign]


class _Sender:
    """One answer."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.cycle, self.transport, self.send_other = cycle, cycle.transport, cycle.send

    async def send(self, message: Any) -> None:
        """Any ASGI message."""
        if message["type"] != ZERO_COPY:
            await self.send_other(message)
            return
        count, cycle = message["count"], self.cycle
        assert 0 < count <= cycle.expected_content_length
        await self._emptied()
        if not cycle.disconnected:
            await self._copied(message["file"], message["offset"], count)
        cycle.expected_content_length -= count
        if not message["more_body"]:
            await self.send_other({"type": "http.response.body", "body": b"", "more_body": False})

    async def _emptied(self) -> None:
        """Until everything written before has left this process."""
        wait_s = 0.0
        while self.transport.get_write_buffer_size() and not self.cycle.disconnected:
            await asyncio.sleep(wait_s)
            wait_s = min(max(2 * wait_s, FIRST_WAIT_S), LONGEST_WAIT_S)

    async def _copied(self, file: int, offset: int, count: int) -> None:
        # A socket of our own: where the client leaves, the transport closes its own, and the number may be another's.
        socket = os.dup(self.transport.get_extra_info("socket").fileno())
        try:
            while count and not self.cycle.disconnected:
                try:
                    sent = os.sendfile(socket, file, offset, count)
                except BlockingIOError:
                    await _writable(socket)
                    continue
                if not sent:
                    raise StorageError(
                        "an object of the store is shorter than it was; run moestro collect-garbage --scrub"
                    )
                offset, count = offset + sent, count - sent
        except (BrokenPipeError, ConnectionError):
            self.transport.abort()  # the client has left
        finally:
            os.close(socket)


async def _writable(socket: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(socket, ready.set)
    try:
        await ready.wait()
    finally:
        with contextlib.suppress(OSError):
            loop.remove_writer(socket)
