"""Logs are events with fields, on stderr, one JSON object per line where nobody watches.

Nothing of a prompt or an output may appear in them. Two nets catch what slips: fields of
telling names are blanked, and the message of an exception is shown only where its type makes
it from code rather than from data.
"""

import logging
import sys
import textwrap
import traceback
from collections.abc import Mapping, MutableMapping
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
    BaseExceptionGroup,
    ImportError,
    IndexError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
)


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
    error = _as_error(exc_info) if exc_info else None
    if error:
        event["exception"] = format_exception(error)
    return event


def format_exception(error: BaseException) -> str:
    """Causes first, as Python prints them, without the messages that could hold data."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    message = f": {error}" if isinstance(error, _MESSAGE_IS_SAFE) else ""
    frames = "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)))
    parts = [f"{frames}{type(error).__module__}.{type(error).__qualname__}{message}"]
    if cause:
        parts.insert(0, format_exception(cause))
    if isinstance(error, BaseExceptionGroup):
        parts += [textwrap.indent(format_exception(part), "  | ") for part in error.exceptions]
    return "\n".join(parts)


def _as_error(value: Any) -> BaseException | None:
    """The exception that `exc_info` means: itself, a triple's, or the one being handled."""
    if isinstance(value, BaseException):
        return value
    error = value[1] if isinstance(value, tuple) else sys.exc_info()[1]
    assert error is None or isinstance(error, BaseException)
    return error


def _with_context(context: Mapping[str, object]) -> structlog.typing.Processor:
    def add(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        for name, value in context.items():
            event.setdefault(name, value)
        return event

    return add
