"""Workers without a model: real gRPC servers and memberships, tokens from a formula.

The next token is a function of all tokens before it, so a worker that was given the wrong
prompt, or the wrong emitted tokens, gives wrong tokens. Tests hold a worker back with
`allow`, and make it fail, vanish or repeat itself.

Decode workers that are given each other as `peers` move sequences as real ones do: the one told to
hand over runs on until the other freezes it, says its last tokens and `moved`, and the other
repeats all tokens since its submit. The pull between is a call.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import grpc

from kvrelay.clock import MonotonicClock
from kvrelay.errors import HandoffLost, ServingError
from kvrelay.rpc import status
from kvrelay.rpc.membership import Membership
from kvrelay.types import Role, WorkerIdentity, WorkerLoad
from kvrelay.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from tests.support.members import FINGERPRINT, OFFERS

VOCAB_SIZE = 1000


def next_token(token_ids) -> int:
    digest = hashlib.blake2b(repr(list(token_ids)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % VOCAB_SIZE


def oracle(prompt_ids, num_tokens) -> list[int]:
    """What any placement of this prompt must answer."""
    token_ids = list(prompt_ids)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt_ids) :]


class Gate:
    """Lets so many pass as it was opened for; all, if it was not made shut."""

    def __init__(self, *, is_shut):
        self._permits = asyncio.Semaphore(0 if is_shut else 1 << 30)

    def open(self, times=1 << 20):
        for _ in range(min(times, 1 << 10)):
            self._permits.release()

    async def passed(self):
        await self._permits.acquire()


class ScriptedWorker:
    """One worker. `allow(n)` lets it say n more things; without it nothing holds it back.

    `pulling` lets it fetch from a running sequence, `parting` lets it say of one that it handed
    over its last tokens and `moved`.
    """

    def __init__(
        self,
        worker_id,
        role,
        *,
        is_held=False,
        fingerprint=FINGERPRINT,
        peers=None,
        is_pulling_shut=False,
        is_parting_shut=False,
    ):
        self.worker_id = worker_id
        self.role = role
        self.epoch = "00000000000000e0"
        self.fingerprint = fingerprint
        self.submits: list = []
        self.cancels: list = []
        self.heard = asyncio.Event()
        self.fail_with: list[ServingError] = []
        self.token_offset = 0
        self.load = WorkerLoad(free_blocks=64)
        self.hand_overs: list = []
        self.cancelled_hand_overs: list[str] = []
        self.released: list[str] = []
        self.pulling = Gate(is_shut=is_pulling_shut)
        self.parting = Gate(is_shut=is_parting_shut)
        self._peers = {} if peers is None else peers
        self._peers[worker_id] = self
        self._holds: dict[str, tuple[str, int]] = {}
        self._running: dict[tuple[str, int], _Sequence] = {}
        self._permits = asyncio.Semaphore(0 if is_held else 1 << 30)
        self._sessions: set[asyncio.Task] = set()
        self._tasks: dict[tuple[str, int], asyncio.Task] = {}

    async def __aenter__(self):
        self.server = grpc.aio.server()
        if self.role is Role.PREFILL:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_Prefill(self), self.server)
        else:
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(_Decode(self), self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.identity = WorkerIdentity(
            worker_id=self.worker_id,
            epoch=self.epoch,
            role=self.role,
            address=f"127.0.0.1:{port}",
            pid=1,
            fingerprint=self.fingerprint,
            num_blocks=64,
            max_sequences=8,
            offers=OFFERS,
        )
        self._joining = self._former = None
        return self

    async def __aexit__(self, *_):
        await self.vanish()

    def join(self, coordinator: str) -> None:
        self.membership = Membership(
            identity=self.identity,
            coordinator=coordinator,
            load=lambda: self.load,
            clock=MonotonicClock(),
        )
        self._joining = asyncio.create_task(self.membership.run())

    def join_again(self, coordinator: str) -> None:
        """While the first membership still stands; it is told off by the coordinator."""
        self._former = self._joining
        self.join(coordinator)

    def allow(self, num_messages: int) -> None:
        for _ in range(num_messages):
            self._permits.release()

    async def vanish(self) -> None:
        """As if killed: membership and sessions break off."""
        joining = [task for task in (self._joining, self._former) if task is not None]
        for task in joining:
            task.cancel()
        await asyncio.gather(*joining, return_exceptions=True)
        self._joining = self._former = None
        await self.server.stop(None)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def header(self):
        return common_pb2.ResponseHeader(worker_id=self.worker_id, epoch=self.epoch)

    async def session(self, requests, response_type) -> AsyncIterator:
        """Answer one coordinator; every message may be held back."""
        outbox: asyncio.Queue = asyncio.Queue()

        async def read() -> None:
            async for request in requests:
                match request.WhichOneof("instruction"):
                    case "submit":
                        self._submit(request.submit, outbox, response_type)
                    case "cancel":
                        self._cancel((request.cancel.request_id, request.cancel.attempt))
                    case "hand_over":
                        self._hand_over(request.hand_over)
                    case "cancel_hand_over":
                        self._cancel_hand_over(request.cancel_hand_over.handoff_id)

        reading = asyncio.create_task(read())
        try:
            while True:
                yield await outbox.get()
        finally:
            reading.cancel()

    def _submit(self, submit, outbox, response_type) -> None:
        self.submits.append(submit)
        self.heard.set()
        key = (submit.request_id, submit.attempt)
        task = asyncio.create_task(self._answer(submit, outbox, response_type))
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    def _cancel(self, key) -> None:
        self.cancels.append(key)
        if key in self._tasks:
            self._tasks[key].cancel()

    def _hand_over(self, message) -> None:
        self.hand_overs.append(message)
        self._holds[message.handoff_id] = (message.request_id, message.attempt)

    def _cancel_hand_over(self, handoff_id) -> None:
        self.cancelled_hand_overs.append(handoff_id)
        self._holds.pop(handoff_id, None)

    def _taken(self, handoff_id) -> "list[int] | None":
        """Freeze and Release: all output of a sequence that stops here, None if it does not run."""
        key = self._holds.pop(handoff_id, None)
        if self._joining is None or key not in self._running:
            return None
        sequence = self._running.pop(key)
        self._tasks[key].cancel()
        last = sequence.step()
        if last.finish_reason:
            response = decode_pb2.DecodeResponse(header=self.header(), outputs=[last])
            sequence.outbox.put_nowait(response)
            return None
        self.released.append(handoff_id)
        parting = asyncio.create_task(self._part(sequence, last))
        self._tasks[(*key, "parting")] = parting
        return sequence.outputs

    async def _part(self, sequence, last) -> None:
        await self.parting.passed()
        response = decode_pb2.DecodeResponse(header=self.header(), outputs=[last])
        sequence.outbox.put_nowait(response)
        moved = decode_pb2.MovedAttempt(**sequence.ids, num_outputs=len(sequence.outputs))
        response = decode_pb2.DecodeResponse(header=self.header(), moved=[moved])
        sequence.outbox.put_nowait(response)

    async def _answer(self, submit, outbox, response_type) -> None:
        async for answer in self._messages(submit, outbox):
            outbox.put_nowait(response_type(header=self.header(), **answer))

    async def _messages(self, submit, outbox):
        ids = {"request_id": submit.request_id, "attempt": submit.attempt}
        if self.fail_with:
            failure = status.to_failure(self.fail_with.pop(0))
            await self._permits.acquire()
            yield {"failed": [common_pb2.FailedAttempt(**ids, failure=failure)]}
        elif self.role is Role.PREFILL:
            await self._permits.acquire()
            yield {"prefilled": [self._prefilled(submit, ids)]}
        else:
            sequence = _Sequence(submit, outbox, self.token_offset)
            if submit.HasField("pull") and submit.pull.is_running:
                await self.pulling.passed()
                outputs = self._peers[submit.pull.worker_id]._taken(submit.pull.handoff_id)
                if outputs is None:
                    failure = status.to_failure(HandoffLost("it does not run there"))
                    yield {"failed": [common_pb2.FailedAttempt(**ids, failure=failure)]}
                    return
                sequence.outputs = list(outputs)
            self._running[(submit.request_id, submit.attempt)] = sequence
            try:
                async for output in self._outputs(sequence):
                    yield {"outputs": [output]}
            finally:
                self._running.pop((submit.request_id, submit.attempt), None)

    def _prefilled(self, submit, ids):
        token_id = next_token(submit.token_ids)
        return prefill_pb2.Prefilled(
            **ids,
            token_id=token_id,
            finish_reason=_finish(submit, token_id, 1),
            queue_s=0.001,
            prefill_s=0.002,
        )

    async def _outputs(self, sequence):
        """One step after the other; the first says again what moved here."""
        while True:
            await self._permits.acquire()
            output = sequence.step()
            yield output
            if output.finish_reason:
                return


class _Sequence:
    """A sequence on a decode worker, as far as it has been computed."""

    def __init__(self, submit, outbox, token_offset):
        self.ids = {"request_id": submit.request_id, "attempt": submit.attempt}
        self.outbox = outbox
        self.outputs = list(submit.emitted_token_ids)
        self._submit = submit
        self._token_offset = token_offset
        self._num_told = len(self.outputs)

    def step(self):
        """Compute a token; say all that was not told."""
        submit = self._submit
        token_id = next_token([*submit.token_ids, *self.outputs])
        is_first = self._num_told == len(submit.emitted_token_ids)
        self.outputs.append(token_id)
        told = self.outputs[self._num_told :]
        output = decode_pb2.SequenceOutput(
            **self.ids,
            position=self._num_told,
            token_ids=[t + self._token_offset for t in told],
            finish_reason=_finish(submit, token_id, len(self.outputs)),
        )
        self._num_told = len(self.outputs)
        if is_first and submit.HasField("pull"):
            output.handoff.transport = submit.pull.offer.name
            output.handoff.num_bytes = 10
        return output


def _finish(submit, token_id, num_output):
    if token_id in submit.stop_token_ids:
        return common_pb2.FINISH_REASON_STOP
    if num_output >= submit.max_tokens:
        return common_pb2.FINISH_REASON_LENGTH
    return common_pb2.FINISH_REASON_UNSPECIFIED


class _Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker):
        self._worker = worker

    async def Prefill(self, request_iterator, context):
        await context.send_initial_metadata(())
        async for answer in self._worker.session(request_iterator, prefill_pb2.PrefillResponse):
            yield answer


class _Decode(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker):
        self._worker = worker

    async def Decode(self, request_iterator, context):
        await context.send_initial_metadata(())
        async for answer in self._worker.session(request_iterator, decode_pb2.DecodeResponse):
            yield answer
