"""Wire messages to domain values and back. Whatever came over the wire is checked here, once."""

import math
import re

from kvrelay.config import split_address
from kvrelay.errors import InvalidRequest, ServingError
from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout
from kvrelay.obs.ledger import Ledger
from kvrelay.rpc import status
from kvrelay.rpc.session import Attempt
from kvrelay.types import (
    Fingerprint,
    FinishReason,
    LinkSpeed,
    Role,
    SamplingParams,
    TransportOffer,
    WorkerIdentity,
    WorkerLoad,
)
from kvrelay.v1 import common_pb2, pool_pb2

MAX_OFFERS = 16
MAX_NAME_CHARS = 256
MAX_ADDRESS_CHARS = 4096
MAX_LINKS = 256

_WORKER_ID = re.compile(r"[a-z0-9.-]{1,64}")
_EPOCH = re.compile(r"[0-9a-f]{16}")

_ROLE_TO_WIRE = {
    Role.PREFILL: common_pb2.ROLE_PREFILL,
    Role.DECODE: common_pb2.ROLE_DECODE,
}
_ROLE_FROM_WIRE = {wire: role for role, wire in _ROLE_TO_WIRE.items()}

_FINISH_TO_WIRE = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}


def header_to_wire(worker_id: str, epoch: str) -> common_pb2.ResponseHeader:
    return common_pb2.ResponseHeader(worker_id=worker_id, epoch=epoch)


def failed_to_wire(attempt: Attempt, failure: ServingError) -> common_pb2.FailedAttempt:
    return common_pb2.FailedAttempt(
        request_id=attempt.request_id, attempt=attempt.number, failure=status.to_failure(failure)
    )


def finish_to_wire(reason: FinishReason | None) -> "common_pb2.FinishReason.ValueType":
    return common_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_WIRE[reason]


def finish_from_wire(wire: "common_pb2.FinishReason.ValueType") -> FinishReason | None:
    """None for unspecified, which means: it goes on.

    Raises:
        InvalidRequest: a reason that this version does not know.
    """
    if wire == common_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    _require(wire in _FINISH_FROM_WIRE, "finish_reason", f"{wire} is not known here")
    return _FINISH_FROM_WIRE[wire]


def sampling_to_wire(sampling: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
    )


def sampling_from_wire(wire: common_pb2.SamplingParams) -> SamplingParams:
    """Resolved parameters, as they travel between coordinator and workers.

    Raises:
        InvalidRequest: a field is absent or outside its bounds.
    """
    for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
        _require(wire.HasField(name), f"sampling.{name}", "must be set")
    _require(0 <= wire.temperature <= 2, "sampling.temperature", "must be in [0, 2]")
    _require(0 < wire.top_p <= 1, "sampling.top_p", "must be in (0, 1]")
    _require(0 <= wire.min_p < 1, "sampling.min_p", "must be in [0, 1)")
    return SamplingParams(
        temperature=wire.temperature,
        top_k=wire.top_k,
        top_p=wire.top_p,
        min_p=wire.min_p,
        seed=wire.seed,
    )


def layout_to_wire(layout: KvLayout) -> common_pb2.KvLayout:
    return common_pb2.KvLayout(
        num_layers=layout.num_layers,
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
    )


def layout_from_wire(wire: common_pb2.KvLayout) -> KvLayout:
    """
    Raises:
        InvalidRequest: a size is 0 or the dtype is not known.
    """
    for name in ("num_layers", "block_size", "num_kv_heads", "head_dim"):
        _require(getattr(wire, name) > 0, f"layout.{name}", "must be at least 1")
    _require(wire.dtype in DTYPE_NUM_BYTES, "layout.dtype", f"must be one of {_DTYPES}")
    return KvLayout(
        num_layers=wire.num_layers,
        block_size=wire.block_size,
        num_kv_heads=wire.num_kv_heads,
        head_dim=wire.head_dim,
        dtype=wire.dtype,
    )


def fingerprint_to_wire(fingerprint: Fingerprint) -> common_pb2.Fingerprint:
    return common_pb2.Fingerprint(
        model_digest=fingerprint.model_digest,
        numerics=fingerprint.numerics,
        layout=layout_to_wire(fingerprint.layout),
        protocol_version=fingerprint.protocol_version,
    )


def fingerprint_from_wire(wire: common_pb2.Fingerprint) -> Fingerprint:
    """
    Raises:
        InvalidRequest: a field is absent or malformed.
    """
    _name("fingerprint.model_digest", wire.model_digest)
    _name("fingerprint.numerics", wire.numerics)
    return Fingerprint(
        model_digest=wire.model_digest,
        numerics=wire.numerics,
        layout=layout_from_wire(wire.layout),
        protocol_version=wire.protocol_version,
    )


def offer_to_wire(offer: TransportOffer) -> common_pb2.TransportOffer:
    return common_pb2.TransportOffer(name=offer.name, address=offer.address, host=offer.host)


def offer_from_wire(wire: common_pb2.TransportOffer) -> TransportOffer:
    """
    Raises:
        InvalidRequest: it has no name, or a field is too long.
    """
    _name("offer.name", wire.name)
    for field, text, limit in (
        ("offer.address", wire.address, MAX_ADDRESS_CHARS),
        ("offer.host", wire.host, 2 * MAX_NAME_CHARS),
    ):
        _require(len(text) <= limit, field, f"at most {limit} characters")
    return TransportOffer(name=wire.name, address=wire.address, host=wire.host)


def identity_to_wire(identity: WorkerIdentity) -> pool_pb2.WorkerIdentity:
    return pool_pb2.WorkerIdentity(
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        role=_ROLE_TO_WIRE[identity.role],
        address=identity.address,
        pid=identity.pid,
        fingerprint=fingerprint_to_wire(identity.fingerprint),
        num_blocks=identity.num_blocks,
        max_sequences=identity.max_sequences,
        offers=[offer_to_wire(offer) for offer in identity.offers],
        wire_dtype=identity.wire_dtype,
    )


def worker_id_from_wire(field: str, worker_id: str) -> str:
    is_valid = _WORKER_ID.fullmatch(worker_id) is not None
    _require(is_valid, field, "must be 1 to 64 characters of a-z0-9.-")
    return worker_id


def epoch_from_wire(field: str, epoch: str) -> str:
    _require(_EPOCH.fullmatch(epoch) is not None, field, "must be 16 lower-case hex digits")
    return epoch


def address_from_wire(field: str, address: str) -> str:
    _require(_is_dialable(address), field, "must be HOST:PORT with a port above 0")
    return address


def identity_from_wire(wire: pool_pb2.WorkerIdentity) -> WorkerIdentity:
    """
    Raises:
        InvalidRequest: a field is absent or malformed.
    """
    worker_id = worker_id_from_wire("worker_id", wire.worker_id)
    epoch = epoch_from_wire("epoch", wire.epoch)
    _require(wire.role in _ROLE_FROM_WIRE, "role", "must be prefill or decode")
    address = address_from_wire("address", wire.address)
    _require(wire.num_blocks > 0, "num_blocks", "must be at least 1")
    _require(wire.max_sequences > 0, "max_sequences", "must be at least 1")
    _require(len(wire.offers) <= MAX_OFFERS, "offers", f"at most {MAX_OFFERS}")
    wire_dtype = wire.wire_dtype or "auto"
    _require(wire_dtype in ("auto", *DTYPE_NUM_BYTES), "wire_dtype", f"must be one of {_DTYPES}")
    return WorkerIdentity(
        worker_id=worker_id,
        epoch=epoch,
        role=_ROLE_FROM_WIRE[wire.role],
        address=address,
        pid=wire.pid,
        fingerprint=fingerprint_from_wire(wire.fingerprint),
        num_blocks=wire.num_blocks,
        max_sequences=wire.max_sequences,
        offers=tuple(offer_from_wire(offer) for offer in wire.offers),
        wire_dtype=wire_dtype,
    )


def load_to_wire(load: WorkerLoad) -> pool_pb2.WorkerLoad:
    return pool_pb2.WorkerLoad(
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        held_blocks=load.held_blocks,
        waiting_sequences=load.waiting_sequences,
        running_sequences=load.running_sequences,
        handoff_holds=load.handoff_holds,
        queued_prompt_tokens=load.queued_prompt_tokens,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        step_s=load.step_s,
        handoffs_total=load.handoffs_total,
        preemptions_total=load.preemptions_total,
        is_draining=load.is_draining,
        waiting_handoffs=load.waiting_handoffs,
        links=[
            pool_pb2.LinkSpeed(
                holder_id=link.holder_id, transport=link.transport, bytes_per_s=link.bytes_per_s
            )
            for link in load.links
        ],
    )


def load_from_wire(wire: pool_pb2.WorkerLoad) -> WorkerLoad:
    """
    Raises:
        InvalidRequest: a measurement is negative or not a number, or there are too many.
    """
    for name in ("prefill_tokens_per_s", "step_s"):
        value = getattr(wire, name)
        _require(math.isfinite(value) and value >= 0, f"load.{name}", "must be finite, at least 0")
    _require(len(wire.links) <= MAX_LINKS, "load.links", f"at most {MAX_LINKS}")
    return WorkerLoad(
        free_blocks=wire.free_blocks,
        cached_blocks=wire.cached_blocks,
        held_blocks=wire.held_blocks,
        waiting_sequences=wire.waiting_sequences,
        running_sequences=wire.running_sequences,
        handoff_holds=wire.handoff_holds,
        queued_prompt_tokens=wire.queued_prompt_tokens,
        prefill_tokens_per_s=wire.prefill_tokens_per_s,
        step_s=wire.step_s,
        handoffs_total=wire.handoffs_total,
        preemptions_total=wire.preemptions_total,
        is_draining=wire.is_draining,
        waiting_handoffs=wire.waiting_handoffs,
        links=tuple(_link_from_wire(link) for link in wire.links),
    )


def _link_from_wire(wire: pool_pb2.LinkSpeed) -> LinkSpeed:
    _name("link.holder_id", wire.holder_id)
    _name("link.transport", wire.transport)
    speed = wire.bytes_per_s
    _require(math.isfinite(speed) and speed > 0, "link.bytes_per_s", "must be finite, above 0")
    return LinkSpeed(holder_id=wire.holder_id, transport=wire.transport, bytes_per_s=speed)


def ledger_to_wire(ledger: Ledger) -> common_pb2.Ledger:
    return common_pb2.Ledger(
        request_id=ledger.request_id,
        ttft_s=ledger.ttft_s,
        ttft_stages=[_stage(name, s) for name, s in ledger.ttft_stages.items()],
        gap1_s=ledger.gap1_s,
        gap1_stages=[_stage(name, s) for name, s in ledger.gap1_stages.items()],
        e2e_s=ledger.e2e_s,
        tpot_s=ledger.tpot_s,
        handoff_tax_s=ledger.handoff_tax_s,
        attempts=ledger.attempts,
        prefill_worker=ledger.prefill_worker,
        decode_worker=ledger.decode_worker,
        route_reason=ledger.route_reason,
        transport=ledger.transport,
        handoff_num_bytes=ledger.handoff_num_bytes,
        overlapped_num_bytes=ledger.overlapped_num_bytes,
        usage=common_pb2.Usage(
            prompt_tokens=ledger.prompt_tokens,
            completion_tokens=ledger.completion_tokens,
            cached_prompt_tokens=ledger.cached_prompt_tokens,
        ),
        outcome=ledger.outcome,
        lost_attempts=ledger.lost_attempts,
        move_gaps_s=ledger.move_gaps_s,
    )


def ledger_from_wire(wire: common_pb2.Ledger) -> Ledger:
    return Ledger(
        request_id=wire.request_id,
        outcome=wire.outcome,
        ttft_s=wire.ttft_s,
        ttft_stages={stage.name: stage.duration_s for stage in wire.ttft_stages},
        gap1_s=wire.gap1_s,
        gap1_stages={stage.name: stage.duration_s for stage in wire.gap1_stages},
        e2e_s=wire.e2e_s,
        tpot_s=wire.tpot_s,
        handoff_tax_s=wire.handoff_tax_s if wire.HasField("handoff_tax_s") else None,
        attempts=wire.attempts,
        lost_attempts=tuple(wire.lost_attempts),
        move_gaps_s=tuple(wire.move_gaps_s),
        prefill_worker=wire.prefill_worker,
        decode_worker=wire.decode_worker,
        route_reason=wire.route_reason,
        transport=wire.transport,
        handoff_num_bytes=wire.handoff_num_bytes,
        overlapped_num_bytes=wire.overlapped_num_bytes,
        prompt_tokens=wire.usage.prompt_tokens,
        completion_tokens=wire.usage.completion_tokens,
        cached_prompt_tokens=wire.usage.cached_prompt_tokens,
    )


_DTYPES = ", ".join(sorted(DTYPE_NUM_BYTES))


def _stage(name: str, duration_s: float) -> common_pb2.Stage:
    return common_pb2.Stage(name=name, duration_s=duration_s)


def _require(is_met: bool, field: str, problem: str) -> None:
    if not is_met:
        raise InvalidRequest(field, problem)


def _name(field: str, text: str) -> None:
    _require(0 < len(text) <= MAX_NAME_CHARS, field, f"must be 1 to {MAX_NAME_CHARS} characters")


def _is_dialable(address: str) -> bool:
    try:
        return split_address(address)[1] > 0 and len(address) <= MAX_NAME_CHARS
    except ValueError:
        return False
