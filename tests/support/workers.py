"""Whole workers without a model: real engine, cache, transports and gRPC on loopback.

The scripted model keeps its fake KV in the real cache, so what a transport moves is what
the next step reads, and a block that is missing, stale or of another prompt shows.
"""

import asyncio
import contextlib
import itertools
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import grpc
from prometheus_client import CollectorRegistry

from decode_svc.area import LandingArea
from decode_svc.fetcher import Fetcher
from decode_svc.holder import HolderClient
from decode_svc.landing import Lander, LandingLimits
from decode_svc.service import DecodeServicer
from kvrelay.clock import Clock, MonotonicClock
from kvrelay.engine.batch import Path
from kvrelay.engine.engine import Engine
from kvrelay.engine.plan import StepLimits
from kvrelay.handoff.desk import TicketDesk
from kvrelay.handoff.holds import HoldLimits
from kvrelay.handoff.keeper import HoldKeeper
from kvrelay.handoff.service import HandoffServicer
from kvrelay.handoff.ticket import Ticket, sign
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.kv.staging import PACKED_DTYPES, StagingPlan
from kvrelay.obs.metrics import WorkerMetrics
from kvrelay.rpc import convert
from kvrelay.rpc.channel import open_channel
from kvrelay.rpc.channels import Channels
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.rpc.submit import ModelBounds
from kvrelay.transfer import stream
from kvrelay.transfer.build import TransportBuilder, TransportChoice, Transports
from kvrelay.transfer.speeds import LinkSpeeds
from kvrelay.transfer.wire_choice import WireDtype
from kvrelay.types import Fingerprint, Role, SamplingParams, TransportOffer
from kvrelay.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    handoff_pb2,
    handoff_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from kvrelay.worker.bridge import StepBridge
from kvrelay.worker.parts import close, make_engine
from prefill_svc.service import PrefillServicer
from tests.support.scripted_model import VOCAB_SIZE, ScriptedModel, Slot, StepGate

BLOCK_SIZE = 4
CHUNK_TOKENS = 8
LAYOUT = KvLayout(num_layers=1, block_size=BLOCK_SIZE, num_kv_heads=1, head_dim=4, dtype="float32")
FINGERPRINT = Fingerprint(model_digest="00", numerics="scripted-v1", layout=LAYOUT)
BOUNDS = ModelBounds(vocab_size=VOCAB_SIZE, context_tokens=2048)
LIMITS = StepLimits(
    budget_tokens=64, max_chunk_tokens=CHUNK_TOKENS, max_sequences=8, max_waiting=1024
)
HOLD_LIMITS = HoldLimits(hold_s=30.0, unclaimed_hold_s=10.0, max_expected=1024, max_remembered=4096)
LANDING_LIMITS = LandingLimits(batch_num_bytes=32 << 20)
WAIT_S = 10.0

TICKET_KEY = bytes(range(32))
PULLER_ID, PULLER_EPOCH = "decode", "d" * 16
LANDING_NUM_BYTES = 1 << 20

_SLOT = struct.Struct("<qqqq")
_HALF = _SLOT.size // 2
_ids = itertools.count(1)


def new_id() -> str:
    """32 hex digits nobody else has."""
    return f"{next(_ids):032x}"


class CacheSlots:
    """The scripted model's slots, kept in the bytes of a cache, where a token's KV would be: half
    of each in the first layer's K and half in its V. So they go where KV goes when blocks are cut.
    """

    def __init__(self, cache: KvCache) -> None:
        layout = cache.layout
        self._row_num_bytes = layout.values_num_bytes // (layout.num_layers * 2 * layout.block_size)
        assert self._row_num_bytes >= _HALF
        self._cache = cache

    def __setitem__(self, place: tuple[int, int], slot: Slot) -> None:
        packed = _SLOT.pack(slot.position + 1, slot.token_id, slot.path is Path.PROMPT, slot.digest)
        k, v = self._halves(place)
        k[:], v[:] = packed[:_HALF], packed[_HALF:]

    def get(self, place: tuple[int, int]) -> Slot | None:
        position, token_id, is_prompt, digest = _SLOT.unpack(b"".join(self._halves(place)))
        if position == 0:
            return None
        return Slot(position - 1, token_id, Path.PROMPT if is_prompt else Path.GENERATION, digest)

    def _halves(self, place: tuple[int, int]) -> tuple[memoryview, memoryview]:
        block, i = place
        view, size = self._cache.block_bytes(block), self._row_num_bytes
        k, v = i * size, (self._cache.layout.block_size + i) * size
        return view[k : k + _HALF], view[v : v + _HALF]


def scripted(cache: KvCache, gate: StepGate | None = None) -> ScriptedModel:
    model = ScriptedModel(block_size=cache.layout.block_size, gate=gate)
    model._slots = CacheSlots(cache)
    return model


@dataclass(kw_only=True)
class Bench:
    """What either kind of worker under test is made of."""

    worker_id: str
    epoch: str
    cache: KvCache
    runner: ScriptedModel
    engine: Engine
    transports: Transports
    staging: StagingPlan
    desk: TicketDesk
    metrics: WorkerMetrics
    registry: CollectorRegistry
    address: str = ""
    failures: list[BaseException] = field(default_factory=list)

    def offer(self, name: str) -> TransportOffer:
        return next(t.describe() for t in self.transports.all if t.name == name)

    @property
    def num_held_blocks(self) -> int:
        return self.engine.load().blocks.held


@dataclass(kw_only=True)
class PrefillBench(Bench):
    service: PrefillServicer
    keeper: HoldKeeper
    handoffs: HandoffServicer

    @property
    def num_expired_holds(self) -> float:
        name = "kvrelay_engine_hold_expirations_total"
        return self.registry.get_sample_value(name, {"role": "prefill"})


@dataclass(kw_only=True)
class DecodeBench(Bench):
    service: DecodeServicer
    keeper: HoldKeeper
    lander: Lander
    area: LandingArea

    @property
    def num_pulled_bytes(self) -> float:
        return self.registry.get_sample_value(
            "kvrelay_engine_pulled_bytes_total", {"role": "decode"}
        )


async def until(condition, timeout_s: float = WAIT_S) -> None:
    """Wait for what another thread or process does in its own time, and tells nobody."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - threads of the engine tell nobody
            await asyncio.sleep(0.002)


def staging_of(cache: KvCache) -> StagingPlan:
    """How a cache's staging is used: to pack in if that fits, and what is left to land in."""
    num_bytes = cache.generations_offset - cache.staging_offset
    for packs in (True, False):
        plan = StagingPlan(
            cache.layout,
            cache.num_blocks,
            packs_to=PACKED_DTYPES if packs else (),
            landing_num_bytes=0,
        )
        if plan.num_bytes <= num_bytes:
            break
    num_landing = max(0, num_bytes - plan.num_bytes)
    return StagingPlan(
        cache.layout,
        cache.num_blocks,
        packs_to=PACKED_DTYPES if packs else (),
        landing_num_bytes=num_landing,
    )


@contextlib.asynccontextmanager
async def _engine_on(
    role: Role,
    *,
    num_blocks: int,
    limits: StepLimits,
    gate: StepGate | None,
    wrap=None,
    model=None,
    layout: KvLayout = LAYOUT,
    worker_id: str = "",
    epoch: str = "",
    transport: TransportChoice = "auto",
) -> AsyncIterator[dict]:
    """The common parts. At the end: nothing failed, and every block is free or cached."""
    failures: list[BaseException] = []
    registry = CollectorRegistry()
    staging = StagingPlan(
        layout, num_blocks, packs_to=PACKED_DTYPES, landing_num_bytes=LANDING_NUM_BYTES
    )
    if model is None:
        cache = KvCache(layout, num_blocks, shareable=True, staging_num_bytes=staging.num_bytes)
        runner = scripted(cache, gate)
    else:
        runner, cache = model
        staging = staging_of(cache)
    bridge = StepBridge(asyncio.get_running_loop(), on_failure=failures.append)
    engine = make_engine(
        runner, cache, limits=limits, sink=bridge, on_failure=failures.append,
        clock=MonotonicClock(),
    )  # fmt: skip
    worker_id = worker_id or role.value
    epoch = epoch or (PULLER_EPOCH if role is Role.DECODE else f"{next(_ids):016x}")
    transports = TransportBuilder(
        worker_id=worker_id,
        epoch=epoch,
        tls=None,
        clock=MonotonicClock(),
        on_lost=failures.append,
        wrap=wrap,
    ).build(transport, cache)
    desk = TicketDesk(worker_id=worker_id, epoch=epoch)
    desk.take_key(TICKET_KEY)
    engine.start()
    parts = {
        "worker_id": worker_id,
        "epoch": epoch,
        "cache": cache,
        "runner": runner,
        "engine": engine,
        "transports": transports,
        "staging": staging,
        "desk": desk,
        "metrics": WorkerMetrics(role, registry),
        "registry": registry,
        "failures": failures,
    }
    try:
        yield {"bridge": bridge, "parts": parts}
    finally:
        if gate is not None:
            gate.open()
        await until(lambda: engine.is_idle or failures)
        await close(engine, transports, cache)
    assert not failures, failures
    engine.check()
    assert engine.load().blocks.held == 0


@contextlib.asynccontextmanager
async def _serving(bench: Bench, services: Sequence[Service]) -> AsyncIterator[None]:
    server = RpcServer(listen="127.0.0.1:0", tls=None, insecure=False, services=services)
    bench.address = await server.start()
    server.set_serving(True)
    try:
        yield
    finally:
        await server.stop()
        await bench.service.drained()


@contextlib.contextmanager
def _keeping(
    parts: dict, *, limits: HoldLimits, clock: Clock | None, fingerprint: Fingerprint
) -> Iterator[tuple[HoldKeeper, HandoffServicer, Service]]:
    """The holder's side of either kind of worker. At the end nothing is held."""
    keeper = HoldKeeper(
        engine=parts["engine"],
        cache=parts["cache"],
        staging=parts["staging"],
        limits=limits,
        metrics=parts["metrics"],
        clock=clock or MonotonicClock(),
    )
    handoffs = HandoffServicer(
        keeper,
        desk=parts["desk"],
        worker_id=parts["worker_id"],
        epoch=parts["epoch"],
        fingerprint=fingerprint,
    )
    service = Service(
        stream.add_to_server,
        handoffs,
        "kvrelay.v1.HandoffService",
    )
    yield keeper, handoffs, service
    keeper.close()
    assert keeper.holds.is_empty
    keeper.holds.check()


@contextlib.asynccontextmanager
async def prefill_worker(
    *,
    num_blocks: int = 64,
    limits: StepLimits = LIMITS,
    hold_limits: HoldLimits = HOLD_LIMITS,
    gate: StepGate | None = None,
    clock: Clock | None = None,
    model=None,
    layout: KvLayout = LAYOUT,
    fingerprint: Fingerprint = FINGERPRINT,
    bounds: ModelBounds = BOUNDS,
    transport: TransportChoice = "auto",
    worker_id: str = "",
    epoch: str = "",
) -> AsyncIterator[PrefillBench]:
    """A prefill worker that serves on loopback."""
    fingerprint = replace(fingerprint, layout=layout if model is None else model[1].layout)
    async with _engine_on(
        Role.PREFILL,
        num_blocks=num_blocks,
        limits=limits,
        gate=gate,
        model=model,
        layout=layout,
        worker_id=worker_id,
        epoch=epoch,
        transport=transport,
    ) as made:
        parts = made["parts"]
        names = {"worker_id": parts["worker_id"], "epoch": parts["epoch"]}
        with _keeping(parts, limits=hold_limits, clock=clock, fingerprint=fingerprint) as kept:
            keeper, handoffs, handoff_service = kept
            service = PrefillServicer(engine=parts["engine"], keeper=keeper, bounds=bounds, **names)
            made["bridge"].connect(service.take_step)
            bench = PrefillBench(service=service, keeper=keeper, handoffs=handoffs, **parts)
            services = [
                Service(
                    prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
                    service,
                    "kvrelay.v1.PrefillService",
                ),
                handoff_service,
            ]
            async with _serving(bench, services):
                yield bench


@contextlib.asynccontextmanager
async def decode_worker(
    *,
    num_blocks: int = 64,
    limits: StepLimits = LIMITS,
    landing_limits: LandingLimits = LANDING_LIMITS,
    hold_limits: HoldLimits = HOLD_LIMITS,
    max_landings: int = 64,
    gate: StepGate | None = None,
    wrap=None,
    wrap_holders=None,
    model=None,
    layout: KvLayout = LAYOUT,
    wire_dtype: WireDtype = "auto",
    fingerprint: Fingerprint = FINGERPRINT,
    bounds: ModelBounds = BOUNDS,
    transport: TransportChoice = "auto",
    worker_id: str = PULLER_ID,
    epoch: str = PULLER_EPOCH,
    release_timeout_s: float = WAIT_S,
) -> AsyncIterator[DecodeBench]:
    """A decode worker that serves on loopback; `wrap` is put around each of its transports,
    `wrap_holders` around its client of holders."""
    fingerprint = replace(fingerprint, layout=layout if model is None else model[1].layout)
    async with _engine_on(
        Role.DECODE,
        num_blocks=num_blocks,
        limits=limits,
        gate=gate,
        wrap=wrap,
        model=model,
        layout=layout,
        worker_id=worker_id,
        epoch=epoch,
        transport=transport,
    ) as made:
        parts = made["parts"]
        channels = Channels(tls=None)
        speeds = LinkSpeeds(forget_after_s=60.0)
        holders = HolderClient(
            channels,
            puller_id=parts["worker_id"],
            epoch=parts["epoch"],
            fingerprint=fingerprint,
            bounds=bounds,
            wire_dtype=wire_dtype,
            release_timeout_s=release_timeout_s,
        )
        staging = parts["staging"]
        area = LandingArea(offset=staging.landing_offset, num_bytes=staging.landing_num_bytes)
        lander = Lander(
            engine=parts["engine"],
            cache=parts["cache"],
            fetcher=Fetcher(
                cache=parts["cache"],
                area=area,
                speeds=speeds,
                metrics=parts["metrics"],
                clock=MonotonicClock(),
                on_lost=parts["failures"].append,
            ),
            transports=parts["transports"].all,
            holders=holders if wrap_holders is None else wrap_holders(holders),
            limits=landing_limits,
            metrics=parts["metrics"],
            clock=MonotonicClock(),
        )
        with _keeping(parts, limits=hold_limits, clock=None, fingerprint=fingerprint) as kept:
            keeper, _, handoff_service = kept
            service = DecodeServicer(
                engine=parts["engine"],
                lander=lander,
                keeper=keeper,
                bounds=bounds,
                max_landings=max_landings,
                speeds=speeds,
                clock=MonotonicClock(),
                on_failure=parts["failures"].append,
                worker_id=parts["worker_id"],
                epoch=parts["epoch"],
            )
            made["bridge"].connect(service.take_step)
            bench = DecodeBench(service=service, keeper=keeper, lander=lander, area=area, **parts)
            services = [
                Service(
                    decode_pb2_grpc.add_DecodeServiceServicer_to_server,
                    service,
                    "kvrelay.v1.DecodeService",
                ),
                handoff_service,
            ]
            async with _serving(bench, services):
                yield bench
            await channels.close()


class Session:
    """A coordinator's end of one session stream."""

    def __init__(self, call, request_type, submit_type) -> None:
        self.call = call
        self._request_type = request_type
        self._submit_type = submit_type

    async def submit(self, **fields) -> None:
        await self.call.write(self._request_type(submit=self._submit_type(**fields)))

    async def cancel(self, request_id: str, attempt: int = 1) -> None:
        cancel = common_pb2.CancelAttempt(request_id=request_id, attempt=attempt)
        await self.call.write(self._request_type(cancel=cancel))

    async def read(self):
        async with asyncio.timeout(WAIT_S):
            return await self.call.read()

    async def one_failure(self):
        """The next message, which must be one failure and nothing else."""
        message = await self.read()
        assert len(message.failed) == 1, message
        return message.failed[0].failure

    async def one_prefilled(self):
        message = await self.read()
        assert len(message.prefilled) == 1, message
        return message.prefilled[0]

    async def outputs(self, request_id: str) -> list[decode_pb2.SequenceOutput]:
        """All outputs of one request while nothing else runs."""
        return (await self.collect(request_id))[request_id]

    async def collect(self, *request_ids: str) -> dict[str, list[decode_pb2.SequenceOutput]]:
        """All outputs of some requests; positions must follow each other, none may fail."""
        outputs: dict[str, list[decode_pb2.SequenceOutput]] = {name: [] for name in request_ids}
        while not all(got and got[-1].finish_reason for got in outputs.values()):
            message = await self.read()
            assert message is not grpc.aio.EOF
            assert not message.failed, message.failed
            for output in message.outputs:
                outputs[output.request_id].append(output)
        for got in outputs.values():
            for before, after in itertools.pairwise(got):
                assert before.position + len(before.token_ids) == after.position
        return outputs


def tokens_of(outputs) -> tuple[int, ...]:
    return tuple(token_id for output in outputs for token_id in output.token_ids)


@contextlib.asynccontextmanager
async def prefill_session(bench: Bench) -> AsyncIterator[Session]:
    async with open_channel(bench.address) as channel:
        call = prefill_pb2_grpc.PrefillServiceStub(channel).Prefill()
        yield Session(call, prefill_pb2.PrefillRequest, prefill_pb2.PrefillSubmit)
        call.cancel()


@contextlib.asynccontextmanager
async def decode_session(bench: Bench) -> AsyncIterator[Session]:
    async with open_channel(bench.address) as channel:
        call = decode_pb2_grpc.DecodeServiceStub(channel).Decode()
        yield Session(call, decode_pb2.DecodeRequest, decode_pb2.DecodeSubmit)
        call.cancel()


@contextlib.asynccontextmanager
async def handoff_stub(bench: Bench) -> AsyncIterator[handoff_pb2_grpc.HandoffServiceStub]:
    async with open_channel(bench.address) as channel:
        yield handoff_pb2_grpc.HandoffServiceStub(channel)


SAMPLING = convert.sampling_to_wire(SamplingParams())


def prefill_submit(prompt_ids: Sequence[int], **changes) -> dict:
    """Fields of a `PrefillSubmit`."""
    fields = {
        "request_id": new_id(),
        "attempt": 1,
        "handoff_id": new_id(),
        "puller_id": "decode",
        "token_ids": prompt_ids,
        "sampling": SAMPLING,
        "max_tokens": 8,
    }
    return {**fields, **changes}


def decode_submit(prompt_ids: Sequence[int], **changes) -> dict:
    """Fields of a `DecodeSubmit` that prefills where it decodes."""
    fields = {
        "request_id": new_id(),
        "attempt": 1,
        "token_ids": prompt_ids,
        "sampling": SAMPLING,
        "max_tokens": 8,
    }
    return {**fields, **changes}


def ticket_of(
    holder: Bench, handoff_id: str, *, puller_id: str = PULLER_ID, puller_epoch: str = PULLER_EPOCH
) -> bytes:
    """What the coordinator would sign."""
    ticket = Ticket(
        handoff_id=handoff_id,
        holder_id=holder.worker_id,
        holder_epoch=holder.epoch,
        puller_id=puller_id,
        puller_epoch=puller_epoch,
    )
    return sign(ticket, TICKET_KEY)


def pull_of(holder: Bench, handoff_id: str, transport: str, **changes) -> decode_pb2.PullSource:
    """Where `holder` holds `handoff_id`."""
    fields = {
        "handoff_id": handoff_id,
        "worker_id": holder.worker_id,
        "epoch": holder.epoch,
        "address": holder.address,
        "offer": convert.offer_to_wire(holder.offer(transport)),
        "ticket": ticket_of(holder, handoff_id),
    }
    return decode_pb2.PullSource(**{**fields, **changes})


def asked(holder: Bench, handoff_id: str, **changes) -> dict:
    """What every request to a holder names."""
    fields = {
        "handoff_id": handoff_id,
        "puller_id": PULLER_ID,
        "puller_epoch": PULLER_EPOCH,
        "epoch": holder.epoch,
    }
    fields |= changes
    signed = {"puller_id": fields["puller_id"], "puller_epoch": fields["puller_epoch"]}
    return {"ticket": ticket_of(holder, handoff_id, **signed), **fields}


def pull_request(holder: Bench, handoff_id: str, **changes) -> handoff_pb2.PullRequest:
    fields = {
        "fingerprint": convert.fingerprint_to_wire(FINGERPRINT),
        "wire_dtype": "auto",
        "digest_kind": "xxh3",
    }
    return handoff_pb2.PullRequest(**{**fields, **asked(holder, handoff_id, **changes)})
