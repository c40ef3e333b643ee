"""Wire messages to the coordinator's own values and back; no decision is taken here."""

from dataclasses import dataclass

from coordinator.registry import Member
from coordinator.request import (
    ChatMessage,
    ChatPrompt,
    GenerateSpec,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from coordinator.router import Placement
from kvrelay.errors import InvalidRequest, ServingError
from kvrelay.events import Delta, Event, Finished, Started, Usage
from kvrelay.handoff.ticket import Ticket, sign
from kvrelay.rpc import convert, status
from kvrelay.transfer.select import alternatives
from kvrelay.types import FinishReason, SamplingParams
from kvrelay.v1 import common_pb2, decode_pb2, generate_pb2, pool_pb2, prefill_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One attempt of one request, as workers are told of it."""

    request_id: str
    attempt: int
    handoff_id: str
    prompt_ids: tuple[int, ...]
    emitted_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    cache_salt: bytes
    running_attempt: int = 0
    """The attempt that this one is to go on from, at `placement.running`; 0 if it is to begin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """A prefill worker sampled position 0."""

    attempt: int
    token_id: int
    finish: FinishReason | None
    queue_s: float
    prefill_s: float
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffCost:
    """What a decode worker says of the pull behind its first output."""

    stages: dict[str, float]
    num_bytes: int
    overlapped_num_bytes: int
    transport: str
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPrefill:
    """What a decode worker says of a prompt it prefilled itself."""

    queue_s: float
    prefill_s: float
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A decode worker's tokens from `position` on."""

    attempt: int
    position: int
    token_ids: tuple[int, ...]
    finish: FinishReason | None
    cost: HandoffCost | LocalPrefill | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """The attempt cannot go on: a worker gave it up, or went away."""

    attempt: int
    error: ServingError
    worker_id: str
    is_reported: bool = False
    """The worker lives and says so itself, perhaps of a peer."""

    is_orderly: bool = False
    """The worker drained and left, for which it first ends what it has, or gives it up in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The attempt goes on at another worker, which has all of it; it says no more."""

    attempt: int


News = FirstToken | Output | Lost | Moved
"""What an attempt hears from its workers."""


def spec_from_wire(request: generate_pb2.GenerateRequest) -> GenerateSpec:
    sampling = request.sampling
    return GenerateSpec(
        prompt=_prompt_from_wire(request, request.WhichOneof("prompt")),
        model=request.model or None,
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        min_p=sampling.min_p if sampling.HasField("min_p") else None,
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        stop=tuple(request.stop),
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
    )


def tokenize_input_from_wire(request: generate_pb2.TokenizeRequest) -> TextPrompt | ChatPrompt:
    prompt = _prompt_from_wire(request, request.WhichOneof("input"))
    assert not isinstance(prompt, TokenPrompt)
    return prompt


def _prompt_from_wire(
    request: generate_pb2.GenerateRequest | generate_pb2.TokenizeRequest, kind: str | None
) -> Prompt:
    match kind:
        case "text":
            return TextPrompt(request.text)
        case "chat":
            turns = request.chat.messages
            return ChatPrompt(tuple(ChatMessage(turn.role, turn.content) for turn in turns))
        case "tokens":
            assert isinstance(request, generate_pb2.GenerateRequest)
            return TokenPrompt(tuple(request.tokens.token_ids))
        case _:
            raise InvalidRequest("prompt", "one of text, chat or tokens must be given")


def event_to_wire(event: Event) -> generate_pb2.GenerateResponse:
    match event:
        case Started():
            return generate_pb2.GenerateResponse(
                started=generate_pb2.Started(
                    request_id=event.request_id,
                    seed=event.seed,
                    prompt_tokens=event.prompt_tokens,
                )
            )
        case Delta():
            return generate_pb2.GenerateResponse(
                delta=generate_pb2.Delta(
                    position=event.position, token_ids=event.token_ids, text=event.text
                )
            )
        case Finished():
            return generate_pb2.GenerateResponse(
                finished=generate_pb2.Finished(
                    reason=convert.finish_to_wire(event.reason),
                    usage=_usage_to_wire(event.usage),
                    ledger=convert.ledger_to_wire(event.ledger),
                )
            )


def _usage_to_wire(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
    )


def model_to_wire(model: ModelInfo) -> generate_pb2.GetModelResponse:
    return generate_pb2.GetModelResponse(
        model=model.name,
        model_digest=model.model_digest,
        context_tokens=model.context_tokens,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        default_max_tokens=model.default_max_tokens,
        disaggregate=model.disaggregate,
        default_sampling=common_pb2.SamplingParams(
            temperature=model.sampling.temperature,
            top_k=model.sampling.top_k,
            top_p=model.sampling.top_p,
            min_p=model.sampling.min_p,
        ),
    )


def prefill_submit(work: Work, puller_id: str) -> prefill_pb2.PrefillRequest:
    return prefill_pb2.PrefillRequest(
        submit=prefill_pb2.PrefillSubmit(
            request_id=work.request_id,
            attempt=work.attempt,
            handoff_id=work.handoff_id,
            puller_id=puller_id,
            token_ids=work.prompt_ids,
            sampling=convert.sampling_to_wire(work.sampling),
            max_tokens=work.max_tokens,
            stop_token_ids=work.stop_token_ids,
            cache_salt=work.cache_salt,
        )
    )


def prefill_cancel(work: Work) -> prefill_pb2.PrefillRequest:
    return prefill_pb2.PrefillRequest(cancel=_cancel(work))


def decode_submit(work: Work, placement: Placement) -> decode_pb2.DecodeRequest:
    return decode_pb2.DecodeRequest(
        submit=decode_pb2.DecodeSubmit(
            request_id=work.request_id,
            attempt=work.attempt,
            token_ids=work.prompt_ids,
            emitted_token_ids=work.emitted_ids,
            sampling=convert.sampling_to_wire(work.sampling),
            max_tokens=work.max_tokens,
            stop_token_ids=work.stop_token_ids,
            pull=_pull_source(work, placement),
            cache_salt=work.cache_salt,
        )
    )


def decode_cancel(work: Work) -> decode_pb2.DecodeRequest:
    return decode_pb2.DecodeRequest(cancel=_cancel(work))


def hand_over(work: Work, puller_id: str) -> decode_pb2.DecodeRequest:
    return decode_pb2.DecodeRequest(
        hand_over=decode_pb2.HandOver(
            request_id=work.request_id,
            attempt=work.running_attempt,
            handoff_id=work.handoff_id,
            puller_id=puller_id,
        )
    )


def cancel_hand_over(work: Work) -> decode_pb2.DecodeRequest:
    return decode_pb2.DecodeRequest(
        cancel_hand_over=decode_pb2.CancelHandOver(
            request_id=work.request_id,
            attempt=work.running_attempt,
            handoff_id=work.handoff_id,
        )
    )


def _cancel(work: Work) -> common_pb2.CancelAttempt:
    return common_pb2.CancelAttempt(request_id=work.request_id, attempt=work.attempt)


def _pull_source(work: Work, placement: Placement) -> decode_pb2.PullSource | None:
    if placement.holder is None or placement.offer is None:
        return None
    holder, puller = placement.holder.identity, placement.decode.identity
    ticket = Ticket(
        handoff_id=work.handoff_id,
        holder_id=holder.worker_id,
        holder_epoch=holder.epoch,
        puller_id=puller.worker_id,
        puller_epoch=puller.epoch,
    )
    others = alternatives(
        holder.offers,
        puller.offers,
        placement.decode.measured_from(placement.holder),
        to=placement.offer,
    )
    return decode_pb2.PullSource(
        handoff_id=work.handoff_id,
        worker_id=holder.worker_id,
        epoch=holder.epoch,
        address=holder.address,
        offer=convert.offer_to_wire(placement.offer),
        other_offers=[convert.offer_to_wire(offer) for offer in others],
        ticket=sign(ticket, placement.holder.ticket_key),
        is_running=placement.running is not None,
    )


def first_token_from_wire(prefilled: prefill_pb2.Prefilled) -> FirstToken:
    return FirstToken(
        attempt=prefilled.attempt,
        token_id=prefilled.token_id,
        finish=convert.finish_from_wire(prefilled.finish_reason),
        queue_s=prefilled.queue_s,
        prefill_s=prefilled.prefill_s,
        cached_prompt_tokens=prefilled.cached_prompt_tokens,
    )


def output_from_wire(output: decode_pb2.SequenceOutput) -> Output:
    return Output(
        attempt=output.attempt,
        position=output.position,
        token_ids=tuple(output.token_ids),
        finish=convert.finish_from_wire(output.finish_reason),
        cost=_cost_from_wire(output),
    )


def _cost_from_wire(output: decode_pb2.SequenceOutput) -> HandoffCost | LocalPrefill | None:
    if output.HasField("handoff"):
        handoff = output.handoff
        return HandoffCost(
            stages={
                "grant_wait": handoff.grant_wait_s,
                "transfer": handoff.transfer_s,
                "verify": handoff.verify_s,
                "release": handoff.release_s,
                "join": handoff.join_s,
                "first_step": handoff.first_step_s,
            },
            num_bytes=handoff.num_bytes,
            overlapped_num_bytes=handoff.overlapped_num_bytes,
            transport=handoff.transport,
            cached_prompt_tokens=handoff.cached_prompt_tokens,
        )
    if output.HasField("prefill"):
        return LocalPrefill(
            queue_s=output.prefill.queue_s,
            prefill_s=output.prefill.prefill_s,
            cached_prompt_tokens=output.prefill.cached_prompt_tokens,
        )
    return None


def lost_from_wire(failed: common_pb2.FailedAttempt, worker_id: str) -> Lost:
    error = status.from_failure(failed.failure)
    return Lost(attempt=failed.attempt, error=error, worker_id=worker_id, is_reported=True)


def member_to_wire(member: Member, now_s: float) -> pool_pb2.PoolMember:
    return pool_pb2.PoolMember(
        identity=convert.identity_to_wire(member.identity),
        load=convert.load_to_wire(member.load),
        load_age_ms=int(1000 * (now_s - member.heard_at_s)),
        placed_sequences=len(member.placed),
    )
