"""Errors as gRPC statuses and back: the one place where a failure gets a code.

On the wire a failure is a status with `google.rpc` details. `ErrorInfo.reason` names the
class, so a peer meets the same `ServingError` that was raised; texts are for people. Inside
of step-batched sessions, where a stream outlives its requests, it is a `Failure` message.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import Any

import grpc
import structlog
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from kvrelay import errors
from kvrelay.errors import ServingError
from kvrelay.rpc import handlers
from kvrelay.v1 import common_pb2

log = structlog.get_logger(__name__)

DOMAIN = "kvrelay"
MAX_TEXT_CHARS = 512
"""Of a message or a detail. Trailers share 8 KiB, and the rest of a long text helps nobody."""

MAX_DETAILS = 8

CODES: Mapping[type[ServingError], grpc.StatusCode] = MappingProxyType(
    {
        errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
        errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.KvPoolExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.NoWorker: grpc.StatusCode.UNAVAILABLE,
        errors.PeerUnavailable: grpc.StatusCode.UNAVAILABLE,
        errors.Draining: grpc.StatusCode.UNAVAILABLE,
        errors.HandoffLost: grpc.StatusCode.NOT_FOUND,
        errors.KvCorrupt: grpc.StatusCode.DATA_LOSS,
        errors.QuiescenceLost: grpc.StatusCode.UNAVAILABLE,
        errors.Incompatible: grpc.StatusCode.FAILED_PRECONDITION,
        errors.DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
        errors.Cancelled: grpc.StatusCode.CANCELLED,
        errors.NotFound: grpc.StatusCode.NOT_FOUND,
        errors.ModelInvalid: grpc.StatusCode.FAILED_PRECONDITION,
        errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    }
)

_BY_REASON = {cls.reason: cls for cls in CODES}

# Statuses that gRPC or a foreign peer made. What is not listed says nothing that a caller
# could act on but to try another peer.
_BY_CODE: Mapping[grpc.StatusCode, type[ServingError]] = {
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlinePassed,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Incompatible,
    grpc.StatusCode.UNIMPLEMENTED: errors.Incompatible,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
}


def to_grpc(error: ServingError) -> grpc.Status:
    """The status that ends a call for `error`."""
    status = status_pb2.Status(code=CODES[type(error)].value[0], message=_bounded(str(error)))
    info = error_details_pb2.ErrorInfo(
        domain=DOMAIN, reason=error.reason, metadata=_bounded_details(error)
    )
    status.details.add().Pack(info)
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_bounded(error.field), description=_bounded(error.problem)
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.Overloaded | errors.NoWorker):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return _as_status(status)


def from_grpc(error: grpc.aio.AioRpcError) -> ServingError:
    """The error that the peer raised, or the nearest one where the status is not a peer's."""
    rich = _rich_status(error)
    info, retry_after_s = error_details_pb2.ErrorInfo(), None
    for detail in rich.details if rich else ():
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
    cls = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    if rich and cls:
        return _rebuild(cls, rich.message, dict(info.metadata), retry_after_s)
    return _from_code(error)


def to_failure(error: ServingError) -> common_pb2.Failure:
    """`error` for one sequence of a session."""
    details = _bounded_details(error)
    if isinstance(error, errors.Overloaded | errors.NoWorker):
        details["retry_after_s"] = str(error.retry_after_s)
    return common_pb2.Failure(
        reason=error.reason,
        message=_bounded(str(error)),
        retryable=error.retryable,
        details=details,
    )


def from_failure(failure: common_pb2.Failure) -> ServingError:
    """The error that the peer had; a reason unknown here counts as a peer that is no use."""
    details = dict(failure.details)
    cls = _BY_REASON.get(failure.reason)
    if cls is None:
        return errors.PeerUnavailable(f"{failure.reason}: {failure.message}", **details)
    retry_after_s = None
    if issubclass(cls, errors.Overloaded | errors.NoWorker):
        retry_after_s = _float_or_none(details.pop("retry_after_s", ""))
    return _rebuild(cls, failure.message, details, retry_after_s)


def bug_status(bug_id: str) -> grpc.Status:
    """What a caller learns of our bug: a name under which the log tells the rest."""
    status = status_pb2.Status(
        code=grpc.StatusCode.INTERNAL.value[0], message=f"internal error {bug_id}"
    )
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason="BUG", metadata={"bug_id": bug_id})
    status.details.add().Pack(info)
    return _as_status(status)


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls with the status of what their method raised. The outermost interceptor."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)

        @asynccontextmanager
        async def around(context: handlers.Context) -> AsyncIterator[None]:
            try:
                yield
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except ServingError as error:
                await context.abort_with_status(to_grpc(error))
            except Exception:
                bug_id = secrets.token_hex(8)
                log.exception("rpc.bug", method=method, bug_id=bug_id)
                await context.abort_with_status(bug_status(bug_id))

        return handlers.wrap(handler, around)


def _rebuild(
    cls: type[ServingError], message: str, details: dict[str, str], retry_after_s: float | None
) -> ServingError:
    """An error of `cls` without its constructor, whose arguments the message already holds."""
    error = cls.__new__(cls)
    ServingError.__init__(error, message)
    error.details = details
    if isinstance(error, errors.InvalidRequest):
        error.field = details.get("field", "")
        error.problem = message.removeprefix(f"{error.field}: ")
    if isinstance(error, errors.ModelInvalid):
        error.file, error.problem = details.get("file", ""), details.get("problem", "")
    if isinstance(error, errors.Overloaded | errors.NoWorker) and retry_after_s is not None:
        error.retry_after_s = retry_after_s
    return error


def _from_code(error: grpc.aio.AioRpcError) -> ServingError:
    code = error.code()
    text = _bounded(error.details() or "no details")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return errors.InvalidRequest("request", text)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlinePassed("waiting for a peer")
    if code is grpc.StatusCode.DATA_LOSS:
        return errors.KvCorrupt(text)
    cls = _BY_CODE.get(code, errors.PeerUnavailable)
    return cls(f"{code.name}: {text}", code=code.name)


def _rich_status(error: grpc.aio.AioRpcError) -> Any:
    """The `google.rpc.Status` of a failed call; None if it has none that fits it."""
    try:
        return rpc_status.from_call(error)
    except ValueError:
        return None


def _as_status(status: Any) -> grpc.Status:
    made: grpc.Status = rpc_status.to_status(status)
    return made


def _bounded(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 3] + "..."


def _bounded_details(error: ServingError) -> dict[str, str]:
    return {name: _bounded(text) for name, text in list(error.details.items())[:MAX_DETAILS]}


def _float_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
