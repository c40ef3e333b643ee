"""A holder with a real CUDA device, as a process: `python -m tests.support.device_child JSON`.

It prints one JSON line that says where it is. Then it does what it is asked on stdin, one JSON line
for each call, and answers with one line each, until stdin ends.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvrelay.clock import MonotonicClock
from kvrelay.errors import PeerUnavailable, QuiescenceLost, ServingError
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.base import BlockCopy, RemoteHold
from kvrelay.transfer.cuda_ipc import CudaIpcTransport, CupyCuda
from kvrelay.transfer.nccl import CupyNccl, NcclTransport
from kvrelay.transfer.nccl_link import LinkLimits
from kvrelay.transfer.nccl_puller import HolderCalls
from kvrelay.types import TransportOffer

LAYOUT = KvLayout(num_layers=32, block_size=16, num_kv_heads=8, head_dim=128, dtype="bfloat16")
"""2 MiB a block."""

WORKER, EPOCH = "prefill-0", "e1"

LIMITS = LinkLimits(open_timeout_s=60.0, transfer_timeout_s=30.0)


def filled_cache(num_blocks: int, *, seed: int, device: int) -> DeviceCache:
    """Random bytes, the same for the same seed and kind of device."""
    there = torch.device("cuda", device)
    cache = DeviceCache(LAYOUT, num_blocks, shareable=False, device=there)
    generator = torch.Generator(there).manual_seed(seed)
    random = torch.randint(
        0, 256, (cache.num_bytes,), dtype=torch.uint8, device=there, generator=generator
    )
    cache.device_bytes.copy_(random)
    torch.cuda.synchronize(there)
    return cache


def make_transport(
    kind: str,
    *,
    worker_id: str,
    epoch: str,
    device: int,
    shares_devices: bool = False,
    calls: HolderCalls | None = None,
) -> CudaIpcTransport | NcclTransport:
    if kind == "cuda_ipc":
        return CudaIpcTransport(
            worker_id=worker_id, epoch=epoch, cuda=CupyCuda(device), clock=MonotonicClock()
        )
    return NcclTransport(
        epoch=epoch,
        nccl=CupyNccl(),
        cuda=CupyCuda(device),
        calls=calls or _NoCalls(),
        clock=MonotonicClock(),
        on_lost=_end,
        limits=LIMITS,
        shares_devices=shares_devices,
    )


class _NoCalls:
    """Of a holder that pulls from nobody."""

    async def open_link(self, remote: RemoteHold, unique_id: bytes) -> None:
        raise PeerUnavailable("only holds")

    async def send(
        self, remote: RemoteHold, *, link_id: str, sequence: int, indexes: Sequence[int]
    ) -> None:
        raise PeerUnavailable("only holds")


def _end(lost: QuiescenceLost) -> None:
    sys.stderr.write(f"{lost}\n")


@dataclass
class DeviceChild:
    """Such a process, and `HolderCalls` to it."""

    process: asyncio.subprocess.Process
    remote: RemoteHold
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def open_link(self, remote: RemoteHold, unique_id: bytes) -> None:
        await self._ask(do="open_link", unique_id=unique_id.hex())

    async def send(
        self, remote: RemoteHold, *, link_id: str, sequence: int, indexes: Sequence[int]
    ) -> None:
        await self._ask(do="send", link_id=link_id, sequence=sequence, indexes=list(indexes))

    async def _ask(self, **call: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        async with self._turn:
            self.process.stdin.write(json.dumps(call).encode() + b"\n")
            said = json.loads(await self.process.stdout.readline())
        if said is not None:
            raise PeerUnavailable(said)


@asynccontextmanager
async def open_device_child(
    kind: str, *, num_blocks: int, seed: int, device: int = 0, shares_devices: bool = False
) -> AsyncIterator[DeviceChild]:
    """It is gone when the block ends."""
    options = {
        "kind": kind,
        "num_blocks": num_blocks,
        "seed": seed,
        "device": device,
        "shares_devices": shares_devices,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.device_child", json.dumps(options)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
        assert line, "the holder did not start"
        remote = RemoteHold(
            handoff_id="handoff-0",
            worker_id=WORKER,
            epoch=EPOCH,
            address="127.0.0.1:1",
            offer=TransportOffer(**json.loads(line)),
        )
        yield DeviceChild(process, remote)
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 30)
        except TimeoutError:
            process.kill()
            await process.wait()


def copies_of(pairs: Sequence[tuple[int, int]]) -> list[BlockCopy]:
    """One copy per (source, target) block; indexes are source ids."""
    each = LAYOUT.block_num_bytes
    return [
        BlockCopy(index=i, source_offset=i * each, target_offset=j * each, num_bytes=each)
        for i, j in pairs
    ]


async def _serve(
    kind: str, *, num_blocks: int, seed: int, device: int, shares_devices: bool
) -> None:
    cache = filled_cache(num_blocks, seed=seed, device=device)
    transport = make_transport(
        kind, worker_id=WORKER, epoch=EPOCH, device=device, shares_devices=shares_devices
    )
    transport.register(cache)
    _say(asdict(transport.describe()))
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            assert isinstance(transport, NcclTransport)
            await _do(transport, json.loads(line))
        except ServingError as error:
            _say(str(error))
        else:
            _say(None)
    await transport.close()
    cache.close()


async def _do(transport: NcclTransport, call: dict[str, Any]) -> None:
    if call["do"] == "open_link":
        unique_id = bytes.fromhex(call["unique_id"])
        await transport.holder.open_link(puller_id="decode-0", unique_id=unique_id)
        return
    each = LAYOUT.block_num_bytes
    await transport.holder.send(
        puller_id="decode-0",
        link_id=call["link_id"],
        sequence=call["sequence"],
        ranges=[(index * each, each) for index in call["indexes"]],
    )


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_serve(**json.loads(sys.argv[1])))
