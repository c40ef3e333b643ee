"""The official `openai` client against the HTTP front, as a caller would use it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest

from kvrelay import errors
from tests.support.scripted_relay import REQUEST_ID, ScriptedRelay, serving

MESSAGES = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def connected(relay: ScriptedRelay) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(relay) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_models_are_listed_and_retrieved():
    """The one model is there, by list and by name."""
    async with connected(ScriptedRelay()) as client:
        listed = [model.id async for model in client.models.list()]
        found = await client.models.retrieve("tiny")

    assert listed == ["tiny"]
    assert found.owned_by == "kvrelay"


async def test_a_chat_completion_is_whole():
    """Message, reason and usage parse into the client's types."""
    async with connected(ScriptedRelay(["Hel", "lo"])) as client:
        completion = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_completion_tokens=8, temperature=0, seed=1
        )

    assert completion.choices[0].message.content == "Hello"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.total_tokens == 7
    assert completion.usage.prompt_tokens_details.cached_tokens == 4
    assert completion.system_fingerprint == "fp_0123456789ab"
    assert completion._request_id == REQUEST_ID


async def test_a_chat_completion_is_streamed():
    """Chunks arrive in order and the last carries usage."""
    async with connected(ScriptedRelay(["Hel", "lö", "\n\n😀"])) as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]

    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == "Hellö\n\n😀"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 3


async def test_a_reply_can_be_sent_back_as_a_turn():
    """The client's own message object is accepted in the next request."""
    relay = ScriptedRelay(["yes"])
    async with connected(relay) as client:
        first = await client.chat.completions.create(model="tiny", messages=MESSAGES)
        turns = [*MESSAGES, first.choices[0].message, *MESSAGES]
        await client.chat.completions.create(model="tiny", messages=turns)

    assert [m.role for m in relay.specs[1].prompt.messages] == ["user", "assistant", "user"]


async def test_the_stream_helper_understands_the_stream():
    """`chat.completions.stream`, which rebuilds the whole from the chunks, works too."""
    async with (
        connected(ScriptedRelay(["Hel", "lo"])) as client,
        client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream,
    ):
        final = await stream.get_final_completion()

    assert final.choices[0].message.content == "Hello"


async def test_completions_are_whole_and_streamed():
    """Text and token id prompts, extra fields by `extra_body`."""
    relay = ScriptedRelay(["a", "b"])
    async with connected(relay) as client:
        whole = await client.completions.create(
            model="tiny", prompt=[1, 2], extra_body={"ignore_eos": True, "top_k": 3}
        )
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        texts = [chunk.choices[0].text async for chunk in stream]

    assert whole.choices[0].text == "".join(texts) == "ab"
    assert (relay.specs[0].ignore_eos, relay.specs[0].top_k) == (True, 3)


async def test_refusals_are_the_clients_own_errors():
    """Each status becomes the exception that its callers catch, with param and code."""
    async with connected(ScriptedRelay()) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="tiny", messages=MESSAGES, n=2)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
    full = errors.QueueFull(what="requests", queued=8, limit=8)
    async with connected(ScriptedRelay(refusal=full)) as client:
        with pytest.raises(openai.RateLimitError) as limited:
            await client.chat.completions.create(model="tiny", messages=MESSAGES)
    async with connected(ScriptedRelay(refusal=errors.NoWorker("none"))) as client:
        with pytest.raises(openai.InternalServerError) as unavailable:
            await client.completions.create(model="tiny", prompt="x", stream=True)

    assert (refused.value.param, refused.value.code) == ("n", "INVALID_REQUEST")
    assert limited.value.code == "QUEUE_FULL"
    assert unavailable.value.status_code == 503


async def test_a_stream_that_breaks_raises_in_the_client():
    """The caller keeps what came and learns that it is not all."""
    relay = ScriptedRelay(["Hel", errors.KvCorrupt("digest differs")])
    texts = []

    async def read(client):
        stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content or "")

    async with connected(relay) as client:
        with pytest.raises(openai.APIError, match="digest differs"):
            await read(client)

    assert "".join(texts) == "Hel"
