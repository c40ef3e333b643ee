"""What a worker tells others of its memory, for them to read from it by NIXL.

NIXL's own description is opaque, and what it does with a damaged one is its own business. So one
travels under a digest, and beside it what NIXL does not say: where the memory begins and ends.
"""

import base64
import functools
import hashlib
import struct
from dataclasses import dataclass

from kvrelay.errors import Incompatible, KvCorrupt

MAX_ADDRESS_CHARS = 4096

_HEADER = struct.Struct("<8sQQH")
"""Digest of the rest, first byte of the memory, its length, length of the name that follows; then
NIXL's own metadata."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A holder's memory, as its offer tells."""

    name: str
    begin: int
    num_bytes: int
    metadata: bytes


def agent_name(worker_id: str, epoch: str) -> str:
    return f"{worker_id}/{epoch}"


def describe(name: str, begin: int, num_bytes: int, metadata: bytes) -> str:
    """The address of an offer.

    Raises:
        Incompatible: it would be longer than an offer's address may be.
    """
    raw_name = name.encode()
    said = _HEADER.pack(bytes(8), begin, num_bytes, len(raw_name)) + raw_name + metadata
    address = base64.b64encode(_digest(said) + said[8:]).decode()
    if len(address) > MAX_ADDRESS_CHARS:
        raise Incompatible(
            f"nixl needs {len(address)} characters to describe this worker, an offer has "
            f"{MAX_ADDRESS_CHARS}: name fewer devices in UCX_NET_DEVICES",
            num_chars=len(address),
        )
    return address


@functools.lru_cache(maxsize=64)  # offers come with every pull, and few differ
def described(address: str) -> Described:
    """What `describe` wrote. Nothing goes to NIXL that is not whole.

    Raises:
        KvCorrupt: anything else.
    """
    try:
        raw = base64.b64decode(address, validate=True)
        digest, begin, num_bytes, name_num_bytes = _HEADER.unpack_from(raw)
        if digest != _digest(raw):
            raise ValueError("digest")
        rest = raw[_HEADER.size :]
        name = rest[:name_num_bytes].decode()
    except (ValueError, struct.error) as error:
        raise KvCorrupt(f"no description of memory: {type(error).__name__}") from error
    return Described(name=name, begin=begin, num_bytes=num_bytes, metadata=rest[name_num_bytes:])


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw[8:], digest_size=8, person=b"kvrelay-nixl1").digest()
