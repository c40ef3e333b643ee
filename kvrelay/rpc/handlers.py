"""Puts the same thing around every method of a server, whichever of the four kinds it is."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

import grpc

Context = grpc.aio.ServicerContext[Any, Any]
Around = Callable[[Context], AbstractAsyncContextManager[None]]
Handler = Any  # grpc.RpcMethodHandler, whose stub lacks the attributes that make it one

_MAKE: dict[tuple[bool, bool], Callable[..., Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def wrap(handler: Handler, around: Around) -> Handler:
    """`handler` with each call inside of `around(context)`."""
    inner = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    behaviour = (_streamed if handler.response_streaming else _single)(inner, around)
    make = _MAKE[handler.request_streaming, handler.response_streaming]
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


def _single(
    inner: Callable[[Any, Context], Awaitable[Any]], around: Around
) -> Callable[[Any, Context], Awaitable[Any]]:
    async def behaviour(request: Any, context: Context) -> Any:
        async with around(context):
            return await inner(request, context)

    return behaviour


def _streamed(
    inner: Callable[[Any, Context], Any], around: Around
) -> Callable[[Any, Context], Awaitable[None]]:
    """Writes what `inner` yields.

    A generator handed to grpc itself is closed only when it is collected; here a cancelled
    call has closed it, and run its `finally`, when the call's task ends.
    """

    async def behaviour(request: Any, context: Context) -> None:
        async with around(context):
            answers = inner(request, context)
            if not inspect.isasyncgen(answers):
                await answers  # a coroutine that writes to the context by itself
                return
            async with aclosing(answers):
                async for message in answers:
                    await _write(context, message)

    return behaviour


async def _write(context: Context, message: Any) -> None:
    """Write, or end as cancelled where the caller is gone and grpc has not cancelled us yet."""
    try:
        await context.write(message)
    except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
        raise asyncio.CancelledError from error
