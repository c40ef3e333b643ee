"""A server as every service runs it, met over real connections."""

import asyncio
import re
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from kvrelay.config import SettingsError, TlsFiles
from kvrelay.errors import PeerUnavailable, PermissionDenied, Unauthenticated
from kvrelay.rpc import auth
from kvrelay.rpc.channel import open_channel
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.rpc.status import from_grpc
from kvrelay.v1 import generate_pb2, generate_pb2_grpc, pool_pb2, pool_pb2_grpc
from tests.support.pki import Authority

HEALTH_STATES = health_pb2.HealthCheckResponse


class Echo(generate_pb2_grpc.GenerateServiceServicer):
    """Answers, fails by a bug, or streams until told to end."""

    def __init__(self):
        self.may_end = asyncio.Event()
        self.cleanups = 0

    async def Detokenize(self, request, context):
        return generate_pb2.DetokenizeResponse(text="x" * len(request.token_ids))

    async def Tokenize(self, request, context):
        raise ValueError(f"cannot encode {request.text!r}")

    async def Generate(self, request, context):
        try:
            yield generate_pb2.GenerateResponse()
            await self.may_end.wait()
            yield generate_pb2.GenerateResponse()
        finally:
            await asyncio.sleep(0)  # a cleanup that needs the loop
            self.cleanups += 1


class Pool(pool_pb2_grpc.PoolServiceServicer):
    """An empty pool."""

    async def GetPool(self, request, context):
        return pool_pb2.GetPoolResponse()


def services(echo=None):
    return [
        Service(
            generate_pb2_grpc.add_GenerateServiceServicer_to_server,
            echo or Echo(),
            "kvrelay.v1.GenerateService",
        ),
        Service(pool_pb2_grpc.add_PoolServiceServicer_to_server, Pool(), "kvrelay.v1.PoolService"),
    ]


def make_server(echo=None, *, listen="127.0.0.1:0", tls=None, insecure=False):
    return RpcServer(listen=listen, tls=tls, insecure=insecure, services=services(echo))


@asynccontextmanager
async def running(echo=None, *, tls=None):
    server = make_server(echo, tls=tls)
    try:
        yield server, await server.start()
    finally:
        await server.stop()


async def detokenize(channel, num_tokens=2):
    request = generate_pb2.DetokenizeRequest(token_ids=[0] * num_tokens)
    try:
        return (await generate_pb2_grpc.GenerateServiceStub(channel).Detokenize(request)).text
    except grpc.aio.AioRpcError as error:
        raise from_grpc(error) from error


async def test_health_follows_what_the_service_says_for_each_name_and_for_the_process():
    """Not serving until told so; an unknown name is not found."""
    async with running() as (server, address), open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        names = ("", "kvrelay.v1.GenerateService", "kvrelay.v1.PoolService")

        async def states():
            requests = [health_pb2.HealthCheckRequest(service=name) for name in names]
            return {(await stub.Check(request)).status for request in requests}

        assert await states() == {HEALTH_STATES.NOT_SERVING}
        server.set_serving(True)
        assert await states() == {HEALTH_STATES.SERVING}
        server.set_serving(False)
        assert await states() == {HEALTH_STATES.NOT_SERVING}

        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Check(health_pb2.HealthCheckRequest(service="nope"))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_all_watchers_of_health_hear_of_changes_and_are_let_go_at_the_drain():
    """One that leaves takes no other with it."""
    async with running() as (server, address), open_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        leaves, stays = (
            watch(health_pb2.HealthCheckRequest()),
            watch(health_pb2.HealthCheckRequest()),
        )
        assert (await leaves.read()).status == HEALTH_STATES.NOT_SERVING
        assert (await stays.read()).status == HEALTH_STATES.NOT_SERVING
        leaves.cancel()

        server.set_serving(True)
        assert (await stays.read()).status == HEALTH_STATES.SERVING
        await asyncio.wait_for(server.drain(60), 10)
        assert (await stays.read()).status == HEALTH_STATES.NOT_SERVING
        assert await stays.read() is grpc.aio.EOF


async def test_reflection_lists_the_services():
    """As grpcurl asks for them."""
    async with running() as (_, address), open_channel(address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
        names = {service.name for service in answer.list_services_response.service}

    assert names == {
        "kvrelay.v1.GenerateService",
        "kvrelay.v1.PoolService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
def test_an_address_that_others_reach_is_refused_without_tls_or_insecure(listen):
    """The sentence names the way out."""
    with pytest.raises(SettingsError, match=r"other machines.*--insecure"):
        make_server(listen=listen)

    make_server(listen=listen, insecure=True)


async def test_insecure_binds_all_addresses():
    """With the real port in the answer."""
    server = make_server(listen="0.0.0.0:0", insecure=True)
    address = await server.start()
    try:
        assert re.fullmatch(r"0\.0\.0\.0:[1-9]\d*", address)
        async with open_channel(f"127.0.0.1:{address.split(':')[1]}") as channel:
            assert await detokenize(channel) == "xx"
    finally:
        await server.stop()


async def test_a_taken_port_is_refused_by_its_setting():
    """It is never shared in silence."""
    async with running() as (_, address):
        other = make_server(listen=address)

        with pytest.raises(SettingsError, match=rf"listen = {re.escape(address)}.*taken"):
            await other.start()
        await other.stop()


@pytest.mark.parametrize("method", ["GenerateService/Explain", "PoolService/Join"])
def test_a_method_without_a_policy_row_stops_the_start(method):
    """Nobody may call what nobody has thought about."""
    path = f"/kvrelay.v1.{method}"
    policy = {name: peers for name, peers in auth.POLICY.items() if name != path}

    with pytest.raises(SettingsError, match=f"{path} has no row"):
        RpcServer(
            listen="127.0.0.1:0", tls=None, insecure=False, services=services(), policy=policy
        )


async def test_a_bug_is_internal_with_an_opaque_id_and_nothing_else():
    """The log has the stack under that id; neither has what the caller said."""
    with capture_logs() as events:
        async with running() as (_, address), open_channel(address) as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Tokenize(generate_pb2.TokenizeRequest(text="secret words"))
    status = raised.value
    (event,) = (event for event in events if event["event"] == "rpc.bug")

    assert status.code() is grpc.StatusCode.INTERNAL
    assert re.fullmatch(r"internal error [0-9a-f]{16}", status.details())
    assert event["bug_id"] in status.details()
    assert event["method"] == "/kvrelay.v1.GenerateService/Tokenize"
    assert event["exc_info"]
    assert "secret" not in repr((status.trailing_metadata(), status.debug_error_string(), event))
    assert type(from_grpc(status)) is PeerUnavailable


async def test_messages_beyond_the_default_limit_pass_and_huge_ones_do_not():
    """8 MiB, on both ends."""
    async with running() as (_, address), open_channel(address) as channel:
        assert len(await detokenize(channel, 5 << 20)) == 5 << 20

        with pytest.raises(PeerUnavailable, match="RESOURCE_EXHAUSTED"):
            await detokenize(channel, 9 << 20)


async def test_a_drain_lets_calls_end_and_takes_no_new_one():
    """The stream under way is whole."""
    echo = Echo()
    async with running(echo) as (server, address), open_channel(address) as channel:
        call = generate_pb2_grpc.GenerateServiceStub(channel).Generate(
            generate_pb2.GenerateRequest()
        )
        await call.read()
        drain = asyncio.create_task(server.drain(60))
        await asyncio.sleep(0)
        async with open_channel(address) as late:
            with pytest.raises(PeerUnavailable):
                await detokenize(late)
        assert not drain.done()

        echo.may_end.set()
        assert await call.read() is not grpc.aio.EOF
        assert await call.read() is grpc.aio.EOF
        await asyncio.wait_for(drain, 10)
    assert echo.cleanups == 1


async def test_a_stop_returns_when_cancelled_methods_have_cleaned_up():
    """No task of a call outlives its server."""
    echo = Echo()
    async with running(echo) as (server, address), open_channel(address) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        calls = [stub.Generate(generate_pb2.GenerateRequest()) for _ in range(5)]
        for call in calls:
            await call.read()
        await server.stop()

        assert echo.cleanups == 5
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await calls[0].read()
        assert type(from_grpc(raised.value)) is PeerUnavailable


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def coordinator_tls(authority):
    return authority.issue("coordinator")


async def test_a_role_may_call_what_the_policy_allows_it_and_nothing_else(
    authority, coordinator_tls
):
    """Both ends show certificates; the caller's name is its role."""
    async with running(tls=coordinator_tls) as (server, address):
        server.set_serving(True)
        async with open_channel(address, tls=authority.issue("client")) as channel:
            assert await detokenize(channel) == "xx"
        async with open_channel(address, tls=authority.issue("decode")) as channel:
            await pool_pb2_grpc.PoolServiceStub(channel).GetPool(pool_pb2.GetPoolRequest())
            with pytest.raises(PermissionDenied, match="decode may not call"):
                await detokenize(channel)
        async with open_channel(address, tls=authority.issue("stranger")) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            health = await stub.Check(health_pb2.HealthCheckRequest())
            assert health.status == HEALTH_STATES.SERVING
            with pytest.raises(Unauthenticated, match="names no role"):
                await detokenize(channel)


async def test_callers_without_a_certificate_of_our_authority_do_not_get_in(
    coordinator_tls, tmp_path
):
    """Neither in clear, nor without one, nor with one that others signed."""
    stranger = Authority(tmp_path).issue("client")
    forged = TlsFiles(cert=stranger.cert, key=stranger.key, ca=coordinator_tls.ca)
    bare = grpc.ssl_channel_credentials(root_certificates=coordinator_tls.ca.read_bytes())
    async with running(tls=coordinator_tls) as (_, address):
        for channel in (
            open_channel(address),
            grpc.aio.secure_channel(address, bare),
            open_channel(address, tls=forged),
        ):
            async with channel:
                with pytest.raises(PeerUnavailable):
                    await detokenize(channel)


async def test_a_tls_file_that_cannot_be_read_is_named(coordinator_tls, tmp_path):
    """With its setting."""
    tls = TlsFiles(cert=coordinator_tls.cert, key=tmp_path / "none.key", ca=coordinator_tls.ca)

    with pytest.raises(SettingsError, match=r"tls_key_file = .*none\.key: No such file"):
        await make_server(tls=tls).start()
    with pytest.raises(SettingsError, match="tls_key_file"):
        open_channel("127.0.0.1:1", tls=tls)


def test_roles_are_read_from_common_name_and_alternative_names():
    """Exactly, or as the end of a URI, as SPIFFE has it."""

    def peers(cn=b"x", *sans):
        return auth.peers_of({"x509_common_name": [cn], "x509_subject_alternative_name": [*sans]})

    assert peers(b"prefill") == {auth.Peer.PREFILL}
    assert peers(b"x", b"spiffe://example.org/ns/default/decode") == {auth.Peer.DECODE}
    assert peers(b"prefill-0", b"prefill.example.org", b"10.0.0.1", b"\xff") == frozenset()
    assert auth.peers_of({}) == frozenset()
