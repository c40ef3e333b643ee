"""Wire messages to this worker's values and back; bounds are checked here, nothing is decided."""

from collections.abc import Sequence
from dataclasses import dataclass

from decode_svc.intake import Announcement, Completion, Opened, SourceBlock, SourceRun
from kvrelay.engine.request import EngineRequest, Origin
from kvrelay.errors import InvalidRequest, KvCorrupt, ServingError
from kvrelay.rpc import convert, submit
from kvrelay.rpc.session import Attempt
from kvrelay.transfer.base import RemoteHold
from kvrelay.types import BlockId, Fingerprint, FinishReason
from kvrelay.v1 import common_pb2, decode_pb2, handoff_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A request to continue, and where its KV is to be pulled from, if anywhere."""

    attempt: Attempt
    request: EngineRequest
    source: RemoteHold | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffCost:
    """Where the time between the holder's first token and ours went."""

    transfer_s: float
    verify_s: float
    release_s: float
    join_s: float = 0.0
    first_step_s: float = 0.0
    num_bytes: int
    overlapped_num_bytes: int
    transport: str
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCost:
    """Where the time until the first token of a prompt prefilled here went."""

    queue_s: float
    prefill_s: float
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one attempt has to say: tokens from `position` on, how they ended, or a failure."""

    attempt: Attempt
    position: int = 0
    token_ids: tuple[int, ...] = ()
    finish: FinishReason | None = None
    cost: HandoffCost | PrefillCost | None = None
    failure: ServingError | None = None


def submit_from_wire(
    attempt: Attempt, message: decode_pb2.DecodeSubmit, bounds: submit.ModelBounds
) -> Submit:
    prompt_ids = submit.prompt_from_wire(message.token_ids, bounds)
    stop = submit.stop_from_wire(
        max_tokens=message.max_tokens,
        stop_token_ids=message.stop_token_ids,
        num_prompt=len(prompt_ids),
        bounds=bounds,
    )
    output_ids = submit.tokens_from_wire("emitted_token_ids", message.emitted_token_ids, bounds)
    if len(output_ids) >= stop.max_tokens:
        raise InvalidRequest(
            "emitted_token_ids", f"{len(output_ids)} tokens, max_tokens is {stop.max_tokens}"
        )
    source = _source_from_wire(message.pull) if message.HasField("pull") else None
    request = EngineRequest(
        seq_id=attempt.seq_id,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        sampling=convert.sampling_from_wire(message.sampling),
        stop=stop,
        origin=Origin.COMPUTE if source is None else Origin.LAND,
        cache_salt=submit.salt_from_wire(message.cache_salt),
    )
    return Submit(attempt=attempt, request=request, source=source)


def _source_from_wire(pull: decode_pb2.PullSource) -> RemoteHold:
    for field in ("worker_id", "epoch", "address"):
        if not getattr(pull, field):
            raise InvalidRequest(f"pull.{field}", "empty")
    return RemoteHold(
        handoff_id=submit.id_from_wire("pull.handoff_id", pull.handoff_id),
        worker_id=pull.worker_id,
        epoch=pull.epoch,
        address=pull.address,
        offer=convert.offer_from_wire(pull.offer),
    )


def outcomes_to_wire(
    header: common_pb2.ResponseHeader, outcomes: Sequence[Outcome]
) -> decode_pb2.DecodeResponse:
    return decode_pb2.DecodeResponse(
        header=header,
        outputs=[_output_to_wire(o) for o in outcomes if o.token_ids],
        failed=[
            convert.failed_to_wire(o.attempt, o.failure) for o in outcomes if o.failure is not None
        ],
    )


def _output_to_wire(outcome: Outcome) -> decode_pb2.SequenceOutput:
    cost = outcome.cost
    return decode_pb2.SequenceOutput(
        request_id=outcome.attempt.request_id,
        attempt=outcome.attempt.number,
        position=outcome.position,
        token_ids=outcome.token_ids,
        finish_reason=convert.finish_to_wire(outcome.finish),
        handoff=_handoff_to_wire(cost) if isinstance(cost, HandoffCost) else None,
        prefill=_prefill_to_wire(cost) if isinstance(cost, PrefillCost) else None,
    )


def _handoff_to_wire(cost: HandoffCost) -> decode_pb2.HandoffTiming:
    return decode_pb2.HandoffTiming(
        transfer_s=cost.transfer_s,
        verify_s=cost.verify_s,
        release_s=cost.release_s,
        join_s=cost.join_s,
        first_step_s=cost.first_step_s,
        num_bytes=cost.num_bytes,
        overlapped_num_bytes=cost.overlapped_num_bytes,
        transport=cost.transport,
        cached_prompt_tokens=cost.cached_prompt_tokens,
    )


def _prefill_to_wire(cost: PrefillCost) -> decode_pb2.PrefillTiming:
    return decode_pb2.PrefillTiming(
        queue_s=cost.queue_s,
        prefill_s=cost.prefill_s,
        cached_prompt_tokens=cost.cached_prompt_tokens,
    )


def pull_to_wire(
    source: RemoteHold, *, puller_id: str, fingerprint: Fingerprint
) -> handoff_pb2.PullRequest:
    return handoff_pb2.PullRequest(
        handoff_id=source.handoff_id,
        puller_id=puller_id,
        epoch=source.epoch,
        fingerprint=convert.fingerprint_to_wire(fingerprint),
    )


def release_to_wire(
    source: RemoteHold, *, puller_id: str, generations: Sequence[int]
) -> handoff_pb2.ReleaseRequest:
    return handoff_pb2.ReleaseRequest(
        handoff_id=source.handoff_id,
        puller_id=puller_id,
        epoch=source.epoch,
        generations=generations,
    )


def announcement_from_wire(
    message: handoff_pb2.PullResponse, bounds: submit.ModelBounds
) -> Announcement:
    """Raises KvCorrupt if it makes no sense."""
    match message.WhichOneof("event"):
        case "opened":
            return Opened(message.opened.num_tokens, message.opened.num_blocks)
        case "blocks":
            run = message.blocks
            blocks = (
                SourceBlock(BlockId(block.block_id), block.generation, block.digest)
                for block in run.blocks
            )
            return SourceRun(run.first_index, tuple(blocks))
        case "complete":
            last = message.complete
            if last.first_token_id >= bounds.vocab_size:
                raise KvCorrupt(f"first token is outside [0, {bounds.vocab_size})")
            return Completion(last.first_token_id, last.num_tokens, last.digest)
        case _:
            raise KvCorrupt("announcement of an unknown kind")
