"""Channels to peers that are called again and again: one per address, few of them idle."""

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from kvrelay.config import TlsFiles
from kvrelay.rpc.channel import open_channel


@dataclass(slots=True)
class _Shared:
    channel: grpc.aio.Channel
    num_users: int = 0


class Channels:
    """Owns its channels until `close`; the least recently used idle ones are closed first."""

    def __init__(self, *, tls: TlsFiles | None, max_idle: int = 64) -> None:
        self._tls = tls
        self._max_idle = max_idle
        self._shared: OrderedDict[str, _Shared] = OrderedDict()

    @asynccontextmanager
    async def use(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """A channel to `HOST:PORT` that stays open meanwhile."""
        shared = self._shared.get(address)
        if shared is None:
            shared = self._shared[address] = _Shared(open_channel(address, tls=self._tls))
        self._shared.move_to_end(address)
        shared.num_users += 1
        try:
            yield shared.channel
        finally:
            shared.num_users -= 1
            await self._close_some_idle()

    async def close(self) -> None:
        """Close every channel, in use or not."""
        while self._shared:
            _, shared = self._shared.popitem()
            await shared.channel.close()

    async def _close_some_idle(self) -> None:
        idle = [address for address, shared in self._shared.items() if shared.num_users == 0]
        for address in idle[: max(0, len(idle) - self._max_idle)]:
            await self._shared.pop(address).channel.close()
