"""Wire messages to this worker's values and back; bounds are checked here, nothing is decided."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.engine.request import EngineRequest, Goal
from kvrelay.errors import InvalidRequest, ServingError
from kvrelay.rpc import convert, submit
from kvrelay.rpc.session import Attempt
from kvrelay.types import FinishReason
from kvrelay.v1 import common_pb2, prefill_pb2


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
        handoff_id=submit.id_from_wire("handoff_id", message.handoff_id),
        puller_id=message.puller_id,
        request=request,
    )


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
