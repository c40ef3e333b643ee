"""A port that is known before its server: reserved for one process, kept from all others."""

import socket
from struct import pack

import grpc.aio
import pytest

from kvrelay.supervise.ports import PortTaken, ReservedPort

IP_LOCAL_PORT_RANGE = 51


@pytest.fixture
def reserved():
    port = ReservedPort("127.0.0.1:0", flag="--grpc-port")
    yield port
    port.close()


async def listen(address: str) -> None:
    """Be a gRPC server there for a moment, as services are: the port is shared with nobody."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_insecure_port(address)
    await server.start()
    await server.stop(None)


async def test_a_server_listens_on_a_reserved_port_again_and_again(reserved):
    """The reservation is in nobody's way who knows of it."""
    await listen(reserved.address)
    await listen(reserved.address)


def test_nobody_else_is_given_a_reserved_port(reserved):
    """Whoever wants any port is rather refused, were it the last one of the machine."""
    number = int(reserved.address.rpartition(":")[2])
    with socket.socket() as other:
        try:
            other.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, pack("HH", number, number))
        except OSError:
            pytest.skip("kernels before 6.3 cannot be asked")
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", 0))


def test_a_port_that_is_taken_is_refused_by_name(reserved):
    """The message says which flag chooses another."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"

        with pytest.raises(PortTaken, match=f"{address} is taken.*--http-port"):
            ReservedPort(address, flag="--http-port")
