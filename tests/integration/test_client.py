"""The typed client against a coordinator's gRPC face, in clear and over mutual TLS."""

import asyncio
import os
import sys
from contextlib import aclosing, asynccontextmanager

import pytest

from coordinator.request import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from coordinator.service import GenerateServicer
from kvrelay.client import Client, GenerateOptions, Message, Tokens
from kvrelay.config import SettingsError, TlsFiles
from kvrelay.errors import InvalidRequest, PeerUnavailable, PermissionDenied
from kvrelay.events import Delta, Finished, Started
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.v1 import generate_pb2_grpc
from tests.support.pki import Authority
from tests.support.scripted_relay import MODEL, ScriptedRelay

DEFAULTS = GenerateOptions()


class Relay(ScriptedRelay):
    """Also tokenizes, by a vocabulary of its own."""

    def __init__(self):
        super().__init__(["Hel", "lo"])
        self.tokenized = []

    async def tokenize(self, prompt):
        self.tokenized.append(prompt)
        return [1, 2, 3]

    async def detokenize(self, token_ids):
        return "x" * len(token_ids)


@asynccontextmanager
async def serving(relay, *, tls=None):
    """The address at which `relay` answers."""
    service = Service(
        generate_pb2_grpc.add_GenerateServiceServicer_to_server,
        GenerateServicer(relay),
        "kvrelay.v1.GenerateService",
    )
    server = RpcServer(listen="127.0.0.1:0", tls=tls, insecure=False, services=[service])
    address = await server.start()
    server.set_serving(True)
    try:
        yield address
    finally:
        await server.stop()


async def ask(client, prompt, options=DEFAULTS):
    async with aclosing(client.generate(prompt, options, timeout_s=20)) as events:
        return [event async for event in events]


PROMPTS = {
    "text": ("once", TextPrompt("once")),
    "chat": ([Message("user", "hi")], ChatPrompt((ChatMessage("user", "hi"),))),
    "tokens": (Tokens([5, 6, 7]), TokenPrompt((5, 6, 7))),
}


@pytest.mark.parametrize("kind", PROMPTS)
async def test_every_kind_of_prompt_arrives_as_it_was_meant(kind):
    """
    The stream is a start, deltas and an end.
    """
    prompt, expected = PROMPTS[kind]
    relay = Relay()
    async with serving(relay) as address, Client(address) as client:
        started, *deltas, finished = await ask(client, prompt)

    assert relay.specs[0].prompt == expected
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert "".join(d.text for d in deltas if isinstance(d, Delta)) == "Hello"


async def test_options_arrive_and_what_is_not_given_is_not_sent():
    """
    The coordinator's defaults stay its own.
    """
    relay = Relay()
    options = GenerateOptions(
        max_tokens=3, temperature=0.0, stop=("x",), stop_token_ids=(4, 5), ignore_eos=True
    )
    async with serving(relay) as address, Client(address) as client:
        await ask(client, "once", options)
        await ask(client, "once")
    full, empty = relay.specs

    assert (full.max_tokens, full.temperature, full.stop) == (3, 0.0, ("x",))
    assert (full.stop_token_ids, full.ignore_eos) == ((4, 5), True)
    assert (empty.max_tokens, empty.temperature, empty.seed) == (None, None, None)


async def test_what_the_coordinator_refuses_is_raised_as_its_own_error():
    """
    With the field.
    """
    async with serving(Relay()) as address, Client(address) as client:
        with pytest.raises(InvalidRequest, match=r"token_ids\[1\]") as refused:
            await ask(client, Tokens([1, MODEL.vocab_size]))

    assert refused.value.field == "token_ids[1]"


async def test_the_model_and_its_tokenizer_can_be_asked():
    """
    As plain values.
    """
    relay = Relay()
    async with serving(relay) as address, Client(address) as client:
        model = await client.model(timeout_s=20)

        assert await client.tokenize("once", timeout_s=20) == (1, 2, 3)
        assert await client.tokenize([Message("user", "hi")], timeout_s=20) == (1, 2, 3)
        assert await client.detokenize([1, 2], timeout_s=20) == "xx"
    assert (model.name, model.context_tokens) == (MODEL.name, MODEL.context_tokens)
    assert (model.eos_token_ids, model.vocab_size) == (MODEL.eos_token_ids, MODEL.vocab_size)
    assert relay.tokenized == [TextPrompt("once"), PROMPTS["chat"][1]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("pki"))


async def test_a_client_certificate_opens_what_callers_may_use(authority):
    """
    Neither no certificate nor another role's does.
    """
    async with serving(Relay(), tls=authority.issue("coordinator")) as address:
        async with Client(address, tls=authority.issue("client")) as client:
            assert await client.is_serving(timeout_s=20)
            assert len(await ask(client, "once")) == 4
        async with Client(address, tls=authority.issue("prefill")) as client:
            with pytest.raises(PermissionDenied, match="prefill may not call"):
                await ask(client, "once")
        async with Client(address) as client:
            with pytest.raises(PeerUnavailable):
                await ask(client, "once")


async def test_a_tls_file_that_cannot_be_read_is_named(authority, tmp_path):
    """
    Before anything is dialled.
    """
    good = authority.issue("client")
    with pytest.raises(SettingsError, match=r"none\.pem"):
        Client("127.0.0.1:1", tls=TlsFiles(cert=tmp_path / "none.pem", key=good.key, ca=good.ca))


@pytest.mark.parametrize("way", ["options", "environment"])
async def test_the_command_speaks_tls_with_the_files_it_is_given(authority, way):
    """
    By options or by environment; without them it says that nobody answers.
    """
    tls = authority.issue("client")
    files = {"tls-cert-file": tls.cert, "tls-key-file": tls.key, "tls-ca-file": tls.ca}
    options = [f"--{name}={path}" for name, path in files.items()]
    env = {f"KVRELAY_{name}".upper().replace("-", "_"): str(p) for name, p in files.items()}
    async with serving(Relay(), tls=authority.issue("coordinator")) as address:
        asked = ("generate", "hi", "--target", address)
        if way == "options":
            answer = await kvrelay(*options, *asked)
        else:
            answer = await kvrelay(*asked, **env)
        refused = await kvrelay(*asked)

    assert answer == (0, "Hello\n")
    assert refused == (1, "")


async def kvrelay(*arguments, **env):
    """Exit status and output of a command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvrelay.cli.app", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | env,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()
