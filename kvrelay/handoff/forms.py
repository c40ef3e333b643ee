"""Where KV is put into another form: on the side of the cache that it travels from and to."""

from collections.abc import Sequence
from typing import Any, Protocol

from kvrelay.kv import wire
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.digest import DigestKind
from kvrelay.types import BlockId


class Pack(Protocol):
    """See `kvrelay.kv.wire.pack`."""

    def __call__(
        self,
        cache: Any,
        blocks: Sequence[BlockId],
        layout: KvLayout,
        target_offsets: Sequence[int],
        /,
    ) -> None: ...


class Unpack(Protocol):
    """See `kvrelay.kv.wire.unpack`."""

    def __call__(
        self,
        cache: Any,
        layout: KvLayout,
        sources: Sequence[int],
        /,
        *,
        first_wire_index: int,
        block_table: Sequence[BlockId],
        first_token: int,
        end_token: int,
    ) -> None: ...


def packing_for(kind: DigestKind) -> Pack:
    """What packs where the puller will read; bytes that a device digests are on a device."""
    if kind is DigestKind.XXH3:
        return wire.pack
    from kvrelay.kernels import wire as on_device  # where there is a device

    return on_device.pack


def unpacking_for(kind: DigestKind) -> Unpack:
    """What unpacks where a pull has landed."""
    if kind is DigestKind.XXH3:
        return wire.unpack
    from kvrelay.kernels import wire as on_device

    return on_device.unpack
