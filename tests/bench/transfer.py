"""Measures how fast KV moves between two processes: `make bench-transfer`.

    1. the limit: one thread that copies between two ordinary, warm buffers
    2. `shm`, `nixl` and `stream` as a decode worker uses them, and NIXL without us
    3. what makes the bytes usable: the digest of each block, and one call of `Release`

All in one run, in turns, so that whatever else the machine does falls on all of them. Blocks have
SmolLM2-135M's shape; 8, 32 and 128 of them are prompts of 256, 1024 and 4096 tokens.
"""

import argparse
import asyncio
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from kvrelay.clock import MonotonicClock
from kvrelay.kv.layout import KvLayout
from kvrelay.rpc.channel import open_channel
from kvrelay.transfer.base import BlockCopy, BlockGeneration
from kvrelay.transfer.digest import DigestKind, range_digests
from kvrelay.transfer.shm import ShmTransport
from kvrelay.types import BlockId
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc
from tests.bench.nixl_alone import NixlAlone
from tests.support.kv_peer import ChildPeer, Peer, copies_of, open_child, open_peer, why_not

LAYOUT = KvLayout(num_layers=30, block_size=32, num_kv_heads=3, head_dim=64, dtype="bfloat16")
NUM_BLOCKS = (8, 32, 128)
BATCH_NUM_BLOCKS = 8
"""What a decode worker fetches at once while a prompt is computed: a chunk of 256 tokens."""

TRANSPORTS = ("shm", "nixl", "stream")

Way = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Work:
    """Blocks that are moved, `order` says whether as neighbours."""

    num_blocks: int
    order: str

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * LAYOUT.block_num_bytes

    @property
    def copies(self) -> list[BlockCopy]:
        sources = range(self.num_blocks)
        targets = sources if self.order == "neighbours" else reversed(sources)
        return copies_of(list(zip(sources, targets, strict=True)), LAYOUT)


@dataclass(slots=True)
class Result:
    """Median seconds by way, for one piece of work."""

    work: Work
    elapsed_s: dict[str, float] = field(default_factory=dict)

    def gigabytes_per_s(self, way: str) -> float:
        return self.work.num_bytes / self.elapsed_s[way] / 1e9


@dataclass(frozen=True, slots=True)
class Bench:
    """Two processes for each transport: a holder, and ourselves with a cache per transport."""

    pullers: dict[str, Peer]
    holders: dict[str, ChildPeer]
    digesting: Peer
    """As `pullers["shm"]`, but digests what it copies on the way, as the product does."""

    alone: NixlAlone | None
    buffers: tuple[np.ndarray, np.ndarray]
    handoffs: "handoff_pb2_grpc.HandoffServiceAsyncStub"

    def ways(self, work: Work) -> dict[str, Way]:
        copies = work.copies
        ways: dict[str, Way] = {"memcpy": lambda: self._memcpy(work.num_bytes)}
        for name in self.pullers:
            ways[name] = lambda name=name: self._pull(name, copies)
        if self.alone is not None:
            ways["NIXL alone"] = lambda: self._read_alone(copies)
        for name in self.pullers:
            ways[f"{name}, batches"] = lambda name=name: self._fetch(name, copies)
            ways[f"{name}, verified"] = lambda name=name: self._fetch_verified(name, copies)
        ways["digest"] = lambda: self._digest(copies)
        ways["fence"] = self._release
        return ways

    async def _memcpy(self, num_bytes: int) -> None:
        np.copyto(self.buffers[1][:num_bytes], self.buffers[0][:num_bytes])

    async def _pull(self, name: str, copies: Sequence[BlockCopy]) -> None:
        await self.pullers[name].transport.pull(self.holders[name].remote, copies)

    async def _read_alone(self, copies: Sequence[BlockCopy]) -> None:
        assert self.alone is not None
        self.alone.read(copies)

    async def _fetch(self, name: str, copies: Sequence[BlockCopy]) -> None:
        for batch in _batches(copies):
            await self._pull(name, batch)

    async def _fetch_verified(self, name: str, copies: Sequence[BlockCopy]) -> None:
        """As a decode worker does. `shm` has digested what it copied, and lets us see the fence; of
        the others each batch is digested while the next is fetched, and the holder is asked.
        """
        if name == "shm":
            for batch in _batches(copies):
                await self.digesting.transport.pull(self.holders[name].remote, batch)
            blocks = [BlockGeneration(BlockId(copy.index), 0) for copy in copies]
            assert self.digesting.transport.still(self.holders[name].remote, blocks)
            return
        digesting: list[asyncio.Future[None]] = []
        for batch in _batches(copies):
            await self._pull(name, batch)
            if digesting:
                await digesting.pop()
            digesting.append(asyncio.ensure_future(asyncio.to_thread(self._digests, name, batch)))
        await digesting.pop()
        await self._release()

    async def _digest(self, copies: Sequence[BlockCopy]) -> None:
        self._digests("shm", copies)

    def _digests(self, name: str, copies: Sequence[BlockCopy]) -> None:
        ranges = [(copy.target_offset, copy.num_bytes) for copy in copies]
        range_digests(self.pullers[name].cache, ranges, DigestKind.XXH3)

    async def _release(self) -> None:
        await self.handoffs.Release(handoff_pb2.ReleaseRequest(handoff_id="h"))


def _batches(copies: Sequence[BlockCopy]) -> Iterator[Sequence[BlockCopy]]:
    for first in range(0, len(copies), BATCH_NUM_BLOCKS):
        yield copies[first : first + BATCH_NUM_BLOCKS]


@asynccontextmanager
async def open_bench(num_blocks: int) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        pullers, holders = {}, {}
        for name in TRANSPORTS:
            if why_not(name) is not None:
                continue
            child = open_child(name, layout=LAYOUT, num_blocks=num_blocks, seed=1)
            holders[name] = await stack.enter_async_context(child)
            pullers[name] = await stack.enter_async_context(_puller(name, num_blocks))
        alone = None
        if "nixl" in pullers:
            alone = NixlAlone(pullers["nixl"].cache, holders["nixl"].remote.offer.address)
            stack.callback(alone.close)
        channel = open_channel(holders["stream"].remote.address)
        stack.push_async_callback(channel.close)
        num_bytes = num_blocks * LAYOUT.block_num_bytes
        yield Bench(
            pullers=pullers,
            holders=holders,
            digesting=await stack.enter_async_context(_puller("shm", num_blocks, digests=True)),
            alone=alone,
            buffers=(np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)),
            handoffs=handoff_pb2_grpc.HandoffServiceStub(channel),
        )


def _puller(
    name: str, num_blocks: int, *, digests: bool = False
) -> AbstractAsyncContextManager[Peer]:
    names = {"worker_id": "decode-0", "epoch": "e9"}
    transport = None
    if name == "shm":
        transport = ShmTransport(clock=MonotonicClock(), digests=digests, **names)
    return open_peer(name, layout=LAYOUT, num_blocks=num_blocks, transport=transport, **names)


async def measure(bench: Bench, work: Work, *, num_repeats: int) -> Result:
    ways = bench.ways(work)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(num_repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            await way()
            elapsed_s = time.perf_counter() - started
            if turn:  # the first connects, and warms the caches
                found[name].append(elapsed_s)
    return Result(work, {name: statistics.median(all_s) for name, all_s in found.items()})


def as_markdown(results: Sequence[Result], *, command: str, num_repeats: int) -> str:
    ways = list(results[0].elapsed_s)
    moving = [name for name in ways if "," not in name and name not in ("digest", "fence")]
    lines = [
        "# Moving KV between two processes",
        "",
        f"Written by `{command}`: medians of {num_repeats} turns, GB/s are 10^9 bytes per second.",
        "`scattered` blocks land in reverse order, so no two are copied as one.",
        *(f"Not measured: {name}: {why_not(name)}." for name in TRANSPORTS if why_not(name)),
        "",
        *_table(("machine", ""), machine().items()),
        "",
        "## Bandwidth",
        "",
        *_table(
            ("MB", "blocks", "", *(f"{name} GB/s" for name in moving), *TARGETS),
            (
                (
                    f"{result.work.num_bytes / 1e6:.1f}",
                    str(result.work.num_blocks),
                    result.work.order,
                    *(f"{result.gigabytes_per_s(name):.2f}" for name in moving),
                    *(_share(result, one, other) for one, other in TARGETS.values()),
                )
                for result in results
            ),
        ),
        "",
        "## Digest and fence",
        "",
        "xxh3 of all blocks as they lie in memory, by one thread, and one `Release` call. Then",
        f"what both add to a pull by batches of {BATCH_NUM_BLOCKS} blocks, as decode workers do:",
        "shm digests each block right after it was copied, and the fence is looked up in the",
        "holder's memory; of the others each batch is digested while the next is fetched, and the",
        "holder answers `Release`.",
        "",
        *_table(
            ("MB", "digest ms", "digest GB/s", "fence ms", *(f"{t} added" for t in TRANSPORTS)),
            (
                (
                    f"{result.work.num_bytes / 1e6:.1f}",
                    f"{result.elapsed_s['digest'] * 1e3:.3f}",
                    f"{result.gigabytes_per_s('digest'):.1f}",
                    f"{result.elapsed_s['fence'] * 1e3:.3f}",
                    *(_added(result, name) for name in TRANSPORTS),
                )
                for result in results
                if result.work.order == "neighbours"
            ),
        ),
        "",
    ]
    return "\n".join(lines)


TARGETS = {"shm of memcpy": ("shm", "memcpy"), "nixl of NIXL": ("nixl", "NIXL alone")}


def _share(result: Result, one: str, other: str) -> str:
    with suppress(KeyError):
        return f"{result.elapsed_s[other] / result.elapsed_s[one]:.0%}"
    return "–"


def _added(result: Result, name: str) -> str:
    with suppress(KeyError):
        batches_s = result.elapsed_s[f"{name}, batches"]
        added_s = result.elapsed_s[f"{name}, verified"] - batches_s
        return f"{added_s * 1e3:.2f} ms, {added_s / batches_s:.0%}"
    return "–"


def _table(head: Sequence[str], rows) -> list[str]:
    body = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(row)} |" for row in body]


def machine() -> dict[str, str]:
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": _processor(),
        "kernel": platform.release(),
        "Python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "grpcio", "xxhash", "nixl-cu13")},
        "UCX_TLS": os.environ.get("UCX_TLS", "not set"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


async def run(num_repeats: int, num_blocks: Sequence[int]) -> list[Result]:
    works = [Work(num, order) for num in num_blocks for order in ("neighbours", "scattered")]
    async with open_bench(max(num_blocks)) as bench:
        return [await measure(bench, work, num_repeats=num_repeats) for work in works]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.transfer")
    parser.add_argument("--repeats", type=int, default=21, help="turns; the median is kept")
    parser.add_argument("--blocks", type=int, nargs="+", default=NUM_BLOCKS)
    parser.add_argument("--out", type=Path, help="a Markdown file; default: standard output")
    args = parser.parse_args(argv)
    results = asyncio.run(run(args.repeats, args.blocks))
    command = shlex.join(["python", "-m", "tests.bench.transfer", *argv])
    said = as_markdown(results, command=command, num_repeats=args.repeats)
    if args.out is None:
        sys.stdout.write(said)
    else:
        args.out.write_text(said, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
