"""Logs are events with fields, on stderr, one JSON object per line where nobody watches.

Nothing of a prompt or an output may appear in them. Two nets catch what slips: fields of
telling names are blanked, and the message of an exception is shown only where its type makes
it from code rather than from data.
"""

import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import Any

import structlog

from kvrelay.errors import ServingError

PRIVATE_FIELDS = frozenset(
    {"prompt", "text", "output", "content", "messages", "token_ids", "prompt_ids", "output_ids"}
    | {"first_token_id", "stop", "authorization", "api_key", "token"}
)
"""Names of fields that would hold what callers say or own."""

_MESSAGE_IS_SAFE = (
    ServingError,
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
)

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def configure(*, level: str, fmt: str, **context: object) -> None:
    """Set up logging of the process, ours and that of libraries. Called once, by `__main__`.

    Args:
        level: least severity, e.g. `info`.
        fmt: `json`, `console`, or `auto` for whichever suits stderr.
        context: fields of every event, in every thread, e.g. `service`, `worker_id`.
    """
    as_json = fmt == "json" or (fmt == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _with_context(context),
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        blank_private_fields,
        safe_exception,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer(default=str)
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def blank_private_fields(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> Mapping[str, Any]:
    """Replace the values of `PRIVATE_FIELDS`."""
    for name in PRIVATE_FIELDS & event.keys():
        event[name] = "[private]"
    return event


def safe_exception(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> Mapping[str, Any]:
    """Render `exc_info` as frames and types; messages only where they cannot hold data."""
    exc_info = event.pop("exc_info", None)
    if exc_info:
        event["exception"] = format_exception(_as_exc_info(exc_info))
    return event


def format_exception(exc_info: _ExcInfo) -> str:
    """Causes first, as Python prints them, without the messages that could hold data."""
    _, error, tb = exc_info
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = format_exception((type(cause), cause, cause.__traceback__)) + "\n" if cause else ""
    message = f": {error}" if isinstance(error, _MESSAGE_IS_SAFE) else ""
    frames = "".join(traceback.format_list(traceback.extract_tb(tb)))
    return f"{before}{frames}{type(error).__module__}.{type(error).__qualname__}{message}"


def _as_exc_info(value: Any) -> _ExcInfo:
    if isinstance(value, BaseException):
        return type(value), value, value.__traceback__
    if isinstance(value, tuple):
        return value
    current = sys.exc_info()
    assert current[0] is not None, "exc_info without an exception"
    return current[0], current[1], current[2]


def _with_context(context: Mapping[str, object]) -> structlog.typing.Processor:
    def add(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        for name, value in context.items():
            event.setdefault(name, value)
        return event

    return add
