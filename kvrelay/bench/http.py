"""As much of HTTP/1.1 as it takes to ask an OpenAI-style server: one request a connection.

A connection of its own for each request makes every one pay the same, and leaves nothing open
to be closed under the next one.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvrelay.config import split_address

LINE_MAX_NUM_BYTES = 1 << 16
BODY_MAX_NUM_BYTES = 1 << 20
READ_NUM_BYTES = 1 << 16


class HttpError(Exception):
    """What came back is not HTTP/1.1, or it broke off."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer whose body is still to be read, once."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""

    reader: asyncio.StreamReader

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives.

        Raises:
            HttpError: it broke off.
        """
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            async for piece in _chunks(self.reader):
                yield piece
        elif length := self.headers.get("content-length"):
            yield await self.reader.readexactly(_number(length, 10))
        else:
            while piece := await self.reader.read(READ_NUM_BYTES):
                yield piece

    async def body(self) -> bytes:
        """All of a small body."""
        data = b""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > BODY_MAX_NUM_BYTES:
                    raise HttpError(f"a body of more than {BODY_MAX_NUM_BYTES} bytes")
        return data


@asynccontextmanager
async def exchange(
    address: str, method: str, path: str, body: bytes = b""
) -> AsyncIterator[Response]:
    """Send a request to HOST:PORT and have its answer; leaving it closes the connection.

    Raises:
        HttpError: also from within, where the answer breaks off.
        OSError: nothing answers.
    """
    host, port = split_address(address)
    reader, writer = await asyncio.open_connection(host, port, limit=LINE_MAX_NUM_BYTES)
    try:
        head = (
            f"{method} {path} HTTP/1.1\r\n"
            f"host: {address}\r\n"
            "connection: close\r\n"
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        yield await _response(reader)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError) as error:
        raise HttpError(f"{address}: {type(error).__name__}") from error
    finally:
        writer.transport.abort()  # a close would wait for a peer that does not read
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _response(reader: asyncio.StreamReader) -> Response:
    version, _, rest = (await _line(reader)).partition(" ")
    if not version.startswith("HTTP/1."):
        raise HttpError("not HTTP/1.1")
    status = _number(rest.partition(" ")[0], 10)
    headers = {}
    while line := await _line(reader):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Response(status, headers, reader)


async def _chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while length := _number((await _line(reader)).partition(";")[0], 16):
        data = await reader.readexactly(length + 2)
        yield data[:-2]


async def _line(reader: asyncio.StreamReader) -> str:
    return (await reader.readuntil(b"\n")).decode("latin-1").rstrip("\r\n")


def _number(text: str, base: int) -> int:
    try:
        number = int(text.strip(), base)
    except ValueError:
        raise HttpError("no number where HTTP has one") from None
    if not 0 <= number <= BODY_MAX_NUM_BYTES:
        raise HttpError(f"{number} where at most {BODY_MAX_NUM_BYTES} is read here")
    return number
