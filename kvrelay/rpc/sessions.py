"""All sessions of one worker: attempts begin, are called off and drain alike in both roles.

What an attempt does is the service's business, given as functions. While a worker drains
nothing begins, and each session ends once its last attempt has.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar

import structlog

from kvrelay.errors import Draining, InvalidRequest, ServingError
from kvrelay.rpc.session import Attempt, Item, Session, converse
from kvrelay.rpc.submit import attempt_from_wire

log = structlog.get_logger(__name__)


class Named(Protocol):
    """A message about one attempt."""

    @property
    def request_id(self) -> str: ...
    @property
    def attempt(self) -> int: ...


Submit = TypeVar("Submit", bound=Named)
Submit_co = TypeVar("Submit_co", bound=Named, covariant=True)


class Instruction(Protocol[Submit_co]):
    """What a coordinator says: submit, cancel, or something that its service knows."""

    @property
    def submit(self) -> Submit_co: ...
    @property
    def cancel(self) -> Named: ...
    def WhichOneof(self, oneof_group: Literal["instruction"], /) -> str | None: ...


class Sessions(Generic[Item, Submit]):
    """The streams of every coordinator with one worker. Used from one event loop."""

    def __init__(
        self,
        *,
        start: Callable[[Session[Item], Attempt, Submit], None],
        cancel: Callable[[Session[Item], Attempt], None],
        failed: Callable[[Attempt, ServingError], Item],
        merge: Callable[[Item, Item], Item],
        others: Mapping[str, Callable[[Session[Item], Attempt, Any], None]] | None = None,
    ) -> None:
        """Functions of the service.

        Args:
            start: begin an attempt; raises a ServingError if it fails at once.
            cancel: end an attempt, if it is one of this session that goes on.
            failed: what is told of an attempt that could not start.
            merge: see `Outbox`.
            others: what else may be said of an attempt, by the name of its field.
        """
        self._start = start
        self._cancel = cancel
        self._failed = failed
        self._merge = merge
        self._others = others or {}
        self._sessions: set[Session[Item]] = set()
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    async def converse(
        self, instructions: AsyncIterator[Instruction[Submit]]
    ) -> AsyncGenerator[list[Item], None]:
        """One session. Its end, however it comes, cancels what is left of its attempts.

        Raises:
            Draining: the worker takes no new session.
            InvalidRequest: an instruction that names no attempt, or is none.
        """
        session = self._open()
        items = converse(instructions, session.outbox, partial(self._obey, session))
        try:
            async with aclosing(items) as batches:
                async for batch in batches:
                    yield batch
        finally:
            self._close(session)

    def end(self, session: Session[Item], attempt: Attempt) -> None:
        """Nothing runs for this attempt any more. Safe to repeat."""
        session.end(attempt)
        self._end_if_drained(session)

    def begin_drain(self) -> None:
        """Take nothing new; each session ends once its last attempt has."""
        self._is_draining = True
        for session in self._sessions:
            self._end_if_drained(session)

    async def drained(self) -> None:
        """Return once no session is left."""
        await self._idle.wait()

    def _open(self) -> Session[Item]:
        self._refuse_if_draining()
        session: Session[Item] = Session(self._merge)
        self._sessions.add(session)
        self._idle.clear()
        log.info("session.opened", num_sessions=len(self._sessions))
        return session

    def _close(self, session: Session[Item]) -> None:
        num_cancelled = len(session.attempts)
        for attempt in list(session.attempts):
            self._call_off(session, attempt)
        self._sessions.discard(session)
        if not self._sessions:
            self._idle.set()
        log.info("session.closed", num_cancelled=num_cancelled)

    def _obey(self, session: Session[Item], instruction: Instruction[Submit]) -> None:
        match instruction.WhichOneof("instruction"):
            case "submit":
                self._submit(session, instruction.submit)
            case "cancel":
                self._call_off(session, _attempt_of(instruction.cancel))
            case str(name) if name in self._others:
                message = getattr(instruction, name)
                self._others[name](session, _attempt_of(message), message)
            case _:
                known = ", ".join(["submit", "cancel", *self._others])
                raise InvalidRequest("instruction", f"one of {known} must be given")

    def _submit(self, session: Session[Item], submit: Submit) -> None:
        # An attempt without a proper name cannot fail by itself: that ends the session.
        attempt = _attempt_of(submit)
        if attempt in session.attempts:
            return  # said twice, it is still one attempt
        try:
            self._refuse_if_draining()
            self._start(session, attempt, submit)
        except ServingError as error:
            session.outbox.put(attempt, self._failed(attempt, error))
        else:
            session.attempts.add(attempt)

    def _call_off(self, session: Session[Item], attempt: Attempt) -> None:
        session.outbox.drop(attempt)
        self._cancel(session, attempt)

    def _refuse_if_draining(self) -> None:
        if self._is_draining:
            raise Draining("this worker is leaving the pool")

    def _end_if_drained(self, session: Session[Item]) -> None:
        if self._is_draining and not session.attempts:
            session.outbox.close()


def _attempt_of(message: Named) -> Attempt:
    return attempt_from_wire(message.request_id, message.attempt)
