"""Workers without a model: real servers, memberships and sessions that say what a script has.

One process plays a prefill and a decode worker. Each decode step is one message with one token
for every sequence. The next is made when gRPC has taken it, so the coordinator sets the pace, or
`--step-s` after it. `python -m kvrelay.bench.control.workers --coordinator HOST:PORT ...`
"""

import argparse
import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from kvrelay import process
from kvrelay.bench.control.script import Script
from kvrelay.clock import MonotonicClock
from kvrelay.kv.layout import KvLayout
from kvrelay.obs import logging
from kvrelay.rpc.convert import header_to_wire
from kvrelay.rpc.membership import Membership
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.store.manifest import model_digest, resolve_model
from kvrelay.types import Fingerprint, Role, TransportOffer, WorkerIdentity, WorkerLoad
from kvrelay.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

NUM_BLOCKS = 1 << 20
LAYOUT = KvLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=1, dtype="float32")
OFFER = TransportOffer(name="stream", address="", host="scripted")

AttemptKey = tuple[str, int]
Context = grpc.aio.ServicerContext[Any, Any]


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Answers every prompt at once with the first token."""

    def __init__(self, script: Script, header: common_pb2.ResponseHeader) -> None:
        self._script = script
        self._header = header

    async def Prefill(
        self, request_iterator: AsyncIterator[prefill_pb2.PrefillRequest], context: Context
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        await context.send_initial_metadata(())
        async for request in request_iterator:
            if request.WhichOneof("instruction") == "submit":
                yield prefill_pb2.PrefillResponse(
                    header=self._header, prefilled=[self._prefilled(request.submit)]
                )

    def _prefilled(self, submit: prefill_pb2.PrefillSubmit) -> prefill_pb2.Prefilled:
        start = self._script.start(submit.token_ids)
        return prefill_pb2.Prefilled(
            request_id=submit.request_id,
            attempt=submit.attempt,
            token_id=self._script.token(start, 0),
            finish_reason=_finish(submit.max_tokens, num_output=1),
        )


@dataclass(slots=True)
class _Sequence:
    """One attempt and where it is in the script."""

    request_id: str
    attempt: int
    start: int
    position: int
    max_tokens: int
    is_repeating_first: bool


class _Steps:
    """The sequences of one session; `step` says one more token of each."""

    def __init__(self, script: Script, header: common_pb2.ResponseHeader) -> None:
        self._script = script
        self._header = header
        self._sequences: dict[AttemptKey, _Sequence] = {}
        self._changed = asyncio.Event()

    async def obey(self, requests: AsyncIterator[decode_pb2.DecodeRequest]) -> None:
        async for request in requests:
            if request.WhichOneof("instruction") == "submit":
                self._submit(request.submit)
            else:
                self._sequences.pop((request.cancel.request_id, request.cancel.attempt), None)

    async def has_work(self) -> None:
        while not self._sequences:
            self._changed.clear()
            await self._changed.wait()

    def step(self) -> decode_pb2.DecodeResponse:
        response = decode_pb2.DecodeResponse(header=self._header)
        for sequence in list(self._sequences.values()):
            self._say(sequence, response.outputs.add())
        return response

    def _submit(self, submit: decode_pb2.DecodeSubmit) -> None:
        num_emitted = len(submit.emitted_token_ids)
        self._sequences[submit.request_id, submit.attempt] = _Sequence(
            request_id=submit.request_id,
            attempt=submit.attempt,
            start=self._script.start(submit.token_ids),
            position=num_emitted,
            max_tokens=submit.max_tokens,
            is_repeating_first=submit.HasField("pull") and not num_emitted,
        )
        self._changed.set()

    def _say(self, sequence: _Sequence, output: decode_pb2.SequenceOutput) -> None:
        output.request_id = sequence.request_id
        output.attempt = sequence.attempt
        output.position = sequence.position
        if sequence.is_repeating_first:
            sequence.is_repeating_first = False
            output.handoff.transport = OFFER.name
            self._add_token(sequence, output)
        if sequence.position < sequence.max_tokens:
            self._add_token(sequence, output)
        if sequence.position >= sequence.max_tokens:
            output.finish_reason = common_pb2.FINISH_REASON_LENGTH
            del self._sequences[sequence.request_id, sequence.attempt]

    def _add_token(self, sequence: _Sequence, output: decode_pb2.SequenceOutput) -> None:
        output.token_ids.append(self._script.token(sequence.start, sequence.position))
        sequence.position += 1


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Generates for all sequences of a session at once, as fast as it is listened to."""

    def __init__(self, script: Script, header: common_pb2.ResponseHeader, *, step_s: float) -> None:
        self._script = script
        self._header = header
        self._step_s = step_s

    async def Decode(
        self, request_iterator: AsyncIterator[decode_pb2.DecodeRequest], context: Context
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        await context.send_initial_metadata(())
        steps = _Steps(self._script, self._header)
        obeying = asyncio.create_task(steps.obey(request_iterator))
        try:
            while True:
                await steps.has_work()
                yield steps.step()
                if self._step_s:
                    await asyncio.sleep(self._step_s)
        finally:
            obeying.cancel()
            await asyncio.gather(obeying, return_exceptions=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    server: RpcServer
    membership: Membership
    address: str


async def _start(
    role: Role, script: Script, fingerprint: Fingerprint, arguments: argparse.Namespace
) -> _Worker:
    worker_id, epoch = f"scripted-{role.value}", secrets.token_hex(8)
    server = RpcServer(
        listen="127.0.0.1:0",
        tls=None,
        insecure=False,
        services=[_service(role, script, header_to_wire(worker_id, epoch), arguments.step_s)],
    )
    address = await server.start()
    identity = WorkerIdentity(
        worker_id=worker_id,
        epoch=epoch,
        role=role,
        address=address,
        pid=os.getpid(),
        fingerprint=fingerprint,
        num_blocks=NUM_BLOCKS,
        max_sequences=1024,
        offers=(OFFER,),
    )
    load = WorkerLoad(free_blocks=NUM_BLOCKS)
    membership = Membership(
        identity=identity,
        coordinator=arguments.coordinator,
        load=lambda: load,
        clock=MonotonicClock(),
    )
    return _Worker(server=server, membership=membership, address=address)


def _service(
    role: Role, script: Script, header: common_pb2.ResponseHeader, step_s: float
) -> Service:
    if role is Role.PREFILL:
        return Service(
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
            PrefillServicer(script, header),
            prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name,
        )
    return Service(
        decode_pb2_grpc.add_DecodeServiceServicer_to_server,
        DecodeServicer(script, header, step_s=step_s),
        decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name,
    )


def _finish(max_tokens: int, *, num_output: int) -> common_pb2.FinishReason.ValueType:
    if num_output >= max_tokens:
        return common_pb2.FINISH_REASON_LENGTH
    return common_pb2.FINISH_REASON_UNSPECIFIED


async def _run(arguments: argparse.Namespace) -> None:
    stop = process.stop_signal()
    script = Script([int(text) for text in arguments.text_ids.split(",")])
    fingerprint = Fingerprint(
        model_digest=model_digest(resolve_model(arguments.model)),
        numerics="scripted",
        layout=LAYOUT,
    )
    workers = [
        await _start(role, script, fingerprint, arguments) for role in (Role.PREFILL, Role.DECODE)
    ]
    joining = [asyncio.create_task(worker.membership.run()) for worker in workers]
    process.tell_ready(arguments.ready_fd, {"grpc": workers[-1].address})
    try:
        await process.until(stop, joining)
    finally:
        for task in joining:
            task.cancel()
        await asyncio.gather(*joining, return_exceptions=True)
        for worker in workers:
            await worker.server.stop()


def main() -> None:
    """Play both workers until told to stop."""
    parser = argparse.ArgumentParser(description="Scripted workers of a control-plane measurement.")
    parser.add_argument("--coordinator", required=True, help="HOST:PORT of its gRPC server")
    parser.add_argument("--model", required=True, help="the coordinator's model")
    parser.add_argument("--text-ids", required=True, help="the script: token ids, comma-separated")
    parser.add_argument("--step-s", type=float, default=0.0, help="pause after every step")
    parser.add_argument("--ready-fd", type=int, default=-1)
    logging.configure(level="warning", fmt="auto", service="decode")
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
