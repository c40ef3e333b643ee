"""The HTTP front over real sockets: routes, refusals, streams that end, break or are left."""

import asyncio
import itertools
import json
import signal
import ssl
from collections.abc import AsyncIterator

import httpx
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from coordinator.http import HttpFront
from coordinator.openai_reply import STATUSES
from coordinator.request import ChatMessage, ChatPrompt, GenerateSpec, TextPrompt, TokenPrompt
from kvrelay import errors
from kvrelay.config import SettingsError, TlsFiles
from tests.support.pki import Authority
from tests.support.scripted_relay import (
    REQUEST_ID,
    ScriptedReadiness,
    ScriptedRelay,
    serving,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
TURN = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=20) as client:
        yield client


async def post(relay, path, body, **kwargs):
    """The response to one request, and nothing left running."""
    async with serving(relay) as served, httpx.AsyncClient(base_url=served.url) as client:
        response = await client.post(path, json=body, **kwargs)
    assert relay.num_running == 0
    return response


def events(text):
    """The payloads of an SSE body, parsed where they are JSON."""
    lines = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_chat_is_answered_whole():
    """Text, finish reason, usage and ids come back in OpenAI's shape."""
    response = await post(ScriptedRelay(["Hel", "lo"]), CHAT, TURN | {"model": "tiny"})

    assert response.status_code == 200
    assert response.headers["x-request-id"] == REQUEST_ID
    body = response.json()
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "id": f"chatcmpl-{REQUEST_ID}",
        "object": "chat.completion",
        "model": "tiny",
        "system_fingerprint": "fp_0123456789ab",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    }


async def test_a_chat_is_streamed():
    """The role comes first, then text, then the reason, usage and the end mark."""
    body = TURN | {"stream": True, "stream_options": {"include_usage": True}}
    response = await post(ScriptedRelay(["Hel", "", "lo\n\nyou "]), CHAT, body)

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == REQUEST_ID
    *chunks, usage, end = events(response.text)
    assert end == "[DONE]"
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo\n\nyou "},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert all(c["usage"] is None for c in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 8


async def test_a_completion_is_answered_whole_and_streamed():
    """Both forms carry the same text, and usage is streamed only when asked for."""
    whole = await post(ScriptedRelay(["a", "b"]), COMPLETIONS, {"prompt": "x"})
    streamed = await post(ScriptedRelay(["a", "b"]), COMPLETIONS, {"prompt": "x", "stream": True})

    assert whole.json()["object"] == "text_completion"
    assert whole.json()["choices"] == [
        {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}
    ]
    *chunks, end = events(streamed.text)
    assert end == "[DONE]"
    assert "".join(c["choices"][0]["text"] for c in chunks) == "ab"
    assert not any("usage" in c for c in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_ledger_is_given_when_asked_for(stream):
    """`?ledger=1` adds it to the last chunk or the body; otherwise it is nowhere."""
    body = {"prompt": "x", "stream": stream}
    asked = await post(ScriptedRelay(["a"]), f"{COMPLETIONS}?ledger=1", body)
    not_asked = await post(ScriptedRelay(["a"]), COMPLETIONS, body)

    last = events(asked.text)[-2] if stream else asked.json()
    assert last["kvrelay"]["ledger"]["request_id"] == REQUEST_ID
    assert last["kvrelay"]["ledger"]["e2e_s"] == 1.0
    assert "kvrelay" not in not_asked.text


async def test_every_field_reaches_the_spec():
    """What is accepted is obeyed."""
    relay = ScriptedRelay()
    body = {
        "model": "tiny",
        "prompt": [3, 4],
        "max_tokens": 9,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "seed": 2**64 - 1,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "ignore_eos": True,
    }
    await post(relay, COMPLETIONS, body)

    assert relay.specs == [
        GenerateSpec(
            prompt=TokenPrompt((3, 4)),
            model="tiny",
            max_tokens=9,
            temperature=1.0,
            top_p=0.5,
            top_k=7,
            min_p=0.25,
            seed=2**64 - 1,
            stop=("a", "b"),
            stop_token_ids=(5,),
            ignore_eos=True,
        )
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x", TextPrompt("x")),
        (["x"], TextPrompt("x")),
        ([1, 2], TokenPrompt((1, 2))),
        ([[1, 2]], TokenPrompt((1, 2))),
    ],
)
async def test_a_prompt_has_many_forms(prompt, expected):
    """Text or ids, bare or as a list of one."""
    relay = ScriptedRelay()
    await post(relay, COMPLETIONS, {"prompt": prompt})

    assert relay.specs[0].prompt == expected


async def test_messages_have_text_or_parts_of_text():
    """Parts are joined, `developer` is the system, and what replies carry may be sent back."""
    relay = ScriptedRelay()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None},
        {"role": "user", "content": parts},
    ]
    await post(relay, CHAT, {"messages": messages, "stop": "x", "max_completion_tokens": 3})

    spec = relay.specs[0]
    assert spec.prompt == ChatPrompt(
        (
            ChatMessage("system", "be brief"),
            ChatMessage("assistant", "ok"),
            ChatMessage("user", "ab"),
        )
    )
    assert (spec.stop, spec.max_tokens) == (("x",), 3)


NEUTRAL = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "logprobs": False,
    "echo": False,
    "best_of": 1,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "repetition_penalty": 1.0,
}
IGNORED = {"user": "u", "service_tier": "auto", "store": True, "metadata": {"a": "b"}}


async def test_fields_that_change_nothing_are_accepted():
    """Neutral values, null and the openly ignored fields give the spec of a bare request."""
    relay = ScriptedRelay()
    async with serving(relay) as served, httpx.AsyncClient(base_url=served.url) as client:
        for extra in ({}, NEUTRAL, IGNORED, dict.fromkeys(NEUTRAL), {"temperature": None}):
            response = await client.post(CHAT, json=TURN | extra)
            assert response.status_code == 200, response.text

    assert relay.specs == [relay.specs[0]] * 5


REFUSED = [
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"presence_penalty": 0.1}, "presence_penalty"),
    ({"frequency_penalty": "0"}, "frequency_penalty"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"logit_bias": {"1": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{}]}, "tools"),
    ({"max_tokns": 3}, "max_tokns"),
    ({"prompt": "x"}, "prompt"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"min_p": 1}, "min_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ({"stop": 3}, "stop"),
    ({"stop": ["a", 3]}, "stop[1]"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": [100]}, "stop_token_ids[0]"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage"),
    ({"model": "other"}, "model"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"\ud800": 1}, "body"),
    ({"a\n": 1}, "'a\\n'"),
    ({"x" * 200: 1}, "x" * 64 + "..."),
    ({f"a{i}": 1 for i in range(100)}, "body"),
]


async def test_what_is_not_served_is_refused_by_name():
    """Each wrong, unknown or unsupported field is a 400 whose `param` is the field."""
    relay = ScriptedRelay()
    async with serving(relay) as served, httpx.AsyncClient(base_url=served.url) as client:
        for extra, param in REFUSED:
            response = await client.post(
                CHAT,
                content=json.dumps(TURN | extra),
                headers={"content-type": "application/json"},
            )
            assert response.status_code == 400, (extra, response.text)
            error = response.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["code"] == "INVALID_REQUEST"
            assert error["param"] == (param or "messages[0].content[0].type")
            assert error["message"].startswith(f"{error['param']}: ")

    assert relay.specs == []


BAD_PROMPTS = [
    ("", "prompt"),
    ([], "prompt"),
    (None, "prompt"),
    (3, "prompt"),
    (["a", "b"], "prompt"),
    ([[1], [2]], "prompt"),
    ([1, True], "prompt[1]"),
    ([1, 2.0], "prompt[1]"),
    ([1, 100], "prompt[1]"),
    ([1, -1], "prompt[1]"),
    ([1] * 65, "prompt"),
    ("x" * ((1 << 20) + 1), "prompt"),
]


async def test_a_bad_prompt_is_refused_as_prompt(client):
    """Whatever form it has, the caller's name of it is `prompt`."""
    async with serving(ScriptedRelay()) as served:
        for prompt, param in BAD_PROMPTS:
            response = await client.post(served.url + COMPLETIONS, json={"prompt": prompt})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == param


BAD_BODIES = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    (b"[]", "must be a JSON object"),
    (b'{"prompt": "x", "temperature": NaN}', "NaN is not JSON"),
    (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is not JSON"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "too many digits"),
    (b'{"prompt": ' + b"[" * 200_000, "nested too deeply"),
]


async def test_a_body_that_is_no_json_object_is_refused(client):
    """Each is a 400 about the body, and nothing is generated."""
    relay = ScriptedRelay()
    headers = {"content-type": "application/json"}
    async with serving(relay) as served:
        for content, problem in BAD_BODIES:
            url = served.url + COMPLETIONS
            response = await client.post(url, content=content, headers=headers)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "body"
            assert problem in response.json()["error"]["message"]

    assert relay.specs == []


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"prompt": "x", "seed": 1, "seed": 2}', "seed"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}", "temperature"),
    ],
)
async def test_json_that_readers_disagree_on_is_refused(client, content, param):
    """Names given twice and numbers beyond floats are refused by the field's name."""
    async with serving(ScriptedRelay()) as served:
        response = await client.post(
            served.url + COMPLETIONS,
            content=content,
            headers={"content-type": "application/json; charset=utf-8"},
        )

    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("is_announced", [False, True])
async def test_a_body_over_the_limit_is_refused(client, is_announced):
    """413 whether its length was announced or met while reading, and the server goes on."""
    body = b'{"prompt": "' + b"x" * 5000 + b'"}'

    async def pieces():
        for i in range(0, len(body), 500):
            yield body[i : i + 500]

    headers = {"content-type": "application/json"}
    async with serving(ScriptedRelay(), max_body_num_bytes=4000) as served:
        content = body if is_announced else pieces()
        response = await client.post(served.url + COMPLETIONS, content=content, headers=headers)
        after = await client.post(served.url + COMPLETIONS, json={"prompt": "x"})

    assert response.status_code == 413
    assert response.json()["error"]["message"] == "body: at most 4000 bytes"
    assert after.status_code == 200


async def test_a_body_that_does_not_come_is_refused():
    """A caller that announces a body and falls silent gets 408."""
    async with serving(ScriptedRelay(), body_s=0.05) as served:
        host, port = served.address.split(":")
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 10\r\n\r\n{"
        )
        status_line = await reader.readline()
        writer.close()
        await writer.wait_closed()

    assert status_line.split()[1] == b"408"


async def test_another_media_type_is_refused(client):
    """A form, which any web page may post, is no request."""
    async with serving(ScriptedRelay()) as served:
        response = await client.post(served.url + COMPLETIONS, data={"prompt": "x"})

    assert response.status_code == 415
    assert response.json()["error"]["param"] == "content-type"


def leaves(cls):
    below = [leaf for sub in cls.__subclasses__() for leaf in leaves(sub)]
    return below or [cls]


def test_every_error_has_a_status():
    """The table covers the leaves of the error tree, no more and no less."""
    known = {cls for cls in leaves(errors.ServingError) if cls.__module__ == "kvrelay.errors"}

    assert set(STATUSES) == known


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (errors.QueueFull(what="requests", queued=8, limit=8), 429, "rate_limit_error", "1"),
        (errors.KvPoolExhausted(wanted_blocks=9, free_blocks=2), 429, "rate_limit_error", "1"),
        (errors.NoWorker("none"), 503, "server_error", "1"),
        (errors.Draining("draining"), 503, "server_error", "1"),
        (errors.PeerUnavailable("gone"), 503, "server_error", "1"),
        (errors.DeadlinePassed("queued"), 504, "server_error", None),
        (errors.KvCorrupt("digest differs"), 502, "server_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_has_the_status_of_its_error(error, status, kind, retry_after, stream):
    """A failure before the first event is an HTTP status, streamed or not."""
    response = await post(ScriptedRelay(refusal=error), CHAT, TURN | {"stream": stream})

    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.json() == {
        "error": {"message": str(error), "type": kind, "param": None, "code": error.reason}
    }


async def test_a_failure_in_mid_stream_ends_it_with_an_error_event():
    """The text so far stays, the error is the last event, and there is no end mark."""
    relay = ScriptedRelay(["Hel", errors.NoWorker("every attempt lost its worker")])
    response = await post(relay, CHAT, TURN | {"stream": True})

    assert response.status_code == 200
    last = events(response.text)[-1]
    assert last["error"]["code"] == "NO_WORKER"
    assert "[DONE]" not in response.text
    assert "Hel" in response.text


async def test_a_failure_before_a_whole_answer_is_a_status():
    """Nothing was sent yet, so the caller gets the status and the id of the request."""
    relay = ScriptedRelay(["Hel", errors.NoWorker("every attempt lost its worker")])
    response = await post(relay, CHAT, TURN)

    assert response.status_code == 503
    assert response.headers["x-request-id"] == REQUEST_ID


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_reveals_nothing_but_an_id(stream):
    """The caller gets an opaque id, under which the log has the stack."""
    relay = ScriptedRelay(["a", AssertionError("secret state")])
    with capture_logs() as logs:
        response = await post(relay, COMPLETIONS, {"prompt": "private words", "stream": stream})

    (bug,) = [line for line in logs if line["event"] == "http.bug"]
    body = events(response.text)[-1] if stream else response.json()
    assert response.status_code == (200 if stream else 500)
    assert body["error"]["message"] == f"internal error {bug['error_id']}"
    assert "secret" not in response.text
    assert "private words" not in str(logs)


async def test_a_caller_who_leaves_in_mid_stream_cancels_the_request(client):
    """Closing the connection ends the generator at once."""
    relay = ScriptedRelay(["a", asyncio.Event()])
    async with serving(relay) as served:
        body = {"prompt": "x", "stream": True}
        async with client.stream("POST", served.url + COMPLETIONS, json=body) as response:
            await anext(response.aiter_lines())
            assert relay.num_running == 1
        async with asyncio.timeout(5):
            await relay.has_ended.wait()

        assert relay.num_running == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_who_leaves_before_the_first_token_cancels_the_request(client, stream):
    """Even while nothing is there to be sent, leaving is noticed."""
    relay = ScriptedRelay([asyncio.Event()])
    async with serving(relay) as served:
        body = {"prompt": "x", "stream": stream}
        asking = asyncio.create_task(client.post(served.url + COMPLETIONS, json=body))
        await relay.has_started.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(5):
            await relay.has_ended.wait()

        assert relay.num_running == 0


async def ask_without_reading(served):
    """Send a request for a stream over a connection whose answer is left unread."""
    _, writer = await asyncio.open_connection(*served.address.split(":"), limit=1024)
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    return writer


async def test_a_caller_who_stops_reading_is_cut_off():
    """An answer left unread is not generated for ever, and its connection is closed."""
    relay = ScriptedRelay(itertools.repeat("x" * 65536))
    with capture_logs() as logs:
        async with serving(relay, stall_s=0.2) as served:
            writer = await ask_without_reading(served)
            async with asyncio.timeout(20):
                await relay.has_ended.wait()
            writer.transport.abort()

    assert relay.num_running == 0
    assert "http.stalled" in [line["event"] for line in logs]


async def test_stopping_lets_streams_end(client):
    """Within the grace an answer is completed, while new requests are refused."""
    gate = asyncio.Event()
    relay = ScriptedRelay(["a", gate, "b"])
    async with serving(relay) as served:
        body = {"prompt": "x", "stream": True}
        async with client.stream("POST", served.url + COMPLETIONS, json=body) as response:
            lines = response.aiter_lines()
            first = await anext(lines)
            stopping = asyncio.create_task(served.front.stop(grace_s=10))
            await asyncio.sleep(0)  # lets it begin
            refused = await client.get(served.url + "/health")
            gate.set()
            rest = [first] + [line async for line in lines]
            await stopping

        with pytest.raises(httpx.ConnectError):
            await client.get(served.url + "/health")

    assert refused.status_code == 503
    assert refused.json()["reason"] == "stopping"
    assert rest[-2:] == ["data: [DONE]", ""]


async def test_stopping_cuts_streams_off_after_the_grace(client):
    """What does not end in time is cancelled, and its caller told why."""
    relay = ScriptedRelay(["a", asyncio.Event()])
    async with serving(relay) as served:
        body = {"prompt": "x", "stream": True}
        async with client.stream("POST", served.url + COMPLETIONS, json=body) as response:
            stopping = asyncio.create_task(served.front.stop(grace_s=0.05))
            text = (await response.aread()).decode()
            await stopping

    assert relay.num_running == 0
    assert events(text)[-1]["error"]["code"] == "DRAINING"


async def test_stopping_waits_for_no_unread_answer():
    """A caller who reads nothing delays the end by the grace and no more."""
    relay = ScriptedRelay(itertools.repeat("x" * 65536))
    async with serving(relay) as served:
        writer = await ask_without_reading(served)
        await relay.has_started.wait()
        async with asyncio.timeout(10):
            await served.front.stop(grace_s=0.05)
        writer.transport.abort()

    assert relay.num_running == 0


async def test_health_says_why_it_is_not_ready(client):
    """200 when a canary crossed the pool, else 503 with the reason."""
    async with serving(ScriptedRelay()) as served:
        ready = await client.get(served.url + "/health")
        served.readiness.not_ready_reason = "no decode worker joined"
        not_ready = await client.get(served.url + "/health")

    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert not_ready.status_code == 503
    assert not_ready.headers["retry-after"] == "1"
    assert not_ready.json() == {"status": "not ready", "reason": "no decode worker joined"}


async def test_metrics_are_prometheus_text(client):
    """The registry is exposed, with the front's own count of requests."""
    async with serving(ScriptedRelay()) as served:
        await client.get(served.url + "/v1/models")
        await client.get(served.url + "/nowhere")
        response = await client.get(served.url + "/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'kvrelay_http_requests_total{path="/v1/models",status="200"} 1.0' in response.text
    assert 'kvrelay_http_requests_total{path="other",status="404"} 1.0' in response.text


async def test_models_lists_the_one_model(client):
    """It is listed, found by its name, and no other is."""
    async with serving(ScriptedRelay()) as served:
        listed = await client.get(served.url + "/v1/models")
        found = await client.get(served.url + "/v1/models/tiny")
        missing = await client.get(served.url + "/v1/models/org/other")

    assert listed.json()["data"] == [found.json()]
    assert found.json()["id"] == "tiny"
    assert found.json()["max_model_len"] == 64
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "NOT_FOUND"


async def test_unknown_paths_and_methods_are_refused_in_shape(client):
    """404 and 405 have OpenAI's error body too."""
    async with serving(ScriptedRelay()) as served:
        nowhere = await client.get(served.url + "/v1/embeddings")
        wrong_method = await client.get(served.url + COMPLETIONS)

    assert nowhere.status_code == 404
    assert nowhere.json()["error"]["code"] == "NOT_FOUND"
    assert wrong_method.status_code == 405
    assert wrong_method.headers["allow"] == "POST"
    assert wrong_method.json()["error"]["type"] == "invalid_request_error"


async def test_a_taken_port_is_named():
    """Starting where something listens already names the setting and the address."""
    async with serving(ScriptedRelay()) as served:
        other = HttpFront(
            ScriptedRelay(), served.address, CollectorRegistry(), readiness=ScriptedReadiness()
        )
        with pytest.raises(SettingsError, match=f"http_listen = {served.address}"):
            await other.start()


def test_an_open_address_needs_tls_or_consent():
    """Only loopback is bound without TLS, unless `insecure` says so."""

    def front(**options):
        return HttpFront(
            ScriptedRelay(),
            "0.0.0.0:0",
            CollectorRegistry(),
            readiness=ScriptedReadiness(),
            **options,
        )

    with pytest.raises(SettingsError, match="insecure"):
        front()
    front(insecure=True)


async def test_with_tls_callers_show_a_certificate(tmp_path):
    """A caller vouched for by the same authority is served, one without is not."""
    authority = Authority(tmp_path)
    own, callers = authority.issue("coordinator"), authority.issue("client")
    known = ssl.create_default_context(cafile=own.ca)
    known.load_cert_chain(callers.cert, callers.key)
    unknown = ssl.create_default_context(cafile=own.ca)
    async with serving(ScriptedRelay(), tls=own) as served:
        url = f"https://{served.address}/v1/models"
        async with httpx.AsyncClient(verify=known) as client:
            response = await client.get(url)
        async with httpx.AsyncClient(verify=unknown) as client:
            with pytest.raises(httpx.TransportError):
                await client.get(url)

    assert response.status_code == 200


async def test_unusable_tls_files_stop_the_start(tmp_path):
    """The error of the file comes out of `start`, and `stop` has nothing to do."""
    missing = TlsFiles(cert=tmp_path / "a", key=tmp_path / "b", ca=tmp_path / "c")
    front = HttpFront(
        ScriptedRelay(),
        "127.0.0.1:0",
        CollectorRegistry(),
        readiness=ScriptedReadiness(),
        tls=missing,
    )
    with pytest.raises(FileNotFoundError):
        await front.start()
    await front.stop()


async def test_signals_are_left_to_the_process():
    """Serving installs no handler of its own."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    async with serving(ScriptedRelay()):
        during = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    assert during == before


async def test_prompts_are_never_logged(client, caplog):
    """Neither a good nor a refused request leaves its words in the log."""
    caplog.set_level("DEBUG")
    with capture_logs() as logs:
        async with serving(ScriptedRelay()) as served:
            for body in ({"prompt": "private"}, {"prompt": "private", "n": 2}):
                await client.post(served.url + COMPLETIONS, json=body)
            await client.post(served.url + COMPLETIONS, content=b'{"prompt": "private')

    assert "private" not in str(logs)
    # The client's and the loop's own debug lines are there too; ours must not join them.
    assert "private" not in caplog.text
