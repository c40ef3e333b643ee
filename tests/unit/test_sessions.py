"""Attempts of many sessions begin, are called off and drain alike in both kinds of worker."""

import asyncio
from contextlib import aclosing

import pytest

from kvrelay.errors import Draining, InvalidRequest, QueueFull
from kvrelay.rpc.session import Attempt, Session
from kvrelay.rpc.sessions import Sessions
from kvrelay.v1 import common_pb2, decode_pb2, prefill_pb2

ID = "0" * 31


class Service:
    """Starts what it is told, unless it is full, and remembers what was called off."""

    def __init__(self) -> None:
        self.started: dict[Attempt, Session[str]] = {}
        self.cancelled: list[Attempt] = []
        self.others: list[tuple[Attempt, str]] = []
        self.is_full = False
        self.sessions: Sessions[str, prefill_pb2.PrefillSubmit] = Sessions(
            start=self._start,
            cancel=self._cancel,
            failed=lambda attempt, failure: failure.reason,
            merge=lambda before, after: before + after,
            others={
                "hand_over": lambda session, attempt, it: self.others.append(
                    (attempt, it.handoff_id)
                )
            },
        )

    def _start(self, session: Session[str], attempt: Attempt, message: object) -> None:
        if self.is_full:
            raise QueueFull(what="tests", queued=1, limit=1)
        self.started[attempt] = session

    def _cancel(self, session: Session[str], attempt: Attempt) -> None:
        self.cancelled.append(attempt)
        self.sessions.end(session, attempt)

    async def say(
        self, *instructions: prefill_pb2.PrefillRequest | decode_pb2.DecodeRequest, then_close: bool
    ) -> list[str]:
        """One session that says all this at once; what it is told until it ends."""
        ends = asyncio.Event()

        async def requests():
            for instruction in instructions:
                yield instruction
            if not then_close:
                await ends.wait()

        async with aclosing(self.sessions.converse(requests())) as batches:
            return [item async for batch in batches for item in batch]


def submit(i: int) -> prefill_pb2.PrefillRequest:
    named = prefill_pb2.PrefillSubmit(request_id=f"{ID}{i}", attempt=1)
    return prefill_pb2.PrefillRequest(submit=named)


def cancel(i: int) -> prefill_pb2.PrefillRequest:
    named = common_pb2.CancelAttempt(request_id=f"{ID}{i}", attempt=1)
    return prefill_pb2.PrefillRequest(cancel=named)


def attempt(i: int) -> Attempt:
    return Attempt(f"{ID}{i}", 1)


async def test_the_end_of_a_session_calls_off_what_is_left_of_it():
    """Once each; an attempt that was cancelled before is not called off again."""
    service = Service()
    await service.say(submit(1), submit(2), cancel(1), then_close=True)
    await service.sessions.drained()

    assert service.cancelled == [attempt(1), attempt(2)]


async def test_an_attempt_that_is_said_twice_is_one_attempt():
    """It is started once, and the session goes on."""
    service = Service()
    told = await service.say(submit(1), submit(1), then_close=True)
    await service.sessions.drained()

    assert told == []
    assert service.cancelled == [attempt(1)]


async def test_what_its_service_knows_besides_is_passed_on_by_name():
    """Of any attempt, known here or not: what to make of it is the service's business."""
    service = Service()
    order = decode_pb2.HandOver(request_id=f"{ID}7", attempt=1, handoff_id="h")
    await service.say(decode_pb2.DecodeRequest(hand_over=order), then_close=True)

    assert service.others == [(attempt(7), "h")]


async def test_what_its_service_does_not_know_ends_the_session():
    """It names what could have been said."""
    service = Service()
    order = decode_pb2.CancelHandOver(request_id=f"{ID}7", attempt=1, handoff_id="h")
    with pytest.raises(InvalidRequest, match="submit, cancel, hand_over"):
        await service.say(decode_pb2.DecodeRequest(cancel_hand_over=order), then_close=True)


async def test_an_attempt_that_cannot_start_fails_alone():
    """Its session goes on, and there is nothing to call off."""
    service = Service()
    service.is_full = True
    told = await service.say(submit(1), then_close=True)

    assert told == ["QUEUE_FULL"]
    assert service.cancelled == []


async def test_a_drained_session_ends_with_its_last_attempt():
    """Its coordinator still listens; nobody else is let in meanwhile."""
    service = Service()
    session = asyncio.create_task(service.say(submit(1), then_close=False))
    while attempt(1) not in service.started:  # noqa: ASYNC110 - one turn of the loop or two
        await asyncio.sleep(0)
    service.sessions.begin_drain()
    with pytest.raises(Draining):
        await service.say(then_close=True)
    assert not session.done()
    mine = service.started[attempt(1)]
    mine.outbox.put(attempt(1), "done")
    service.sessions.end(mine, attempt(1))
    await service.sessions.drained()

    assert await session == ["done"]
    assert service.sessions.is_draining


@pytest.mark.parametrize(
    "instruction",
    [
        prefill_pb2.PrefillRequest(),
        prefill_pb2.PrefillRequest(submit=prefill_pb2.PrefillSubmit(request_id="x", attempt=1)),
        prefill_pb2.PrefillRequest(submit=prefill_pb2.PrefillSubmit(request_id=f"{ID}1")),
        decode_pb2.DecodeRequest(hand_over=decode_pb2.HandOver(request_id="x", attempt=1)),
    ],
)
async def test_an_instruction_without_a_name_ends_the_session(instruction):
    """No attempt of ours could carry the failure."""
    service = Service()
    with pytest.raises(InvalidRequest):
        await service.say(instruction, then_close=True)
    await service.sessions.drained()

    assert not service.started
