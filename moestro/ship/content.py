"""Answers that carry file content: ranges, validators, back-pressure; and bodies that come in, with their limits.

    BlobAnswer(store, blob, leaves, bucket, metrics)      body = await read_body(request, most_bytes, stall_s)

Content goes out in pieces of 256 KiB straight from the page cache where it lies there (RWF_NOWAIT), else a thread reads
it first, so that one slow disk read delays one client only. Over plain HTTP the kernel copies files to sockets itself.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request

from moestro.core.errors import RefusalError
from moestro.ship.gate import Bucket, Message, Receive, Send
from moestro.ship.metrics import Metrics
from moestro.ship.objects import Opened
from moestro.ship.sendfile import ZERO_COPY
from moestro.ship.store import Blob, Store

PIECE_BYTES = 256 << 10
"""Small enough that hundreds of clients take turns quickly, large enough to be cheap."""
MAX_DIGITS = 18
RANGE = re.compile(rf"bytes=(\d{{0,{MAX_DIGITS}}})-(\d{{0,{MAX_DIGITS}}})")


def requested_range(text: str, size: int) -> tuple[int, int] | None:
    """[start, stop) of a Range header; None where the whole file is to be sent (RFC 9110, 14.2).

    raises   RefusalError 416 where nothing of the range exists
    """
    match = RANGE.fullmatch(text.strip())
    if not match or match[1] == match[2] == "":
        return None  # several ranges, other units or nonsense: the header is ignored
    if match[1] == "":
        start, stop = max(size - int(match[2]), 0), size
    else:
        start, stop = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
        if match[2] and int(match[2]) < start:
            return None
    if start >= stop:
        raise RefusalError(f"the range {text[:60]!r} is outside the file's {size} bytes", 416)
    return start, stop


class BlobAnswer:
    """An ASGI response with a blob or a range of it."""

    def __init__(
        self, store: Store, blob: Blob, leaves: bytes, bucket: Bucket | None, metrics: Metrics, stall_s: float
    ) -> None:
        self.store, self.blob, self.leaves = store, blob, leaves
        self.bucket, self.metrics, self.stall_s = bucket, metrics, stall_s

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        etag = f'"{self.blob.root}"'
        common = [(b"etag", etag.encode()), (b"accept-ranges", b"bytes"), (b"cache-control", b"private, immutable")]
        if etag in [tag.strip() for tag in headers.get("if-none-match", "").split(",")]:
            await _start(send, 304, common)
            return
        part = None
        if "range" in headers and headers.get("if-range", etag) == etag:
            part = requested_range(headers["range"], self.blob.size)
        start, stop = part or (0, self.blob.size)
        common += [(b"content-length", b"%d" % (stop - start)), (b"content-type", b"application/octet-stream")]
        if part:
            common.append((b"content-range", b"bytes %d-%d/%d" % (start, stop - 1, self.blob.size)))
        if scope["method"] == "HEAD" or start == stop:
            await _start(send, 206 if part else 200, common)
            return
        await send({"type": "http.response.start", "status": 206 if part else 200, "headers": common})
        zero_copy = ZERO_COPY in scope.get("extensions", {})
        await self._send(self._pieces(start, stop, zero_copy), receive, send)

    async def _send(self, pieces: AsyncIterator[tuple[Message, int]], receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            async for message, count in pieces:
                while self.bucket and (wait_s := self.bucket.wait_s(count)):
                    await asyncio.sleep(wait_s)
                if gone.done():
                    raise ClientDisconnect
                async with asyncio.timeout(self.stall_s):
                    await send(message)
                self.metrics.sent.inc(count)
                await asyncio.sleep(0)
        except TimeoutError:
            raise ClientDisconnect from None
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone

    async def _pieces(self, start: int, stop: int, zero_copy: bool) -> AsyncIterator[tuple[Message, int]]:
        """Messages that carry the content, and how many bytes each carries."""
        left = stop - start
        for key, begin, end in self.store.spans(self.blob, self.leaves, start, stop):
            opened = self.store.objects.opened(key, begin, end)
            try:
                for at in range(begin, end, PIECE_BYTES):
                    last = min(at + PIECE_BYTES, end)
                    left -= last - at
                    yield await _piece(opened, at, last, zero_copy) | {"more_body": left > 0}, last - at
            finally:
                opened.close()


async def _piece(opened: Opened, start: int, stop: int, zero_copy: bool) -> dict[str, Any]:
    """The message for bytes [start, stop) of an object, which are in memory then."""
    if not zero_copy or opened.handle is None:
        data = opened.now(start, stop)
        return {
            "type": "http.response.body",
            "body": await asyncio.to_thread(opened.read, start, stop) if data is None else data,
        }
    if not opened.here(start, stop):
        await asyncio.to_thread(opened.read, start, stop)
    return {"type": ZERO_COPY, "file": opened.handle, "offset": start, "count": stop - start}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def read_body(request: Request, most_bytes: int, stall_s: float) -> bytes:
    """The request's body; raises RefusalError 413 as soon as it is too long, 408 where it stops coming."""
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or len(stated) > MAX_DIGITS or int(stated) > most_bytes:
        raise RefusalError(f"the body has {stated[:20]} bytes; at most {most_bytes} are allowed here", 413)
    body = bytearray()
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(stall_s):
                part = await anext(stream, None)
        except TimeoutError as error:
            raise RefusalError(f"no byte of the body came for {stall_s:g} s", 408) from error
        if part is None:
            return bytes(body)
        body += part
        if len(body) > most_bytes:
            raise RefusalError(f"the body has more than the {most_bytes} bytes allowed here", 413)
