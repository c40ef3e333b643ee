"""Wire messages to this worker's values and back; bounds are checked here, nothing is decided."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.engine.request import EngineRequest, Goal
from kvrelay.errors import Incompatible, InvalidRequest, ServingError
from kvrelay.rpc import convert, submit
from kvrelay.rpc.session import Attempt
from kvrelay.types import Fingerprint, FinishReason
from kvrelay.v1 import common_pb2, handoff_pb2, prefill_pb2
from prefill_svc.keeper import Announcement, BlockRun, Completed, Frame, Opened

MAX_READ_INDEXES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A prompt to prefill, and for whom to hold it."""

    attempt: Attempt
    handoff_id: str
    puller_id: str
    request: EngineRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one attempt came to: a first token, or a failure."""

    attempt: Attempt
    token_id: int = 0
    finish: FinishReason | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    cached_prompt_tokens: int = 0
    failure: ServingError | None = None


def submit_from_wire(
    attempt: Attempt, message: prefill_pb2.PrefillSubmit, bounds: submit.ModelBounds
) -> Submit:
    prompt_ids = submit.prompt_from_wire(message.token_ids, bounds)
    if not message.puller_id:
        raise InvalidRequest("puller_id", "empty")
    request = EngineRequest(
        seq_id=attempt.seq_id,
        prompt_ids=prompt_ids,
        sampling=convert.sampling_from_wire(message.sampling),
        stop=submit.stop_from_wire(
            max_tokens=message.max_tokens,
            stop_token_ids=message.stop_token_ids,
            num_prompt=len(prompt_ids),
            bounds=bounds,
        ),
        goal=Goal.HOLD,
        cache_salt=submit.salt_from_wire(message.cache_salt),
    )
    return Submit(
        attempt=attempt,
        handoff_id=handoff_id_from_wire(message.handoff_id),
        puller_id=message.puller_id,
        request=request,
    )


def handoff_id_from_wire(handoff_id: str) -> str:
    return submit.id_from_wire("handoff_id", handoff_id)


def indexes_from_wire(indexes: Sequence[int]) -> Sequence[int]:
    if len(indexes) > MAX_READ_INDEXES:
        raise InvalidRequest("indexes", f"{len(indexes)}, at most {MAX_READ_INDEXES}")
    return indexes


def require_fingerprint(theirs: common_pb2.Fingerprint, ours: Fingerprint) -> None:
    """Raises Incompatible, naming what differs."""
    differences = ours.differences(convert.fingerprint_from_wire(theirs))
    if differences:
        listed = ", ".join(f"{name}: {values}" for name, values in differences.items())
        raise Incompatible(f"fingerprints differ ({listed})", **differences)


def outcomes_to_wire(
    header: common_pb2.ResponseHeader, outcomes: Sequence[Outcome]
) -> prefill_pb2.PrefillResponse:
    return prefill_pb2.PrefillResponse(
        header=header,
        prefilled=[_prefilled_to_wire(o) for o in outcomes if o.failure is None],
        failed=[
            convert.failed_to_wire(o.attempt, o.failure) for o in outcomes if o.failure is not None
        ],
    )


def _prefilled_to_wire(outcome: Outcome) -> prefill_pb2.Prefilled:
    return prefill_pb2.Prefilled(
        request_id=outcome.attempt.request_id,
        attempt=outcome.attempt.number,
        token_id=outcome.token_id,
        finish_reason=convert.finish_to_wire(outcome.finish),
        queue_s=outcome.queue_s,
        prefill_s=outcome.prefill_s,
        cached_prompt_tokens=outcome.cached_prompt_tokens,
    )


def announcement_to_wire(event: Announcement) -> handoff_pb2.PullResponse:
    match event:
        case Opened():
            opened = handoff_pb2.PullOpened(
                num_tokens=event.num_tokens, num_blocks=event.num_blocks
            )
            return handoff_pb2.PullResponse(opened=opened)
        case BlockRun():
            blocks = [
                handoff_pb2.HeldBlock(
                    block_id=block.block_id, generation=block.generation, digest=block.digest
                )
                for block in event.blocks
            ]
            run = handoff_pb2.PullBlocks(first_index=event.first_index, blocks=blocks)
            return handoff_pb2.PullResponse(blocks=run)
        case Completed():
            complete = handoff_pb2.PullComplete(
                first_token_id=event.first_token_id,
                num_tokens=event.num_tokens,
                digest=event.digest,
            )
            return handoff_pb2.PullResponse(complete=complete)


def frame_to_wire(frame: Frame) -> handoff_pb2.ReadResponse:
    return handoff_pb2.ReadResponse(
        index=frame.index, offset_bytes=frame.offset_bytes, data=frame.data
    )
