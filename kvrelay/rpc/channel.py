"""Channels to peers: no hidden retries, no proxy, and a dead peer is noticed in seconds."""

import grpc

from kvrelay.config import TlsFiles
from kvrelay.rpc import auth

MAX_MESSAGE_BYTES = 8 << 20
KEEPALIVE_S = 5.0
KEEPALIVE_TIMEOUT_S = 2.0

SHARED_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    # Without it the core waits its own minute for the answer to a ping (seen with 1.85).
    ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
"""Of both ends of every connection."""

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *SHARED_OPTIONS,
    ("grpc.enable_retries", 0),  # what may be tried again is the coordinator's to say
    ("grpc.enable_http_proxy", 0),
    # A peer that comes back is met within a second or two, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # Channels that share connections would also share the back-off of a failed one.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str, *, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """A channel to `HOST:PORT`, connected on first use. The caller closes it."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, auth.channel_credentials(tls), options=_CHANNEL_OPTIONS)
