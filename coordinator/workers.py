"""The coordinator's end of its sessions with workers: instructions out, news in.

One stream per worker carries all requests placed on it. An attempt registers an inbox
under its (request_id, attempt) and hears of nothing else; outputs for an inbox that is
gone belong to an attempt that was given up, and are dropped and counted. When a stream
ends, for whatever reason, every inbox on it hears `Lost`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc
import structlog

from coordinator import convert
from coordinator.convert import Lost, Moved, News, Work
from coordinator.registry import Member
from coordinator.router import Placement
from kvrelay.config import TlsFiles
from kvrelay.errors import PeerUnavailable, ServingError
from kvrelay.rpc import status
from kvrelay.rpc.channel import open_channel
from kvrelay.types import Role
from kvrelay.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)

log = structlog.get_logger(__name__)

AttemptKey = tuple[str, int]
Inbox = Callable[[News], None]
Answer = prefill_pb2.PrefillResponse | decode_pb2.DecodeResponse


class Link(Protocol):
    """What a session needs of a worker: to send an instruction and to be called back."""

    def open(self, key: AttemptKey, inbox: Inbox, instruction: Any) -> None: ...
    def send(self, instruction: Any) -> None: ...
    def close(self, key: AttemptKey, instruction: Any | None) -> None: ...


class WorkerLink:
    """One session stream with one worker process.

    `on_open` is called when the worker has answered.

    `run` lives as long as the worker is a member and ends when the stream breaks or it is
    cancelled; either way every inbox still open hears `Lost`, once. `on_end` is called just
    before that, so that whoever hears it does not find the worker in the pool again.
    """

    def __init__(
        self,
        member: Member,
        *,
        tls: TlsFiles | None,
        on_stale: Callable[[], None],
        on_open: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._member = member
        self._identity = member.identity
        self._tls = tls
        self._on_stale = on_stale
        self._on_open = on_open
        self._on_end = on_end
        self._inboxes: dict[AttemptKey, Inbox] = {}
        # Holds at most what is said of each admitted request's attempts: a submit and a cancel,
        # and as much again if it moves.
        self._outbox: asyncio.Queue[Any] = asyncio.Queue()
        self._ended: ServingError | None = None

    def open(self, key: AttemptKey, inbox: Inbox, instruction: Any) -> None:
        """Send a submit and deliver what comes back for `key` to `inbox`, after this has returned.

        If the stream has ended already, `inbox` hears so.
        """
        assert key not in self._inboxes
        if self._ended is not None:
            _soon(inbox, self._lost(key, self._ended))
            return
        self._inboxes[key] = inbox
        self._outbox.put_nowait(instruction)

    def send(self, instruction: Any) -> None:
        """Send what has no answer of its own. Nothing comes of it once the stream has ended."""
        if self._ended is None:
            self._outbox.put_nowait(instruction)

    def close(self, key: AttemptKey, instruction: Any | None) -> None:
        """Stop listening for `key`; send the cancel, if one is given and it was open."""
        if self._inboxes.pop(key, None) is not None and instruction is not None:
            self._outbox.put_nowait(instruction)

    async def run(self) -> None:
        """Carry the session until it ends."""
        error: ServingError = PeerUnavailable(f"{self._identity.worker_id} ended its session")
        try:
            async with open_channel(self._identity.address, tls=self._tls) as channel:
                call = self._call(channel)
                await call.initial_metadata()
                self._on_open()
                async for answer in call:
                    self._deliver(answer)
        except grpc.aio.AioRpcError as rpc_error:
            error = PeerUnavailable(f"{self._identity.worker_id}: {status.from_grpc(rpc_error)}")
        except PeerUnavailable as other_epoch:
            error = other_epoch
        except asyncio.CancelledError:
            error = PeerUnavailable(f"{self._identity.worker_id} left the pool")
            raise
        finally:
            self.end(error)

    def _call(self, channel: grpc.aio.Channel) -> "grpc.aio.StreamStreamCall[Any, Any]":
        if self._identity.role is Role.PREFILL:
            return prefill_pb2_grpc.PrefillServiceStub(channel).Prefill(self._outgoing())
        return decode_pb2_grpc.DecodeServiceStub(channel).Decode(self._outgoing())

    async def _outgoing(self) -> AsyncIterator[Any]:
        while (instruction := await self._outbox.get()) is not None:
            yield instruction

    def _deliver(self, answer: Answer) -> None:
        if answer.header.epoch != self._identity.epoch:
            raise PeerUnavailable(f"{self._identity.worker_id} answers from another epoch")
        if isinstance(answer, prefill_pb2.PrefillResponse):
            for first in answer.prefilled:
                key = (first.request_id, first.attempt)
                self._tell(key, convert.first_token_from_wire(first))
        else:
            for output in answer.outputs:
                key = (output.request_id, output.attempt)
                self._tell(key, convert.output_from_wire(output))
            for moved in answer.moved:
                self._say_goodbye((moved.request_id, moved.attempt))
        for failed in answer.failed:
            key = (failed.request_id, failed.attempt)
            self._tell(key, convert.lost_from_wire(failed, self._identity.worker_id))

    def _tell(self, key: AttemptKey, news: News) -> None:
        inbox = self._inboxes.get(key)
        if inbox is None:
            self._on_stale()
        else:
            inbox(news)

    def _say_goodbye(self, key: AttemptKey) -> None:
        """An attempt moved on; whoever heard so from its new worker listens here no more."""
        inbox = self._inboxes.pop(key, None)
        if inbox is not None:
            inbox(Moved(attempt=key[1]))

    def _lost(self, key: AttemptKey, error: ServingError) -> Lost:
        return Lost(
            attempt=key[1],
            error=error,
            worker_id=self._identity.worker_id,
            is_orderly=self._member.load.is_draining,
        )

    def end(self, error: ServingError) -> None:
        """Tell everybody who listens. Safe to repeat; the first error stands."""
        if self._ended is not None:
            return
        self._ended = error
        self._outbox.put_nowait(None)  # or gRPC's reader of a call that broke waits here for ever
        self._on_end()
        inboxes, self._inboxes = self._inboxes, {}
        if inboxes:
            log.warning(
                "worker.session_lost",
                worker_id=self._identity.worker_id,
                num_attempts=len(inboxes),
                error=str(error),
            )
        for key, inbox in inboxes.items():
            inbox(self._lost(key, error))


class Workers:
    """The links to all members. Owns their tasks: a link lives from `add` to `remove`."""

    def __init__(self, *, tls: TlsFiles | None, on_stale: Callable[[], None]) -> None:
        self._tls = tls
        self._on_stale = on_stale
        self._links: dict[Member, tuple[WorkerLink, asyncio.Task[None]]] = {}

    def add(
        self, member: Member, *, on_open: Callable[[], None], on_end: Callable[[], None]
    ) -> None:
        """Open a session with a new member; both callbacks come at most once, in this order."""
        link = WorkerLink(
            member, tls=self._tls, on_stale=self._on_stale, on_open=on_open, on_end=on_end
        )
        task = asyncio.create_task(link.run(), name=f"session {member.worker_id}")
        # A task that is cancelled before its first step never runs its own `finally`.
        gone = PeerUnavailable(f"{member.worker_id} left the pool")
        task.add_done_callback(lambda _: link.end(gone))
        self._links[member] = (link, task)

    async def remove(self, member: Member) -> None:
        """End the session with a former member."""
        entry = self._links.pop(member, None)
        if entry is None:
            return
        _, task = entry
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def close(self) -> None:
        """End all sessions."""
        links, self._links = self._links, {}
        for _, task in links.values():
            task.cancel()
        await asyncio.gather(*(task for _, task in links.values()), return_exceptions=True)

    def dispatch(self, work: Work, placement: Placement, inbox: Inbox) -> "Attempt":
        """Tell the chosen workers at the same time, and listen to both."""
        attempt = Attempt(
            work,
            prefill=self._link(placement.prefill) if placement.prefill else None,
            running=self._link(placement.running) if placement.running else None,
            decode=self._link(placement.decode),
        )
        attempt.start(placement, inbox)
        return attempt

    def _link(self, member: Member) -> Link:
        entry = self._links.get(member)
        return entry[0] if entry is not None else _NoLink(member.worker_id)


class _NoLink:
    """A worker that left between being chosen and being told."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    def open(self, key: AttemptKey, inbox: Inbox, instruction: Any) -> None:
        error = PeerUnavailable(f"{self._worker_id} left the pool")
        _soon(inbox, Lost(attempt=key[1], error=error, worker_id=self._worker_id))

    def send(self, instruction: Any) -> None:
        pass

    def close(self, key: AttemptKey, instruction: Any | None) -> None:
        pass


def _soon(inbox: Inbox, news: News) -> None:
    """Who is just telling a worker something does not hear of it in the midst of that."""
    asyncio.get_running_loop().call_soon(inbox, news)


class Attempt:
    """One placement of one request, from the submits to the cancels."""

    def __init__(
        self, work: Work, *, prefill: Link | None, running: Link | None, decode: Link
    ) -> None:
        self._work = work
        self._key = (work.request_id, work.attempt)
        self._prefill = prefill
        self._running = running
        self._decode = decode

    def start(self, placement: Placement, inbox: Inbox) -> None:
        puller_id = placement.decode.worker_id
        if self._prefill is not None:
            self._prefill.open(self._key, inbox, convert.prefill_submit(self._work, puller_id))
        if self._running is not None:
            self._running.send(convert.hand_over(self._work, puller_id))
        self._decode.open(self._key, inbox, convert.decode_submit(self._work, placement))

    def took_over(self) -> None:
        """It goes on where it was to move to; there is nothing left to call off where it ran."""
        self._running = None

    def close(self, *, decode_is_over: bool) -> None:
        """Stop listening, and have all sides forget whatever they still do."""
        if self._prefill is not None:
            self._prefill.close(self._key, convert.prefill_cancel(self._work))
        if self._running is not None:
            self._running.send(convert.cancel_hand_over(self._work))
        cancel = None if decode_is_over else convert.decode_cancel(self._work)
        self._decode.close(self._key, cancel)
