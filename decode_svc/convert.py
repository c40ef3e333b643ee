"""Wire messages to this worker's values and back; bounds are checked here, nothing is decided."""

from collections.abc import Sequence
from dataclasses import dataclass

from decode_svc.intake import (
    Announcement,
    Completion,
    DigestRun,
    Opened,
    SourceBlock,
    SourceRun,
)
from kvrelay.engine.request import EngineRequest, Origin
from kvrelay.errors import InvalidRequest, KvCorrupt, ServingError
from kvrelay.rpc import convert, submit
from kvrelay.rpc.session import Attempt
from kvrelay.transfer.base import RemoteHold
from kvrelay.transfer.digest import DigestKind
from kvrelay.transfer.wire_choice import WireDtype
from kvrelay.types import BlockId, Fingerprint, FinishReason
from kvrelay.v1 import common_pb2, decode_pb2, handoff_pb2

MOVE_SLACK_TOKENS = 256
"""A sequence that moves may generate so many more tokens before its blocks are here."""

MAX_OTHER_OFFERS = convert.MAX_OFFERS - 1
MAX_TICKET_BYTES = 64
"""More than any ticket has; which one is genuine is for its holder to say."""


@dataclass(frozen=True, slots=True)
class Puller:
    """Who we are to holders."""

    worker_id: str
    epoch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """A request to continue, and where its KV is to be pulled from, if anywhere."""

    attempt: Attempt
    request: EngineRequest
    source: RemoteHold | None
    is_running: bool
    """Whether its source generates, and comes with the KV of generated tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """An attempt of ours that another decode worker shall go on with."""

    attempt: Attempt
    handoff_id: str
    puller_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffCost:
    """Where the time between the holder's first token and ours went."""

    grant_wait_s: float
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
    """What one attempt has to say: tokens from `position` on, and how they ended: by themselves,
    badly, or with another worker.
    """

    attempt: Attempt
    position: int = 0
    token_ids: tuple[int, ...] = ()
    finish: FinishReason | None = None
    cost: HandoffCost | PrefillCost | None = None
    failure: ServingError | None = None
    num_moved_outputs: int | None = None
    """Tokens generated when it moved away."""


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
    is_running = source is not None and message.pull.is_running
    if is_running and not output_ids:
        raise InvalidRequest("emitted_token_ids", "empty, but its source generates")
    most_slots = len(prompt_ids) + stop.max_tokens - 1
    landing_tokens = min(len(prompt_ids) + len(output_ids) + MOVE_SLACK_TOKENS, most_slots)
    request = EngineRequest(
        seq_id=attempt.seq_id,
        prompt_ids=prompt_ids,
        output_ids=output_ids,
        sampling=convert.sampling_from_wire(message.sampling),
        stop=stop,
        origin=Origin.COMPUTE if source is None else Origin.LAND,
        cache_salt=submit.salt_from_wire(message.cache_salt),
        landing_tokens=landing_tokens if is_running else 0,
    )
    return Submit(attempt=attempt, request=request, source=source, is_running=is_running)


def hand_over_from_wire(attempt: Attempt, message: decode_pb2.HandOver) -> HandOver:
    return HandOver(
        attempt=attempt,
        handoff_id=submit.id_from_wire("hand_over.handoff_id", message.handoff_id),
        puller_id=convert.worker_id_from_wire("hand_over.puller_id", message.puller_id),
    )


def _source_from_wire(pull: decode_pb2.PullSource) -> RemoteHold:
    if len(pull.other_offers) > MAX_OTHER_OFFERS:
        problem = f"{len(pull.other_offers)}, at most {MAX_OTHER_OFFERS}"
        raise InvalidRequest("pull.other_offers", problem)
    if len(pull.ticket) > MAX_TICKET_BYTES:
        raise InvalidRequest("pull.ticket", f"{len(pull.ticket)} bytes, at most {MAX_TICKET_BYTES}")
    return RemoteHold(
        handoff_id=submit.id_from_wire("pull.handoff_id", pull.handoff_id),
        worker_id=convert.worker_id_from_wire("pull.worker_id", pull.worker_id),
        epoch=convert.epoch_from_wire("pull.epoch", pull.epoch),
        address=convert.address_from_wire("pull.address", pull.address),
        offer=convert.offer_from_wire(pull.offer),
        other_offers=tuple(convert.offer_from_wire(offer) for offer in pull.other_offers),
        ticket=pull.ticket,
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
        moved=[
            decode_pb2.MovedAttempt(
                request_id=o.attempt.request_id,
                attempt=o.attempt.number,
                num_outputs=o.num_moved_outputs,
            )
            for o in outcomes
            if o.num_moved_outputs is not None
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
        grant_wait_s=cost.grant_wait_s,
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
    source: RemoteHold,
    puller: Puller,
    *,
    fingerprint: Fingerprint,
    wire_dtype: WireDtype,
    digest_kind: DigestKind,
    limit_tokens: int,
) -> handoff_pb2.PullRequest:
    return handoff_pb2.PullRequest(
        handoff_id=source.handoff_id,
        puller_id=puller.worker_id,
        puller_epoch=puller.epoch,
        epoch=source.epoch,
        ticket=source.ticket,
        fingerprint=convert.fingerprint_to_wire(fingerprint),
        wire_dtype=wire_dtype,
        digest_kind=digest_kind.value,
        limit_tokens=limit_tokens,
    )


def freeze_to_wire(source: RemoteHold, puller: Puller) -> handoff_pb2.FreezeRequest:
    return handoff_pb2.FreezeRequest(
        handoff_id=source.handoff_id,
        puller_id=puller.worker_id,
        puller_epoch=puller.epoch,
        epoch=source.epoch,
        ticket=source.ticket,
    )


def release_to_wire(
    source: RemoteHold, puller: Puller, *, generations: Sequence[int]
) -> handoff_pb2.ReleaseRequest:
    return handoff_pb2.ReleaseRequest(
        handoff_id=source.handoff_id,
        puller_id=puller.worker_id,
        puller_epoch=puller.epoch,
        epoch=source.epoch,
        ticket=source.ticket,
        generations=generations,
    )


def announcements_from_wire(
    message: handoff_pb2.PullResponse, bounds: submit.ModelBounds
) -> list[Announcement]:
    """In the order in which they are to be heard. Raises KvCorrupt if they make no sense."""
    news: list[Announcement] = []
    if message.HasField("opened"):
        news.append(_opened_from_wire(message.opened))
    if message.HasField("blocks"):
        news.append(_blocks_from_wire(message.blocks))
    if message.HasField("digests"):
        news.append(DigestRun(message.digests.first_index, tuple(message.digests.digests)))
    if message.HasField("complete"):
        news.append(_completion_from_wire(message.complete, bounds))
    if not news:
        raise KvCorrupt("announcement of an unknown kind")
    return news


def _opened_from_wire(opened: handoff_pb2.PullOpened) -> Opened:
    try:
        layout = convert.layout_from_wire(opened.wire_layout)
    except InvalidRequest as error:
        raise KvCorrupt(f"handoff of an unknown form: {error}") from error
    return Opened(opened.num_tokens, opened.num_blocks, layout, opened.is_running)


def _blocks_from_wire(run: handoff_pb2.PullBlocks) -> SourceRun:
    blocks = (
        SourceBlock(BlockId(block.block_id), block.generation, block.offset_bytes)
        for block in run.blocks
    )
    return SourceRun(run.first_index, tuple(blocks))


def _completion_from_wire(last: handoff_pb2.PullComplete, bounds: submit.ModelBounds) -> Completion:
    output_ids = tuple(last.output_token_ids)
    if not all(token_id < bounds.vocab_size for token_id in output_ids):
        raise KvCorrupt(f"a generated token is outside [0, {bounds.vocab_size})")
    return Completion(output_ids, last.num_tokens, last.digest)
