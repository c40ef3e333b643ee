"""The fronts of a real deployment: what callers may rely on, and what they are told when wrong."""

import json
import time

import grpc
import httpx
import openai
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from kvrelay.rpc.channel import open_channel
from kvrelay.v1 import common_pb2, generate_pb2
from tests.support.asking import Ask, Asker
from tests.support.deployment import deployment, is_idle
from tests.support.prompts import prompts

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.realmodel,
    pytest.mark.asyncio(loop_scope="module"),
]

SECRET = "xylophone quartz"
"""Appears in prompts of this module, and so must appear in no log."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployed(real_model, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("logs")
    flags = ("--disaggregate", "always")
    services = ("COORDINATOR", "PREFILL", "DECODE")
    env = {f"KVRELAY_{service}_LOG_LEVEL": "debug" for service in services}
    async with deployment(real_model, log_dir=log_dir, flags=flags, env=env) as it:
        await it.pool()  # connected before any single test begins
        yield it


@pytest_asyncio.fixture(loop_scope="module")
async def asker(deployed):
    async with Asker(deployed.grpc) as asker:
        yield asker


async def test_the_openai_client_streams_a_chat_completion(deployed):
    """
    The official client, as it comes: deltas, a finish reason, and usage when asked for.
    """
    async with openai.AsyncOpenAI(base_url=f"http://{deployed.http}/v1", api_key="none") as client:
        models = await client.models.list()
        stream = await client.chat.completions.create(
            model=models.data[0].id,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]

    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "Paris" in text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.prompt_tokens == 37


async def test_reflection_lists_the_services(deployed):
    """
    What grpcurl would show.
    """
    async with open_channel(deployed.grpc) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        answers = [answer async for answer in call]

    names = {s.name for a in answers for s in a.list_services_response.service}
    assert names >= {
        "kvrelay.v1.GenerateService",
        "kvrelay.v1.PoolService",
        "grpc.health.v1.Health",
    }


def request(**fields):
    given = {"text": SECRET, "max_tokens": 4} | fields
    return generate_pb2.GenerateRequest(**given)


def sampling(**fields):
    return request(sampling=common_pb2.SamplingParams(**fields))


def tokens(*token_ids):
    return generate_pb2.GenerateRequest(tokens=generate_pb2.TokenPrompt(token_ids=token_ids))


def chat(*turns):
    messages = [generate_pb2.ChatMessage(role=role, content=text) for role, text in turns]
    return generate_pb2.GenerateRequest(chat=generate_pb2.ChatPrompt(messages=messages))


BAD = {
    "no prompt": (generate_pb2.GenerateRequest(), "prompt"),
    "empty text": (request(text=""), "text"),
    "huge text": (request(text="a" * ((1 << 20) + 1)), "text"),
    "no messages": (chat(), "messages"),
    "unknown role": (chat(("wizard", SECRET)), "messages[0].role"),
    "no tokens": (tokens(), "token_ids"),
    "token past the vocabulary": (tokens(1, 49152), "token_ids[1]"),
    "prompt beyond the context": (tokens(*[5] * 8193), "token_ids"),
    "prompt that fills the context": (tokens(*[5] * 8192), "prompt"),
    "max_tokens 0": (request(max_tokens=0), "max_tokens"),
    "max_tokens huge": (request(max_tokens=(1 << 32) - 1), "max_tokens"),
    "prompt and max_tokens beyond the context": (request(max_tokens=8192), "max_tokens"),
    "temperature NaN": (sampling(temperature=float("nan")), "temperature"),
    "temperature negative": (sampling(temperature=-1), "temperature"),
    "top_p 0": (sampling(top_p=0), "top_p"),
    "min_p 1": (sampling(min_p=1), "min_p"),
    "top_k past the vocabulary": (sampling(top_k=1 << 31), "top_k"),
    "empty stop": (request(stop=[""]), "stop"),
    "too many stops": (request(stop=["x"] * 17), "stop"),
    "another model": (request(model="another"), "model"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_is_refused_by_field(case, asker):
    """
    INVALID_ARGUMENT with a `BadRequest` naming the field, and no work is done.
    """
    message, field = BAD[case]

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await collect(asker.stub.Generate(message, timeout=30))

    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violated_field(refused.value) == field
    assert SECRET not in refused.value.details()


async def collect(call):
    return [response async for response in call]


def violated_field(error) -> str:
    status = rpc_status.from_call(_Trailers(error))
    detail = error_details_pb2.BadRequest()
    assert any(d.Unpack(detail) for d in status.details if d.Is(detail.DESCRIPTOR))
    return detail.field_violations[0].field


class _Trailers:
    """An aio error, seen as the finished call that `rpc_status` expects."""

    def __init__(self, error) -> None:
        self._error = error

    def trailing_metadata(self):
        return [(key, value) for key, value in self._error.trailing_metadata()]

    def code(self):
        return self._error.code()

    def details(self):
        return self._error.details()


BAD_BODIES = {
    "unknown field": ({"modle": "x"}, "modle"),
    "wrong type": ({"max_tokens": "many"}, "max_tokens"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "temperature": ({"temperature": 3}, "temperature"),
    "two answers": ({"n": 2}, "n"),
    "empty prompt": ({"prompt": ""}, "prompt"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
async def test_a_bad_body_is_refused_by_field(case, deployed):
    """
    400 in OpenAI's error shape, `param` being the field.
    """
    change, field = BAD_BODIES[case]
    body = {"model": "smollm2-135m-instruct", "prompt": SECRET, "max_tokens": 4} | change
    async with httpx.AsyncClient(base_url=f"http://{deployed.http}") as http:
        answer = await http.post("/v1/completions", json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert SECRET not in answer.text


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": "\xff\xfe"}', b'{"temperature": NaN}'])
async def test_a_body_that_is_not_json_in_utf8_is_refused(body, deployed):
    """
    400, whatever the bytes.
    """
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=f"http://{deployed.http}") as http:
        answer = await http.post("/v1/completions", content=body, headers=headers)

    assert answer.status_code == 400


async def test_a_cancelled_request_stops_and_frees_both_sides(deployed, asker, real_model):
    """
    Cancelled in the prompt and in mid-stream: blocks come back long before it would have ended.
    """
    long = Ask(prompts(real_model)[-1], max_tokens=512)
    for num_responses in (1, 6):
        call = asker.stub.Generate(long.message, timeout=120)
        stream = aiter(call)
        for _ in range(num_responses):
            await anext(stream)

        call.cancel()
        cancelled_at_s = time.monotonic()
        await stream.aclose()
        await deployed.until(is_idle, within_s=10)

        # Loads are reported every half second, so this is as soon as can be seen.
        assert time.monotonic() - cancelled_at_s < 2.5


async def test_an_expired_request_stops_and_frees_both_sides(deployed, asker, real_model):
    """
    DEADLINE_EXCEEDED, and no work afterwards.
    """
    long = Ask(prompts(real_model)[-1], max_tokens=512)

    with pytest.raises(grpc.aio.AioRpcError) as expired:
        await asker.one(long, timeout_s=0.4)
    expired_at_s = time.monotonic()
    await deployed.until(is_idle, within_s=10)

    assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - expired_at_s < 2.5


async def test_a_seed_gives_the_same_sampled_tokens_again(asker, real_model):
    """
    And another seed others.
    """
    prompt = prompts(real_model)[20]
    same = [await asker.one(Ask(prompt, 24, temperature=1.0, seed=5)) for _ in range(2)]
    other = await asker.one(Ask(prompt, 24, temperature=1.0, seed=6))

    assert same[0].token_ids == same[1].token_ids != other.token_ids


async def test_the_metrics_speak_of_what_happened(deployed):
    """
    Requests, handoffs and workers are there to scrape.
    """
    async with httpx.AsyncClient(base_url=f"http://{deployed.http}") as http:
        text = (await http.get("/metrics")).text

    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(samples['kvrelay_request_success_total{finished_reason="length"}']) >= 3
    assert float(samples["kvrelay_handoff_tax_seconds_count"]) >= 3
    assert float(samples['kvrelay_pool_workers{role="prefill"}']) == 1


async def test_nothing_of_a_prompt_is_in_the_logs(deployed, asker):
    """
    Neither text nor token ids, at any level; a marked prompt is looked for.
    """
    marked = asker.stub.Generate(request(max_tokens=8), timeout=60)
    answer = [response async for response in marked]
    token_ids = [t for a in answer for t in a.delta.token_ids]

    logs = deployed.logs()

    assert answer[0].started.request_id in logs
    assert SECRET not in logs
    assert json.dumps(token_ids)[1:-1] not in logs
