"""Who may call what. Every method a server has is a row here, or the server does not start.

With TLS a caller is what its certificate says: a role is the subject's common name, or a
subject alternative name that is the role or a URI that ends in `/<role>`. Without TLS there
are no identities, and who can reach the address may call.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from enum import Enum
from types import MappingProxyType
from typing import Any

import grpc

from kvrelay.config import SettingsError, TlsFiles
from kvrelay.errors import PermissionDenied, Unauthenticated
from kvrelay.rpc import handlers


class Peer(Enum):
    """What a certificate can make its holder."""

    COORDINATOR = "coordinator"
    PREFILL = "prefill"
    DECODE = "decode"
    CLIENT = "client"


Policy = Mapping[str, frozenset[Peer]]

ANYONE = frozenset(Peer)
"""Any certificate that the CA vouches for, even one without a role."""

_CALLERS = frozenset({Peer.CLIENT, Peer.COORDINATOR})
_WORKERS = frozenset({Peer.PREFILL, Peer.DECODE})

POLICY: Policy = MappingProxyType(
    {
        "/kvrelay.v1.GenerateService/Generate": _CALLERS,
        "/kvrelay.v1.GenerateService/Tokenize": _CALLERS,
        "/kvrelay.v1.GenerateService/Detokenize": _CALLERS,
        "/kvrelay.v1.GenerateService/GetModel": _CALLERS,
        "/kvrelay.v1.GenerateService/Explain": _CALLERS,
        "/kvrelay.v1.PoolService/Join": _WORKERS,
        "/kvrelay.v1.PoolService/GetPool": ANYONE,
        "/kvrelay.v1.PrefillService/Prefill": frozenset({Peer.COORDINATOR}),
        "/kvrelay.v1.DecodeService/Decode": frozenset({Peer.COORDINATOR}),
        "/kvrelay.v1.HandoffService/Pull": frozenset({Peer.DECODE}),
        "/kvrelay.v1.HandoffService/Read": frozenset({Peer.DECODE}),
        "/kvrelay.v1.HandoffService/Freeze": frozenset({Peer.DECODE}),
        "/kvrelay.v1.HandoffService/Release": frozenset({Peer.DECODE}),
        "/kvrelay.v1.HandoffService/OpenLink": frozenset({Peer.DECODE}),
        "/kvrelay.v1.HandoffService/Send": frozenset({Peer.DECODE}),
        "/grpc.health.v1.Health/Check": ANYONE,
        "/grpc.health.v1.Health/List": ANYONE,
        "/grpc.health.v1.Health/Watch": ANYONE,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ANYONE,
    }
)


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls that the policy does not allow. Installed where TLS is on."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)

        @asynccontextmanager
        async def around(context: handlers.Context) -> AsyncIterator[None]:
            authorize(method, context.auth_context(), self._policy)
            yield

        return handlers.wrap(handler, around)


def authorize(method: str, identity: Mapping[str, Any], policy: Policy) -> None:
    """Refuse a caller whose certificate does not allow `method`.

    Raises:
        Unauthenticated: no certificate, or one that names no role where one is needed.
        PermissionDenied: the role may not call it.
    """
    if identity.get("transport_security_type") != [b"ssl"]:
        raise Unauthenticated("a client certificate is needed")
    allowed = policy[method]
    if allowed == ANYONE:
        return
    peers = peers_of(identity)
    if not peers:
        raise Unauthenticated("the certificate names no role: coordinator, prefill, decode, client")
    if not peers & allowed:
        who = ", ".join(sorted(p.value for p in peers))
        raise PermissionDenied(f"{who} may not call {method}", role=who, method=method)


def require_claimed(identity: Mapping[str, Any], peer: Peer) -> None:
    """Refuse a caller that says it is `peer` and whose certificate says otherwise.

    Raises:
        PermissionDenied: with TLS, the certificate is not of that role.
    """
    if identity.get("transport_security_type") == [b"ssl"] and peer not in peers_of(identity):
        raise PermissionDenied(f"the certificate is not of a {peer.value}", role=peer.value)


def peers_of(identity: Mapping[str, Any]) -> frozenset[Peer]:
    """The roles that a TLS identity, as gRPC reports it, holds."""
    fields = ("x509_common_name", "x509_subject_alternative_name")
    names = {raw.decode(errors="replace") for field in fields for raw in identity.get(field, ())}
    names |= {name.rpartition("/")[2] for name in names if "://" in name}
    return frozenset(peer for peer in Peer if peer.value in names)


def server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a server that demands a certificate of every caller."""
    cert, key, ca = _read(tls)
    return grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=ca, require_client_auth=True
    )


def channel_credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Credentials of a caller that shows its certificate."""
    cert, key, ca = _read(tls)
    return grpc.ssl_channel_credentials(
        root_certificates=ca, private_key=key, certificate_chain=cert
    )


def _read(tls: TlsFiles) -> tuple[bytes, bytes, bytes]:
    contents = []
    for name in ("cert", "key", "ca"):
        path = getattr(tls, name)
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise SettingsError(f"tls_{name}_file = {path}: {error.strerror}") from error
    cert, key, ca = contents
    return cert, key, ca
